"""OmniQuant (arXiv 2308.13137): learned clipping and learned scales, on the blocks of tiny models."""

import pytest
import torch
from torch import Tensor

from bitmill.calibration.collect import collect_statistics
from bitmill.errors import RecipeError
from bitmill.formats.straight_through import round_in_range
from bitmill.formats.uniform import Uniform
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.grouping import grouped
from bitmill.recipes.method import build_recipe
from bitmill.solvers import Statistics
from bitmill.solvers.base import output_error
from bitmill.solvers.nearest import Nearest
from bitmill.sources.module import ModuleSource
from bitmill.tuners import BlockTask
from bitmill.tuners.omniquant import OmniQuant, _Learned
from helpers.tiny_models import tiny_model

WINDOWS = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(7))
MODELS = ["llama", "opt", "gpt2", "gemma2"]


@torch.no_grad()
def task_of(name: str = "llama", format: Uniform | None = None) -> BlockTask:
    """The first block of a tiny model, with its own outputs as targets."""
    streamed = StreamedModel(ModuleSource(tiny_model(name)))
    streamed.load(streamed.names())
    batches = [streamed.embed(windows) for windows in WINDOWS.split(4)]
    block, adapter = streamed.blocks[0], streamed.adapter
    inputs, calls = [hidden for hidden, _ in batches], [calls[0] for _, calls in batches]
    targets = [call.run(block, hidden) for call, hidden in zip(calls, inputs)]
    task = BlockTask(
        block,
        list(adapter.linears),
        dict.fromkeys(adapter.linears, format or Uniform(3, 16)),
        calls,
        inputs,
        targets,
        index=0,
        depth=2,
        transposed=adapter.transposed,
        seams=adapter.seams,
    )
    task.stages = [list(stage) for stage in adapter.stages]
    task.input_stats = collect_statistics(block, inputs, calls, [stage[0] for stage in task.stages])
    return task


def nearest(task: BlockTask) -> dict[str, Tensor]:
    """Return the block as the nearest solver stores it."""
    solved = {n: Nearest().solve(task.matrix(n), Statistics(), task.formats[n]).dequantize() for n in task.names}
    return {f"{n}.weight": W.T if task.transposed else W for n, W in solved.items()}


def quick(**options) -> OmniQuant:
    """Steps large enough for tiny layers."""
    return OmniQuant(
        **{"start": "wide", "epochs": 20, "tokens": 32, "patience": 20, "lr_lwc": 0.1, "lr_let": 0.02, **options}
    )


@torch.no_grad()
def errors(tuner: OmniQuant, name: str = "llama", format: Uniform | None = None) -> tuple[float, float]:
    """The block's error under nearest rounding, before and after."""
    task = task_of(name, format)
    start = task.error(nearest(task))
    tuner.before(task)
    return start, task.error(nearest(task))


@pytest.mark.parametrize("name", MODELS)
def test_beats_nearest(name):
    start, end = errors(quick(shift=True), name)
    assert end < 0.7 * start


@pytest.mark.parametrize("options", [{"let": False}, {"lwc": False}], ids=str)
def test_each_part_helps(options):
    start, end = errors(quick(**options))
    assert end < 0.9 * start


@pytest.mark.parametrize("name", MODELS)
def test_starts_from_search(name):
    found = errors(quick(start="search", lr_lwc=1e-9, lr_let=1e-9), name)[1]
    assert errors(quick(start="search"), name)[1] < 0.95 * found


def test_never_worse_than_nearest():
    start, end = errors(OmniQuant(epochs=1, lr_lwc=1e3, lr_let=1e3, start="wide"))
    assert end <= start


@pytest.mark.parametrize("format", [Uniform(3, 20), Uniform(4, "row")], ids=repr)
@torch.no_grad()
def test_search_improves_start(format):
    task = task_of("llama", format)
    search, wide = (_Learned(task, OmniQuant(start=start)).rounded() for start in ("search", "wide"))
    near, far = (
        sum(output_error(task.matrix(n), found[f"{n}.weight"], task.input_statistics(n).gram) for n in task.names)
        for found in (search, wide)
    )
    assert near < 0.95 * far


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_statistics_follow_transform(name):
    task = task_of(name)
    learned = _Learned(task, OmniQuant())
    scramble(learned)
    learned.apply()
    now = collect_statistics(task.block, task.inputs, task.calls, [stage[0] for stage in task.stages])
    first = task.stages[0][0]  # later ones read what clamped weights make
    torch.testing.assert_close(task.input_stats[first].gram, now[first].gram, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "format", [Uniform(3, 20), Uniform(3, 16, True), Uniform(4, "row"), Uniform(8, "tensor")], ids=repr
)
@torch.no_grad()
def test_stored_equals_learned(name, format):
    """From minimum to maximum of the clamped weights: bit by bit what the last forward pass computed with."""
    task = task_of(name, format)
    learned = _Learned(task, OmniQuant(shift=True))
    scramble(learned)
    expected = learned.rounded()
    learned.apply()
    found = {n: p.detach() for n, p in task.block.named_parameters()} | nearest(task)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    assert task.error(nearest(task)) == pytest.approx(task_of(name, format).error(expected))


def scramble(learned: _Learned) -> None:
    draw = torch.Generator().manual_seed(0)
    for leaf in learned.leaves:
        leaf.data += torch.randn(leaf.shape, generator=draw)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_float_outputs_unchanged(name):
    task = task_of(name)
    learned = _Learned(task, OmniQuant(shift=True))
    scramble(learned)
    folded = learned.folded()
    assert {f"{n}.weight" for seam in task.seams for n in (seam.source, *seam.targets)} <= set(folded)
    shifted = [seam for seam, shift in zip(task.seams, learned.shifts) if shift is not None]
    assert bool(shifted) == (name in ("opt", "gpt2"))  # norms with a bias
    assert task.error(folded) < 1e-8 * task.error({n: t * 0 for n, t in folded.items()})


@pytest.mark.parametrize("format", [Uniform(3, 20), Uniform(3, 20, True)], ids=repr)
def test_straight_through_gradients(format):
    draw = torch.Generator().manual_seed(0)
    x = grouped(torch.randn(4, 60, generator=draw), 20)
    low = x.amin(-1) * torch.rand(x.shape[:2], generator=draw)
    high = x.amax(-1) * torch.rand(x.shape[:2], generator=draw)
    weight = torch.randn(x.shape, generator=draw)
    found = gradients(lambda *a: round_in_range(*a, format), weight, x, low, high)
    expected = gradients(lambda *a: formula(*a, format), weight, x, low, high)
    for mine, theirs in zip(found, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def gradients(function, weight: Tensor, *arguments: Tensor) -> list[Tensor]:
    leaves = [a.clone().requires_grad_() for a in arguments]
    (function(*leaves) * weight).sum().backward()
    return [leaf.grad for leaf in leaves]


def formula(x: Tensor, low: Tensor, high: Tensor, format: Uniform) -> Tensor:
    """As in the paper, equation 2, all by autograd; the scale's value is the stored one."""
    top = 2**format.bits - 1
    x, low, high = (
        torch.minimum(torch.maximum(x, low[..., None]), high[..., None]),
        low[..., None],
        high[..., None],
    )
    span = 2 * torch.maximum(high, -low) if format.symmetric else high - low
    scale = span / top
    scale = scale + (scale.to(torch.float16).float() - scale).detach()
    steps = x / scale
    zero = torch.full_like(scale, 2 ** (format.bits - 1)) if format.symmetric else (-low / scale).round().detach()
    steps = steps + ((steps.round() + zero).clamp(0, top) - zero - steps).detach()
    return steps * scale


def test_unsupported_formats_refused():
    for options, word in (
        ({"lr_lwc": 0.0}, "lr_lwc"),
        ({"epochs": 0}, "epochs"),
        ({"lwc": False, "let": False}, "let"),
    ):
        with pytest.raises(RecipeError, match=word):
            OmniQuant(**options)
    assert build_recipe("omniquant").needs >= {"targets"}
