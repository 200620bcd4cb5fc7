"""Calls around the decode step: caches, generate(), and calls that fall back to transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TextStreamer
from transformers.cache_utils import StaticCache
from transformers.models.llama.modeling_llama import LlamaMLP

from bitmill.errors import UsageError
from bitmill.formats import FORMATS
from bitmill.runtime.decode import attach, decode_path, detach, step_cache
from helpers.decoding import PROMPT, is_stepping, logits, odd_model, quantize, relative_error
from helpers.native_kernels import needs_native
from helpers.tiny_models import tiny_model

pytestmark = needs_native

TOKENS = [7, 3, 100, 0, 55]


@pytest.fixture(autouse=True)
def _compiled(monkeypatch):
    monkeypatch.delenv("BITMILL_KERNEL", raising=False)
    monkeypatch.setenv("BITMILL_ACTIVATIONS", "float32")
    monkeypatch.setattr(step_cache, "MIN_CAPACITY", 2)  # so that memory must grow


@pytest.fixture
def model():
    return attach(odd_model())


def whole(model, ids: list[int]):
    """Logits of the last token, without any cache."""
    with torch.no_grad():
        return detach(copy.deepcopy(model))(input_ids=torch.tensor([ids])).logits[0, -1]


def test_memory_grows_with_text(model):
    ids = torch.randint(0, 101, (80,)).tolist()
    found, cache = logits(model, ids)
    assert is_stepping(model)
    assert cache.get_seq_length() == len(ids) + PROMPT.shape[1]
    assert relative_error(found[-1], whole(model, PROMPT[0].tolist() + ids)) < 1e-5


def test_cache_readable_by_forward(model):
    _, cache = logits(model, TOKENS)
    with torch.no_grad():
        more = model(input_ids=torch.tensor([[9, 10, 11]]), past_key_values=cache).logits[0, -1]  # a next question
    ids = [*PROMPT[0].tolist(), *TOKENS, 9, 10, 11]
    assert relative_error(more, whole(model, ids)) < 1e-5
    assert relative_error(logits(model, [12], cache)[0][0], whole(model, [*ids, 12])) < 1e-5
    assert cache.layers[2].get_seq_length() == len(ids) + 1


def test_cache_crop(model):
    ids = PROMPT[0].tolist()
    _, cache = logits(model, TOKENS)
    cache.crop(-3)
    assert relative_error(logits(model, [12], cache)[0][0], whole(model, [*ids, *TOKENS[:2], 12])) < 1e-5
    cache.reset()
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(input_ids=PROMPT, past_key_values=cache)
    assert relative_error(logits(model, [12], cache)[0][0], whole(model, [*ids, 12])) < 1e-5


def test_cache_copies_independent(model):
    _, cache = logits(model, TOKENS)
    other = copy.deepcopy(cache)
    first = logits(model, [1, 2], cache)[0]
    logits(model, [90, 91], other)
    cache.crop(-1)
    assert torch.equal(logits(model, [2], cache)[0][0], first[1])


def test_removed_layers(model):
    _, cache = logits(model, TOKENS)
    cache.batch_repeat_interleave(2)
    with torch.no_grad():
        two = model(input_ids=torch.tensor([[12], [12]]), past_key_values=cache).logits[:, -1]
    expected = whole(model, [*PROMPT[0].tolist(), *TOKENS, 12])
    assert relative_error(two[0], expected) < 1e-5
    cache.batch_select_indices(torch.tensor([1]))
    assert (
        relative_error(logits(model, [13], cache)[0][0], whole(model, [*PROMPT[0].tolist(), *TOKENS, 12, 13]))
        < 1e-5
    )


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "output_scores": True, "return_dict_in_generate": True},
        {"do_sample": False, "prompt_lookup_num_tokens": 2},
    ],
    ids=lambda options: ",".join(options),
)
def test_generate_unchanged(model, options):
    texts = []
    for one in (detach(copy.deepcopy(model)), model):
        torch.manual_seed(3)
        made = one.generate(PROMPT, max_new_tokens=25, **options)
        texts.append(getattr(made, "sequences", made))
    assert torch.equal(*texts)


def test_streamers_and_stop_criteria(model):
    class Words:
        def decode(self, ids, **_):
            return " ".join(map(str, torch.as_tensor(ids).tolist())) + " "

    seen = []
    streamer = TextStreamer(Words())
    streamer.on_finalized_text = lambda text, stream_end=False: seen.append(text)
    end = int(detach(copy.deepcopy(model)).generate(PROMPT, max_new_tokens=9, do_sample=False)[0, -1])
    found = model.generate(PROMPT, max_new_tokens=40, do_sample=False, streamer=streamer, eos_token_id=end)
    assert found[0, -1] == end
    assert found.shape[1] <= PROMPT.shape[1] + 9
    assert "".join(seen).split() == [str(t) for t in found[0].tolist()]


def test_other_calls_fall_back(model):
    plain = detach(copy.deepcopy(model))
    ids = torch.tensor([[9]])
    padded = torch.tensor([[0, *[1] * (PROMPT.shape[1] + len(TOKENS))]])
    calls = [
        {"output_attentions": True},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"attention_mask": padded},
        {"position_ids": torch.tensor([[40]])},
        {"labels": ids},
        {"logits_to_keep": torch.tensor([0])},
    ]
    for call in calls:
        answers = []
        for one in (plain, model):
            _, cache = logits(one, TOKENS)
            with torch.no_grad():
                output = one(input_ids=ids, past_key_values=cache, **call)
            answers.append(output)
        first, second = ((a[0] if isinstance(a, tuple) else a.logits) for a in answers)
        assert relative_error(second, first) < 1e-5, call
        assert type(answers[0]) is type(answers[1])
        if "output_hidden_states" in call:
            assert len(answers[1].hidden_states) == len(answers[0].hidden_states)


def test_gradients_flow(model):
    _, cache = logits(model, TOKENS)
    output = model(input_ids=torch.tensor([[9]]), past_key_values=cache)
    assert output.logits.requires_grad


def test_static_cache_unchanged(model):
    cache = StaticCache(config=model.config, max_cache_len=64)
    with torch.no_grad():
        model(input_ids=PROMPT, past_key_values=cache)
    found, _ = logits(model, TOKENS, cache)
    assert relative_error(found[-1], whole(model, PROMPT[0].tolist() + TOKENS)) < 1e-5


def test_changed_model_replanned(model):
    logits(model, TOKENS)
    quantize(model, FORMATS.get("uniform")(4, 16))
    found, _ = logits(model, TOKENS)
    plain = detach(copy.deepcopy(model))
    assert relative_error(found, logits(plain, TOKENS)[0]) < 1e-5
    before = model.state_dict()  # takes the packed tensors back from the kernels
    assert relative_error(logits(model, TOKENS)[0], found) < 1e-6
    assert is_stepping(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)  # in place: the step reads the model's own tensors
    assert relative_error(logits(model, TOKENS)[0], logits(detach(copy.deepcopy(model)), TOKENS)[0]) < 1e-5
    assert before.keys() == model.state_dict().keys()


def test_hooks_are_called(model):
    logits(model, TOKENS)
    called = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: called.append(1))
    logits(model, TOKENS)
    assert len(called) == 1 + len(TOKENS)
    handle.remove()
    logits(model, TOKENS)
    assert is_stepping(model)


def test_custom_forward_detected(model, monkeypatch):
    own = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, x: 2 * own(mlp, x))
    found, _ = logits(model, TOKENS)
    assert "differs" in decode_path(model)
    assert torch.equal(found, logits(detach(model), TOKENS)[0])


def test_reasons():
    refusals = {
        "OlmoForCausalLM of": odd_model("olmo"),
        "do_layer_norm_before": tiny_model("opt", do_layer_norm_before=False),
        "not SiLU": odd_model(hidden_act="gelu_10"),
        "float16": odd_model().to(torch.float16),
    }
    for reason, model in refusals.items():
        sentence = decode_path(attach(model))
        assert sentence.startswith("It decodes by transformers' own forward: ")
        assert reason in sentence


def test_can_be_disabled(monkeypatch):
    monkeypatch.setenv("BITMILL_DECODE", "off")
    assert "no step is attached" in decode_path(attach(odd_model()))
    monkeypatch.setenv("BITMILL_DECODE", "sometimes")
    with pytest.raises(UsageError, match="sometimes"):
        attach(odd_model())


def test_torch_compile(model):
    with torch.no_grad():
        expected = model(input_ids=PROMPT, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(input_ids=PROMPT, use_cache=False).logits, expected)
        exported = torch.export.export(model, (), {"input_ids": PROMPT, "use_cache": False}, strict=False)
        assert torch.equal(exported.module()(input_ids=PROMPT, use_cache=False).logits, expected)
