// Theme, sorting, filters, tabs: everything a page needs without charts. Other scripts listen for the events
// "bitmill:theme" and "bitmill:filter" on the document.
"use strict";
(() => {
  const root = document.documentElement;
  const remember = {
    get: () => { try { return localStorage.getItem("bitmill-theme"); } catch { return null; } },
    set: (value) => { try { localStorage.setItem("bitmill-theme", value); } catch { /* a file may have no storage */ } },
  };
  if (["light", "dark"].includes(remember.get())) root.dataset.theme = remember.get();
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ?? (prefersDark.matches ? "dark" : "light")) === "dark";
  const announce = (name) => document.dispatchEvent(new Event(`bitmill:${name}`));

  function theme() {
    const button = document.getElementById("theme");
    const show = () => button.setAttribute("aria-pressed", String(isDark()));
    button.hidden = false;
    button.addEventListener("click", () => {
      root.dataset.theme = isDark() ? "light" : "dark";
      remember.set(root.dataset.theme);
      show();
      announce("theme");
    });
    prefersDark.addEventListener("change", () => { show(); announce("theme"); });
    show();
  }

  // Numbers by value, words by the alphabet; rows without a value stay at the end.
  function compare(a, b, direction) {
    if (a === "" || b === "") return (a === "") - (b === "");
    const x = Number(a), y = Number(b);
    const order = Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b, "en", { numeric: true }) : x - y;
    return direction * order;
  }

  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const first = head.dataset.first ?? "ascending";
        const next = head.ariaSort === "none" || head.ariaSort === null
          ? first : head.ariaSort === "ascending" ? "descending" : "ascending";
        heads.forEach((other) => other.setAttribute("aria-sort", "none"));
        head.setAttribute("aria-sort", next);
        const value = (row) => row.cells[column]?.dataset.value ?? "";
        const rows = [...body.rows].sort((a, b) => compare(value(a), value(b), next === "ascending" ? 1 : -1));
        body.append(...rows);
      });
    });
  }

  function filters(form) {
    form.hidden = false;
    const apply = () => {
      const off = (name) => new Set([...form.querySelectorAll(`[name="${name}"]:not(:checked)`)].map((i) => i.value));
      const methods = off("method"), bits = off("bits");
      document.querySelectorAll("[data-method]").forEach((element) => {
        element.hidden = methods.has(element.dataset.method) || bits.has(element.dataset.bits);
      });
      announce("filter");
    };
    const all = form.querySelector(".all"), methods = [...form.querySelectorAll('[name="method"]')];
    const rename = () => { all.textContent = methods.some((box) => box.checked) ? "none" : "all"; };
    all.addEventListener("click", () => {
      const on = all.textContent === "all";
      methods.forEach((box) => { box.checked = on; });
      rename();
      apply();
    });
    form.addEventListener("change", () => { rename(); apply(); });
    form.addEventListener("submit", (event) => event.preventDefault());
    form.reset();  // browsers keep the state of forms when a page is loaded again
  }

  function tabs() {
    const choices = [...document.querySelectorAll('[name="prompt"]')];
    if (!choices.length) return;
    const show = () => {
      const chosen = choices.find((choice) => choice.checked)?.value;
      document.querySelectorAll("[data-prompt]").forEach((pane) => { pane.hidden = pane.dataset.prompt !== chosen; });
    };
    document.querySelectorAll("[data-prompt] h3").forEach((heading) => heading.classList.add("unseen"));
    choices.forEach((choice) => choice.addEventListener("change", show));
    show();
  }

  // The figure of the cell that is pointed at; a tap keeps it.
  function figures(map) {
    const output = map.closest("figure").querySelector("output"), idle = output.textContent;
    map.addEventListener("pointerover", (event) => { output.textContent = event.target.title || idle; });
    map.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") output.textContent = idle; });
  }

  document.addEventListener("DOMContentLoaded", () => {
    theme();
    document.querySelectorAll("form.controls").forEach((form) => {
      form.hidden = false;
      form.reset();
      form.addEventListener("submit", (event) => event.preventDefault());
    });
    document.querySelectorAll("table.sortable").forEach(sortable);
    document.querySelectorAll("form.filters").forEach(filters);
    document.querySelectorAll(".heat").forEach(figures);
    tabs();
  });
})();
