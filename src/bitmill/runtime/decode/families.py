"""Decoders of transformers, described by their parts: where the modules are, and the numbers they compute with.

The compiled step (csrc/step) loops over such parts and knows no model. Names and shapes of weights do not reveal
a multiplier, a scale by position or a block without rotary embedding, so a description holds for the exact classes
of one model type and for no others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Family:
    """A model type, by default with the parts of Llama.

    Paths of modules are relative to the base model in the first group of attributes, and to a block in the others;
    "" stands for a part that the model does not have. Attributes are named where a model's numbers differ.

    kind: module of transformers.models.
    prefix: what the names of its classes begin with; `suffixes` lists how they end.
    base: path of the base model in the model, and `causal` the end of the model's class.
    positions, position_offset: learned embedding of positions, and the row of position 0.
    rotary: rotary embedding; `rotary_by_type`: each type of layer has angles of its own.
    rotary_switch: attribute of attention that is false in blocks without rotary embedding.
    interleaved: neighbouring numbers of a head form the pairs that rotate, otherwise those a half apart. With
        `repeated_angles` attention repeats the first half of the rotary embedding's angles for such pairs.

    qkv: layers of queries, keys and values, or the one layer with all of them. With `by_head` the three of a head
        follow one another, otherwise all queries, keys and values do.
    q_norm, k_norm: norms of each head before it rotates, or with `whole_norms` of all heads together.
    before_attention, after_attention, before_mlp, after_mlp: norms of the stream and of what joins it.
    parallel: True, or the attribute of a block that is true where attention and MLP read one stream. Without
        `before_mlp` the MLP then reads the norm before attention.
    mlp_inputs: gate and up, or the one layer with both, or up alone where there is no gate (`gated`).
    experts: module with the matrices of all experts `gate_up_proj` and `down_proj`, in the place of `mlp_inputs`
        and `mlp_output`, and `router`: module with their scores' weight and `top_k`. With `normalized_shares`,
        True or an attribute of the router, the shares of the chosen experts add up to one.
    optional: norms that a model may lack, depending on its config.
    ignored: modules that do nothing outside of training.

    norm_plus_one: RMS norms multiply by (1 + weight).
    windows: a sliding window of the config applies to its layers.
    score_cap: attribute of attention, and `logit_cap` attribute of the config: x becomes cap * tanh(x / cap).
    embedding_multiplier, logit_multiplier, logit_divisor: attributes of the config.
    residual_multiplier: attribute of a block, by which both results are multiplied before they join the stream.
    required: (attribute, value) pairs of the config that the description needs.
    """

    kind: str
    prefix: str
    suffixes: tuple[str, ...] = ("Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
    causal: str = "ForCausalLM"
    base: str = "model"
    head: str = "lm_head"

    embedding: str = "embed_tokens"
    positions: str = ""
    position_offset: int = 0
    rotary: str = "rotary_emb"
    rotary_by_type: bool = False
    layers: str = "layers"
    norm: str = "norm"

    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    by_head: bool = False
    attention_output: str = "self_attn.o_proj"
    q_norm: str = ""
    k_norm: str = ""
    whole_norms: bool = False
    rotary_switch: str = ""
    interleaved: bool = False
    repeated_angles: bool = False
    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    parallel: bool | str = False
    mlp_inputs: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    gated: bool = True
    mlp_output: str = "mlp.down_proj"
    activation: str = "mlp.act_fn"
    experts: str = ""
    router: str = ""
    normalized_shares: bool | str = True
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    norm_plus_one: bool = False
    windows: bool = False
    score_cap: str = ""
    logit_cap: str = ""
    embedding_multiplier: str = ""
    residual_multiplier: str = ""
    logit_multiplier: str = ""
    logit_divisor: str = ""
    required: tuple[tuple[str, object], ...] = ()

    @property
    def classes(self) -> frozenset[tuple[str, str]]:
        """The module and the name of each of its classes."""
        path = f"transformers.models.{self.kind}.modeling_{self.kind}"
        return frozenset((path, self.prefix + suffix) for suffix in (self.causal, *self.suffixes))

    @property
    def block_modules(self) -> tuple[str, ...]:
        """Paths of all parts of a block."""
        norms = (self.before_attention, self.after_attention, self.before_mlp, self.after_mlp)
        layers = (*self.qkv, self.attention_output, *self.mlp_inputs, self.mlp_output)
        layers += (self.experts, self.router)
        return tuple(filter(None, (*layers, self.activation, self.q_norm, self.k_norm, *norms)))

    @property
    def base_modules(self) -> tuple[str, ...]:
        """Paths of all parts of the base model outside of the blocks."""
        return tuple(filter(None, (self.embedding, self.positions, self.rotary, self.norm)))


LLAMA = Family("llama", "Llama")
_HEAD_NORMS: dict[str, Any] = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_WITHOUT_MLP = ("Model", "DecoderLayer", "Attention", "RotaryEmbedding")
_WITHOUT_RMS = ("Model", "DecoderLayer", "Attention", "MLP", "RotaryEmbedding")
_GEMMA = replace(
    LLAMA,
    kind="gemma",
    prefix="Gemma",
    suffixes=(*LLAMA.suffixes, "TextScaledWordEmbedding"),
    norm_plus_one=True,
    required=(("use_bidirectional_attention", None),),
)
_GEMMA2 = replace(
    _GEMMA,
    kind="gemma2",
    prefix="Gemma2",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
    windows=True,
    score_cap="attn_logit_softcapping",
    logit_cap="final_logit_softcapping",
)
_GEMMA3 = replace(
    _GEMMA2,
    kind="gemma3",
    prefix="Gemma3",
    suffixes=(*_GEMMA.suffixes, "TextModel"),
    rotary_by_type=True,
    score_cap="",
    **_HEAD_NORMS,
)
_GPT2 = Family(
    "gpt2",
    "GPT2",
    suffixes=("Model", "Block", "Attention", "MLP"),
    causal="LMHeadModel",
    base="transformer",
    embedding="wte",
    positions="wpe",
    rotary="",
    layers="h",
    norm="ln_f",
    attention="attn",
    qkv=("attn.c_attn",),
    attention_output="attn.c_proj",
    before_attention="ln_1",
    before_mlp="ln_2",
    mlp_inputs=("mlp.c_fc",),
    gated=False,
    mlp_output="mlp.c_proj",
    activation="mlp.act",
    ignored=("drop", "attn.attn_dropout", "attn.resid_dropout", "mlp.dropout"),
)
_OPT = Family(
    "opt",
    "OPT",
    suffixes=("Model", "Decoder", "DecoderLayer", "Attention", "LearnedPositionalEmbedding"),
    base="model.decoder",
    positions="embed_positions",
    position_offset=2,
    rotary="",
    norm="final_layer_norm",
    attention_output="self_attn.out_proj",
    before_attention="self_attn_layer_norm",
    before_mlp="final_layer_norm",
    mlp_inputs=("fc1",),
    gated=False,
    mlp_output="fc2",
    activation="activation_fn",
    optional=("norm",),
    required=(("do_layer_norm_before", True),),
)
_GPT_NEOX = Family(
    "gpt_neox",
    "GPTNeoX",
    suffixes=("Model", "Layer", "Attention", "MLP", "RotaryEmbedding"),
    base="gpt_neox",
    embedding="embed_in",
    norm="final_layer_norm",
    attention="attention",
    qkv=("attention.query_key_value",),
    by_head=True,
    attention_output="attention.dense",
    parallel="use_parallel_residual",
    mlp_inputs=("mlp.dense_h_to_4h",),
    gated=False,
    mlp_output="mlp.dense_4h_to_h",
    activation="mlp.act",
    ignored=("emb_dropout", "post_attention_dropout", "post_mlp_dropout"),
)
_PHI = Family(
    "phi",
    "Phi",
    suffixes=_WITHOUT_RMS,
    norm="final_layernorm",
    attention_output="self_attn.dense",
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    before_mlp="",
    parallel=True,
    mlp_inputs=("mlp.fc1",),
    gated=False,
    mlp_output="mlp.fc2",
    activation="mlp.activation_fn",
    optional=("q_norm", "k_norm"),
    ignored=("embed_dropout", "resid_dropout"),
)
_PHI3 = replace(
    LLAMA,
    kind="phi3",
    prefix="Phi3",
    qkv=("self_attn.qkv_proj",),
    mlp_inputs=("mlp.gate_up_proj",),
    activation="mlp.activation_fn",
    ignored=("resid_attn_dropout", "resid_mlp_dropout"),
    windows=True,
)
_GRANITE = replace(
    LLAMA,
    kind="granite",
    prefix="Granite",
    embedding_multiplier="embedding_multiplier",
    residual_multiplier="residual_multiplier",
    logit_divisor="logits_scaling",
)
_STABLELM = replace(
    LLAMA,
    kind="stablelm",
    prefix="StableLm",
    suffixes=(*_WITHOUT_RMS, "LayerNormPerHead"),
    q_norm="self_attn.q_layernorm",
    k_norm="self_attn.k_layernorm",
    parallel="use_parallel_residual",
    optional=("q_norm", "k_norm", "before_mlp"),
    ignored=("dropout",),
)
_COHERE = replace(
    LLAMA,
    kind="cohere",
    prefix="Cohere",
    suffixes=(*_WITHOUT_RMS, "LayerNorm"),
    interleaved=True,
    before_mlp="",
    parallel=True,
    optional=("q_norm", "k_norm"),
    logit_multiplier="logit_scale",
    **_HEAD_NORMS,
)
_OLMO2 = replace(
    LLAMA,
    kind="olmo2",
    prefix="Olmo2",
    before_attention="",
    after_attention="post_attention_layernorm",
    before_mlp="",
    after_mlp="post_feedforward_layernorm",
    whole_norms=True,
    **_HEAD_NORMS,
)
_GLM = replace(
    LLAMA,
    kind="glm",
    prefix="Glm",
    mlp_inputs=("mlp.gate_up_proj",),
    activation="mlp.activation_fn",
    interleaved=True,
    repeated_angles=True,
)
_STARCODER2 = replace(
    LLAMA,
    kind="starcoder2",
    prefix="Starcoder2",
    suffixes=_WITHOUT_RMS,
    mlp_inputs=("mlp.c_fc",),
    gated=False,
    mlp_output="mlp.c_proj",
    activation="mlp.act",
    windows=True,
)
_MIXTRAL = replace(
    LLAMA,
    kind="mixtral",
    prefix="Mixtral",
    suffixes=(*_WITHOUT_MLP, "RMSNorm", "SparseMoeBlock", "Experts", "TopKRouter"),
    mlp_inputs=(),
    mlp_output="",
    activation="mlp.experts.act_fn",
    experts="mlp.experts",
    router="mlp.gate",
    windows=True,
)

FAMILIES = (
    LLAMA,
    replace(LLAMA, kind="mistral", prefix="Mistral", windows=True),
    replace(LLAMA, kind="ministral", prefix="Ministral", windows=True),
    replace(LLAMA, kind="seed_oss", prefix="SeedOss"),
    replace(LLAMA, kind="ernie4_5", prefix="Ernie4_5", interleaved=True, repeated_angles=True),
    replace(LLAMA, kind="helium", prefix="Helium", interleaved=True, repeated_angles=True),
    replace(LLAMA, kind="qwen2", prefix="Qwen2", windows=True),
    replace(LLAMA, kind="qwen3", prefix="Qwen3", windows=True, **_HEAD_NORMS),
    replace(LLAMA, kind="smollm3", prefix="SmolLM3", windows=True, rotary_switch="use_rope"),
    _GEMMA,
    _GEMMA2,
    _GEMMA3,
    _GPT2,
    _OPT,
    _GPT_NEOX,
    _PHI,
    _PHI3,
    _GRANITE,
    _STABLELM,
    _COHERE,
    replace(
        _COHERE,
        kind="cohere2",
        prefix="Cohere2",
        q_norm="",
        k_norm="",
        windows=True,
        rotary_switch="sliding_window",
    ),
    _OLMO2,
    replace(_OLMO2, kind="olmo3", prefix="Olmo3", windows=True, rotary_by_type=True),
    _GLM,
    replace(
        _GLM,
        kind="glm4",
        prefix="Glm4",
        after_attention="post_self_attn_layernorm",
        after_mlp="post_mlp_layernorm",
    ),
    _STARCODER2,
    _MIXTRAL,
    replace(
        _MIXTRAL,
        kind="qwen3_moe",
        prefix="Qwen3Moe",
        normalized_shares="norm_topk_prob",
        required=(("mlp_only_layers", None), ("decoder_sparse_step", 1)),
        **_HEAD_NORMS,
    ),
    replace(
        _MIXTRAL,
        kind="olmoe",
        prefix="Olmoe",
        normalized_shares="norm_topk_prob",
        whole_norms=True,
        windows=False,
        required=(("clip_qkv", None),),
        **_HEAD_NORMS,
    ),
)
