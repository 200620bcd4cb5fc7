"""A prompt that begins as the last one did is read from where they differ, with equal answers."""

from __future__ import annotations

import pytest
import torch

from bitmill.errors import SourceError
from bitmill.evaluation.generate import generate
from bitmill.evaluation.prompt_cache import PromptCache
from bitmill.kv.config import parse_kv_config
from bitmill.workflows.kv import CacheFactory
from helpers.tiny_models import tiny_model


class Tokenizer:
    """Text is of no interest here."""

    eos_token_id = None

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "x" * len(tokens)


def conversation(model, prompts, prompt_cache, **options):
    """Return the answers to prompts, and how many tokens of each were read."""
    answers, lengths = [], []
    handle = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    read = []
    for prompt in prompts:
        past, skipped = prompt_cache.begin(prompt)
        lengths.clear()
        done = generate(model, Tokenizer(), prompt, max_new_tokens=4, past=past, read=skipped, **options)
        prompt_cache.end(done.past, done.held)
        answers.append(done.tokens)
        read.append(len(prompt) - skipped)
        assert lengths[0] == read[-1]
    handle.remove()
    return answers, read


@pytest.mark.parametrize("kv", [None, "per_token"])
def test_equal_answers(kv):
    model = tiny_model("llama").eval()
    config = parse_kv_config(kv, None if kv is None else 8, None)
    caches = CacheFactory(model, config, "tiny")
    assert caches.continues
    first = list(range(5, 25))
    fresh = PromptCache(caches.new, reuse=False)
    start, _ = conversation(model, [first], fresh)
    longer = [*first, *start[0], 7, 8, 9]  # the answer, and what the user says to it
    other = [*first[:12], 60, 61, 62]  # the conversation goes back
    expected, all_read = conversation(model, [first, longer, longer, other], fresh)
    found, read = conversation(model, [first, longer, longer, other], PromptCache(caches.new))
    assert found == expected
    assert all_read == [20, 27, 27, 15]
    assert read == [20, 4, 1, 3]  # the last token of an answer was not read


def test_error_leaves_no_cache():
    cache = PromptCache(lambda: "new")
    cache.end("filled", [1, 2, 3])
    assert cache.begin([1, 2, 3, 4]) == ("filled", 3)
    assert cache.begin([1, 2, 3, 4]) == ("new", 0)  # the first caller never came back


def test_sliding_window_that_forgot():
    model = tiny_model("mistral", sliding_window=8).eval()
    prompts = [list(range(5, 35)), [*range(5, 15), 60, 61]]
    expected, _ = conversation(model, prompts, PromptCache(lambda: None, reuse=False))
    found, read = conversation(model, prompts, PromptCache(lambda: None))
    assert found == expected
    assert read == [30, 12]


def test_heads_that_differ_between_layers():
    model = tiny_model("gemma4_text").eval()
    assert CacheFactory(model, parse_kv_config(None, None, None), "tiny").new() is None
    with pytest.raises(SourceError, match="differ between layers"):
        CacheFactory(model, parse_kv_config("per_token", 8, None), "tiny")


def test_hybrids_read_everything():
    model = torch.nn.Linear(2, 2)
    assert not CacheFactory(model, parse_kv_config("none", None, None), "tiny").continues
