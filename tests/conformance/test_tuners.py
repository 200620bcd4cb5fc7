"""Laws of tuners, for every registered tuner: the error of a block falls, and the measured block is stored."""

from __future__ import annotations

import copy
import dataclasses
import json
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import bitmill
from bitmill.errors import RecipeError
from bitmill.formats import Format
from bitmill.formats.quantized_inputs import QuantizedInputs
from bitmill.formats.uniform import Uniform
from bitmill.models.streamed import StreamedModel
from bitmill.pipeline import BlockResult, run
from bitmill.recipes.recipe import Recipe
from bitmill.solvers import Solver
from bitmill.solvers.beam import BeamSearch
from bitmill.solvers.gptq import GPTQ
from bitmill.solvers.nearest import Nearest
from bitmill.sources.module import ModuleSource
from bitmill.tuners import TUNERS, BlockTask, Tuner
from bitmill.tuners.base import relative_error
from helpers.cases import all_wrappers, few_formats, varied
from helpers.jobs import job_of
from helpers.selection import FULL, one_of_each, thin
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(7))
MODELS = thin(["llama", "opt", "gpt2", "gemma2"], ["llama", "gpt2"])
DEFAULTS = [kind() for _, kind in TUNERS.items()]
ALL = [tuner for _, kind in TUNERS.items() for tuner in (kind(), *varied(kind))]
BRIEF = {"iters": 10, "epochs": 1}  # short training, for tests that do not measure its effect
EACH_FORMAT = one_of_each([*few_formats(), *all_wrappers()], type)
every_tuner = pytest.mark.parametrize("tuner", ALL, ids=repr)


class Keep:
    """A sink that keeps the blocks, and finds those that it is given finished."""

    def __init__(self, done: list[BlockResult] | None = None) -> None:
        self.done, self.blocks = done or [], list[BlockResult]()

    def finished(self, index: int) -> BlockResult | None:
        return self.done[index] if index < len(self.done) else None

    def write(self, result: BlockResult, streamed: StreamedModel) -> None:
        self.blocks.append(result)

    def shared(self) -> None:
        return None

    def share(self, parts: dict[str, dict[str, Tensor]]) -> None:
        self.parts = parts


@dataclasses.dataclass(frozen=True)
class Watch(Tuner):
    """Does nothing but to note how far the block is from the float one."""

    name = "watch"  # type: ignore[assignment]
    seen: list = dataclasses.field(default_factory=list)
    measure: object = BlockTask.error

    def after(self, task: BlockTask) -> None:
        self.seen.append(self.measure(task))


def recipe_of(tuner: Tuner, format: Format | None = None, solver: Solver | None = None) -> Recipe:
    return Recipe("test", format or Uniform(2, 16), solver or Nearest(), tuners=(tuner,))


def errors(tuner: Tuner | None = None, model: str = "llama", measure=BlockTask.error, **choices) -> list[float]:
    """The error of each block of a tiny model, as the tuner left it."""
    watch, sink = Watch(measure=measure), Keep()
    recipe = recipe_of(watch, **choices)
    if tuner:
        recipe = dataclasses.replace(recipe, tuners=(tuner, watch))
    run(job_of(StreamedModel(ModuleSource(tiny_model(model))), recipe, WINDOWS), sink)
    return watch.seen


@torch.no_grad()
def hidden_states(model: nn.Module, blocks: str) -> list[Tensor]:
    """Return the outputs of every block on the windows."""
    seen: list[Tensor] = []

    def note(module, args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    hooks = [block.register_forward_hook(note) for block in model.get_submodule(blocks)]
    model(WINDOWS)
    for hook in hooks:
        hook.remove()
    return seen


def brief(tuner: Tuner) -> Tuner:
    """The same after little training."""
    return dataclasses.replace(tuner, **{name: steps for name, steps in BRIEF.items() if hasattr(tuner, name)})


def enough(tuner: Tuner) -> Tuner:
    """The whole training in a full run, a little in a brief one."""
    return tuner if FULL else brief(tuner)


@cache
def untuned(format: Format, solver: Solver | None, measure) -> float:
    """The error of the first block without a tuner."""
    return errors(format=format, solver=solver, measure=measure)[0]


def quantize(recipe: Recipe, model: nn.Module, out=None, **options):
    return bitmill.quantize(model, recipe, calib=WINDOWS, out=out, measure=0, **options)


@every_tuner
def test_error_falls(tuner):
    assert errors(enough(tuner))[0] < untuned(Uniform(2, 16), None, BlockTask.error)


@every_tuner
def test_error_falls_with_rounded_inputs(tuner):
    format = QuantizedInputs(Uniform(3, 16), Uniform(4, "row"))
    if reason := tuner.unsupported_reason(format):
        assert reason.endswith(".")
        return
    assert errors(enough(tuner), format=format)[0] < untuned(format, None, BlockTask.error)


@every_tuner
@pytest.mark.parametrize(("bits", "solver"), [(8, Nearest(search=True)), (2, GPTQ())], ids=repr)
def test_never_worse(tuner, bits, solver):
    """The error never rises, even where many bits or a solver leave little to gain."""
    if reason := tuner.unsupported_solver_reason(solver):
        assert reason.endswith(".")
        with pytest.raises(RecipeError, match="cannot be built"):
            recipe_of(tuner, solver=solver)
        solver = Nearest()
    format = Uniform(bits, 16)
    tuned = errors(enough(tuner), format=format, solver=solver)[0]
    assert tuned <= untuned(format, solver, BlockTask.error)


@every_tuner
@pytest.mark.parametrize("model", MODELS)
def test_stored_error_equals_measured(tuner, model, tmp_path):
    """The error of each block of the stored model equals the error that the tuner reported."""
    tuner, source = brief(tuner), tiny_model(model)
    streamed = StreamedModel(ModuleSource(copy.deepcopy(source)))
    quantize(recipe_of(tuner), source, tmp_path / "out")
    path = streamed.adapter.blocks
    before, after = hidden_states(source, path), hidden_states(bitmill.load(tmp_path / "out"), path)
    found = [float(relative_error(b, a).mean()) for a, b in zip(before, after)]
    assert found == pytest.approx(errors(tuner, model), rel=1e-3)


@every_tuner
def test_deterministic_bytes(tuner, tmp_path):
    for out in ("one", "other"):
        torch.manual_seed(len(out))  # must not matter: each draw has a generator of its own
        model = tiny_model("llama")
        quantize(recipe_of(brief(tuner)), model, tmp_path / out)
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes(), file


@every_tuner
def test_resumed_run_keeps_tuning(tuner):
    """Finished blocks keep their tuned norms, so that the next block is identical bit by bit."""
    recipe = recipe_of(brief(tuner))
    whole, rest = Keep(), Keep()
    run(job_of(StreamedModel(ModuleSource(tiny_model("llama"))), recipe, WINDOWS), whole)
    rest.done = whole.blocks[:1]
    run(job_of(StreamedModel(ModuleSource(tiny_model("llama"))), recipe, WINDOWS), rest)
    first, second = whole.blocks[1], rest.blocks[0]
    assert first.changed.keys() == second.changed.keys()
    assert all(torch.equal(tensor, second.changed[name]) for name, tensor in first.changed.items())
    for name, layer in first.layers.items():
        mine, theirs = layer.quantized.pack(), second.layers[name].quantized.pack()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in mine.items())


@pytest.mark.parametrize("tuner", thin([t for t in ALL if not getattr(t, "seed", 0)], DEFAULTS), ids=repr)
@pytest.mark.parametrize("format", EACH_FORMAT, ids=repr)
def test_formats_tuned_or_refused(tuner, format):
    reason = tuner.unsupported_reason(format)
    if reason:
        assert reason.endswith(".")
        with pytest.raises(RecipeError, match="cannot be built"):
            recipe_of(tuner, format)
        return
    measure = getattr(tuner, "loss", BlockTask.error)  # the error that it minimizes
    solver = BeamSearch(rounds=1, sweeps=0) if format.shared else None
    tuned = errors(enough(tuner), format=format, solver=solver, measure=measure)[0]
    assert tuned <= untuned(format, solver, measure)


@every_tuner
def test_source_weights_unmodified(tuner):
    model = tiny_model("llama")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run(job_of(StreamedModel(ModuleSource(model)), recipe_of(brief(tuner)), WINDOWS), Keep())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@every_tuner
def test_dict_round_trip(tuner):
    assert TUNERS.from_dict(json.loads(json.dumps(tuner.to_dict()))) == tuner
    recipe = recipe_of(tuner)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@every_tuner
def test_invalid_options_refused(tuner):
    for field in dataclasses.fields(tuner):
        with pytest.raises(RecipeError, match=field.name):
            TUNERS.from_dict({**tuner.to_dict(), field.name: [3]})
    with pytest.raises(RecipeError, match="unheard_of"):
        TUNERS.from_dict({**tuner.to_dict(), "unheard_of": 1})
