"""What bitmill reads: for every kind of file, files to damage and the ways in which they are read.

A reader registers itself here. `test_fuzz.py` fails where a module of bitmill reads files and no reader names it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import tempfile
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from bitmill.cli.main import main
from bitmill.compat import forward_with_cache
from bitmill.errors import BitmillError
from bitmill.files import file_record
from helpers.workspace import Workspace

TOKENS = torch.tensor([[3, 17, 99, 5, 42, 8]])
PAIRS = [("cat", "mat"), ("dog", "log"), ("bird", "roof"), ("fish", "bank")]
SHORT = ["--seqlen", "16", "--windows", "1"]


class Refused(Exception):
    """A use refused a file in one sentence."""


Use = Callable[[Path], str]


@dataclass(frozen=True)
class Reader:
    """A kind of file and its uses.

    Attributes:
        modules: modules of bitmill that read it, relative to `src/bitmill`.
        root: folder of the corpus that holds the files.
        pattern: glob pattern of the files to damage, in `root`.
        uses: by name; each takes the copy of `root`, returns a digest of what it computes, or raises Refused.
        strict: a use that goes on must compute what it computes from the undamaged files.
        adapt: called on the copy after the damage.
    """

    modules: tuple[str, ...]
    root: str
    pattern: str
    uses: dict[str, Use]
    strict: bool = False
    adapt: Callable[[Path], None] | None = None


READERS: dict[str, Reader] = {}


def digest_of(value: Any) -> str:
    """Return a digest of tensors or text."""
    data = value.detach().double().numpy().tobytes() if isinstance(value, torch.Tensor) else str(value).encode()
    return hashlib.sha256(data).hexdigest()[:12]


def command(*words: str, digest: bool = False) -> Use:
    """Return the use of a command in the folder."""

    def use(folder: Path) -> str:
        os.chdir(folder)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main(list(words))
        errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        if status not in (0, 1, 2) or len(errors) != (status != 0) or "Traceback" in err.getvalue():
            raise AssertionError(f"exit {status}: {err.getvalue()[-600:]}")
        if status:
            raise Refused(errors[0])
        return digest_of(out.getvalue()) if digest else "done"

    return use


def refusing(function: Use) -> Use:
    """Return a use of Python: a BitmillError is a refusal."""

    def use(folder: Path) -> str:
        os.chdir(folder)
        try:
            return function(folder)
        except BitmillError as error:
            raise Refused(str(error)) from None

    return use


@refusing
def load(folder: Path) -> str:
    import bitmill

    with torch.no_grad():
        logits = bitmill.load(".")(TOKENS).logits
    tokenizer = bitmill.load_tokenizer(".")
    return digest_of(logits) + digest_of(tokenizer("w1 w2")["input_ids"])


def from_pretrained(folder: Path) -> str:
    """transformers' own loader, whose own errors are refusals too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    os.chdir(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(".").eval()
        tokenizer = AutoTokenizer.from_pretrained(".")
        with torch.no_grad():
            return digest_of(model(TOKENS).logits) + digest_of(tokenizer("w1 w2")["input_ids"])
    except Exception as error:
        raise Refused(f"{type(error).__name__}: {error}") from None


@refusing
def export(folder: Path) -> str:
    import bitmill

    with tempfile.TemporaryDirectory() as place:
        out = bitmill.export(".", "dense", Path(place) / "out").out
        return "".join(digest_of(tensor) for _, tensor in sorted(load_file(out / "model.safetensors").items()))


verify = command("verify", ".", "--no-quality")

READERS["quantized folder"] = Reader(
    ("checkpoint/contents.py", "checkpoint/reader.py", "checkpoint/tensors.py", "evaluation/reference.py",
     "files.py", "integrations/renaming.py", "sources/safetensors_header.py",
     "workflows/export/run.py", "workflows/load.py", "workflows/sizes.py"),
    "done",
    "*",
    {"verify": verify, "load": load, "from_pretrained": from_pretrained, "inspect": command("inspect", "."),
     "export": export},
    strict=True,
)  # fmt: skip


def record_anew(folder: Path) -> None:
    """Record the files of a quantized folder as they are, so that digests do not reveal the damage."""
    report = folder / "report.json"
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError, KeyError):
        if any(not path.is_file() for path in folder.iterdir()):  # reading a FIFO or a device never ends
            return
        data = json.loads(report.read_text())
        data["files"] = {name: file_record(folder / name) for name in data["files"]}
        report.write_text(json.dumps(data))


READERS["quantized folder, recorded anew"] = Reader(
    (),
    "done",
    "*",
    {
        "verify": verify,
        "load": load,
        "from_pretrained": from_pretrained,
        "inspect": command("inspect", "."),
        "generate": command("generate", ".", "--prompt", "w1 w2", "--max-new-tokens", "1", "--raw"),
    },
    adapt=record_anew,
)
READERS["float folder"] = Reader(
    (
        "sources/hf.py",
        "sources/base.py",
        "sources/config_bounds.py",
        "sources/published.py",
        "checkpoint/writer.py",
    ),
    "float",
    "source/*",
    {
        "quantize": command("quantize", "source", "--method", "rtn", "--measure", "0", "-o", "out"),
        "eval": command("eval", "source", "--text", "text.txt", *SHORT),
        "plan": command("plan", "source"),
    },
)
READERS["encoder folder"] = Reader(
    ("sources/pooling.py",),
    "encoder",
    "source/**/*.json",
    {"eval": command("eval", "source", "--text", "text.txt", "--seqlen", "16", "--windows", "20")},
)
READERS["gguf"] = Reader(
    ("sources/gguf.py", "sources/gguf_header.py"),
    "gguf",
    "model.gguf",
    {
        "quantize": command("quantize", "model.gguf", "--method", "rtn", "--measure", "0", "-o", "out"),
        "generate": command("generate", "model.gguf", "--prompt", "a", "--max-new-tokens", "1"),
    },
)
IMPORTED = {"gptq": {"symmetric": True}, "awq": {}, "compressed-tensors": {"bits": 3}}
IMPORT = command("import", "model", "-o", "out")
for _program in IMPORTED:
    READERS[f"import of {_program}"] = Reader((), f"import-{_program}", "model/*", {"import": IMPORT})
READERS["import of gguf"] = Reader(
    ("workflows/imports/packed.py",),
    "import-gguf",
    "model.gguf",
    {"import": command("import", "model.gguf", "-o", "out")},
)
READERS["keys and values"] = Reader(
    ("kv/calibration_file.py", "workflows/kv.py"),
    "kv",
    "kept/[krc]*",
    {
        "verify": command("verify", "kept", "--no-quality"),
        "generate": command(
            "generate", "kept", "--prompt", "w1 w2", "--max-new-tokens", "2", "--raw", digest=True
        ),
    },
    strict=True,
)


@refusing
def _saved_cache(folder: Path) -> str:
    import bitmill

    model = bitmill.load("source")
    cache = bitmill.QuantizedCache.load(model, "cache.safetensors")
    with torch.no_grad():
        output, _ = forward_with_cache(model, TOKENS, cache)
    return digest_of(output.logits)


READERS["saved cache"] = Reader(
    ("recorded_tensors.py", "kv/cache.py"),
    "cache",
    "cache.safetensors",
    {"continue": _saved_cache},
    strict=True,
)
RESUME = ["quantize", "source", "--calib", "text.txt", "-o", "half", "--samples", "4", "--seqlen", "32"]
RESUME += ["--measure", "2", "--group-size", "16", "--method", "gptq", "--resume"]


def _resume(folder: Path) -> str:
    command(*RESUME)(folder)
    shards = sorted((folder / "half").glob("model-*.safetensors"))
    return digest_of([hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards])


READERS["unfinished run"] = Reader(
    ("checkpoint/journal.py", "checkpoint/work_folder.py", "workflows/quantize/run.py"),
    "half",
    "half.partial/**/*",
    {"resume": _resume},
    strict=True,
)
COMPARE = ["compare", "source", "--methods", "rtn", "--bits", "4", "--calib", "text.txt", "--samples", "2", *SHORT]
COMPARE += ["--max-new-tokens", "1", "--keep-models", "-o", "grid"]


def _compare(folder: Path) -> str:
    from bitmill.workflows.comparison import run
    from helpers.comparisons import in_this_process

    run.run_grid.__kwdefaults__ = {**(run.run_grid.__kwdefaults__ or {}), "run": in_this_process}
    return command(*COMPARE)(folder)


@refusing
def _results(folder: Path) -> str:
    from bitmill.report.html import comparison_page
    from bitmill.report.results import read_results

    return str(len(comparison_page(read_results(folder / "grid" / "results.json"))) > 0)


READERS["comparison"] = Reader(
    ("report/results.py", "workflows/comparison/run.py", "workflows/comparison/worker.py",
     "workflows/comparison/predictions.py"),
    "comparison",
    "grid/**/*.[jn][sp]*",
    {"go on": _compare, "page": _results},
)  # fmt: skip


def _with_statistics(method: str) -> Use:
    """Return the use of shared statistics by a method."""

    @refusing
    def use(folder: Path) -> str:
        import bitmill

        data = bitmill.CalibrationData("text.txt", samples=2, seqlen=16)
        options: dict[str, Any] = {"propagate": "float", "statistics": "statistics"}
        bitmill.quantize("source", method, out=f"out-{method}", calib=data, measure=0, **options)
        files = [file for file in sorted((folder / f"out-{method}").iterdir()) if file.name != "report.json"]
        return digest_of([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])

    return use


STATISTICS_USES = {method: _with_statistics(method) for method in ("gptq", "squeezellm")}
READERS["statistics"] = Reader(
    ("calibration/store.py", "calibration/fisher.py", "calibration/gradients.py"),
    "statistics",
    "statistics/*",
    STATISTICS_USES,
    strict=True,
)
READERS["recipe"] = Reader(
    ("config/documents.py", "recipes/method.py"),
    "texts",
    "mine.yaml",
    {"recipes": command("recipes", "mine.yaml"), "quantize": command("quantize", "source", "--method", "mine.yaml",
                                                                     "--dry-run")},
)  # fmt: skip
READERS["text"] = Reader(
    ("data/text.py",),
    "texts",
    "text.*",
    {
        "text": command("eval", "source", "--text", "text.txt", *SHORT),
        "lines": command("eval", "source", "--text", "text.jsonl", *SHORT),
    },
)


@refusing
def _prompts(folder: Path) -> str:
    from bitmill.cli.compare import read_prompts

    return str(len(read_prompts(Path("prompts.txt"))))


READERS["prompts"] = Reader(("cli/compare.py",), "texts", "prompts.txt", {"read": _prompts})


@refusing
def _onnx(folder: Path) -> str:
    from bitmill.sources.onnx import read_onnx

    weights = read_onnx(Path("model.onnx"))
    return digest_of({name: tensor.tolist() for name, tensor in sorted(weights.tensors.items())})


READERS["onnx"] = Reader(("sources/onnx.py",), "onnx", "model.onnx", {"read": _onnx})


@refusing
def _nbest(folder: Path) -> str:
    from bitmill.data.nbest import read_nbest

    return digest_of(read_nbest(Path("nbest.jsonl")))


READERS["n-best lists"] = Reader(("data/nbest.py",), "texts", "nbest.jsonl", {"read": _nbest})


@refusing
def _lattice(folder: Path) -> str:
    from bitmill.data.lattices import read_lattices

    return digest_of(read_lattices(Path("u1.slf"), 3))


READERS["lattices"] = Reader(("data/lattices.py",), "texts", "u1.slf", {"read": _lattice})


@refusing
def _labelled(folder: Path) -> str:
    from bitmill.data.labelled import read_labelled

    return digest_of(read_labelled("labelled.jsonl"))


READERS["texts with labels"] = Reader(("data/labelled.py",), "texts", "labelled.jsonl", {"read": _labelled})


@refusing
def _recordings(folder: Path) -> str:
    from bitmill.data.recordings import read_recordings, samples_of

    listed = list(read_recordings(Path("recordings.jsonl")))
    return digest_of([[number, text, samples_of(path).tolist()] for number, path, text in listed])


READERS["recordings"] = Reader(("data/recordings.py",), "texts", "recordings.jsonl", {"read": _recordings})


def build(root: Path) -> None:
    """Write the files of all readers below a folder."""
    import bitmill
    from bitmill.kv.cache import QuantizedCache
    from bitmill.sources.open import open_source
    from helpers.tiny_gguf import write_gguf
    from helpers.tiny_models import tiny_model
    from helpers.tiny_onnx import tiny_onnx
    from helpers.workspace import build_workspace

    (root / "half").mkdir(parents=True)
    made: Workspace = build_workspace(root / "half")
    os.chdir(root)
    shutil.move(made.done, root / "done")
    for name in ("float", "kv", "cache", "comparison", "statistics", "texts", "encoder", "gguf"):
        (root / name).mkdir()
        shutil.copy(made.text, root / name / "text.txt")
        if name not in ("encoder", "gguf"):
            shutil.copytree(made.source, root / name / "source")
    (root / "float" / "source" / "README.md").write_text("---\nlicense: mit\nlanguage: [en, de]\n---\n# A model\n")
    text = (root / "texts" / "text.txt").read_text()
    (root / "texts" / "text.jsonl").write_text(f'{{"text": "{text}"}}\n{{"text": "w1 w2"}}\n')
    (root / "texts" / "prompts.txt").write_text("w1 w2\nw3\n")
    utterance = {"id": "u1", "hypotheses": [{"text": "w1 w2", "score": -3.5}], "reference": "w1"}
    (root / "texts" / "nbest.jsonl").write_text(json.dumps(utterance) + "\n")
    lattice = "VERSION=1.0\nlmscale=2\nN=2 L=2\nI=0\nI=1\nJ=0 S=0 E=1 W=w1 a=-3.5 l=-1\nJ=1 S=0 E=1 W=w2 a=-4\n"
    (root / "texts" / "u1.slf").write_text(lattice)
    labelled = [{"text": f"w{n} w{n + 1}", "label": n % 2} for n in range(4)]
    (root / "texts" / "labelled.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in labelled))
    with wave.open(str(root / "texts" / "w1.wav"), "wb") as sound:
        sound.setparams((1, 2, 16_000, 0, "NONE", ""))
        sound.writeframes(bytes(range(64)))
    (root / "texts" / "recordings.jsonl").write_text('{"audio": "w1.wav", "text": "w1"}\n')
    shutil.copy(root / "done" / "recipe.yaml", root / "texts" / "mine.yaml")
    tiny_model("bert").save_pretrained(root / "encoder" / "source")
    open_source(str(made.source)).tokenizer().save_pretrained(root / "encoder" / "source")
    pooling = root / "encoder" / "source" / "1_Pooling"
    pooling.mkdir()
    (pooling / "config.json").write_text('{"word_embedding_dimension": 32, "pooling_mode_mean_tokens": true}')
    (pooling.parent / "modules.json").write_text(
        '[{"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]'
    )
    sentences = [f"The {animal} sat on the {place} of w{n}." for n in range(9) for animal, place in PAIRS]
    (root / "encoder" / "text.txt").write_text(" ".join(sentences))
    write_gguf(root / "gguf" / "model.gguf", tiny_model("llama"))
    _build_imports(root, made.source)
    (root / "onnx").mkdir()
    (root / "onnx" / "model.onnx").write_bytes(tiny_onnx(torch.arange(6.0).view(2, 3)))
    kept = ["quantize", "source", "--method", "none", "--kv", "kvquant", "--kv-bits", "3", "--calib", "text.txt"]
    command(*kept, "--kv-samples", "2", "--kv-seqlen", "64", "-o", "kept")(root / "kv")
    model = bitmill.load(root / "cache" / "source")
    cache = QuantizedCache(model, "kivi", bits=4, group=8)
    with torch.no_grad():
        forward_with_cache(model, TOKENS.repeat(1, 8), cache)
    cache.save(root / "cache" / "cache.safetensors")
    _compare(root / "comparison")
    for method, use in STATISTICS_USES.items():
        use(root / "statistics")
        shutil.rmtree(root / "statistics" / f"out-{method}")
    os.chdir(root)


def _build_imports(root: Path, source: Path) -> None:
    """Write a checkpoint of every program that is imported."""
    import bitmill
    from helpers.tiny_gguf import write_gguf
    from helpers.tiny_models import tiny_model

    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    for program, options in IMPORTED.items():
        folder = root / f"import-{program}"
        folder.mkdir()
        options = {"bits": 4, "group_size": 32, "measure": 0, **options}
        bitmill.quantize(tiny_model("llama", **sizes), "rtn", out=folder / "packed", **options)
        bitmill.export(folder / "packed", program, folder / "model")
        shutil.rmtree(folder / "packed")
    (root / "import-gguf").mkdir()
    kinds = {f"blk.{block}.ffn_up.weight": "Q5_1" for block in range(2)}
    write_gguf(root / "import-gguf" / "model.gguf", tiny_model("llama", **sizes), kinds=kinds)
