"""Embedding and output head of a model: of tokens the largest matrices of a small model, tied in many models.

The embedding of a vision model is a convolution whose stride is its kernel's size: the product of every patch with
a matrix (out, channels * height * width).
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any, TypeGuard

from torch import nn

from bitmill.architectures.site import Site
from bitmill.errors import SourceError
from bitmill.models.streamed import StreamedModel


@dataclass(frozen=True)
class EmbeddingAndHead:
    """Paths of the embedding of tokens or patches, and of the output head.

    embedding: path of the embedding; "" where it is left out, see `only`.
    head: path of the head; "" where there is none, as in an encoder.
    tied: the head uses the matrix of the embedding.
    """

    embedding: str
    head: str
    tied: bool

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers with a matrix of their own, (vocabulary, width) each."""
        return (self.embedding,) if self.tied else tuple(filter(None, (self.embedding, self.head)))

    @property
    def weights(self) -> tuple[str, ...]:
        """The names that a source may use for these matrices."""
        return tuple(f"{path}.weight" for path in (self.embedding, self.head) if path)

    def only(self, layers: Container[str]) -> EmbeddingAndHead:
        """Return the part whose matrices are among `layers`; a tied head belongs to the embedding."""
        embedding = self.embedding if self.embedding in layers else ""
        if self.tied:
            return self if embedding else EmbeddingAndHead("", "", False)
        return replace(self, embedding=embedding, head=self.head if self.head in layers else "")

    def stored_name(self, layer: str, streamed: StreamedModel) -> str:
        """Return the name that the source uses for the matrix of a layer.

        Args:
            layer: path of the embedding or the head; of tied layers the source may hold either.
            streamed: the model.
        """
        present = [name for name in self.weights if name in streamed.names()]
        own = f"{layer}.weight"
        return own if own in present else present[0]

    def shape(self, layer: str, streamed: StreamedModel) -> tuple[int, int]:
        """Return the shape (rows, columns) of the matrix of a layer."""
        rows, *columns = streamed.shape(self.stored_name(layer, streamed))
        return rows, prod(columns)

    def sites(self, streamed: StreamedModel) -> tuple[Site, ...]:
        """Return the matrices of `layers` as sites, (vocabulary, width) each of a language model."""
        return tuple(Site(f"{layer}.weight", shape=self.shape(layer, streamed)) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


def embedding_and_head(streamed: StreamedModel) -> EmbeddingAndHead:
    """Return the token embedding and the head of a model.

    Raises:
        SourceError: The embedding is no plain nn.Embedding, or the head no plain nn.Linear.
    """
    found = find_embedding_and_head(streamed)
    if isinstance(found, str):
        raise SourceError(f"{found}; leave out --head-bits (head_bits).")
    return found


def find_embedding_and_head(streamed: StreamedModel) -> EmbeddingAndHead | str:
    """Return the token embedding and the head of a model, or the reason why they cannot be packed.

    An inferred adapter lists other embeddings and linear layers too; those with a row for every token count.
    """
    adapter, name = streamed.adapter, streamed.source.name
    modules = dict(streamed.model.named_modules())
    listed = {path: modules.get(path) for path in adapter.embeddings}
    tokens = {path: module for path, module in listed.items() if isinstance(module, nn.Embedding)}
    patches = {path: module for path, module in listed.items() if embeds_patches(module)}
    head = modules.get(adapter.head) if adapter.head else None
    if adapter.inferred and not patches:
        vocabulary = getattr(streamed.source.config, "vocab_size", None) or getattr(head, "out_features", None)
        tokens = {path: m for path, m in tokens.items() if m.num_embeddings == vocabulary}
        head = head if getattr(head, "out_features", None) == vocabulary else None
    embeddings: dict[str, nn.Embedding | nn.Conv2d] = {**tokens, **patches}
    if not embeddings:
        return f"{name} has no token embedding that bitmill recognizes, so it stays in float"
    if not isinstance(head, nn.Linear | None):
        return f"The head of {name} is a {type(head).__name__} and no linear layer, so it stays in float"
    path, embedding = next(iter(embeddings.items()))
    for other, module in streamed.model.named_modules(remove_duplicate=False):
        if other != path and isinstance(module, nn.Embedding) and module.weight is embedding.weight:
            return f"The embedding {path} of {name} is {other} too, so it stays in float"
    tied = head is not None and head.weight is embedding.weight
    return EmbeddingAndHead(path, "" if head is None else adapter.head, tied)


def embeds_patches(module: Any) -> TypeGuard[nn.Conv2d]:
    """Return True for a convolution that multiplies every patch of a picture with one matrix, and nothing else."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride
        and module.padding in ((0, 0), "valid")
        and module.dilation == (1, 1)
        and module.groups == 1
    )


def embedding_and_head_sites(streamed: StreamedModel) -> tuple[Site, ...]:
    """Return the token embedding and the head as sites, one where they are tied.

    Raises:
        SourceError: The model has no plain embedding, or its head is no linear layer.
    """
    return embedding_and_head(streamed).sites(streamed)
