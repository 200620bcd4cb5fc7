"""Prompts as conversations, answers up to a stop sequence, and numbers in them."""

from __future__ import annotations

from decimal import Decimal

import pytest

import bitmill
from bitmill.evaluation.generated_answers import answer, final_number, share_figures
from bitmill.evaluation.prompt import Prompt, prompt_tokens
from bitmill.evaluation.prompt_cache import PromptCache
from helpers.workspace import save_model

PROMPT = Prompt("w1 w2", (("user", "w3"), ("assistant", "w4"), ("user", "w5")), reply="w6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("answers"))


def test_prompts(folder):
    tokenizer = bitmill.load_tokenizer(folder)

    def read(text: str) -> list[int]:
        return tokenizer(text)["input_ids"]

    assert prompt_tokens(tokenizer, PROMPT) == read("user w3 assistant w4 user w5 assistant w6")
    assert prompt_tokens(tokenizer, Prompt("w1 w2")) == read("user w1 w2 assistant")
    tokenizer.chat_template = None
    assert prompt_tokens(tokenizer, PROMPT) == read("w1 w2")


def test_answers_end_at_the_first_stop_sequence(folder):
    model, tokenizer = bitmill.load(folder), bitmill.load_tokenizer(folder)
    whole = answer(model, tokenizer, PROMPT, (), 12)
    words = whole.split(" ")
    assert len(words) == 12
    later, earlier = sorted(set(words), key=whole.index)[2:0:-1]
    assert answer(model, tokenizer, PROMPT, (later, "absent", earlier), 12) == whole[: whole.index(earlier)]
    assert answer(model, tokenizer, PROMPT, (), 5) == " ".join(words[:5])


def test_examples_are_read_once(folder):
    model, tokenizer = bitmill.load(folder), bitmill.load_tokenizer(folder)
    lengths: list[int] = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    questions = [Prompt("w1 w2", (*PROMPT.turns[:2], ("user", word))) for word in ("w7 w8", "w9")]
    expected = [answer(model, tokenizer, question, (), 3) for question in questions]
    lengths.clear()
    cache = PromptCache(lambda: None)
    assert [answer(model, tokenizer, question, (), 3, cache) for question in questions] == expected
    assert lengths == [8, 1, 1, 2, 1, 1]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So the answer is 18.", "18"),
        ("She makes 9 * 2 = $1,450.50 every day", "1450.5"),
        ("10 - 12 = -2", "-2"),
        ("16-3", "3"),
        ("18.00", "18"),
        ("none", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_share_of_right_answers():
    assert share_figures("pass_at_1", [True, False, False, False]) == {
        "pass_at_1": 0.25,
        "pass_at_1_stderr": 0.25,
        "pass_at_1_interval": pytest.approx([0.0063, 0.8059], abs=1e-4),
    }
    assert share_figures("pass_at_1", [True])["pass_at_1_stderr"] is None
