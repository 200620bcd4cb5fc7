"""Generation: stopping, sampling and streaming."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bitmill.errors import NumericsError, UsageError
from bitmill.evaluation.answers import answer_prompts
from bitmill.evaluation.generate import chat_prompt, encode, eos_tokens, generate
from bitmill.progress import Progress


class Script(nn.Module):
    """A model without a cache that generates the tokens of a script."""

    def __init__(self, script: list[int], limit: int = 100, vocabulary: int = 250) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.script, self.vocabulary = script, vocabulary
        self.config = SimpleNamespace(max_position_embeddings=limit, eos_token_id=[2, 3])
        self.read: list[int] = []

    def forward(self, tokens, past_key_values=None, use_cache=True):
        self.read.append(tokens.shape[1])
        logits = torch.zeros(1, tokens.shape[1], self.vocabulary)
        logits[0, -1, self.script[len(self.read) - 1]] = 5.0
        return SimpleNamespace(logits=logits, past_key_values=None)


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    eos_token_id = None
    chat_template = None

    def __call__(self, text: str, **kwargs: object) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def test_stops_at_end_token():
    for end in (2, 3):
        done = generate(Script([65, 66, end, 67]), Bytes(), [1], max_new_tokens=10)
        assert (done.text, done.tokens, done.stopped) == ("AB", [65, 66], "eos")
        assert done.new_tokens == 2
        assert done.tokens_per_s > 0


def test_stops_at_length():
    assert generate(Script([65] * 9), Bytes(), [1], max_new_tokens=4).text == "AAAA"
    done = generate(Script([65] * 9, limit=6), Bytes(), [1, 1, 1], max_new_tokens=9)
    assert (done.text, done.stopped) == ("AAA", "length")


def test_model_without_cache():
    model = Script([65] * 9)
    generate(model, Bytes(), [1, 1], max_new_tokens=3)
    assert model.read == [2, 3, 4]


def test_pieces_are_whole_characters():
    expected = "naïve 日本 🙂!"
    pieces: list[str] = []
    done = generate(
        Script(list(expected.encode())), Bytes(), [1], max_new_tokens=len(expected.encode()), on_text=pieces.append
    )
    assert done.text == expected == "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_partial_final_character():
    done = generate(Script(list("é".encode())[:1]), Bytes(), [1], max_new_tokens=1)
    assert done.text == "\ufffd"
    assert done.tokens_per_s is None


def test_sampling_seed():
    def sample(seed: int, temperature: float) -> list[int]:
        state = torch.get_rng_state()
        tokens = generate(
            Script([65] * 20), Bytes(), [1], max_new_tokens=20, temperature=temperature, seed=seed
        ).tokens
        assert torch.equal(torch.get_rng_state(), state)
        return tokens

    assert sample(1, 2.0) == sample(1, 2.0) != sample(2, 2.0)
    assert sample(1, 1e-30) == [65] * 20  # a tiny temperature is greedy, not NaN


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "-1.0"),
        ({"temperature": float("nan")}, "nan"),
        ({"temperature": float("inf")}, "inf"),
    ],
)
def test_bad_options(options, word):
    with pytest.raises(UsageError, match=word):
        generate(Script([65]), Bytes(), [1], **options)


def test_bad_prompts():
    with pytest.raises(UsageError, match="no tokens"):
        generate(Script([65]), Bytes(), [])
    with pytest.raises(UsageError, match=r"7 tokens.*has 5"):
        generate(Script([65], limit=5), Bytes(), [1] * 7)


def test_nonfinite_logits():
    class Broken(Script):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits[:] = float("nan")
            return output

    with pytest.raises(NumericsError):
        generate(Broken([65]), Bytes(), [1])


def test_end_token_sources():
    model = Script([1])
    model.generation_config = SimpleNamespace(eos_token_id=7)
    assert eos_tokens(model, SimpleNamespace(eos_token_id=9)) == {2, 3, 7, 9}


def test_failing_chat_template():
    class Strict(Bytes):
        def apply_chat_template(self, turns, **kwargs):
            raise ValueError("roles must\nalternate.")

    with pytest.raises(UsageError, match=r"\(roles must alternate\)"):
        chat_prompt(Strict(), [{"role": "user", "content": "x"}])
    assert encode(Bytes(), "A") == [65]


def test_answers_record_tokens():
    """The second byte of é completes a character that began with the first."""
    script = [*"né!".encode(), 2]
    (answer,) = answer_prompts(Script(script), Bytes(), ["a"], 8, Progress())
    assert answer == {
        "text": "né!",
        "new_tokens": 4,
        "stopped": "eos",
        "token_ids": script[:4],
        "token_starts": [0, 1, 1, 2],
    }
