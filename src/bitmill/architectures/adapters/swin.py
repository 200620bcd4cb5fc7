"""Swin transformers: stages of layers that attend inside windows, with a merging of patches between stages.

A stage is a block here: its layers have equal widths, and it ends with the linear layer that merges patches, so
that hidden states change their shape from block to block. The norms feed linear layers alone. There is no class
token.
"""

from bitmill.architectures.adapter import Adapter, Seam, register

_LAYER = "blocks.*"
_QKV = tuple(f"{_LAYER}.attention.{name}_proj" for name in "qkv")

for _base in ("", "swin"):
    register(
        Adapter(
            name="swin_classifier" if _base else "swin",
            model_types=("swin",),
            blocks=f"{_base}.encoder.layers".removeprefix("."),
            stages=(),
            fused=(),
            seams=(
                Seam("norm", f"{_LAYER}.layernorm_before", _QKV),
                Seam("linear", f"{_LAYER}.attention.v_proj", (f"{_LAYER}.attention.o_proj",)),
                Seam("norm", f"{_LAYER}.layernorm_after", (f"{_LAYER}.mlp.fc1",)),
                Seam("norm", "downsample.norm", ("downsample.reduction",)),
            ),
            embeddings=(f"{_base}.embeddings.patch_embeddings.projection".removeprefix("."),),
            head="classifier" if _base else "",
            task="image_classifier" if _base else "image_encoder_mean",
            head_class="ForImageClassification" if _base else "",
            inferred=True,
        )
    )
