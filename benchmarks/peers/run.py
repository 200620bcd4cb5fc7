"""Decode and prefill of bitmill, llama.cpp, torch and vLLM: one machine, one run, in turns.

    python benchmarks/peers/run.py --prepare            # environments and models, once; an hour
    python benchmarks/peers/run.py                      # measures; minutes
    python benchmarks/peers/run.py --model smollm2-135m --peers llama.cpp --turns 1 --json

Every engine is a process that keeps its model loaded and waits while another one works. A turn measures all of
them once, bitmill between its peers; figures are medians over the turns, ratios medians of the ratios within a
turn. An engine that fails its check is not measured: logits finite, of the right size, and close to the float
model's, and a continuation that is likely under the float model. Results are written to benchmarks/results/peers-
MODEL.json after every turn; benchmarks/performance.py makes the page from them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engines import PEERS, Worker, engines_of
from environments import python_of
from host import busy, describe_host

from bitmill.sources.cache import cache_folder
from bitmill.workflows.bench.memory import ReadBandwidth
from models import HERE, MODELS, Model

RESULTS = Path(__file__).parent.parent / "results"
PROMPT, PREFILL = 16, 512
PAUSE_S = 0.05  # so that the threads of the previous engine go to sleep


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), nargs="+", default=list(MODELS))
    parser.add_argument("--peers", default="llama.cpp,torch", help=f"of {','.join(PEERS)} (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument("--turns", type=int, help="of decode (default: 5, of the large model 3)")
    parser.add_argument("--prefill-turns", type=int, help="of prefill (default: 3, of the large model 2)")
    parser.add_argument("--tokens", type=int, default=32, help="decoded in a turn (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "peers", help="of environments and models")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--prepare", action="store_true", help="make environments and models, measure nothing")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    if unknown := set(arguments.peers.split(",")) - set(PEERS):
        parser.error(f"there is no peer {sorted(unknown)[0]!r}; choose of {', '.join(PEERS)}")

    failed = False
    for name in arguments.model:
        result = compare(MODELS[name], arguments)
        if arguments.prepare:
            continue
        failed |= any(not engine["check"]["passed"] for engine in result["engines"])
        if arguments.json:
            print(json.dumps(result))
        else:
            show(result)
    return int(failed)


def compare(model: Model, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all engines.

    Args:
        model: The model.
        arguments: Of the command line.

    Returns:
        Plain data: machine; check, decode, prefill and memory of every engine; ratios of bitmill to each.
    """
    files, peers = arguments.folder / "models", arguments.peers.split(",")
    files.mkdir(parents=True, exist_ok=True)
    pythons = {peer: python_of(peer, arguments.folder, arguments.jobs) for peer in ("bitmill", *peers)}
    engines = engines_of(model, files, pythons)
    if arguments.prepare:
        return {}
    prompt, long = prompts(model)
    result: dict[str, Any] = {
        "model": model.name,
        "about": model.about,
        "machine": describe_host(arguments.threads),
        "prompt_tokens": PROMPT,
        "decode_tokens": arguments.tokens,
        "prefill_tokens": PREFILL,
    }
    torch.set_num_threads(arguments.threads)
    memory = ReadBandwidth()  # in this process, so that its buffer does not count for an engine
    workers = [Worker(engine, arguments.threads, arguments.folder / "logs") for engine in engines]
    try:
        measured = [w for w in workers if w.check(prompt, model, reference=workers[0])]
        for worker in measured:
            worker.warm_up(long)
        result["machine"]["arithmetic"] = workers[0].request("arithmetic")
        decodes, prefills = arguments.turns or model.turns[0], arguments.prefill_turns or model.turns[1]
        for turn in range(max(decodes, prefills)):
            result.setdefault("read_bandwidths", []).append(max(memory.measure() for _ in range(3)))
            for worker in measured:
                if turn < decodes:
                    time.sleep(PAUSE_S)
                    worker.decode(long[:PROMPT], arguments.tokens)
            for worker in measured:
                if turn < prefills:
                    time.sleep(PAUSE_S)
                    worker.prefill(long)
            result |= {"engines": [worker.result() for worker in workers], "ratios": ratios(measured)}
            save(result, arguments.out / f"peers-{model.name}.json")
    finally:
        for worker in workers:
            worker.close()
    result["machine"]["busy"] = max(result["machine"]["busy"], busy())
    save(result, arguments.out / f"peers-{model.name}.json")
    return result


def prompts(model: Model) -> tuple[list[int], list[int]]:
    """Return token ids of a prompt to continue, and of 512 tokens to read."""
    if model.text is None:
        long = [(7919 * i) % 31000 + 1 for i in range(PREFILL)]
        return long[:PROMPT], long
    return model.ids(model.text), model.ids((HERE / "run.py").read_text(encoding="utf-8"))[:PREFILL]


def ratios(workers: list[Worker]) -> list[dict[str, Any]]:
    """Return bitmill's speed divided by each peer's, medians over turns."""
    found = []
    for ours in (w for w in workers if w.engine.peer == "bitmill"):
        for other in (w for w in workers if w.engine.peer != "bitmill"):
            pair: dict[str, Any] = {"bits": ours.engine.bits, "peer": other.engine.name}
            for what in ("decode", "prefill"):
                times = list(zip(other.seconds[what], ours.seconds[what], strict=True))
                pair[what] = median(theirs / mine for theirs, mine in times) if times else None
            found.append(pair)
    return found


def save(result: dict[str, Any], path: Path) -> None:
    """Write the result atomically.

    Args:
        result: Plain data.
        path: The file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.rename(path)


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    machine = result["machine"]
    console.print(
        f"{result['model']} on {machine['cpu']}, {machine['threads']} threads, "
        f"{median(result['read_bandwidths']) / 1e9:.1f} GB/s read; others use {machine['busy']:.0%}"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("engine", "MB", "decode tokens/s", "prefill tokens/s", "peak MB", "check"):
        table.add_column(column, justify="left" if column in ("engine", "check") else "right", no_wrap=True)
    for engine in result["engines"]:
        check = engine["check"]
        text = check["text"] or f"cosine {check['cosine']:.3f}"
        cells = [engine["name"], f"{engine['size_bytes'] / 1e6:.0f}"]
        cells += [f"{engine[what]['tokens_per_s']:.1f}" if engine[what] else "-" for what in ("decode", "prefill")]
        cells += [f"{engine['peak_memory_bytes'] / 1e6:.0f}", ("" if check["passed"] else "FAILED ") + text]
        table.add_row(*cells)
    console.print(table)
    table = Table(box=None, pad_edge=False)
    for column in ("bitmill bits", "peer", "decode ratio", "prefill ratio"):
        table.add_column(column)
    for pair in result["ratios"]:
        rounded = [f"{pair[what]:.2f}" if pair[what] else "-" for what in ("decode", "prefill")]
        table.add_row(str(pair["bits"]), pair["peer"], *rounded)
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
