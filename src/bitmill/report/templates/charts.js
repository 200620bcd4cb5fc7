// The two charts of a comparison, drawn by plotly from the JSON in #data.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const FAR = 10;  // a perplexity this many times the float model's is off the scale
  const MEASURES = {
    perplexity: { title: "perplexity", better: "lower", text: (v) => short(v) },
    kl_divergence: { title: "KL divergence from float, nats a token", better: "lower", text: (v) => short(v) },
    top1_agreement: { title: "top-1 agreement with float", better: "higher", text: (v) => `${short(100 * v)} %` },
  };
  const AXES = {
    bits_per_weight: { title: "bits per weight, all metadata included", scale: 1 },
    size_bytes: { title: "size on disk, MB", scale: 1e-6 },
  };
  const CONFIG = { displaylogo: false, responsive: false, scrollZoom: false, doubleClick: "reset",
    displayModeBar: matchMedia("(hover: hover)").matches ? "hover" : false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"] };

  // plotly reads some HTML in its texts
  const escape = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  const short = (value) => {
    if (Math.abs(value) < 1e4) return String(Number(value.toPrecision(4)));
    if (Math.abs(value) < 1e5) return Math.round(value).toLocaleString("en").replaceAll(",", "\u202f");
    const [mantissa, exponent] = value.toExponential(1).split("e");
    return `${mantissa}×10${[...String(Number(exponent))].map((d) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[d]).join("")}`;
  };
  const chosen = (name) => document.querySelector(`[name="${name}"]:checked`)?.value;
  const narrow = (element) => element.clientWidth < 560;
  const style = (name, element = document.body) => {
    const probe = document.createElement("i");
    probe.style.color = `var(${name})`;
    element.append(probe);
    const colour = getComputedStyle(probe).color;
    probe.remove();
    return colour;
  };
  const markColour = (index) => {
    const probe = document.createElement("i");
    probe.className = `m${index}`;
    document.body.append(probe);
    const colour = style("--mark", probe);
    probe.remove();
    return colour;
  };
  const off = (name) => new Set([...document.querySelectorAll(`.filters [name="${name}"]:not(:checked)`)].map((i) => i.value));
  const visible = () => {
    const methods = off("method"), bits = off("bits");
    return data.variants.filter((v) => !methods.has(data.methods[v.method].name) && !bits.has(String(v.bits)));
  };

  function base(element) {
    const ink = style("--ink"), muted = style("--muted"), line = style("--line");
    const axis = { gridcolor: line, linecolor: line, zeroline: false, ticks: "", automargin: false,
      tickfont: { color: muted, size: 12 }, title: { font: { color: muted, size: 12.5 }, standoff: 6 } };
    return { ink, muted, axis, layout: {
      width: element.clientWidth, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
      dragmode: narrow(element) ? false : "zoom", hovermode: "closest",
      font: { family: getComputedStyle(document.body).fontFamily, color: ink, size: 13 },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: muted, activecolor: ink },
      hoverlabel: { bgcolor: style("--panel"), bordercolor: muted, font: { color: ink, size: 13 }, align: "left" },
    } };
  }

  // Round numbers between two, on a linear or a logarithmic axis.
  function ticks(low, high, log, most) {
    const found = [];
    if (log) {
      for (const steps of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]]) {
        found.length = 0;
        for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
          for (const step of steps) { const v = step * 10 ** e; if (v >= low && v <= high) found.push(v); }
        if (found.length >= Math.min(4, most)) break;
      }
    } else {
      const raw = (high - low) / most, power = 10 ** Math.floor(Math.log10(raw));
      const step = power * [1, 2, 2.5, 5, 10].find((s) => s * power >= raw);
      for (let k = Math.ceil(low / step); k * step <= high; k++) found.push(Number((k * step).toPrecision(12)));
    }
    return found.map((v) => Number(v.toPrecision(6)));
  }

  function front(points, lowerIsBetter) {
    const kept = [];
    for (const point of [...points].sort((a, b) => a.x - b.x || (lowerIsBetter ? a.y - b.y : b.y - a.y))) {
      const best = kept.at(-1);
      if (!best || (lowerIsBetter ? point.y < best.y : point.y > best.y)) kept.push(point);
    }
    return kept;
  }

  // Place each label next to its point, on no other point or label, and across as few lines as possible.
  const canvas = document.createElement("canvas").getContext("2d");
  function place(texts, points, lines, bounds, font) {
    canvas.font = font;
    const taken = points.map((p) => [p.px - 7, p.py - 7, p.px + 7, p.py + 7]);
    const inside = ([x, y], box) => x > box[0] && x < box[2] && y > box[1] && y < box[3];
    const along = lines.flatMap(([a, b]) => {
      const steps = Math.ceil(Math.hypot(b[0] - a[0], b[1] - a[1]) / 6) || 1;
      return Array.from({ length: steps + 1 }, (_, i) => [a[0] + (b[0] - a[0]) * i / steps, a[1] + (b[1] - a[1]) * i / steps]);
    });
    const clear = (box) => box[0] >= bounds[0] && box[1] >= bounds[1] && box[2] <= bounds[2] && box[3] <= bounds[3]
      && !taken.some((t) => box[0] < t[2] && box[2] > t[0] && box[1] < t[3] && box[3] > t[1]);
    const placed = [];
    for (const item of texts) {
      const w = canvas.measureText(item.text).width + 6, h = 17, { px, py } = item;
      const boxes = [[10, -h / 2], [-w - 10, -h / 2], [-w / 2, -h - 9], [-w / 2, 9], [7, -h - 5], [7, 5], [-w - 7, -h - 5], [-w - 7, 5],
        [18, -h - 13], [18, 13], [-w - 18, -h - 13], [-w - 18, 13],
        [10, 10], [10, 27], [10, 44], [-w - 10, 10], [-w - 10, 27], [-w - 10, 44]].map(([dx, dy]) => [px + dx, py + dy, px + dx + w, py + dy + h]).filter(clear);
      if (!boxes.length) continue;
      const cost = (box, i) => along.filter((point) => inside(point, box)).length + i / 4;
      const box = boxes.map((b, i) => [cost(b, i), b]).sort((a, b) => a[0] - b[0])[0][1];
      taken.push(box);
      placed.push({ ...item, x: (box[0] + box[2]) / 2, y: (box[1] + box[3]) / 2 });
    }
    return placed;
  }

  function quality() {
    const element = document.getElementById("quality");
    const key = chosen("measure"), against = chosen("against"), measure = MEASURES[key], across = AXES[against];
    const { ink, muted, axis, layout } = base(element), glass = style("--glass");
    const reference = data.float, isPerplexity = key === "perplexity", lower = measure.better === "lower";
    let points = visible().filter((v) => v[key] !== null).map((v) => ({ v, x: v[against] * across.scale, y: v[key] }));
    const note = document.getElementById("quality-note");
    if (!points.length) { Plotly.purge(element); element.textContent = ""; note.textContent = "Nothing to draw: every variant is filtered out."; return; }
    const limit = isPerplexity && reference ? FAR * reference.perplexity : Infinity;
    const far = points.filter((p) => p.y > limit).length <= points.length - 2 ? points.filter((p) => p.y > limit) : [];
    const near = points.filter((p) => !far.includes(p));

    const ys = near.map((p) => p.y), line0 = isPerplexity && reference ? reference.perplexity : key === "top1_agreement" ? 1 : null;
    if (line0 !== null) ys.push(line0);
    let low = Math.min(...ys), high = Math.max(...ys);
    const log = lower && low > 0 && high / low > 6;
    const value = (y) => (log ? Math.log10(y) : y);
    const span = value(high) - value(low) || Math.abs(value(high)) * .1 || 1;
    const range = [value(low) - span * .07, value(high) + span * (far.length ? .16 : .07)];
    if (!log && key === "kl_divergence") range[0] = Math.min(0, range[0] < 0 ? -span * .03 : range[0]);
    const top = range[1] - span * .05;
    far.forEach((p) => { p.clipped = true; });
    const xs = points.map((p) => p.x), wide = Math.max(...xs) - Math.min(...xs) || Math.max(...xs) * .1;
    const xrange = [Math.min(...xs) - wide * .07, Math.max(...xs) + wide * .07];

    const margin = { l: narrow(element) ? 50 : 66, r: 16, t: 14, b: 50 }, height = element.clientHeight;
    const w = element.clientWidth - margin.l - margin.r, h = height - margin.t - margin.b;
    points.forEach((p) => {
      p.py = margin.t + h * (1 - ((p.clipped ? top : value(p.y)) - range[0]) / (range[1] - range[0]));
      p.px = margin.l + w * (p.x - xrange[0]) / (xrange[1] - xrange[0]);
      p.at = p.clipped ? (log ? 10 ** top : top) : p.y;
    });

    const best = front(near, lower), traces = [], lines = [];
    if (best.length > 1) {
      const last = best.at(-1);
      best.forEach((p, i) => { const q = best[i + 1] ?? { px: margin.l + w, py: p.py }; lines.push([[p.px, p.py], [q.px, p.py]], [[q.px, p.py], [q.px, q.py]]); });
      traces.push({ x: [...best.map((p) => p.x), xrange[1]], y: [...best.map((p) => p.y), last.y], mode: "lines", hoverinfo: "skip",
        line: { color: muted, width: 1.5, dash: "dot", shape: "hv" } });
    }
    const gaussian = key === "kl_divergence" && against === "bits_per_weight" ? data.gaussian_divergence : null;
    if (gaussian) {  // it is drawn where it is on the scale, and never widens it
      const floor = log ? 10 ** range[0] : range[0], ceiling = log ? 10 ** range[1] : range[1];
      const curve = Array.from({ length: 121 }, (_, i) => xrange[0] + (xrange[1] - xrange[0]) * i / 120)
        .map((x) => ({ x, y: gaussian * 4 ** -x })).filter((p) => p.y >= floor && p.y <= ceiling);
      traces.push({ x: curve.map((p) => p.x), y: curve.map((p) => p.y), mode: "lines", name: "Gaussian bound",
        hovertemplate: "limit of a Gaussian source<extra></extra>", line: { color: ink, width: 1.5, dash: "dashdot" } });
    }
    data.methods.forEach((method, index) => {
      const mine = points.filter((p) => p.v.method === index).sort((a, b) => a.x - b.x);
      if (!mine.length) return;
      const colour = markColour(method.colour), joined = mine.filter((p) => !p.clipped);
      joined.slice(1).forEach((p, i) => lines.push([[joined[i].px, joined[i].py], [p.px, p.py]]));
      if (joined.length > 1)
        traces.push({ x: joined.map((p) => p.x), y: joined.map((p) => p.y), mode: "lines", hoverinfo: "skip", opacity: .4, line: { color: colour, width: 2 } });
      traces.push({ x: mine.map((p) => p.x), y: mine.map((p) => p.at), mode: "markers", name: escape(method.name), cliponaxis: false,
        text: mine.map((p) => `<b>${escape(p.v.label)}</b><br>` + p.v.hover.map(([k, t]) => `${escape(k)}: ${escape(t)}`).join("<br>")),
        hovertemplate: "%{text}<extra></extra>",
        marker: { color: colour, size: mine.map((p) => (best.includes(p) ? 13 : 10.5)), opacity: 1,
          symbol: mine.map((p) => (p.clipped ? "triangle-up-open" : method.symbol)),
          line: { color: mine.map((p) => (p.clipped ? colour : best.includes(p) ? ink : style("--panel"))), width: mine.map((p) => (p.clipped ? 2 : best.includes(p) ? 1.5 : 1)) } } });
    });

    // a method is labelled at its point of fewest bits, where the methods differ most
    const texts = far.sort((a, b) => a.px - b.px).map((p) => ({ ...p, text: `${p.v.label} ↑ ${measure.text(p.y)}`, colour: p.v.method }));
    data.methods.forEach((method, index) => {
      const mine = near.filter((p) => p.v.method === index).sort((a, b) => a.x - b.x);
      if (mine.length) texts.push({ ...mine[0], text: method.name, colour: index });
    });
    const px = narrow(element) ? 11.5 : 12.5, bounds = [margin.l, 2, element.clientWidth - 2, margin.t + h];
    const placed = place(texts, points, lines, bounds, `600 ${px}px ${layout.font.family}`);
    const annotations = placed.map((t) => ({ x: (t.x - margin.l) / w, y: 1 - (t.y - margin.t) / h, xref: "paper", yref: "paper",
      xanchor: "center", yanchor: "middle", showarrow: false, text: escape(t.text), bgcolor: glass, borderpad: 0, font: { size: px, weight: 600, color: markColour(data.methods[t.colour].colour) } }));
    const shapes = [];
    if (line0 !== null) {
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: line0, y1: line0, line: { color: ink, width: 1.2, dash: "dash" } });
      annotations.push({ x: 0.005, xref: "paper", y: value(line0), xanchor: "left", yanchor: "bottom", showarrow: false,
        text: isPerplexity ? `float ${line0 < 1e4 ? line0.toPrecision(4) : short(line0)}` : "float 100 %", font: { size: 12, color: ink } });
    }
    const tick = ticks(log ? 10 ** range[0] : range[0], log ? 10 ** range[1] : range[1], log, narrow(element) ? 5 : 7);
    Plotly.react(element, traces, { ...layout, height, margin, annotations, shapes,
      xaxis: { ...axis, range: xrange, nticks: narrow(element) ? 5 : 9, title: { ...axis.title, text: across.title } },
      yaxis: { ...axis, type: log ? "log" : "linear", range, tickvals: tick, ticktext: tick.map(measure.text),
        title: { ...axis.title, text: measure.title + (log ? " (log scale)" : "") } } }, CONFIG);
    const beyond = far.length ? ` ${far.map((p) => `${p.v.label} (${short(p.y)})`).join(", ")} ${far.length > 1 ? "are" : "is"} off the scale: more than ${FAR} times the float model's.` : "";
    const bound = gaussian ? " The dash-dotted curve is the rate-distortion bound of a Gaussian source: the relative squared error of weights that no code of these bits goes below, 2^(-2 bits), times the least divergence per error of all variants." : "";
    note.textContent = `${lower ? "Lower" : "Higher"} is better. The dotted line is the Pareto front: no other visible variant is both smaller and better than one on it (outlined).${bound}${beyond}`;
  }

  function layers() {
    const element = document.getElementById("layers"), select = document.getElementById("layer-variant");
    if (!element || !select.value) return;
    const grid = data.layers, note = document.getElementById("layers-note"), variant = data.variants.find((v) => v.name === select.value);
    const errors = grid.values[variant.name], [outputs, weights] = document.querySelectorAll('[name="error"]');
    outputs.disabled = !errors.output_error;
    (errors[preferred] ? [outputs, weights].find((input) => input.value === preferred) : weights).checked = true;
    const key = chosen("error"), missing = errors[preferred] ? "" : `${variant.label} read no calibration text, so its output errors were not measured. `;
    const table = errors[key];
    document.querySelectorAll("[data-error]").forEach((set) => { set.hidden = set.dataset.error !== key; });
    document.querySelectorAll("[data-variant]").forEach((map) => { map.classList.toggle("chosen", map.dataset.variant === variant.name); });
    if (!table) { Plotly.purge(element); element.textContent = ""; note.textContent = "No errors of its layers were recorded."; return; }
    const all = Object.values(grid.values).flatMap((v) => v[key] ?? []).flat().filter((v) => v > 0).map(Math.log10).sort((a, b) => a - b);
    const low = all[Math.floor(all.length / 50)], high = all.at(-1), small = narrow(element);
    const { muted, axis, layout } = base(element);
    const stops = [0, 1, 2, 3, 4].map((i) => [i / 4, style(`--heat${i}`)]);
    const tick = ticks(10 ** low, 10 ** high, true, 4);
    const height = 26 * grid.rows.length + (small ? 116 : 84);
    const longest = Math.max(...grid.rows.map((name) => name.length));
    Plotly.react(element, [{
      type: "heatmap", x: grid.blocks, y: grid.rows.map(escape), z: table.map((row) => row.map((v) => (v > 0 ? Math.log10(v) : v === null ? null : low))),
      customdata: table.map((row, r) => row.map((v) => [escape(grid.names[r]), v === null ? "" : Number(v.toPrecision(3))])),
      zmin: low, zmax: high > low ? high : low + 1, colorscale: stops, xgap: 1, ygap: 1, hoverongaps: false,
      hovertemplate: "block %{x}, %{customdata[0]}<br>relative squared error %{customdata[1]}<extra></extra>",
      colorbar: { tickvals: tick.map(Math.log10), ticktext: tick.map(short), tickfont: { color: muted, size: 11.5 }, outlinewidth: 0, thickness: 12,
        ...(small ? { orientation: "h", y: -.26, yanchor: "top", len: 1, x: .5 } : { len: 1, x: 1.01 }) },
    }], { ...layout, height, margin: { l: 12 + 7.2 * longest, r: small ? 12 : 70, t: 10, b: small ? 88 : 46 },
      xaxis: { ...axis, showgrid: false, title: { ...axis.title, text: "block" }, dtick: Math.max(1, Math.ceil(grid.blocks.length / (small ? 8 : 24))) },
      yaxis: { ...axis, showgrid: false, autorange: "reversed", tickfont: { ...axis.tickfont, color: layout.font.color }, fixedrange: true } }, CONFIG);
    let worst = null;
    table.forEach((row, r) => row.forEach((v, c) => { if (v !== null && (!worst || v > worst.v)) worst = { v, r, c }; }));
    note.textContent = `${missing}All variants share one colour scale. The worst layer of ${variant.label} is ${grid.names[worst.r]} of block ${grid.blocks[worst.c]}: relative squared error ${short(worst.v)}.`;
  }

  let preferred = "output_error";  // last choice, kept for variants that do not have it

  // filtered variants cannot be selected
  function choices() {
    const select = document.getElementById("layer-variant");
    if (!select) return;
    const names = new Set(visible().map((v) => v.name));
    [...select.options].forEach((option) => { option.hidden = option.disabled = !names.has(option.value); });
    if (select.selectedOptions[0]?.disabled) select.value = [...select.options].find((option) => !option.disabled)?.value ?? select.value;
  }

  // a map of the overview is drawn large when its name is pressed
  function pick(map) {
    const button = document.createElement("button"), name = map.querySelector("figcaption > span");
    button.type = "button";
    button.className = "pick";
    button.title = "draw large";
    button.append(...name.childNodes);
    name.append(button);
    button.addEventListener("click", () => {
      document.getElementById("layer-variant").value = map.dataset.variant;
      draw();
      document.getElementById("layers").closest(".panel").scrollIntoView({ block: "nearest" });
    });
  }

  const draw = () => { quality(); layers(); };
  let waiting = 0;
  const soon = () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(draw); };
  document.addEventListener("DOMContentLoaded", () => {
    document.querySelectorAll("[data-variant]").forEach(pick);
    document.querySelectorAll(".drawn").forEach((panel) => { panel.hidden = false; });
    document.querySelectorAll('[name="error"]').forEach((input) => input.addEventListener("change", () => { preferred = input.value; }));
    document.querySelectorAll(".controls").forEach((form) => form.addEventListener("change", draw));
    document.addEventListener("bitmill:theme", draw);
    document.addEventListener("bitmill:filter", () => { choices(); draw(); });
    let width = 0;
    new ResizeObserver(([entry]) => { if (entry.contentRect.width !== width) { width = entry.contentRect.width; soon(); } }).observe(document.querySelector("main"));
  });
})();
