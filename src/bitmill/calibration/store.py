"""Statistics of the float model on disk, one file per block, shared by all recipes of a comparison."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bitmill.config.documents import load_json, read_document
from bitmill.errors import CalibrationError, one_line
from bitmill.files import create_text, make_folder, output_errors, write_tensors
from bitmill.numerics.statistics import Statistics

_PARTS = ("gram", "mean_abs", "max_abs")  # tensors of a file, by fields of Statistics


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

    def save(self, index: int, stats: dict[str, Statistics], stages: list[list[str]]) -> None:
        """Write the statistics of a block.

        Args:
            index: the block.
            stats: result of `collect_statistics`, by the first linear of each stage.
            stages: the linears of the block, those that read one tensor in one list.
        """
        tensors: dict[str, Tensor] = {}
        for lead, of_stage in stats.items():
            for part in _PARTS:
                tensors[f"{lead}/{part}"] = getattr(of_stage, part).cpu()
            tensors[f"{lead}/tokens"] = torch.tensor(of_stage.tokens)
        described = {"stages": json.dumps(stages)}
        write_tensors(self._file(index), tensors, described, shared=True)

    def stages(self, index: int) -> list[list[str]]:
        """Return the linears of a block in the order in which they run; those that read one tensor share a list.

        Empty if an earlier version wrote the file.
        """
        with self._opened(index) as file:
            stages: list[list[str]] = load_json((file.metadata() or {}).get("stages", "[]"))
            if not all(
                isinstance(stage, list) and all(isinstance(name, str) for name in stage) for stage in stages
            ):
                raise ValueError("its stages are no names")
            return stages

    def load(self, index: int, device: torch.device | str = "cpu") -> dict[str, Statistics]:
        """Return the statistics of a block, by the first linear of each stage."""
        with self._opened(index, device) as file:
            leads = sorted({key.rpartition("/")[0] for key in file.keys()})  # noqa: SIM118
            return {lead: _read(file, lead) for lead in leads}

    @contextlib.contextmanager
    def _opened(self, index: int, device: torch.device | str = "cpu") -> Iterator[Any]:
        """Open the file of a block; errors of its contents become a CalibrationError."""
        path = self._file(index)
        try:
            with safe_open(path, "pt", str(device)) as file:
                yield file
        except (SafetensorError, OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise CalibrationError(
                f"The statistics in {path} cannot be read ({one_line(error)}); delete {self.folder}."
            ) from None

    def _file(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"


def _read(file: Any, lead: str) -> Statistics:
    """Return the statistics of one input. Raises ValueError where they are none."""
    parts = {part: file.get_tensor(f"{lead}/{part}") for part in _PARTS}
    width = parts["gram"].shape[-1]
    shapes = {"gram": (width, width), "mean_abs": (width,), "max_abs": (width,)}
    for part, tensor in parts.items():
        is_sound = tensor.shape == shapes[part] and tensor.dtype == torch.float32
        if not is_sound or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{lead}/{part} is not finite, or of another shape or type")
    return Statistics(tokens=int(file.get_tensor(f"{lead}/tokens")), **parts)
