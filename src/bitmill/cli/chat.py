"""bitmill chat."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Annotated, Any

import typer

from bitmill.cli.activations import Activations, rounded_to
from bitmill.cli.options import AnyModel, Device, Kv, KvBits, KvSet, TrustRemoteCode
from bitmill.cli.output import Output, command_output
from bitmill.cli.session import Dense, MaxNewTokens, Seed, Session, Temperature, note_cache, parse_kv
from bitmill.errors import BitmillError, UsageError
from bitmill.evaluation.context import context_length

HELP = """\
/help          list these commands
/system TEXT   give the model this system prompt; without TEXT, none
/reset         forget the conversation, but for the system prompt
/exit          end the chat, as /quit, Ctrl-D and Ctrl-C at the prompt do
Ctrl-C during an answer stops the answer.
"""
ENDS = ("/exit", "/quit")

System = Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt of the chat.", show_default=False)]


@dataclass
class Conversation:
    """A chat so far: a system prompt, and turns of user and model."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """Return all messages, as chat templates read them."""
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def add(self, role: str, text: str) -> None:
        """Append a turn."""
        self.turns.append({"role": role, "content": text})

    def prompt(self, session: Session, max_new_tokens: int) -> list[int]:
        """Return the token ids of the chat, after dropping the oldest turns that exceed the model's context."""
        from bitmill.evaluation.generate import chat_prompt

        context = context_length(session.model.config)
        ids = chat_prompt(session.tokenizer, self.messages())
        while context is not None and len(ids) + max_new_tokens > context and len(self.turns) > 2:
            del self.turns[:2]  # the oldest question and its answer
            ids = chat_prompt(session.tokenizer, self.messages())
        return ids


def chat(
    model: AnyModel,
    system: System = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dense: Dense = False,
    kv: Kv = None,
    kv_bits: KvBits = None,
    kv_set: KvSet = None,
    device: Device = "cpu",
    activations: Activations = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Chat with a model; Ctrl-C stops an answer, /help lists commands."""
    with command_output(False) as output, rounded_to(activations):
        session = Session(
            output,
            model,
            kv=parse_kv(kv, kv_bits, kv_set),
            dense=dense,
            device=device,
            trust_remote_code=trust_remote_code,
            chats=True,
        )
        conversation = Conversation()
        _set_system(session, conversation, system or "")
        with contextlib.suppress(KeyboardInterrupt):
            for line in _read_lines(output):
                if line in ENDS:
                    return
                with _reported(output):
                    if line.startswith("/"):
                        _obey(line, session, conversation, output)
                    else:
                        _answer(line, session, conversation, output, max_new_tokens, temperature, seed)
            return
        output.write("\n")


def _obey(line: str, session: Session, conversation: Conversation, output: Output) -> None:
    """Carry out a line that begins with a slash."""
    command, _, text = line.partition(" ")
    if command == "/help":
        output.write(HELP)
    elif command == "/reset":
        conversation.turns.clear()
        output.note("The conversation is forgotten.")
    elif command == "/system":
        _set_system(session, conversation, text.strip())
        output.note("The system prompt is set." if conversation.system else "There is no system prompt.")
    else:
        raise UsageError(f"There is no command {command!r}; /help lists all.")


def _set_system(session: Session, conversation: Conversation, text: str) -> None:
    """Change the system prompt. Raises UsageError where the model's template has no place for one."""
    from bitmill.evaluation.generate import chat_prompt

    if text:
        turns = [{"role": "system", "content": text}, {"role": "user", "content": "Hello"}]
        try:
            chat_prompt(session.tokenizer, turns)
        except UsageError as error:
            raise UsageError(f"The model takes no system prompt: {error}") from None
    conversation.system = text or None


def _answer(
    line: str,
    session: Session,
    conversation: Conversation,
    output: Output,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> None:
    """Print the model's answer while it is generated; a stopped one stays in the conversation as it is."""
    conversation.add("user", line)
    try:
        ids = conversation.prompt(session, max_new_tokens)
        turn_seed = seed + len(conversation.turns)
        with _Stop() as stop:
            done, cache = session.generate(
                ids, max_new_tokens, temperature, turn_seed, output.write, stop.is_requested
            )
    except BaseException:
        conversation.turns.pop()
        raise
    output.write("\n")
    if done.stopped == "interrupt":
        output.note("(stopped)")
    note_cache(output, cache)
    conversation.add("assistant", done.text)


class _Stop:
    """Turns the first Ctrl-C of a block into a request to stop; the second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self._requested = False
        self._before: Any = None

    def is_requested(self) -> bool:
        """Return True after Ctrl-C."""
        return self._requested

    def __enter__(self) -> _Stop:
        with contextlib.suppress(ValueError):  # not the main thread, which alone receives signals
            self._before = signal.signal(signal.SIGINT, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._requested:
            raise KeyboardInterrupt
        self._requested = True


@contextlib.contextmanager
def _reported(output: Output) -> Iterator[None]:
    """Print an error of a line and go on, on a terminal; an error in lines of a file ends the chat."""
    try:
        yield
    except BitmillError as error:
        if not sys.stdin.isatty():
            raise
        print(f"error: {error}", file=sys.stderr)


def _read_lines(output: Output) -> Iterator[str]:
    """Yield the non-empty lines of stdin until its end; with a prompt sign on a terminal."""
    interactive = sys.stdin.isatty()
    if interactive:
        output.note("/help lists the commands, Ctrl-C stops an answer, /exit ends the chat.")
    while True:
        if interactive:
            output.write("> ")
        line = sys.stdin.readline()
        if not line:
            if interactive:
                output.write("\n")
            return
        if line := line.strip():
            yield line
