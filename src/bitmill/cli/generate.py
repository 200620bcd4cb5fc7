"""bitmill generate and bitmill chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from bitmill.cli.options import AsJson, Device, Kv, KvBits, KvSet, TrustRemoteCode, pairs
from bitmill.cli.output import Output, kv_rows, number, working
from bitmill.errors import UsageError

ModelArgument = Annotated[str, typer.Argument(help="Quantized folder, or any float model.", show_default=False)]
MaxTokens = Annotated[int, typer.Option(metavar="N", help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option(metavar="T", help="0 always takes the likeliest token.")]
Seed = Annotated[int, typer.Option(metavar="S", help="Seed of the sampling.")]
Dense = Annotated[
    bool, typer.Option("--dense", help="Unpack all weights first: an ordinary model, with a float model's memory.")
]


def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to continue or to answer.")],
    max_new_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the bare text, even if the model has a chat template.")
    ] = False,
    dense: Dense = False,
    kv: Kv = None,
    kv_bits: KvBits = None,
    kv_set: KvSet = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Generate text; answers the prompt as a chat when the tokenizer has a chat template."""
    with working(as_json) as output:
        live, tokenizer = _open(output, model, dense, device, trust_remote_code)
        caches = _caches(live, model, kv, kv_bits, kv_set)
        from bitmill.evaluation.generate import chat_prompt, encode, generate
        from bitmill.progress import peak_memory_bytes

        chat = not raw and bool(getattr(tokenizer, "chat_template", None))
        turns = [{"role": "user", "content": prompt}]
        ids = chat_prompt(tokenizer, turns) if chat else encode(tokenizer, prompt)
        pending = [] if chat else [prompt]  # a bare text is shown with its continuation, once there is one

        def show(piece: str) -> None:
            _say(output, "".join(pending) + piece)
            pending.clear()

        past = caches.new()
        done = generate(
            live,
            tokenizer,
            ids,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            on_text=None if as_json else show,
            past=past,
            chunk=caches.chunk,
        )
        if not as_json:
            show("\n")
            speed = f"{done.new_tokens} tokens, {number(done.tokens_per_s, 3)} tokens/s"
            print(f"{speed}, peak memory {peak_memory_bytes() / 1e9:.2f} GB", file=sys.stderr)
            _say_cache(caches.measured(past))
            return
        output.result(
            {
                "text": done.text,
                "prompt": prompt,
                "chat": chat,
                "new_tokens": done.new_tokens,
                "stopped": done.stopped,
                "tokens_per_s": done.tokens_per_s,
                "time_s": done.time_s,
                "peak_memory_bytes": peak_memory_bytes(),
                **caches.measured(past),
            },
            lambda: [],
        )


def chat(
    model: ModelArgument,
    max_new_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dense: Dense = False,
    kv: Kv = None,
    kv_bits: KvBits = None,
    kv_set: KvSet = None,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk with a model; /quit, Ctrl-D or Ctrl-C ends."""
    with working(False) as output:
        live, tokenizer = _open(output, model, dense, device, trust_remote_code)
        caches = _caches(live, model, kv, kv_bits, kv_set)
        from bitmill.evaluation.generate import chat_prompt, generate

        if not getattr(tokenizer, "chat_template", None):
            raise UsageError(f"{model} has no chat template; use bitmill generate {model} --prompt TEXT.")
        room = getattr(live.config, "max_position_embeddings", None)
        turns: list[dict[str, str]] = []
        try:
            for line in _lines(output):
                turns.append({"role": "user", "content": line})
                ids = chat_prompt(tokenizer, turns)
                while isinstance(room, int) and len(ids) + max_new_tokens > room and len(turns) > 2:
                    del turns[:2]  # the oldest question and its answer
                    ids = chat_prompt(tokenizer, turns)
                past = caches.new()
                done = generate(
                    live,
                    tokenizer,
                    ids,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    seed=seed + len(turns),
                    on_text=lambda piece: _say(output, piece),
                    past=past,
                    chunk=caches.chunk,
                )
                _say(output, "\n")
                _say_cache(caches.measured(past))
                turns.append({"role": "assistant", "content": done.text})
        except KeyboardInterrupt:
            _say(output, "\n")


def _open(output: Output, model: str, dense: bool, device: str, trust_remote_code: bool) -> tuple[Any, Any]:
    output.progress.start(f"loading {model}", 0)
    from bitmill import api
    from bitmill.evaluation.generate import check_can_generate

    tokenizer = api.load_tokenizer(model, trust_remote_code=trust_remote_code)
    live = api.load(model, device=device, dense=dense, trust_remote_code=trust_remote_code)
    check_can_generate(live, model)
    output.progress.finish()
    return live, tokenizer


def _caches(live: Any, model: str, kv: str | None, bits: int | None, settings: list[str] | None) -> Any:
    from bitmill.kv.config import parse_kv_config
    from bitmill.workflows.kv import CacheFactory

    return CacheFactory(live, parse_kv_config(kv, bits, pairs(settings, "--kv-set")), model)


def _say_cache(measured: dict[str, Any]) -> None:
    if measured:
        print(", ".join(f"{name} {value}" for name, value in kv_rows(measured)), file=sys.stderr)


def _lines(output: Output) -> Iterator[str]:
    """What the user says, line by line, until /quit or the end of the input."""
    asks = sys.stdin.isatty()
    if asks:
        print("/quit ends the chat.", file=sys.stderr)
    while True:
        if asks:
            _say(output, "> ")
        line = sys.stdin.readline()
        if not line:
            if asks:
                _say(output, "\n")
            return
        line = line.strip()
        if line == "/quit":
            return
        if line:
            yield line


def _say(output: Output, text: str) -> None:
    output.stdout.write(text)
    output.stdout.flush()
