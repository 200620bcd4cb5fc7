"""The float model and its calibration windows in files that any program reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import bitmill
from bitmill.calibration.token_windows import calibration_windows
from bitmill.sources.open import open_source

SAMPLES, SEQLEN, SEED = 128, 512, 0


def float_folder(model: str, files: Path) -> Path:
    """Return the float model as a folder in fp32, which holds every value of fp16 and bf16; made on first use.

    Args:
        model: Name of a demo model.
        files: Folder of the files of this model.
    """
    out = files / "float"
    if not (out / "tokenizer_config.json").is_file():
        bitmill.load(model).save_pretrained(out)
        bitmill.load_tokenizer(model).save_pretrained(out)
    return out


def windows_file(model: str, files: Path) -> Path:
    """Return the calibration windows of `bitmill quantize`, (128, 512) token ids in a .npy file.

    Args:
        model: Name of a demo model.
        files: Folder of the files of this model.
    """
    out = files / f"mix-{SAMPLES}x{SEQLEN}-seed{SEED}.npy"
    if not out.is_file():
        calibration = bitmill.CalibrationData("mix", SAMPLES, SEQLEN, SEED)
        windows, _ = calibration_windows(open_source(model), calibration, "cpu", None)
        out.parent.mkdir(parents=True, exist_ok=True)
        np.save(out, windows.numpy())
    return out
