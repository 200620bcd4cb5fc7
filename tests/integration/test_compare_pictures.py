"""`bitmill compare` of a vision model: figures against the float model, and a page with feature maps."""

from __future__ import annotations

import json

import pytest
import torch

from bitmill.cli.main import main
from bitmill.evaluation.feature_maps import FeatureColours, patch_cosine
from helpers.tiny_models import tiny_vision_model


@pytest.fixture
def folder(tmp_path):
    from transformers import ViTImageProcessor

    image = pytest.importorskip("PIL.Image")
    generator = torch.Generator().manual_seed(0)
    for label in ("red", "blue"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(20):
            noise = torch.randint(0, 255, (20, 20, 3), generator=generator).to(torch.uint8)
            image.fromarray(noise.numpy()).save(tmp_path / "pictures" / label / f"{number}.png")
    tiny_vision_model("dinov2").save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    return tmp_path


def test_compare_vision_models(folder, capsys):
    out, pictures = folder / "out", str(folder / "pictures")
    command = ["compare", str(folder / "model"), "--methods", "rtn", "--bits", "8,2", "-o", str(out)]
    command += ["--calib", pictures, "--samples", "4", "--windows", "8", "--set", "rtn.group_size=16"]
    assert main(command) == 0
    assert "rtn-8bit" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    fine, coarse = results["variants"]
    assert fine["figures"]["cosine_similarity"] > coarse["figures"]["cosine_similarity"]
    assert fine["figures"]["pictures"] == results["terms"]["evaluation"]["pictures"] > 3
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 3 * 4  # three pictures: itself, float, two variants
    assert not (out / "cells" / "rtn-8bit").exists()
    before = (out / "results.json").read_bytes()
    assert main(command) == 0  # nothing is missing
    assert (out / "results.json").read_bytes() == before
    assert main([*command, "--seed", "3"]) != 0
    assert "seed was 0 and is now 3" in capsys.readouterr().err


def test_colours_are_those_of_the_float_model():
    features = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(1))
    colours = FeatureColours(features)
    assert colours.picture(features) == colours.picture(features.clone())
    assert colours.picture(features) != colours.picture(-features)
    assert patch_cosine(features, features) == pytest.approx(1, abs=1e-6)
    FeatureColours(features[..., :2]).picture(features[..., :2])  # of fewer numbers than colours
