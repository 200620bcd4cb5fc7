"""A loaded model that generates text, and the options of the commands that use one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from bitmill.cli.options import parse_pairs
from bitmill.cli.output import Output, kv_cache_rows
from bitmill.errors import UsageError

MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Maximum number of tokens to generate.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="0 always takes the most likely token.")]
Seed = Annotated[int, typer.Option(metavar="S", help="Seed of the sampling.")]
Dense = Annotated[
    bool, typer.Option("--dense", help="Unpack all weights first: an ordinary model, with a float model's memory.")
]


class Session:
    """A loaded model with its tokenizer and a factory of caches.

    Args:
        output: receives the progress.
        model: name or folder.
        kv: configuration of the cache, see `parse_kv`.
        dense: unpack all weights.
        device: cpu or cuda.
        trust_remote_code: run Python code that comes with the model.
        chats: the tokenizer needs a chat template.

    Raises:
        BitmillError: the model cannot be loaded, or not be used so.
    """

    def __init__(
        self,
        output: Output,
        model: str,
        *,
        kv: Any,
        dense: bool,
        device: str,
        trust_remote_code: bool,
        chats: bool = False,
    ) -> None:
        output.progress.start(f"loading {model}", 0)
        from bitmill import api
        from bitmill.evaluation.generate import check_can_generate
        from bitmill.evaluation.prompt_cache import PromptCache
        from bitmill.workflows.kv import CacheFactory

        self.tokenizer: Any = api.load_tokenizer(model, trust_remote_code=trust_remote_code)
        self.model: Any = api.load(model, device=device, dense=dense, trust_remote_code=trust_remote_code)
        check_can_generate(self.model, model)
        if chats and not self.has_chat_template:
            raise UsageError(f"{model} has no chat template; use bitmill generate {model} --prompt TEXT.")
        output.progress.finish()
        self.caches = CacheFactory(self.model, kv, model)
        self._prompts = PromptCache(self.caches.new, self.caches.continues)

    @property
    def has_chat_template(self) -> bool:
        """True if the tokenizer can format a chat."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def generate(
        self,
        ids: list[int],
        max_new_tokens: int,
        temperature: float,
        seed: int,
        on_text: Callable[[str], None] | None,
        should_stop: Callable[[], bool] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Continue token ids, of which those that the last call began with too are not read again.

        Args:
            ids: the prompt.
            max_new_tokens: maximum number of new tokens.
            temperature: 0 takes the most likely token.
            seed: of the sampling.
            on_text: receives the text piece by piece.
            should_stop: asked before every token.

        Returns:
            The `Generation`, and the measures of the packed cache (empty for an ordinary one).
        """
        from bitmill.evaluation.generate import generate

        past, read = self._prompts.begin(ids)
        generation = generate(
            self.model,
            self.tokenizer,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            on_text=on_text,
            past=past,
            read=read,
            chunk=self.caches.chunk,
            should_stop=should_stop,
        )
        self._prompts.end(generation.past, generation.held)
        return generation, self.caches.measurements(past)


def parse_kv(kv: str | None, bits: int | None, settings: list[str] | None) -> Any:
    """Return the configuration of the cache from --kv, --kv-bits and --kv-set."""
    from bitmill.kv.config import parse_kv_config

    return parse_kv_config(kv, bits, parse_pairs(settings, "--kv-set"))


def note_cache(output: Output, measured: dict[str, Any]) -> None:
    """Print the measures of a packed cache on stderr."""
    if measured:
        output.note(", ".join(f"{name} {value}" for name, value in kv_cache_rows(measured)))
