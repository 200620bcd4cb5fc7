"""Write a quantized model as a Hugging Face folder, shard by shard, complete or not at all.

Finished blocks are written to `OUT.partial/model` and recorded in a journal in `OUT.partial`. After the last
file the folder is renamed to OUT. Nothing in the folder depends on the clock, so that equal jobs give equal
bytes, interrupted or not.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from bitmill.checkpoint.contents import read_json
from bitmill.checkpoint.dtype import stated_dtype
from bitmill.checkpoint.journal import Journal, first_difference
from bitmill.checkpoint.marker import WEIGHT, weight_marker
from bitmill.checkpoint.overwrite import publish_work
from bitmill.checkpoint.schema import quantization_config
from bitmill.checkpoint.work_folder import WorkFolder, remove, remove_leftovers
from bitmill.errors import CheckpointError, OutputError, SourceError, one_line
from bitmill.evaluation.reference import FILE as REFERENCE_FILE
from bitmill.files import (
    file_records,
    folder_bytes,
    make_folder,
    output_errors,
    sync_folder,
    write_json,
    write_tensors,
    write_text,
)
from bitmill.formats import Format
from bitmill.formats.quantized import unpack
from bitmill.kv.calibration_file import FILE as KV_FILE
from bitmill.models.embedding_and_head import EmbeddingAndHead
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline.job import NON_BLOCK, BlockResult, LayerResult, Shared
from bitmill.progress import Progress
from bitmill.recipes.resolve import ResolvedRecipe
from bitmill.sources.safetensors_header import read_header

FROM_SOURCE = "SOURCE_"  # before the names of files of the source that would clash with these
OWN_NAMES = {
    "config.json",
    "readme.md",
    "recipe.yaml",
    "report.html",
    "report.json",
    "model.safetensors.index.json",
    KV_FILE,
    REFERENCE_FILE,
}


class FolderSink:
    """A sink that writes blocks as shards of a folder.

    Args:
        work: the locked work folder of the folder to write.
        resolved: the recipe on the model; None where the weights stay as they are.
        identity: plain data that decides the output bytes, see `journal`.
        blocks: number of blocks of the model.
        resume: continue an unfinished run.
        overwrite: take the place of a folder that bitmill wrote.

    Raises:
        CheckpointError: the unfinished run has another identity, or is damaged.
    """

    def __init__(
        self,
        work: WorkFolder,
        resolved: ResolvedRecipe | None,
        identity: dict[str, Any],
        blocks: int,
        resume: bool,
        overwrite: bool = False,
    ) -> None:
        self.overwrite = overwrite
        self.place, self.work, self.folder = work, work.path, work.model
        self.out, self.resolved = work.out, resolved
        # the first holds what lies outside the blocks, the last what they share
        self.shards = blocks + 1 + bool(resolved and resolved.shares_parts)
        self.index: dict[str, str] = {}
        self.layers: list[dict[str, Any]] = []
        self.formats: dict[str, Format] = {}
        self.auxiliary_bytes = 0
        self._config: dict[str, Any] = {}
        self._shared: Shared = {}
        self._places: dict[str, str] = {}
        self.journal = Journal(self.work, identity)
        if resume and work.unfinished:
            self.journal.load(self.folder)
        else:
            work.clear()

    # -- before the first block ---------------------------------------------------------------------------

    def prepare(self, streamed: StreamedModel) -> None:
        """Write all files but the weights, so that other errors appear before the first block.

        Raises:
            BitmillError: a file cannot be written, or the config cannot be saved.
        """
        with output_errors(self.folder):
            make_folder(self.folder)
            for entry in self.folder.iterdir():  # what a killed run was writing
                if entry.name not in self.journal.shards():
                    remove(entry)
            before = folder_bytes(self.folder)
            streamed.source.write_auxiliary_files(self.folder)
            _set_apart(self.folder, self.journal.shards())
            self.auxiliary_bytes = folder_bytes(self.folder) - before
            sync_folder(self.folder)
        _check_generation_config(self.folder)
        self._config = _plain_config(streamed)

    def begin(self) -> None:
        """Write the journal; from then on the run can be resumed."""
        if not self.journal.path.exists():
            self.journal.save()

    # -- what layers share --------------------------------------------------------------------------------

    def shared(self) -> Shared | None:
        """Read the shared parts of an earlier run."""
        if self.journal.shared is None:
            return None
        file = self.folder / self.journal.shared["file"]
        self._keep(load_file(file), file)
        return self._shared

    def share(self, parts: Shared) -> None:
        """Write shared parts to their own shard."""
        tensors = {f"{place}.{part}": tensor for place, named in parts.items() for part, tensor in named.items()}
        file = self._shard(self.shards - 1)
        write_tensors(file, tensors)
        self._keep(tensors, file)
        self.journal.share(file)

    def _keep(self, tensors: dict[str, Tensor], file: Path) -> None:
        self.index.update(dict.fromkeys(tensors, file.name))
        for name, tensor in tensors.items():
            place, _, part = name.rpartition(".")
            self._shared.setdefault(place, {})[part] = tensor

    @property
    def ends(self) -> EmbeddingAndHead | None:
        """The quantized ones of embedding and head; None where both stay in float."""
        return self.resolved.ends if self.resolved else None

    # -- blocks -------------------------------------------------------------------------------------------

    def finished(self, index: int) -> BlockResult | None:
        """Read a block that an earlier run finished."""
        entry = self.journal.blocks.get(index)
        if entry is None:
            return None
        with safe_open(self.folder / entry["file"], "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        result = BlockResult(index)
        formats = self.resolved.formats if self.resolved else {}
        try:
            for name, known in entry["layers"].items():
                format = formats[name]
                prefix = name + "."
                parts = {k.removeprefix(prefix): tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
                parts.pop(WEIGHT, None)
                bias = parts.pop("bias", None)
                if bias is not None:
                    tensors[prefix + "bias"] = bias
                place = known.get("shared", "")
                parts |= self._shared[place] if place else {}
                quantized = unpack(format, parts, tuple(known["shape"]))
                result.layers[name] = LayerResult(
                    quantized, known["weight_error"], known["output_error"], place, known.get("tokens")
                )
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError):
            # the shard is sound, its digest said so: it is the journal that does not describe it
            raise self.journal.unreadable(f"its block {index} does not fit the shard") from None
        result.changed = tensors
        self._note(result, self.folder / entry["file"])
        return result

    def write(self, result: BlockResult, streamed: StreamedModel) -> None:
        """Write a block to its shard: packed layers, and all other tensors as the source holds them."""
        tensors: dict[str, Tensor] = {}
        for name, layer in result.layers.items():
            for part, tensor in layer.own().items():
                tensors[f"{name}.{part}"] = tensor
            tensors[f"{name}.{WEIGHT}"] = weight_marker(layer.quantized.shape)
        names, packed = streamed.block_tensors(result.index), {f"{name}.weight" for name in result.layers}
        if result.index == NON_BLOCK:
            names, packed = streamed.non_block_tensors(), set(self.ends.weights if self.ends else ())
        for name in names:
            if name not in packed:
                tensors[name] = result.changed[name] if name in result.changed else streamed.stored_tensor(name)
        file = self._shard(result.index + 1)
        write_tensors(file, tensors)
        self._note(result, file, tensors)
        self.journal.add(result.index, file, {name: layer.summary() for name, layer in result.layers.items()})

    def _note(self, result: BlockResult, file: Path, tensors: dict[str, Tensor] | None = None) -> None:
        """Add a block to the index and the report."""
        if tensors is None:
            with safe_open(file, "pt") as opened:
                names = list(opened.keys())
        else:
            names = list(tensors)
        self.index.update(dict.fromkeys(names, file.name))
        for name, layer in result.layers.items():
            self.formats[name] = layer.quantized.format
            self.layers.append({"name": name, **layer.summary()})
            if layer.shared:
                self._places[name] = layer.shared

    def keep(self, streamed: StreamedModel, progress: Progress) -> None:
        """Write all blocks as the source holds them."""
        progress.start("copying weights", len(streamed.blocks))
        for index in range(len(streamed.blocks)):
            if self.finished(index) is None:
                self.write(BlockResult(index), streamed)
            progress.advance()
        progress.finish()

    # -- the rest -----------------------------------------------------------------------------------------

    def complete(self, streamed: StreamedModel) -> Path:
        """Write everything but the blocks; returns the folder, which can be loaded from then on."""
        recipe = self.resolved.recipe if self.resolved else None
        if self.ends is None:  # otherwise it was written first
            file = self._shard(0)
            tensors = {name: streamed.stored_tensor(name) for name in streamed.non_block_tensors()}
            write_tensors(file, tensors)
            self.index.update(dict.fromkeys(tensors, file.name))
            del tensors
        shards = [self.folder / name for name in sorted(set(self.index.values()))]
        entries = [e for f in shards for e in read_header(f).values()]
        total = sum(entry.end - entry.begin for entry in entries)
        write_json(
            self.folder / "model.safetensors.index.json",
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(self.index.items()))},
        )
        config = {**self._config, "dtype": str(stated_dtype(streamed)).removeprefix("torch.")}
        if recipe is not None:
            ends = self.ends.to_dict() if self.ends else None
            config["quantization_config"] = quantization_config(self.formats, recipe.to_dict(), self._places, ends)
            write_text(self.folder / "recipe.yaml", recipe.to_yaml())
        write_json(self.folder / "config.json", config)
        return self.folder

    def finish(self, report: dict[str, Any], documents: dict[str, str]) -> None:
        """Write report and documents, then rename the folder.

        Args:
            report: report.json without the digests of files.
            documents: file name -> text of documents made from the report; their digests are not recorded.
        """
        files = file_records(self.folder, {*documents, "report.json"})
        for name, text in documents.items():
            write_text(self.folder / name, text)
        write_json(self.folder / "report.json", {**report, "files": files})
        publish_work(self.place, self.overwrite)

    def _shard(self, number: int) -> Path:
        return self.folder / f"model-{number + 1:05d}-of-{self.shards:05d}.safetensors"


def _set_apart(folder: Path, shards: set[str]) -> None:
    """Rename the files of the source that have a name of ours in any case: some file systems ignore it."""
    names = sorted(entry.name for entry in folder.iterdir() if entry.name not in shards)
    taken = {name.casefold() for name in names}
    for name in names:
        if name.casefold() in OWN_NAMES or is_shard(name):
            new = FROM_SOURCE + name
            while new.casefold() in taken:
                new = FROM_SOURCE + new
            taken.add(new.casefold())
            (folder / name).rename(folder / new)


def is_shard(name: str) -> bool:
    """Return True for the name of a shard that this module writes, in upper or lower case."""
    return re.fullmatch(r"model-\d+-of-\d+\.safetensors", name, re.IGNORECASE) is not None


def _check_generation_config(folder: Path) -> None:
    """Raise SourceError for a generation config with which the folder could not be loaded."""
    from transformers import GenerationConfig

    if (folder / "generation_config.json").exists():
        with suppress(OSError):  # is no JSON, and loaded as if it were not there
            try:
                GenerationConfig.from_pretrained(str(folder))
            except (TypeError, ValueError, AttributeError) as error:
                raise SourceError(
                    f"The generation_config.json cannot be used ({one_line(error)}); correct or remove it."
                ) from None


def _plain_config(streamed: StreamedModel) -> dict[str, Any]:
    """Return config.json but for the quantization. Raises SourceError where the config cannot be saved."""
    try:
        config: dict[str, Any] = json.loads(streamed.source.config.to_json_string(use_diff=True))
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SourceError(
            f"The config of {streamed.source.name} cannot be saved ({one_line(error)}); change the entry."
        ) from None
    if streamed.untied:
        config["tie_word_embeddings"] = False  # what is stored, for readers that trust the config
    return config


def is_finished(out: Path, identity: dict[str, Any]) -> bool:
    """Return True if `out` holds the result of this job.

    Args:
        out: the folder.
        identity: identity of the job.

    Raises:
        BitmillError: `out` holds something else.
    """
    if not out.exists():
        return False
    try:
        report = read_json(out, "report.json")
        difference = first_difference(report["identity"], json.loads(json.dumps(identity)))
    except (CheckpointError, KeyError, TypeError):
        raise OutputError(f"{out} exists but is no finished bitmill folder; choose another with -o.") from None
    if difference:
        key, old, new = difference
        raise CheckpointError(
            f"{out} is finished already, but its {key} was {old!r} and is now {new!r}; choose another folder."
        )
    remove_leftovers(out)
    return True
