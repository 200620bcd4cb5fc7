"""The two ends of a model: the table that turns tokens into vectors, and the head that turns vectors into logits.

They are the largest matrices of a small model. In many models they are one and the same.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from bitmill.architectures.site import Site
from bitmill.errors import SourceError
from bitmill.models.streamed import StreamedModel


@dataclass(frozen=True)
class EmbeddingAndHead:
    """Paths of the table of token embeddings and of the head; `head` is "" where there is none, as in an encoder.

    tied: the head reads the embedding's matrix.
    """

    embedding: str
    head: str
    tied: bool

    @property
    def layers(self) -> tuple[str, ...]:
        """Those with a matrix of their own, (rows, columns) = (vocabulary, width) each."""
        return (self.embedding,) if self.tied or not self.head else (self.embedding, self.head)

    @property
    def weights(self) -> tuple[str, ...]:
        """The names under which a source may hold these matrices."""
        return tuple(f"{path}.weight" for path in (self.embedding, self.head) if path)

    def stored_name(self, layer: str, streamed: StreamedModel) -> str:
        """The name under which the source does hold the matrix of a layer; of tied ones it may hold either."""
        known = [name for name in self.weights if name in streamed.names()]
        own = f"{layer}.weight"
        return own if own in known else known[0]

    def sites(self, streamed: StreamedModel) -> tuple[Site, ...]:
        """Return the matrices of `layers` as sites, (vocabulary, width) each."""
        return tuple(
            Site(f"{layer}.weight", shape=streamed.shape(self.stored_name(layer, streamed)))
            for layer in self.layers
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def embedding_and_head(streamed: StreamedModel) -> EmbeddingAndHead:
    """The ends of a model. Raises SourceError where they are not a plain table and a plain linear.

    A generic walk finds other tables and linears too: what has a row for every token counts.
    """
    adapter, name = streamed.adapter, streamed.source.name
    modules = dict(streamed.model.named_modules())
    tables = {path: table for path in adapter.embeddings if isinstance(table := modules.get(path), nn.Embedding)}
    head = modules.get(adapter.head) if adapter.head else None
    if adapter.inferred:
        vocabulary = getattr(streamed.source.config, "vocab_size", None) or getattr(head, "out_features", None)
        tables = {path: table for path, table in tables.items() if table.num_embeddings == vocabulary}
        head = head if getattr(head, "out_features", None) == vocabulary else None
    if not tables:
        raise SourceError(
            f"{name} has no table of token embeddings that bitmill knows, so it stays in float; leave --head-bits "
            "(head_bits) out."
        )
    if not isinstance(head, nn.Linear | None):
        raise SourceError(
            f"The head of {name} is a {type(head).__name__} and no linear layer, so it stays in float; leave "
            "--head-bits (head_bits) out."
        )
    path, table = next(iter(tables.items()))
    tied = head is not None and head.weight is table.weight
    return EmbeddingAndHead(path, "" if head is None else adapter.head, tied)


def embedding_and_head_sites(streamed: StreamedModel) -> tuple[Site, ...]:
    """Return the token embedding and the head as sites, one where they are tied.

    Raises:
        SourceError: The model has no plain embedding, or its head is no linear layer.
    """
    return embedding_and_head(streamed).sites(streamed)
