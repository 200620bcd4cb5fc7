"""Documentation: the language reference inside the standard library of Python."""

from __future__ import annotations

from bitmill.data.domain import DOMAINS, Document, Domain, grouped


@DOMAINS.register("documentation")
class Documentation(Domain):
    """Topics of `pydoc`, of which some repeat parts of others and then are in one part with them."""

    description = "the language reference of Python"
    origin = "pydoc_data of the running Python"
    licence = "PSF-2.0"

    @classmethod
    def documents(cls) -> list[Document]:
        """Return one document per topic."""
        from pydoc_data.topics import topics

        identities = grouped({name: topics[name] for name in sorted(topics)})
        return [Document(identities[name], text) for name, text in sorted(topics.items())]
