"""Sites, fused groups and seams of a model carry full names."""

from __future__ import annotations

import pytest

from bitmill.models.embedding_and_head import embedding_and_head_sites
from bitmill.models.streamed import StreamedModel
from bitmill.sources.module import ModuleSource
from helpers.tiny_models import TEXT_ADAPTERS, tiny_model


@pytest.mark.parametrize("name", TEXT_ADAPTERS)
def test_sites_cover_linears(name):
    streamed = StreamedModel(ModuleSource(tiny_model(name)))
    sites = streamed.all_sites()
    assert sites == streamed.sites(0) + streamed.sites(1)
    assert [site.layer for site in streamed.sites(1)] == [
        f"{streamed.adapter.blocks}.1.{linear}" for linear in streamed.adapter.linears
    ]
    for site in sites:
        streamed.load([site.path])
        assert site.shape == tuple(streamed.matrix(site.path).shape)
        assert site.role == "weight"


def test_full_names_in_groups():
    streamed = StreamedModel(ModuleSource(tiny_model("llama")))
    assert streamed.fused_layers(1)[1] == ("model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    seam = streamed.seams(1)[3]
    assert (seam.source, seam.targets) == ("model.layers.1.mlp.up_proj", ("model.layers.1.mlp.down_proj",))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embedding_is_one_site(tied):
    streamed = StreamedModel(ModuleSource(tiny_model("gpt2", tie_word_embeddings=tied)))
    sites = embedding_and_head_sites(streamed)
    assert [site.path for site in sites] == ["transformer.wte.weight", "lm_head.weight"][: 1 if tied else 2]
    assert {site.shape for site in sites} == {(128, 32)}
