"""Pictures of a folder as a model reads them, and their labels.

Pictures in subfolders are labelled with the name of the outermost one, as torchvision's ImageFolder does. Each one
belongs to a part that its path alone decides, so that parts stay as they are when pictures are added: a fifth is
measured on ("eval"), a fifth is for choices ("choose"), and three fifths calibrate ("calib").
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitmill.config.paths import user_path
from bitmill.data.text import TextSource
from bitmill.errors import CalibrationError, one_line

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_RATIO = 20  # of the sides of a picture: scaling the shorter one would make the other one too long
PARTS = {"eval": (0,), "choose": (1,), "calib": (2, 3, 4), "all": (0, 1, 2, 3, 4)}
_FIFTHS = 5


class PictureWindows:
    """The pictures of a folder; a window is one picture.

    Args:
        source: a folder of pictures.
        processor: image processor of transformers, as `AutoImageProcessor` loads it.

    Raises:
        CalibrationError: the source is no folder, or holds no picture.
    """

    prefix: tuple[int, ...] = ()

    def __init__(self, source: TextSource, processor: Any) -> None:
        folder = user_path(source) if isinstance(source, str) else None
        if folder is None or not folder.is_dir():
            raise CalibrationError(
                f"The model reads pictures, and {source!r} is no folder of them; give one with --calib, or with "
                "--text to measure on."
            )
        self.folder, self._processor = folder, processor
        found = sorted(path for path in folder.rglob("*") if _is_picture(path, folder))
        if not found:
            raise CalibrationError(f"{folder} holds no picture; its files would end in {', '.join(SUFFIXES)}.")
        self._by_label = _by_label(found, folder)

    @property
    def labels(self) -> list[str]:
        """The sorted labels; one, the empty text, for pictures without labels."""
        return list(self._by_label)

    def calibration(self, samples: int, seqlen: int, seed: int) -> Tensor:
        """Return random pictures of the part "calib".

        Args:
            samples: number of pictures.
            seqlen: not used.
            seed: of the choice.

        Returns:
            fp32 (samples, channels, height, width).

        Raises:
            CalibrationError: the part has fewer pictures, or one cannot be read.
        """
        part = [path for paths in self._part("calib").values() for path in paths]
        if not 0 < samples <= len(part):
            raise CalibrationError(
                f"samples is {samples}, and {self.folder} has {len(part)} pictures to calibrate on, three fifths "
                "of all; lower --samples, or add pictures."
            )
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))
        return self.read([part[index] for index in order[:samples].tolist()])

    def held_out(self, split: str, seqlen: int, windows: int | None) -> Tensor:
        """Return the pictures of a part, label by label.

        Args:
            split: "eval", "choose", "calib" or "all".
            seqlen: not used.
            windows: number of pictures, equally many of each label; all of the part without it.

        Returns:
            fp32 (pictures, channels, height, width).

        Raises:
            CalibrationError: the part has no picture, or one cannot be read.
        """
        chosen = [path for paths in self._chosen(split, windows).values() for path in paths]
        if not chosen:
            raise CalibrationError(f"{self.folder} has no picture in the part {split!r}; add pictures.")
        return self.read(chosen)

    def domains(self, split: str, seqlen: int, windows: int | None) -> dict[str, int]:
        """Return the number of pictures of each label in `held_out`, in its order; empty without labels."""
        return {} if self.labels == [""] else {k: len(paths) for k, paths in self._chosen(split, windows).items()}

    def describe(self, part: str, windows: int | None = None) -> dict[str, Any]:
        """Return for reports that a window is a picture, and how many labels there are."""
        return {"unit": "pictures", "labels": 0 if self.labels == [""] else len(self.labels)}

    def read(self, paths: Sequence[Path]) -> Tensor:
        """Return pictures as the model's processor makes them.

        Args:
            paths: their files.

        Returns:
            fp32 (pictures, channels, height, width).

        Raises:
            CalibrationError: a file holds no picture that can be read, or they differ in size once processed.
        """
        read = [_processed(path, self._processor) for path in paths]
        if len({picture.shape for picture in read}) > 1:
            raise CalibrationError(
                f"The pictures of {self.folder} have several sizes behind the model's image processor; let its "
                "preprocessor_config.json crop or scale them to one size."
            )
        return torch.stack(read)

    def _part(self, split: str) -> dict[str, list[Path]]:
        fifths = PARTS[split]
        return {
            label: [path for fifth, _, path in ordered if fifth in fifths]
            for label, ordered in self._by_label.items()
        }

    def _chosen(self, split: str, windows: int | None) -> dict[str, list[Path]]:
        """Return label -> paths of a part, at most `windows` in all, equally many of each label."""
        part = self._part(split)
        if windows is None:
            return part
        each, extra = divmod(windows, len(part))
        return {label: paths[: each + (at < extra)] for at, (label, paths) in enumerate(part.items())}


def _is_picture(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return path.suffix.lower() in SUFFIXES and not hidden and path.is_file()


def _by_label(paths: Sequence[Path], folder: Path) -> dict[str, list[tuple[int, str, Path]]]:
    """Return label -> (fifth, digest, path) of its pictures, in an order that their names alone decide."""
    labelled: dict[str, list[tuple[int, str, Path]]] = {}
    for path in paths:
        inside = path.relative_to(folder)
        digest = hashlib.sha256(inside.as_posix().encode()).hexdigest()
        label = inside.parts[0] if len(inside.parts) > 1 else ""
        labelled.setdefault(label, []).append((int(digest, 16) % _FIFTHS, digest, path))
    if len(labelled) == 1:
        return {"": sorted(*labelled.values())}
    return {label: sorted(labelled[label]) for label in sorted(labelled)}


def _processed(path: Path, processor: Any) -> Tensor:
    """Return a picture (channels, height, width). Raises CalibrationError."""
    try:
        from PIL import Image
    except ImportError:
        raise CalibrationError("Pictures are read with Pillow; install bitmill[vision].") from None
    try:
        with Image.open(path) as opened:
            width, height = opened.size
            if max(width, height) > MAX_RATIO * min(width, height):
                raise ValueError(f"it has {width} x {height} pixels, more than {MAX_RATIO} times as long as wide")
            picture = opened.convert("RGB")  # the first frame of several, as Pillow converts it
        pixels: Tensor = processor(images=picture, return_tensors="pt")["pixel_values"][0].float()
    except Exception as error:  # Pillow and processors raise all sorts for damaged files
        raise CalibrationError(
            f"{path} holds no picture that can be read ({one_line(error)}); remove it, or convert it again."
        ) from None
    if not bool(torch.isfinite(pixels).all()):
        raise CalibrationError(f"{path} gives NaN or Inf behind the model's image processor; remove it.")
    return pixels


def checked_pictures(pictures: Tensor) -> Tensor:
    """Return a caller's pictures as fp32 on the CPU.

    Args:
        pictures: (pictures, channels, height, width), behind the model's image processor.

    Raises:
        CalibrationError: they have another shape or type, or hold NaN or Inf.
    """
    if pictures.is_meta or pictures.dim() != 4 or not pictures.numel() or not pictures.is_floating_point():
        raise CalibrationError(
            f"The calibration tensor is {str(pictures.dtype).removeprefix('torch.')} of shape "
            f"{tuple(pictures.shape)}; give floating-point pictures (pictures, channels, height, width)."
        )
    pictures = pictures.to("cpu", torch.float32)
    if not bool(torch.isfinite(pictures).all()):
        raise CalibrationError("The calibration pictures hold NaN or Inf; give finite ones.")
    return pictures
