"""The Python interface: quantize, load, evaluate."""

from __future__ import annotations

from bitmill.data.windows import CalibrationData
from bitmill.workflows.estimate import Estimate, estimate
from bitmill.workflows.evaluate import evaluate
from bitmill.workflows.export.run import Export, export
from bitmill.workflows.imports.run import Import, import_checkpoint
from bitmill.workflows.lint.run import Lint, lint
from bitmill.workflows.load import load, load_tokenizer
from bitmill.workflows.qat import convert_qat, prepare_qat, set_qat_temperature
from bitmill.workflows.quantize.run import Outcome, quantize
from bitmill.workflows.sizes import stored_bits
from bitmill.workflows.tasks import evaluate_tasks
from bitmill.workflows.train import TrainingOutcome, train

__all__ = [
    "CalibrationData",
    "Estimate",
    "Export",
    "Import",
    "Lint",
    "Outcome",
    "TrainingOutcome",
    "convert_qat",
    "estimate",
    "evaluate",
    "evaluate_tasks",
    "export",
    "import_checkpoint",
    "lint",
    "load",
    "load_tokenizer",
    "prepare_qat",
    "quantize",
    "set_qat_temperature",
    "stored_bits",
    "train",
]
