"""Statistics of the float model on disk, one file per block, shared by all recipes of a comparison."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from bitmill.config.documents import load_json, read_document
from bitmill.errors import CalibrationError, one_line
from bitmill.files import create_text, make_folder, output_errors
from bitmill.numerics.statistics import Statistics
from bitmill.recorded_tensors import read_recorded, write_recorded

_PARTS = ("gram", "mean_abs", "max_abs")  # tensors of a file, by fields of Statistics
_META = "bitmill_statistics"
_LARGEST = "largest_hidden_state"
_UNRECORDED = ("format", "stages")  # metadata of earlier versions


@dataclass(frozen=True)
class StoredBlock:
    """What a store holds of a block.

    Attributes:
        stats: statistics by the first linear of each stage.
        stages: the linears in the order in which they run, those that read one tensor in one list; empty in files
            of earlier versions.
        largest_hidden_state: largest absolute value of the block's outputs; None in files of earlier versions.
    """

    stats: dict[str, Statistics]
    stages: list[list[str]]
    largest_hidden_state: float | None


class StatisticsStore:
    """A folder of statistics for one model and one set of calibration windows."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        """Open or create the folder.

        Args:
            folder: where the statistics are kept.
            identity: plain data that all jobs which share the folder have in common.

        Raises:
            CalibrationError: If the folder was made with another identity.
        """
        self.folder = folder
        with output_errors(folder):
            make_folder(folder)
        file = folder / "identity.json"
        text = json.dumps(identity, sort_keys=True)
        if not file.exists():
            create_text(file, text)
        if read_document(file, "identity", CalibrationError) != text:
            raise CalibrationError(
                f"The statistics in {folder} belong to another model, text, device or version; "
                "choose another folder, or delete it."
            )

    def has(self, index: int) -> bool:
        """Return True if the folder holds the statistics of block `index`."""
        return self._file(index).is_file()

    def save(
        self, index: int, stats: dict[str, Statistics], stages: list[list[str]], largest_hidden_state: float
    ) -> None:
        """Write the statistics of a block.

        Args:
            index: the block.
            stats: result of `collect_statistics`, by the first linear of each stage.
            stages: the linears of the block, those that read one tensor in one list.
            largest_hidden_state: largest absolute value of the block's outputs.
        """
        tensors: dict[str, Tensor] = {}
        for lead, of_stage in stats.items():
            for part in _PARTS:
                tensors[f"{lead}/{part}"] = getattr(of_stage, part).cpu()
            tensors[f"{lead}/tokens"] = torch.tensor(of_stage.tokens)
        about = {"stages": stages, _LARGEST: largest_hidden_state}
        write_recorded(self._file(index), _META, tensors, about, shared=True)

    def load(self, index: int, device: torch.device | str = "cpu") -> StoredBlock:
        """Return what is stored of a block.

        Args:
            index: the block.
            device: where the statistics are needed.

        Raises:
            CalibrationError: the file is damaged.
        """
        path = self._file(index)
        try:
            tensors, about = read_recorded(path, _META, _UNRECORDED)
            leads = sorted({key.rpartition("/")[0] for key in tensors})
            stats = {lead: _read(tensors, lead, device) for lead in leads}
            largest = about.get(_LARGEST)
            if not isinstance(largest, (float, type(None))):
                raise ValueError(f"its {_LARGEST} is no number")
            return StoredBlock(stats, _stages(about.get("stages", [])), largest)
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CalibrationError(
                f"The statistics in {path} cannot be read ({one_line(error)}); delete {self.folder}."
            ) from None

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"


def _stages(stored: Any) -> list[list[str]]:
    """Return the stages of a block, which earlier versions stored as text. Raises ValueError for anything else."""
    stages: list[list[str]] = load_json(stored) if isinstance(stored, str) else stored
    if not all(isinstance(stage, list) and all(isinstance(name, str) for name in stage) for stage in stages):
        raise ValueError("its stages are no names")
    return stages


def _read(tensors: dict[str, Tensor], lead: str, device: torch.device | str) -> Statistics:
    """Return the statistics of one input. Raises ValueError where they are none."""
    parts = {part: tensors[f"{lead}/{part}"] for part in _PARTS}
    width = parts["gram"].shape[-1]
    shapes = {"gram": (width, width), "mean_abs": (width,), "max_abs": (width,)}
    for part, tensor in parts.items():
        is_sound = tensor.shape == shapes[part] and tensor.dtype == torch.float32
        if not is_sound or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{lead}/{part} is not finite, or of another shape or type")
    gram, mean_abs, max_abs = (parts[part].to(device) for part in _PARTS)
    return Statistics(gram, int(tensors[f"{lead}/tokens"]), mean_abs=mean_abs, max_abs=max_abs)
