"""Vision models in the same commands: a folder of pictures calibrates and measures them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import bitmill
from bitmill.architectures.adapter import ADAPTERS
from bitmill.errors import CalibrationError
from bitmill.recipes.method import build_recipe
from bitmill.runtime.modules.linear import QuantLinear
from bitmill.tuners import TUNERS
from helpers.tiny_models import VISION_ADAPTERS, tiny_vision_model

PICTURES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path):
    """Pictures of three labels, and a function that saves a tiny model with an image processor."""
    image = pytest.importorskip("PIL.Image")
    colours = {"red": (200, 0, 0), "green": (0, 200, 0), "blue": (0, 0, 200)}
    generator = torch.Generator().manual_seed(0)
    for label, colour in colours.items():
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for number in range(30):
            noise = torch.randint(0, 55, (20, 20, 3), generator=generator)
            pixels = (noise + torch.tensor(colour)).to(torch.uint8).numpy()
            image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{number}.png")
    return tmp_path


def save(adapter: str, folder) -> str:
    from transformers import ViTImageProcessor

    model = tiny_vision_model(adapter)
    model.save_pretrained(folder / adapter)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / adapter)
    return str(folder / adapter)


@pytest.mark.parametrize("adapter", VISION_ADAPTERS)
def test_a_live_vision_model_is_quantized_on_pictures(adapter):
    model = tiny_vision_model(adapter)
    before = model(PICTURES)[0].detach()
    outcome = bitmill.quantize(model, "gptq", bits=8, group_size=16, calib=PICTURES, measure=0)
    assert len(outcome.report["layers"]) == (19 if "swin" in adapter else 12)  # merging of patches included
    after = model(PICTURES)[0]
    assert 0 < float((after - before).norm() / before.norm()) < 0.05


@pytest.mark.parametrize("adapter", ["dinov2", "vit_classifier", "swin", "swin_classifier"])
def test_folder_of_a_vision_model(adapter, folder):
    import transformers

    model, out = save(adapter, folder), folder / "out"
    calib = bitmill.CalibrationData(str(folder / "pictures"), samples=8)
    bitmill.quantize(model, "gptq", bits=8, group_size=16, calib=calib, out=out, measure=12)
    checkpoint = bitmill.load(out)
    auto = transformers.AutoModelForImageClassification if "classifier" in adapter else transformers.AutoModel
    assert torch.equal(auto.from_pretrained(out)(PICTURES)[0], checkpoint(PICTURES)[0])
    figures = bitmill.evaluate(out, text=str(folder / "pictures"), reference=model, windows=0)
    assert figures["cosine_similarity"] > 0.99
    assert figures["pictures"] == figures["windows"]
    assert 0 <= figures["knn_accuracy"] <= 1
    low, high = figures["knn_change_interval"]
    assert low <= figures["knn_change"] <= high
    assert ("top1_accuracy" in figures) == ("classifier" in adapter)


@pytest.mark.parametrize(("adapter", "log"), [("dinov2", "adalog"), ("dinov2", "uniform"), ("swin", "log2")])
def test_adalog_is_stored_and_loaded(adapter, log, folder):
    from transformers import AutoModel

    model, out = save(adapter, folder), folder / "out"
    calib = bitmill.CalibrationData(str(folder / "pictures"), samples=8)
    outcome = bitmill.quantize(model, "adalog", bits=4, act_bits=4, log=log, calib=calib, out=out, measure=4)
    assert outcome.report["measured"][0]["cosine_similarity"] > 0.5
    loaded = AutoModel.from_pretrained(out)
    parameters = loaded.config.quantization_config.to_dict()["recipe"]["attention"]["probabilities"]["parameters"]
    assert len(parameters) == 2
    assert ("base" in parameters[0]) == (log == "adalog")
    live = AutoModel.from_pretrained(model)
    bitmill.quantize(live, "adalog", bits=4, act_bits=4, log=log, calib=calib_tensor(model, folder), measure=0)
    with torch.no_grad():
        assert torch.equal(loaded(PICTURES)[0], bitmill.load(out)(PICTURES)[0])
        assert torch.equal(loaded(PICTURES)[0], live(PICTURES)[0])
    report = (out / "README.md").read_text(encoding="utf-8")
    assert "simulated" in report


def test_a_block_of_rounded_activations_is_reconstructed():
    recipe = build_recipe("adalog", {"bits": 3, "act_bits": 3})
    tuned = replace(recipe, tuners=(TUNERS.get("block_finetune")(epochs=2),))

    def error(recipe) -> float:
        model = tiny_vision_model("dinov2")
        with torch.no_grad():
            expected = model(PICTURES)[0].clone()
            bitmill.quantize(model, recipe, calib=PICTURES, measure=0)
            return float((model(PICTURES)[0] - expected).norm())

    assert error(tuned) < error(recipe)


def calib_tensor(model: str, folder) -> torch.Tensor:
    from transformers import AutoImageProcessor

    from bitmill.data.pictures import PictureWindows

    return PictureWindows(str(folder / "pictures"), AutoImageProcessor.from_pretrained(model)).calibration(8, 0, 0)


def test_commands_of_a_vision_model(folder, capsys):
    from bitmill.cli.main import main

    model, out, pictures = save("vit", folder), str(folder / "out"), str(folder / "pictures")
    small = ["--calib", pictures, "--samples", "4", "--measure", "6", "-o", out]
    assert main(["quantize", model, "--method", "rtn", "--set", "group_size=16", *small]) == 0
    assert "pictures" in (folder / "out" / "README.md").read_text(encoding="utf-8")
    assert main(["eval", out, "--text", pictures, "--windows", "6"]) == 0
    assert "6 pictures" in capsys.readouterr().out
    assert main(["inspect", out]) == 0
    assert main(["verify", out]) == 0


@pytest.mark.parametrize("adapter", ["dinov2", "vit_classifier", "swin_classifier"])
def test_embedding_of_patches_and_head_are_packed(adapter, folder):
    import transformers

    model, out = save(adapter, folder), folder / "out"
    bitmill.quantize(model, "rtn", bits=8, group_size=16, head_bits=8, out=out, measure=0)
    checkpoint = bitmill.load(out)
    packed = {name for name, module in checkpoint.named_modules() if isinstance(module, QuantLinear)}
    outside = {name for name in packed if name.endswith(("projection", "classifier"))}
    assert len(outside) == (2 if "classifier" in adapter else 1)
    auto = transformers.AutoModelForImageClassification if "classifier" in adapter else transformers.AutoModel
    dense = bitmill.load(out, dense=True)
    with torch.no_grad():
        found, expected = checkpoint(PICTURES)[0], tiny_vision_model(adapter)(PICTURES)[0]
        assert torch.equal(auto.from_pretrained(out)(PICTURES)[0], found)
        assert torch.allclose(dense(PICTURES)[0], found, rtol=1e-3, atol=1e-3)
        assert 0 < float((found - expected).norm() / expected.norm()) < 0.05
    live = tiny_vision_model(adapter)
    bitmill.quantize(live, "rtn", bits=8, group_size=16, head_bits=8, measure=0)
    with torch.no_grad():
        assert torch.equal(live(PICTURES)[0], found)


def test_a_text_is_no_folder_of_pictures(folder):
    model = save("vit", folder)
    with pytest.raises(CalibrationError, match="'pydoc' is no folder"):
        bitmill.quantize(model, "gptq", calib="pydoc", out=folder / "out")
    assert not (folder / "out").exists()


def test_every_vision_adapter_lists_the_linear_layers_of_a_block():
    for name in (name for name in VISION_ADAPTERS if not ADAPTERS.get(name).inferred):
        blocks = tiny_vision_model(name).get_submodule(ADAPTERS.get(name).blocks)
        linears = {n for n, m in blocks[0].named_modules() if isinstance(m, torch.nn.Linear)}
        assert linears == set(ADAPTERS.get(name).linears)
