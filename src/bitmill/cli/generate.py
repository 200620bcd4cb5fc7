"""bitmill generate."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from bitmill.cli.activations import Activations, rounded_to
from bitmill.cli.options import AnyModel, AsJson, Device, Kv, KvBits, KvSet, TrustRemoteCode
from bitmill.cli.output import Output, command_output
from bitmill.cli.session import Dense, MaxNewTokens, Seed, Session, Temperature, note_cache, parse_kv
from bitmill.report.text import format_number

Prompt = Annotated[str, typer.Option(metavar="TEXT", help="Text to continue or to answer.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the bare text, even if the model has a chat template.")]


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
    activations: Activations = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Generate text; the prompt is answered as a chat if the tokenizer has a chat template."""
    with command_output(as_json) as output, rounded_to(activations):
        config = parse_kv(kv, kv_bits, kv_set)
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
            note_cache(output, cache)


def _generation_data(done: Any, prompt: str, chat: bool, cache: dict[str, Any]) -> dict[str, Any]:
    from bitmill.progress import peak_memory_bytes
    from bitmill.runtime.activations import activations

    return {
        "text": done.text,
        "prompt": prompt,
        "chat": chat,
        "new_tokens": done.new_tokens,
        "activations": activations().name,
        "stopped": done.stopped,
        "tokens_per_s": done.tokens_per_s,
        "time_s": done.time_s,
        "peak_memory_bytes": peak_memory_bytes(),
        **cache,
    }


def _print_speed(output: Output, done: Any) -> None:
    from bitmill.progress import peak_memory_bytes
    from bitmill.runtime.activations import activations

    speed = f"{done.new_tokens} tokens, {format_number(done.tokens_per_s, 3)} tokens/s"
    output.note(f"{speed}, activations {activations().name}, peak memory {peak_memory_bytes() / 1e9:.2f} GB")
