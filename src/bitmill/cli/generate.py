"""bitmill generate and bitmill chat."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from bitmill.cli.options import AnyModel, AsJson, Device, Kv, KvBits, KvSet, TrustRemoteCode, parse_pairs
from bitmill.cli.output import Output, command_output, kv_cache_rows
from bitmill.errors import UsageError
from bitmill.evaluation.context import context_length
from bitmill.report.text import format_number

Prompt = Annotated[str, typer.Option(metavar="TEXT", help="Text to continue or to answer.")]
MaxNewTokens = Annotated[int, typer.Option(metavar="N", help="Maximum number of tokens to generate.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="0 always takes the most likely token.")]
Seed = Annotated[int, typer.Option(metavar="S", help="Seed of the sampling.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the bare text, even if the model has a chat template.")]
Dense = Annotated[
    bool, typer.Option("--dense", help="Unpack all weights first: an ordinary model, with a float model's memory.")
]


class Session:
    """A loaded model with its tokenizer and a factory of caches."""

    def __init__(
        self, output: Output, model: str, *, kv: Any, dense: bool, device: str, trust_remote_code: bool
    ) -> None:
        output.progress.start(f"loading {model}", 0)
        from bitmill import api
        from bitmill.evaluation.generate import check_can_generate
        from bitmill.workflows.kv import CacheFactory

        self.tokenizer: Any = api.load_tokenizer(model, trust_remote_code=trust_remote_code)
        self.model: Any = api.load(model, device=device, dense=dense, trust_remote_code=trust_remote_code)
        check_can_generate(self.model, model)
        output.progress.finish()
        self.caches = CacheFactory(self.model, kv, model)

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
    ) -> tuple[Any, dict[str, Any]]:
        """Continue token ids with an empty cache.

        Args:
            ids: the prompt.
            max_new_tokens: maximum number of new tokens.
            temperature: 0 takes the most likely token.
            seed: of the sampling.
            on_text: receives the text piece by piece.

        Returns:
            The `Generation`, and the measures of the packed cache (empty for an ordinary one).
        """
        from bitmill.evaluation.generate import generate

        past = self.caches.new()
        generation = generate(
            self.model,
            self.tokenizer,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            on_text=on_text,
            past=past,
            chunk=self.caches.chunk,
        )
        return generation, self.caches.measurements(past)


def generate(
    model: AnyModel,
    prompt: Prompt,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    raw: Raw = False,
    dense: Dense = False,
    kv: Kv = None,
    kv_bits: KvBits = None,
    kv_set: KvSet = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Generate text; the prompt is answered as a chat if the tokenizer has a chat template."""
    with command_output(as_json) as output:
        config = _kv_config(kv, kv_bits, kv_set)
        session = Session(
            output, model, kv=config, dense=dense, device=device, trust_remote_code=trust_remote_code
        )
        from bitmill.evaluation.generate import chat_prompt, encode

        chat = not raw and session.has_chat_template
        messages = [{"role": "user", "content": prompt}]
        ids = chat_prompt(session.tokenizer, messages) if chat else encode(session.tokenizer, prompt)
        pending = [] if chat else [prompt]  # a bare prompt is printed with the first piece of its continuation

        def show(piece: str) -> None:
            output.write("".join(pending) + piece)
            pending.clear()

        done, cache = session.generate(ids, max_new_tokens, temperature, seed, None if as_json else show)
        if as_json:
            output.result(_generation_data(done, prompt, chat, cache), lambda: [])
        else:
            show("\n")
            _print_speed(output, done)
            _print_cache(output, cache)


def chat(
    model: AnyModel,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dense: Dense = False,
    kv: Kv = None,
    kv_bits: KvBits = None,
    kv_set: KvSet = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a model; /quit, Ctrl-D or Ctrl-C ends."""
    with command_output(False) as output:
        config = _kv_config(kv, kv_bits, kv_set)
        session = Session(
            output, model, kv=config, dense=dense, device=device, trust_remote_code=trust_remote_code
        )
        if not session.has_chat_template:
            raise UsageError(f"{model} has no chat template; use bitmill generate {model} --prompt TEXT.")
        messages: list[dict[str, str]] = []
        try:
            for line in _read_lines(output):
                messages.append({"role": "user", "content": line})
                ids = _fit_context(session, messages, max_new_tokens)
                turn_seed = seed + len(messages)
                done, cache = session.generate(ids, max_new_tokens, temperature, turn_seed, output.write)
                output.write("\n")
                _print_cache(output, cache)
                messages.append({"role": "assistant", "content": done.text})
        except KeyboardInterrupt:
            output.write("\n")


def _kv_config(kv: str | None, bits: int | None, settings: list[str] | None) -> Any:
    from bitmill.kv.config import parse_kv_config

    return parse_kv_config(kv, bits, parse_pairs(settings, "--kv-set"))


def _fit_context(session: Session, messages: list[dict[str, str]], max_new_tokens: int) -> list[int]:
    """Return the prompt of a chat, after deleting the oldest turns that exceed the model's context."""
    from bitmill.evaluation.generate import chat_prompt

    context = context_length(session.model.config)
    ids = chat_prompt(session.tokenizer, messages)
    while context is not None and len(ids) + max_new_tokens > context and len(messages) > 2:
        del messages[:2]  # the oldest question and its answer
        ids = chat_prompt(session.tokenizer, messages)
    return ids


def _generation_data(done: Any, prompt: str, chat: bool, cache: dict[str, Any]) -> dict[str, Any]:
    from bitmill.progress import peak_memory_bytes

    return {
        "text": done.text,
        "prompt": prompt,
        "chat": chat,
        "new_tokens": done.new_tokens,
        "stopped": done.stopped,
        "tokens_per_s": done.tokens_per_s,
        "time_s": done.time_s,
        "peak_memory_bytes": peak_memory_bytes(),
        **cache,
    }


def _print_speed(output: Output, done: Any) -> None:
    from bitmill.progress import peak_memory_bytes

    speed = f"{done.new_tokens} tokens, {format_number(done.tokens_per_s, 3)} tokens/s"
    output.note(f"{speed}, peak memory {peak_memory_bytes() / 1e9:.2f} GB")


def _print_cache(output: Output, measured: dict[str, Any]) -> None:
    if measured:
        output.note(", ".join(f"{name} {value}" for name, value in kv_cache_rows(measured)))


def _read_lines(output: Output) -> Iterator[str]:
    """Yield the non-empty lines of stdin, until /quit or its end; with a prompt sign on a terminal."""
    interactive = sys.stdin.isatty()
    if interactive:
        print("/quit ends the chat.", file=sys.stderr)
    while True:
        if interactive:
            output.write("> ")
        line = sys.stdin.readline()
        if not line:
            if interactive:
                output.write("\n")
            return
        line = line.strip()
        if line == "/quit":
            return
        if line:
            yield line
