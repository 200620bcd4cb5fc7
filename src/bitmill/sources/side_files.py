"""The files of a model's folder besides its weights: tokenizer, chat templates, code, licence."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

ADAPTER = "adapter_config.json"  # makes transformers load an adapter onto the model
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".index.json",
)
# Of subfolders only what a tokenizer, a template or code reads: they also hold logs and data.
SUFFIXES_IN_SUBFOLDERS = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py", ".md", ".yaml", ".yml")
# Other tools would take these for a description of the weights that bitmill writes.
QUANTIZERS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
WORK_FOLDERS = ".partial"  # in which bitmill makes folders, perhaps inside of the model's
MAX_DEPTH = 3


def side_files(folder: Path, modules: Collection[str] = ()) -> Iterator[Path]:
    """Yield the files to keep with new weights, relative to the folder, in order.

    Args:
        folder: the folder of the model.
        modules: subfolders that belong to the model although they hold weights. Any other subfolder with weights
            is a model of its own and left out.
    """
    for path in sorted(folder.iterdir()):
        if _is_side_file(path) and path.name != "config.json":
            yield path.relative_to(folder)
    for path in sorted(_subfolders(folder, folder, modules)):
        for file in sorted(path.iterdir()):
            if _is_side_file(file) and file.name.endswith(SUFFIXES_IN_SUBFOLDERS):
                yield file.relative_to(folder)


def _subfolders(root: Path, folder: Path, modules: Collection[str]) -> Iterator[Path]:
    """Yield every subfolder that belongs to the model."""
    for path in folder.iterdir():
        name = path.relative_to(root)
        if (
            path.name.startswith((".", "__"))
            or path.name.endswith(WORK_FOLDERS)
            or path.is_symlink()
            or not path.is_dir()
            or len(name.parts) > MAX_DEPTH
        ):
            continue
        holds_weights = any(file.name.endswith(WEIGHT_SUFFIXES) for file in path.iterdir())
        if str(name) in modules or not holds_weights:
            yield path
            yield from _subfolders(root, path, modules)


def _is_side_file(path: Path) -> bool:
    """Return True for a regular file that holds no weights and does not describe them."""
    hidden = path.name.startswith(".")
    return not (hidden or path.name.endswith(WEIGHT_SUFFIXES) or path.name in QUANTIZERS) and path.is_file()
