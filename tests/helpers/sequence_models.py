"""Tiny encoder-decoders and classifiers with seeded weights, built in code."""

from __future__ import annotations

import torch
import transformers

_BART = {
    "vocab_size": 128,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_T5 = {"vocab_size": 128, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3}
_POSITIONS = {"max_position_embeddings": 64, "forced_eos_token_id": None}
_WHISPER = {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 24}
_BERT = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_labels": 3}


def sequence_model(kind: str, vocabulary: int = 128):
    """Return a float32 model: bart, marian, t5, whisper, or a classifier."""
    torch.manual_seed(0)
    words = {"vocab_size": vocabulary}
    t = transformers
    if kind == "t5":
        config = t.T5Config(**_T5 | words, num_heads=4, decoder_start_token_id=0, feed_forward_proj="gated-gelu")
        model = t.T5ForConditionalGeneration(config)
    elif kind == "whisper":
        model = t.WhisperForConditionalGeneration(t.WhisperConfig(**_BART | words, **_WHISPER))
    elif kind == "marian":
        config = t.MarianConfig(**_BART, **_POSITIONS, decoder_vocab_size=128)
        model = t.MarianMTModel(config)
    elif kind == "bart":
        model = t.BartForConditionalGeneration(t.BartConfig(**_BART, **_POSITIONS))
    elif kind == "distilbert":
        sizes = {"vocab_size": 128, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "num_labels": 3}
        model = t.DistilBertForTokenClassification(t.DistilBertConfig(**sizes, max_position_embeddings=64))
    else:
        name = {"bert": "Bert", "roberta": "Roberta"}[kind]
        config = getattr(t, f"{name}Config")(**_BERT, num_attention_heads=4, max_position_embeddings=64)
        model = getattr(t, f"{name}ForSequenceClassification")(config)
    model = model.float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def sequence_windows(kind: str) -> torch.Tensor:
    """Return eight windows that the model reads."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 120, (8, 12), generator=generator)
    if kind != "whisper":
        return ids
    from bitmill.data.recordings import join

    return join(torch.randn(8, 16, 40, generator=generator), ids)
