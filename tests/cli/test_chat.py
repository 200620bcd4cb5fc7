"""bitmill chat: its commands, Ctrl-C, and a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from bitmill.cli.main import main
from bitmill.cli.output import Output
from bitmill.evaluation import generate
from helpers.workspace import save_model

NEEDS_USER = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_model(tmp_path_factory.mktemp("chat") / "model"))


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def chat(folder, capsys, monkeypatch):
    """Chat with the given lines; status, stdout, stderr and the messages of every answer."""
    prompts = []
    encode = generate.chat_prompt

    def record(tokenizer, turns):
        prompts.append([(turn["role"], turn["content"]) for turn in turns])
        return encode(tokenizer, turns)

    monkeypatch.setattr(generate, "chat_prompt", record)

    def run(lines, *options, terminal=False):
        monkeypatch.setattr(sys, "stdin", (Terminal if terminal else io.StringIO)(lines))
        prompts.clear()
        status = main(["chat", folder, "--max-new-tokens", "4", *options])
        return status, *capsys.readouterr(), prompts

    return run


def test_commands(chat):
    status, out, err, prompts = chat("/help\nw1\n/reset\nw2\n/system w9\nw3\n/system\nw4\n/exit\nw5\n")
    assert (status, err.count("system prompt")) == (0, 2)
    assert "/system TEXT" in out
    asked = [[text for role, text in messages if role != "assistant"] for messages in prompts]
    assert asked == [["w1"], ["w2"], ["w9", "Hello"], ["w9", "w2", "w3"], ["w2", "w3", "w4"]]


def test_system_option(chat):
    _, _, _, prompts = chat("w1\n", "--system", "w7 w8")
    assert prompts[-1] == [("system", "w7 w8"), ("user", "w1")]


def test_template_without_system(chat, folder, monkeypatch):
    from bitmill.workflows import load

    original = load.load_tokenizer

    def other(*args, **kwargs):
        tokenizer = original(*args, **kwargs)
        tokenizer.chat_template = NEEDS_USER + tokenizer.chat_template
        return tokenizer

    monkeypatch.setattr("bitmill.api.load_tokenizer", other)
    status, _, err, _ = chat("w1\n", "--system", "w7")
    assert status == 2
    assert "takes no system prompt" in err
    status, _, err, prompts = chat("/system w7\nw1\n", terminal=True)
    assert status == 0
    assert "takes no system prompt" in err
    assert prompts[-1] == [("user", "w1")]


def test_unknown_command(chat):
    assert chat("/jump\nw1\n")[0] == 2
    status, _, err, prompts = chat("/jump\nw1\n", terminal=True)
    assert (status, len(prompts)) == (0, 1)
    assert "no command '/jump'" in err


def test_ctrl_c_stops_the_answer(chat, monkeypatch):
    write, pieces = Output.write, []

    def interrupted(output, text):
        pieces.append(text)
        write(output, text)
        if len(pieces) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Output, "write", interrupted)
    before = signal.getsignal(signal.SIGINT)
    status, out, err, prompts = chat("w1\nw2\n", "--temperature", "9")
    assert status == 0
    assert "(stopped)" in err
    assert prompts[-1][1] == ("assistant", "".join(pieces[:2]))
    assert len(out.splitlines()) == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_ends_the_chat(chat, monkeypatch):
    def interrupted(output, text):
        for _ in range(2 if text.strip() else 0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    monkeypatch.setattr(Output, "write", interrupted)
    status, _, _, prompts = chat("w1\nw2\n", "--temperature", "9")
    assert (status, len(prompts)) == (0, 1)


def test_refused_without_template(tmp_path, capsys):
    source = save_model(tmp_path / "plain", chat=False)
    assert main(["chat", str(source)]) == 2
    assert f"use bitmill generate {source} --prompt" in capsys.readouterr().err


def test_terminal(folder):
    command = [sys.executable, "-m", "bitmill", "chat", folder, "--max-new-tokens", "4"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
                          preexec_fn=_control_terminal) as process:  # fmt: skip
        os.close(theirs)
        seen = b""

        def expect(text: bytes) -> None:
            nonlocal seen
            limit = time.monotonic() + 60
            while text not in seen:
                assert time.monotonic() < limit, seen
                if select.select([ours], [], [], 0.2)[0]:
                    seen += os.read(ours, 4096)
            seen = seen.partition(text)[2]

        try:
            expect(b"> ")
            os.write(ours, b"/help\n")
            expect(b"Ctrl-C during an answer")
            expect(b"> ")
            os.write(ours, b"w1 w2\n")
            expect(b"> ")
            for _ in range(6):  # Python loses a signal that arrives between its last look and the read
                os.write(ours, b"\x03")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                    break
            assert process.returncode == 0, seen
        finally:
            process.kill()  # leaving the block waits for it
    os.close(ours)


def _control_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs, and their children, ignore it
