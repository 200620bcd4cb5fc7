"""Vision transformers with norms before attention and MLP: ViT, DeiT and DINOv2, with and without a classifier.

Attention is linear in the values. The norms feed linear layers alone, so their channels may be scaled; GELU does
not commute with a scale.
"""

from bitmill.architectures.adapter import Adapter, Seam, register

_QKV = ("attention.q_proj", "attention.k_proj", "attention.v_proj")
_OUT, _UP, _DOWN = "attention.o_proj", "mlp.fc1", "mlp.fc2"


def _adapter(name: str, model_types: tuple[str, ...], blocks: str, norms: tuple[str, str], base: str) -> Adapter:
    """Return the adapter of an encoder, or of a classifier that holds it as `base`."""
    return Adapter(
        name=f"{name}_classifier" if base else name,
        model_types=model_types,
        blocks=f"{base}.{blocks}" if base else blocks,
        stages=(_QKV, (_OUT,), (_UP,), (_DOWN,)),
        fused=(_QKV,),
        seams=(
            Seam("norm", norms[0], _QKV),
            Seam("linear", "attention.v_proj", (_OUT,)),
            Seam("norm", norms[1], (_UP,)),
        ),
        embeddings=(f"{base}.embeddings.patch_embeddings.projection".removeprefix("."),),
        head="classifier" if base else "",
        task="image_classifier" if base else "image_encoder",
        head_class="ForImageClassification" if base else "",
    )


for _base in ("", "vit"):
    register(_adapter("vit", ("vit",), "layers", ("layernorm_before", "layernorm_after"), _base))
for _base in ("", "deit"):
    register(_adapter("deit", ("deit",), "layers", ("layernorm_before", "layernorm_after"), _base))
for _base in ("", "dinov2"):
    register(_adapter("dinov2", ("dinov2",), "encoder.layer", ("norm1", "norm2"), _base))
