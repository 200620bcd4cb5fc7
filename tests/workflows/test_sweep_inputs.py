"""A sweep of inputs: errors are those of the outputs, and predictions those of a model with rounded inputs."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bitmill.architectures.inputs import hook_inputs
from bitmill.cli.sweep import cell_table
from bitmill.errors import UsageError
from bitmill.evaluation.metrics import score_windows
from bitmill.models.streamed import StreamedModel
from bitmill.progress import Progress
from bitmill.solvers import Statistics
from bitmill.sources.open import open_source
from bitmill.workflows.sweep.cell import LayerInputs
from bitmill.workflows.sweep.inputs import BITS, FLOATS, SIZES, input_cells
from bitmill.workflows.sweep.layers import Layers, RandomInputs
from bitmill.workflows.sweep.run import fill_cells, sweep
from helpers.tiny_models import tiny_model
from helpers.workspace import save_model, write_text

WINDOWS = torch.randint(3, 128, (3, 16), generator=torch.Generator().manual_seed(0))


class GivenInputs(Layers):
    """Layers whose inputs are those of a model on WINDOWS, recorded here."""

    def __init__(self, streamed, inputs):
        super().__init__(streamed)
        self._inputs = inputs

    def _with_inputs(self, index, block, matrices):
        for path, W in matrices.items():
            x = self._inputs[f"{self._streamed.block_name(index)}.{path}"]
            yield path, W, LayerInputs(x, x)


@torch.no_grad()
def recorded(model) -> dict[str, torch.Tensor]:
    inputs = {}
    names = StreamedModel(open_source(model))
    layers = [f"{names.block_name(i)}.{path}" for i in range(len(names.blocks)) for path in names.adapter.linears]
    for name in layers:
        hook = partial(lambda _, args, name: inputs.update({name: args[0].flatten(0, 1)}), name=name)
        model.get_submodule(name).register_forward_pre_hook(hook)
    model(WINDOWS)
    return inputs


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_predictions_are_those_of_rounded_inputs(architecture):
    model = tiny_model(architecture)
    inputs = recorded(copy.deepcopy(model))
    table = [cell for cell in input_cells() if cell.bits == 6 and cell.group_size in ("tensor", 64)]
    streamed = StreamedModel(open_source(model))
    fill_cells(streamed, table, GivenInputs(streamed, inputs), WINDOWS, Progress())
    for cell in table:
        rounded = copy.deepcopy(model)
        for name, x in inputs.items():
            largest = Statistics(max_abs=x.abs().amax(0))
            params = cell._format.fit_inputs(largest)
            hook_inputs(rounded.get_submodule(name), partial(cell._format.effective_inputs, params=params))
        logits = (lambda tokens, m=m: m(tokens).logits for m in (rounded, model))
        expected = score_windows(next(logits), WINDOWS, next(logits))
        found = cell.result()
        for key in ("perplexity", "kl_divergence", "top1_agreement"):
            assert found[key] == pytest.approx(expected[key], rel=1e-3)


@torch.no_grad()
def test_errors_are_those_of_outputs():
    model = tiny_model("llama")
    inputs = recorded(copy.deepcopy(model))
    cell = next(cell for cell in input_cells() if cell.bits == 4 and cell.group_size == "row")
    streamed = StreamedModel(open_source(model))
    fill_cells(streamed, [cell], GivenInputs(streamed, inputs), None, Progress())
    for name, error in cell.errors.items():
        x, W = inputs[name].double(), model.get_submodule(name).weight.double()
        largest = x.abs().amax(1, keepdim=True)
        step = (largest / 7.5).half().double()
        rounded = (x / step).round().clamp(-8, 7) * step
        expected = ((rounded - x) @ W.T).square().sum() / (x @ W.T).square().sum()
        assert error == pytest.approx(float(expected), rel=0.02)
    assert cell.result()["bits_per_input"] == pytest.approx(4 + 16 / 48, abs=0.2)


def test_random_inputs_have_no_verdicts():
    model = tiny_model("llama")
    result = sweep(model, activations=True)
    cells = result["cells"]
    assert len(cells) == 2 * len(BITS) * len(SIZES) + len(FLOATS)
    assert result["inputs"]["source"] == "random"
    assert {cell["verdict"] for cell in cells} == {None}
    assert "random" in result["verdicts"][0]
    assert cell_table(cells, measured=False, of="input").row_count == len(cells)
    errors = {(cell["name"], cell["group_size"]): cell["output_error"] for cell in cells}
    for size in SIZES:
        assert errors["8 bits", size] < errors["6 bits", size] < errors["4 bits", size]
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_outlier_channels_of_a_text(tmp_path):
    folder = save_model(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    block = model.model.layers[0]
    with torch.no_grad():  # the model computes what it did before
        block.input_layernorm.weight[3] *= 100
        for name in ("q_proj", "k_proj", "v_proj"):
            block.self_attn.get_submodule(name).weight[:, 3] /= 100
    text = write_text(tmp_path / "text.txt")
    tokenizer, found = AutoTokenizer.from_pretrained(folder), {}
    for calib in (None, str(text)):
        result = sweep(model, activations=True, calib=calib, windows=2, seqlen=16, tokenizer=tokenizer)
        found[calib] = {(cell["name"], cell["group_size"]): cell for cell in result["cells"]}
    assert result["inputs"]["text"] == str(text)
    row = ("4 bits", "row")
    assert found[str(text)][row]["worst_layer"].startswith("model.layers.0.self_attn")
    assert found[str(text)][row]["output_error"] > 2 * found[None][row]["output_error"]
    assert result["verdicts"][-1].startswith("smallest fair: ")


def test_same_numbers_for_equal_columns():
    streamed = StreamedModel(open_source(tiny_model("llama")))
    layers = RandomInputs(streamed)
    first = layers.of_block(0, streamed.load_block(0))
    again = layers.of_block(1, streamed.load_block(1))
    assert first[0].inputs is again[0].inputs


def test_options_that_do_not_fit():
    model = tiny_model("llama")
    with pytest.raises(UsageError, match="add activations"):
        sweep(model, calib="pydoc")
    with pytest.raises(UsageError, match="not searched"):
        sweep(model, activations=True, search=True)
