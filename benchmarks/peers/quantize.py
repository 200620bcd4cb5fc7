"""Quantize a demo model with other programs, calibrated on the windows of `bitmill quantize`, to dense folders.

    python benchmarks/peers/quantize.py smollm2-135m hqq:3 gptqmodel:3 auto-round:3 llama.cpp:Q3_K_M -o FOLDER

Every program runs in an environment of its own, installed on first use, with its defaults: groups of 64, and a
number of bits or, for llama.cpp, a type. GPTQModel and auto-round calibrate on the 128 x 512 tokens of bitmill's
default (`mix`, seed 0), llama.cpp gets an importance matrix of them, and HQQ needs none. FOLDER/PROGRAM-SETTING is
then the float model with the linear layers of its blocks as the program unpacks them, in fp32, and a peer.json:
bits per weight of these layers with scales and zero points, seconds of the wall and of the processor, and peak
memory of the program's process. torch collects the importance matrix, whose time counts and whose memory does not.
llama.cpp stores rows that are no multiple of 256 weights, most of these models', in types of 4 bits and more.
benchmarks/suite.py measures such folders. gemma3-270m needs BITMILL_ACCEPT_LICENCE=gemma3-270m.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from environments import python_of
from float_files import float_folder, windows_file
from gguf_float import write_float
from importance import importance_matrix
from quantized_weights import READERS, is_block_linear
from safetensors.torch import load_file, save_file

from bitmill.sources.cache import cache_folder
from bitmill.sources.zoo import fetch
from models import HERE, types_of

GROUP = 64
WEIGHTS = "model.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a demo model")
    parser.add_argument("variants", nargs="+", metavar="PROGRAM:SETTING", help=f"of {', '.join(READERS)}")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder of the folders")
    parser.add_argument("--iters", type=int, default=200, help="of auto-round (default: %(default)s, its own)")
    parser.add_argument("--threads", type=int, default=1, help="of a program (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=cache_folder() / "peers", help="of environments and files")
    parser.add_argument("--jobs", type=int, default=1, help="compilers at a time (default: %(default)s)")
    arguments = parser.parse_args()
    for variant in arguments.variants:
        peer, _, setting = variant.partition(":")
        if peer not in READERS or not setting:
            parser.error(f"{variant!r} is not PROGRAM:SETTING with a program of {', '.join(READERS)}")
        quantize(peer, setting, arguments)


def quantize(peer: str, setting: str, arguments: argparse.Namespace) -> None:
    """Run a program and write its folder; what the program left before is not made again.

    Args:
        peer: Name of the program.
        setting: Bits or type.
        arguments: Of the command line.
    """
    files = arguments.folder / "models" / arguments.model
    name = f"{peer}-{setting}" + (f"-iters{arguments.iters}" if peer == "auto-round" else "")
    made = files / name
    if not (made / "about.json").is_file():
        python = python_of(peer, arguments.folder, arguments.jobs)
        model, calibration = inputs(peer, arguments.model, files)
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        command = [python, str(HERE / f"quantize_{re.sub('[^a-z]', '_', peer)}.py")]
        command += [str(model), str(calibration), str(made), setting]
        command += ["--group", str(GROUP), "--iters", str(arguments.iters)]
        variables = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "TOKENIZERS_PARALLELISM": "false"}
        print(f"running {name}; its output is in {made}.log", file=sys.stderr)
        with made.with_name(f"{name}.log").open("w", encoding="utf-8") as log:
            # some of them write into the current folder
            if subprocess.run(command, env=variables, cwd=made, stdout=log, stderr=log).returncode:
                raise SystemExit(f"{name} failed; see {log.name}.")
    write_folder(peer, setting, files, made, arguments.output / name)


def inputs(peer: str, model: str, files: Path) -> tuple[Path, Path]:
    """Return the float model and the calibration in the files that a program reads.

    Args:
        peer: Name of the program.
        model: Name of the model.
        files: Folder that keeps them.
    """
    folder, windows = float_folder(model, files), windows_file(model, files)
    if peer != "llama.cpp":
        return folder, windows
    gguf = files / "F16.gguf"
    if not gguf.is_file():
        write_float(fetch(model), gguf)
    return gguf, importance_matrix(model, windows, files / "importance.npz")


def write_folder(peer: str, setting: str, files: Path, made: Path, out: Path) -> None:
    """Write the float model's folder with the weights of a program, and peer.json.

    Args:
        peer: Name of the program.
        setting: Bits or type.
        files: Folder of the float model's files.
        made: What the program wrote.
        out: The folder.
    """
    about: dict[str, Any] = json.loads((made / "about.json").read_text(encoding="utf-8"))
    if peer == "llama.cpp":
        for name, cost in zip(("seconds", "cpu_seconds"), np.load(files / "importance.npz")["cost"], strict=True):
            about[name] += float(cost)
        about["settings"] += f": {types_of(made / 'model.gguf')}"
    dense, bits = READERS[peer](made)
    tensors = load_file(files / "float" / WEIGHTS)
    linears = {name for name, tensor in tensors.items() if is_block_linear(name, tuple(tensor.shape))}
    if dense.keys() != linears:
        raise SystemExit(f"{made} has other layers than the model: {sorted(dense.keys() ^ linears)[:3]}.")
    weights = sum(tensors[name].numel() for name in linears)
    described = {
        "tool": peer,
        "version": about.pop("version"),
        "bits": int(re.findall(r"\d", setting)[0]),
        "group": None if peer == "llama.cpp" else GROUP,
        "bits_per_weight": bits / weights,
        **about,
    }
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(files / "float", partial, ignore=shutil.ignore_patterns(WEIGHTS))
    save_file(tensors | dense, partial / WEIGHTS, metadata={"format": "pt"})
    (partial / "peer.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    print(f"{out}: {bits / weights:.3f} bits per weight, {about['seconds']:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
