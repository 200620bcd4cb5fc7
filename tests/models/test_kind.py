"""Models that the task's class cannot load are refused before anything is written."""

from __future__ import annotations

import pytest
import torch
import transformers

import bitmill
from bitmill.errors import SourceError
from bitmill.models.streamed import StreamedModel
from bitmill.sources.module import ModuleSource
from bitmill.sources.open import open_source

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
BART = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32}


def build(kind: str, cls: str, sizes=SIZES) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, cls)(transformers.AutoConfig.for_model(kind, **sizes)).eval()


def llava() -> transformers.PreTrainedModel:
    text = SIZES | {"model_type": "llama"}
    config = {"text_config": text, "vision_config": VISION, "image_token_id": 5}
    return build("llava", "LlavaForConditionalGeneration", config)


CASES = [("roberta", "RobertaForMaskedLM", SIZES), ("roberta", "RobertaForCausalLM", SIZES)]
TASKS_OF_CLASSES = [
    ("llama", "LlamaForSequenceClassification", SIZES, "AutoModelForSequenceClassification"),
    (
        "gemma2",
        "Gemma2ForTokenClassification",
        SIZES | {"head_dim": 16, "num_key_value_heads": 2},
        "AutoModelForTokenClassification",
    ),
    ("bert", "BertForSequenceClassification", SIZES, "AutoModelForSequenceClassification"),
    ("t5", "T5ForConditionalGeneration", T5, "AutoModelForSeq2SeqLM"),
    ("bart", "BartForConditionalGeneration", BART, "AutoModelForSeq2SeqLM"),
    ("modernbert", "ModernBertModel", SIZES, "AutoModel"),
    ("roberta", "RobertaModel", SIZES, "AutoModel"),
]


@pytest.mark.parametrize(("kind", "cls", "sizes", "auto_class"), TASKS_OF_CLASSES)
@pytest.mark.parametrize("live", [True, False])
def test_class_decides_on_task(kind, cls, sizes, auto_class, live, tmp_path):
    model = build(kind, cls, sizes)
    if not live:
        model.save_pretrained(tmp_path)
    streamed = StreamedModel(ModuleSource(model) if live else open_source(tmp_path))
    assert streamed.task.auto_class_name == auto_class
    assert type(streamed.model) is type(model)


@pytest.mark.parametrize(("kind", "cls", "sizes"), CASES)
@pytest.mark.parametrize("live", [True, False])
def test_other_kinds_refused(kind, cls, sizes, live, tmp_path):
    model = build(kind, cls, sizes)
    if not live:
        model.save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="bitmill quantizes decoders"):
        StreamedModel(ModuleSource(model) if live else open_source(tmp_path))


def test_encoder_with_head_refused(tmp_path):
    build("bert", "BertForMaskedLM").save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="is a BertForMaskedLM, but would be loaded as a BertModel"):
        StreamedModel(open_source(tmp_path))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_language_model_of_images_and_text(method):
    """Its blocks are quantized, although the image tower has more."""
    model = llava()
    bitmill.quantize(model, method, bits=4, calib=torch.randint(6, 64, (2, 16)), measure=0)
    names = [name for name, module in model.named_modules() if type(module).__name__ == "QuantLinear"]
    assert names
    assert all("language_model" in name for name in names)


def test_live_model_without_loading_class_refused(tmp_path):
    with pytest.raises(SourceError, match="no folder of it could be loaded"):
        bitmill.quantize(llava(), "rtn", bits=4, out=tmp_path / "out", measure=0)


def test_config_of_no_model_refused(tmp_path):
    model = build("bert", "BertModel")
    model.config.initializer_range = -1.0  # transformers only finds that it is negative when it draws weights
    model.save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="cannot build the model"):
        StreamedModel(open_source(str(tmp_path)))
