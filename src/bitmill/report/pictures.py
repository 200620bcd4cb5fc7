"""The results of a comparison of vision models, as models that validate results.json, and its table.

Pictures are data URIs of PNG files, so that the page is made from this file alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from bitmill.report import formatting

_PNG = r"^data:image/png;base64,[A-Za-z0-9+/=]*$"
_COLUMNS = {  # figure -> title; those that no variant has are left out
    "cosine_similarity": "cosine",
    "knn_accuracy": "k-NN",
    "top1_accuracy": "top-1",
    "top1_agreement": "same class",
    "neighbour_agreement": "same neighbour",
}


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class PictureExample(_StrictModel):
    """A picture, and its feature maps.

    Attributes:
        picture: as the model reads it.
        float_map: features of its patches in the float model, the first three principal components as colours.
        maps: variant -> those of the quantized model, in the float model's components.
        cosines: variant -> mean cosine between the features of a patch in both models.
    """

    picture: str = Field(pattern=_PNG)
    float_map: str = Field(pattern=_PNG)
    maps: dict[str, str] = {}
    cosines: dict[str, float] = {}


class PictureVariant(_StrictModel):
    """One recipe: its state, cost and quality.

    figures: of docs/vision.md, against the float model.
    """

    name: str
    method: str
    bits: int | None = None
    status: Literal["done", "failed", "not_applicable", "pending"] = "pending"
    reason: str | None = None
    recipe: dict[str, Any] | None = None
    bits_per_weight: float | None = None
    size_bytes: int | None = None
    quantize_time_s: float | None = None
    figures: dict[str, int | float | list[float]] = {}


class PictureResults(_StrictModel):
    """All results of one comparison of a vision model."""

    kind: Literal["pictures"] = "pictures"
    bitmill: str
    command: str
    terms: dict[str, Any]  # under which all variants were made and measured
    variants: list[PictureVariant]
    examples: list[PictureExample] = []


def picture_rows(results: PictureResults) -> tuple[list[str], list[list[str]]]:
    """Return the titles and the rows of the table, the most bits and the highest cosine first."""
    figures = [name for name in _COLUMNS if any(name in variant.figures for variant in results.variants)]
    titles = ["variant", *(_COLUMNS[name] for name in figures), "bits/w", "on disk", "made in"]
    rows = []
    for variant in picture_order(results):
        shown = [_share(name, variant.figures.get(name)) for name in figures]
        cost = (variant.bits_per_weight, variant.size_bytes, variant.quantize_time_s)
        kinds: tuple[Callable[[Any], str], ...] = (formatting.number, formatting.size, formatting.duration)
        rows.append(
            [variant.name, *shown, *("-" if value is None else show(value) for value, show in zip(cost, kinds))]
        )
    return titles, rows


def picture_order(results: PictureResults) -> list[PictureVariant]:
    """Return the variants by falling bits, then falling cosine; unmeasured ones come last."""

    def place(variant: PictureVariant) -> tuple[bool, int, float, str]:
        cosine = variant.figures.get("cosine_similarity")
        number = float(cosine) if isinstance(cosine, (int, float)) else 0.0
        return cosine is None, -(variant.bits or 0), -number, variant.name

    return sorted(results.variants, key=place)


def _share(name: str, value: int | float | list[float] | None) -> str:
    if not isinstance(value, (int, float)):
        return "-"
    return f"{value:.4f}" if name == "cosine_similarity" else f"{value:.1%}"
