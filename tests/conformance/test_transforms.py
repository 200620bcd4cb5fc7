"""Laws of seam transforms: folded into the float model, they do not change its outputs."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from bitmill.calibration.collect import collect_statistics
from bitmill.errors import NumericsError, RecipeError
from bitmill.formats.uniform import Uniform
from bitmill.models.block_call import output_fn
from bitmill.models.streamed import StreamedModel
from bitmill.numerics.statistics import Statistics
from bitmill.pipeline.fold import fold_transforms
from bitmill.pipeline.job import Job
from bitmill.recipes.recipe import Recipe
from bitmill.recipes.resolve import ResolvedRecipe
from bitmill.recipes.rules import FLOAT, Rule
from bitmill.solvers.nearest import Nearest
from bitmill.sources.module import ModuleSource
from bitmill.transforms import TRANSFORMS, SeamTransform, SeamView, Transform
from helpers.tiny_models import TEXT_ADAPTERS, tiny_model

TOKENS = torch.arange(24).view(2, 12) + 3
ARCHITECTURES = [pytest.param(name, {}, id=name) for name in TEXT_ADAPTERS] + [
    pytest.param("llama", {"num_key_value_heads": 4}, id="llama without grouped queries"),
    pytest.param("llama", {"num_key_value_heads": 1}, id="llama with one key"),
    pytest.param("llama", {"attention_bias": True, "mlp_bias": True}, id="llama with biases"),
    pytest.param("opt", {"do_layer_norm_before": False}, id="opt with norms after"),
    pytest.param("opt", {"activation_function": "gelu"}, id="opt with gelu"),
    pytest.param("bert", {"hidden_act": "relu"}, id="bert with relu"),
]


def transforms() -> list[SeamTransform]:
    """Every seam transform at its defaults."""
    return [kind() for _, kind in TRANSFORMS.items() if issubclass(kind, SeamTransform)]


def loaded(name: str, changes: dict[str, object]) -> StreamedModel:
    streamed = StreamedModel(ModuleSource(tiny_model(name, **changes)))
    streamed.load(streamed.names())
    return streamed


def folded(streamed: StreamedModel, *chosen: Transform, ignore=()) -> list[dict[str, torch.Tensor]]:
    """Fold the transforms into each block, and return the changed tensors of each block."""
    recipe = Recipe("test", Uniform(4), Nearest(), chosen, tuple(Rule(pattern, FLOAT) for pattern in ignore))
    changed = []
    schemes = {site.layer: recipe.scheme(site.layer) for site in streamed.all_sites()}
    job = Job(streamed, ResolvedRecipe(recipe, schemes))
    hidden, calls = streamed.embed(TOKENS)
    for index, block in enumerate(streamed.blocks):
        leads = [stage[0] for stage in streamed.adapter.stages]
        seen = collect_statistics(block, [hidden], [calls[index]], leads) if recipe.needs else None
        changed.append(fold_transforms(job, index, seen))
        if seen:
            assert_seen(seen, collect_statistics(block, [hidden], [calls[index]], leads))
        hidden = calls[index].run(block, hidden)
    return changed


def assert_seen(kept: dict[str, Statistics], now: dict[str, Statistics]) -> None:
    """Check that statistics collected before the fold are scaled along."""
    for lead, expected in now.items():
        for name in ("gram", "mean_abs", "max_abs"):
            found, target = getattr(kept[lead], name), getattr(expected, name)
            assert (found - target).norm() < 1e-4 * target.norm()


@dataclasses.dataclass(frozen=True)
class Scramble(SeamTransform):
    name = "scramble"  # type: ignore[assignment]

    """A hard case for the folding: scales from 0.1 to 10."""

    def choose(self, seam: SeamView) -> torch.Tensor:
        source = seam.source
        for target in seam.targets:
            assert target.shape[1] % source.shape[0] == 0
        return torch.logspace(-1, 1, source.shape[0])[torch.randperm(source.shape[0])]


@pytest.mark.parametrize(("name", "changes"), ARCHITECTURES)
@pytest.mark.parametrize("transform", [*transforms(), Scramble()], ids=repr)
@torch.no_grad()
def test_logits_unchanged(name, changes, transform):
    streamed = loaded(name, changes)
    before = output_fn(streamed.model)(TOKENS)
    weights = {n: p.clone() for n, p in streamed.model.named_parameters()}
    folded(streamed, transform)
    after = output_fn(streamed.model)(TOKENS)
    assert (after - before).norm() < 1e-4 * before.norm()
    if streamed.adapter.seams:
        assert any(not torch.equal(p, weights[n]) for n, p in streamed.model.named_parameters())


@pytest.mark.parametrize("name", TEXT_ADAPTERS)
@torch.no_grad()
def test_every_seam_folded(name):
    streamed = loaded(name, {})
    for seam in streamed.adapter.seams:
        names = [f"{n}.weight" for n in (seam.source, *seam.targets)]
        before = {n: streamed.blocks[0].get_parameter(n).clone() for n in names}
        others = [n for s in streamed.adapter.seams for n in s.targets if s != seam]
        folded(streamed, Scramble(), ignore=[f"*.{n}" for n in others])
        for n in names:
            assert not torch.equal(streamed.blocks[0].get_parameter(n), before[n]), n


@torch.no_grad()
def test_grouped_query_scales():
    streamed = loaded("llama", {"num_attention_heads": 4, "num_key_value_heads": 2})
    v, o = (streamed.blocks[0].self_attn.get_submodule(name).weight for name in ("v_proj", "o_proj"))
    v_before, o_before = v.clone(), o.clone()
    folded(streamed, Scramble(), ignore=["*.q_proj", "*.k_proj", "*.v_proj", "*.mlp.*"])
    v, o = (streamed.blocks[0].self_attn.get_submodule(name).weight for name in ("v_proj", "o_proj"))
    by_channel, by_column = (v_before / v)[:, 0], (o / o_before)[0]
    heads = by_channel.view(2, 8)
    torch.testing.assert_close(by_column.view(4, 8), heads[[0, 0, 1, 1]])
    assert len(by_channel.unique()) > 8


@torch.no_grad()
def test_float_seams_skipped():
    streamed = loaded("llama", {})
    before = {n: p.clone() for n, p in streamed.model.named_parameters()}
    assert folded(streamed, Scramble(), ignore=["*"]) == [{}, {}]
    assert all(torch.equal(p, before[n]) for n, p in streamed.model.named_parameters())


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma2"])
@torch.no_grad()
def test_changed_float_tensors_returned(name):
    streamed = loaded(name, {})
    before = {n: p.clone() for n, p in streamed.model.named_parameters()}
    changed = folded(streamed, Scramble())
    prefix = streamed.adapter.blocks
    linears = {f"{prefix}.{i}.{n}.weight" for i in range(2) for n in streamed.adapter.linears}
    for block in changed:
        for key, tensor in block.items():
            assert key not in linears
            assert torch.equal(streamed.model.get_parameter(key), tensor)
    handed = set().union(*changed)
    moved = {n for n, p in streamed.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved - linears <= handed


@torch.no_grad()
def test_transforms_in_sequence():
    streamed = loaded("llama", {})
    before = streamed.model(TOKENS).logits
    folded(streamed, Scramble(), *transforms(), Scramble())
    assert (streamed.model(TOKENS).logits - before).norm() < 1e-4 * before.norm()


def test_no_transforms():
    streamed = loaded("llama", {})
    assert folded(streamed) == [{}, {}]


@pytest.mark.parametrize("transform", transforms(), ids=repr)
def test_scales_positive_and_finite(transform):
    X = torch.randn(20, 8) * torch.tensor([0, 1e-4, 1e4, 1, 1, 1, 1, 1])
    seen = Statistics(X.T @ X / 20, 20, mean_abs=X.abs().mean(0), max_abs=X.abs().amax(0))
    silent = Statistics(torch.zeros(8, 8), 20, mean_abs=torch.zeros(8), max_abs=torch.zeros(8))
    for source, activations in ((torch.randn(8), seen), (torch.zeros(8), silent), (torch.randn(8, 5) * 1e6, seen)):
        scale = transform.choose(SeamView(source, [torch.randn(4, 8), torch.zeros(3, 8)], Uniform(4), activations))
        assert scale.shape == (8,)
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()


@pytest.mark.parametrize("transform", [t for t in transforms() if t.needs], ids=repr)
def test_missing_statistics_message(transform):
    with pytest.raises(NumericsError, match=transform.name):
        transform.choose(SeamView(torch.randn(8), [torch.randn(4, 8)], Uniform(4)))


@pytest.mark.parametrize("transform", transforms(), ids=repr)
def test_dict_round_trip(transform):
    assert TRANSFORMS.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform


def test_invalid_options_refused():
    for data in ({"transform": "magic"}, {"strength": 1.0}, {"transform": "equalize", "unheard_of": 1}):
        with pytest.raises(RecipeError):
            TRANSFORMS.from_dict(data)


def test_equalize_balances_ranges():
    source, target = torch.tensor([[8.0], [1.0]]), torch.tensor([[2.0, 4.0]])
    transform = TRANSFORMS.get("equalize")()
    scale = transform.choose(SeamView(source, [target], Uniform(4)))
    writes, reads = source.abs().amax(1) / scale, target.abs().amax(0) * scale
    assert torch.allclose(writes / reads, (writes / reads)[0].expand(2))
