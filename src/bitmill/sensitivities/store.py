"""Measured costs on disk: one file for each sensitivity and block, so that an interrupted measurement goes on."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from bitmill.config.documents import read_json_object
from bitmill.errors import CalibrationError
from bitmill.files import make_folder, output_errors, write_text
from bitmill.sensitivities.base import Sensitivity

_LIMIT_BYTES = 64 << 20
Costs = dict[str, dict[str, float]]  # name of a unit -> key of a candidate -> cost


class CostStore:
    """The costs of one sensitivity with its options, in a folder that belongs to one model and one text."""

    def __init__(self, folder: Path, sensitivity: Sensitivity) -> None:
        options = json.dumps(sensitivity.to_dict(), sort_keys=True)
        self.folder = folder / f"{sensitivity.name}-{hashlib.sha256(options.encode()).hexdigest()[:8]}"
        with output_errors(self.folder):
            make_folder(self.folder)

    def load(self, block: int) -> Costs:
        """Return the costs of a block, empty where none are known.

        Raises:
            CalibrationError: the file is damaged.
        """
        path = self._file(block)
        if not path.exists():
            return {}
        data = read_json_object(path, CalibrationError, _LIMIT_BYTES, f"delete {self.folder}")
        if not all(isinstance(costs, dict) and all(map(_is_cost, costs.values())) for costs in data.values()):
            raise CalibrationError(f"The sensitivities in {path} are no costs of units; delete {self.folder}.")
        return data

    def save(self, block: int, costs: Costs) -> None:
        """Write the costs of a block, with those that are known of other candidates."""
        known = self.load(block)
        merged = {unit: {**known.get(unit, {}), **costs.get(unit, {})} for unit in {**known, **costs}}
        with output_errors(self.folder):
            write_text(self._file(block), json.dumps(merged))

    def _file(self, block: int) -> Path:
        return self.folder / (f"block-{block:05d}.json" if block >= 0 else "embedding-and-head.json")


def _is_cost(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
