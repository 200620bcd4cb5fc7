"""Quantization-aware training of live models, and the folders that compute what training ended with."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import bitmill
from bitmill.errors import BitmillError, NumericsError, OutputError, RecipeError, UsageError
from bitmill.formats.uniform import Uniform
from bitmill.recipes.recipe import Recipe
from bitmill.runtime.modules.convolution import QuantConv2d
from bitmill.solvers.nearest import Nearest
from bitmill.training.fake_quant_conv2d import FakeQuantConv2d
from bitmill.training.input_statistics import input_statistics
from helpers.tiny_models import tiny_model

IDS = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(5))
RECIPES = {
    "2 bits": ("rtn", {"bits": 2, "group_size": 32}),
    "symmetric": ("rtn", {"bits": 3, "group_size": 32, "symmetric": True}),
    "hqq": ("hqq", {"bits": 2, "group_size": 32}),
    "codebook": ("nf4", {}),
    "inputs": ("w8a8", {"static": False}),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def prepared(recipe: str = "2 bits", model: str = "llama"):
    method, options = RECIPES[recipe]
    return bitmill.prepare_qat(tiny_model(model), method, **options)


def train(model: nn.Module, steps: int = 20, rate: float = 1e-3) -> list[float]:
    """Train on a few windows; returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(IDS).logits


@every_recipe
def test_folder_equals_trained_model(recipe, tmp_path):
    model = prepared(recipe)
    losses = train(model)
    assert losses[-1] < losses[0]
    expected = logits(model)
    bitmill.convert_qat(model, tmp_path / "out")
    assert torch.equal(logits(model), expected)
    loaded = bitmill.load(tmp_path / "out")
    assert torch.equal(logits(loaded), expected)


def test_training_and_evaluation_agree():
    """Rounded weights in fp32 and packed ones differ by the rounding of sums alone."""
    model = prepared()
    train(model, 3)
    with torch.no_grad():
        trained = model.train()(IDS).logits
    assert torch.allclose(logits(model), trained, atol=1e-3)


def test_weights_scales_and_zeros_learn():
    model = prepared()
    layer = model.model.layers[0].mlp.up_proj
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    assert before.keys() == {"weight", "scale", "zero"}
    train(model)
    assert all(not torch.equal(p, before[name]) for name, p in layer.named_parameters())
    assert layer.quantized().params["zero"].unique().numel() <= 4


def test_soft_rounding_while_training():
    model = prepared()
    hard = logits(model)
    layer = model.model.layers[0].mlp.up_proj
    bitmill.set_qat_temperature(model, 0.5)
    assert not torch.equal(layer.train()(), layer.quantized().dequantize())
    assert torch.equal(logits(model), hard)  # evaluation rounds to the nearest level
    losses = train(model, 10)
    assert losses[-1] < losses[0]
    bitmill.set_qat_temperature(model, 0)
    assert torch.equal(layer.train()(), layer.quantized().dequantize())
    for wrong in (-1.0, float("nan")):
        with pytest.raises(UsageError, match="temperature is"):
            bitmill.set_qat_temperature(model, wrong)
    with pytest.raises(UsageError, match="no layers of prepare_qat"):
        bitmill.set_qat_temperature(tiny_model("llama"), 0.5)


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_other_architectures(architecture, tmp_path):
    model = prepared(model=architecture)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        output = model(IDS)[0].float().square().mean()
        optimizer.zero_grad()
        output.backward()
        optimizer.step()
    with torch.no_grad():
        expected = model.eval()(IDS)[0]
        bitmill.convert_qat(model, tmp_path / "out")
        assert torch.equal(bitmill.load(tmp_path / "out")(IDS)[0], expected)


def test_gradient_checkpointing_and_autocast():
    model = prepared()
    model.gradient_checkpointing_enable()
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert model.model.layers[0].mlp.up_proj.scale.grad.abs().sum() > 0


def test_state_dict_resumes_training(tmp_path):
    model = prepared()
    train(model, 2)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = prepared()
    before = logits(other)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(logits(other), logits(model))
    assert not torch.equal(logits(other), before)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    model = prepared()
    data = [{"input_ids": ids, "labels": ids} for ids in IDS]
    arguments = TrainingArguments(
        tmp_path / "runs", max_steps=20, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[],
        save_strategy="no", use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    expected = logits(model)
    bitmill.convert_qat(model, tmp_path / "out")
    assert torch.equal(logits(bitmill.load(tmp_path / "out")), expected)


class Convolutional(nn.Module):
    """A patch convolution, blocks of linears, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, 4)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in "ab")
        )
        self.head = nn.Linear(32, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.patch(pixels).flatten(2).mT).mean(1))


@pytest.mark.parametrize("method", ["rtn", "power_of_two", "apot", "post", "gptq", "asq"])
def test_module_without_config(method, tmp_path):
    torch.manual_seed(0)
    batches = [torch.randn(4, 3, 16, 16) for _ in "ab"] if method in ("gptq", "asq") else None
    model = bitmill.prepare_qat(
        Convolutional(), method, calib=batches, bits=3, group_size=32, rules=["head=float"]
    )
    assert isinstance(model.head, nn.Linear)
    assert isinstance(model.patch, FakeQuantConv2d)
    pixels, labels = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(pixels), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected = model.eval()(pixels)
        with pytest.raises(UsageError, match="no model of transformers"):
            bitmill.convert_qat(model, tmp_path / "out")
        assert torch.equal(bitmill.convert_qat(model)(pixels), expected)
    assert isinstance(model.patch, QuantConv2d)


CONVOLUTIONS = [
    nn.Conv2d(3, 8, 3),
    nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), bias=False),
    nn.Conv2d(4, 8, 4, padding="same", padding_mode="reflect"),
]


@torch.no_grad()
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_convolutions_run_as_matrices(conv):
    """Packed and trained convolutions compute what torch does with the decoded weights, in a shape of its own."""
    pictures = torch.randn(2, conv.in_channels, 9, 11)
    model = bitmill.prepare_qat(nn.Sequential(conv), "rtn", bits=4, group_size="row")
    layer = model[0]
    packed = layer.quant_linear()
    decoded, shape = packed.float_module()
    decoded = decoded.to_empty(device="cpu")
    decoded.weight.copy_(layer.quantized().dequantize().view(shape))
    decoded.bias.copy_(torch.zeros(8) if conv.bias is None else conv.bias)
    expected = decoded(pictures)
    assert torch.allclose(packed(pictures), expected, atol=1e-5)
    assert torch.allclose(layer.train()(pictures), expected, atol=1e-5)


def test_scales_of_inputs_learn():
    torch.manual_seed(0)
    pixels = torch.randn(8, 3, 16, 16)
    model = bitmill.prepare_qat(
        Convolutional(), "asq", calib=[pixels], bits=4, adaptive=False, rules=["head=float"]
    )
    model(pixels).square().sum().backward()
    assert float(model.patch.input_scale.grad.abs()) > 0
    linear = Convolutional()
    expected = (pixels.unfold(2, 4, 4).unfold(3, 4, 4).abs()).amax()
    found = input_statistics(linear, ["patch"], [pixels[:4], {"pixels": pixels[4:]}])["patch"]
    assert found.tokens == 8 * 16
    assert float(found.max_abs.amax()) == float(expected)
    assert found.gram.shape == (48, 48)


def test_convolutions_with_groups_stay_in_float():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1), nn.ConvTranspose2d(8, 4, 2))
    bitmill.prepare_qat(model, "rtn", bits=4, group_size="row")
    assert [type(layer) for layer in model] == [nn.Conv2d, FakeQuantConv2d, nn.ConvTranspose2d]


def test_refused():
    for calib, words in [([], "calib is"), (["text"], "calib is"), ([torch.zeros(2, 3)], "cannot run on a batch")]:
        with pytest.raises(UsageError, match=words):
            bitmill.prepare_qat(Convolutional(), "gptq", calib=calib)
    for method, words in [("gptq", "calibration text"), ("awq", "does more"), ("omniquant", "does more")]:
        with pytest.raises(RecipeError, match=words):
            bitmill.prepare_qat(tiny_model("llama"), method)
    with pytest.raises(UsageError, match="quantized already"):
        bitmill.prepare_qat(prepared(), "rtn")
    with pytest.raises(UsageError, match="prepare_qat"):
        bitmill.convert_qat(tiny_model("llama"))
    with pytest.raises(UsageError, match="no linear layer"):
        bitmill.prepare_qat(nn.Conv2d(3, 3, 1), Recipe("test", Uniform(2), Nearest()))
    with pytest.raises(BitmillError, match="unheard_of"):
        bitmill.prepare_qat(tiny_model("llama"), "rtn", unheard_of=1)


def test_nothing_changes_where_conversion_is_refused(tmp_path):
    model = prepared()
    before = logits(model)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("mine")
    with pytest.raises(OutputError):
        bitmill.convert_qat(model, tmp_path / "out")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.scale[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"scale of 'model.layers.0.mlp.up_proj'"):
        bitmill.convert_qat(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.scale[0, 0] = 0.01
    assert logits(model).shape == before.shape
