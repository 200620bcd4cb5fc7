"""`bitmill serve` checks what it can before it hands over to the server of transformers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import import_utils

import bitmill
from bitmill.cli import serve
from bitmill.cli.main import main
from helpers.workspace import save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("serve")
    bitmill.quantize(str(save_model(path / "float")), "rtn", bits=4, out=path / "packed", measure=0)
    return path / "packed"


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    found: list[list[str]] = []
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: True)
    monkeypatch.setattr(serve, "run_program", found.append)
    return found


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        return int(server.getsockname()[1])


def test_program(folder: Path, programs: list[list[str]]) -> None:
    port = str(free_port())
    assert main(["serve", str(folder), "--port", port, "--", "--enable-cors"]) == 0
    words = programs[0]
    assert words[:5] == [sys.executable, "-P", "-m", "transformers.cli.transformers", "serve"]
    assert words[5] == str(folder.resolve())
    assert words[-5:] == ["--port", port, "--device", "cpu", "--enable-cors"]


def test_refusals(folder: Path, programs: list[list[str]], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
        assert main(["serve", str(folder), "--port", port]) == 2
        assert "choose another --port" in capsys.readouterr().err
    assert main(["serve", str(folder / "absent")]) != 0
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    assert main(["serve", str(folder)]) == 2
    assert 'pip install "bitmill[serve]"' in capsys.readouterr().err
    assert main(["serve", str(folder), "--engine", "vllm"]) == (0 if find_spec("vllm") else 2)
    assert find_spec("vllm") or "vLLM is not installed here" in capsys.readouterr().err
    assert main(["serve", str(folder), "--engine", "llama"]) == 2
    assert not programs or find_spec("vllm")


def test_vllm(folder: Path, programs: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: object())
    port = str(free_port())
    command = ["serve", str(folder), "--engine", "vllm", "--port", port, "--", "--max-model-len", "512"]
    assert main(command) == 0
    assert programs[0][3:6] == ["vllm.entrypoints.cli.main", "serve", str(folder.resolve())]
    assert programs[0][-4:] == ["--port", port, "--max-model-len", "512"]


@pytest.mark.skipif(not import_utils.is_serve_available(), reason="needs bitmill[serve]")
def test_answers(folder: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "bitmill", "serve", str(folder), "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        listed = ask(server, f"http://localhost:{port}/v1/models")
        assert [model["id"] for model in listed["data"]] == [str(folder.resolve())]
        question = {"messages": [{"role": "user", "content": "w5 w6"}], "max_tokens": 3, "temperature": 0}
        answer = ask(
            server, f"http://localhost:{port}/v1/chat/completions", {"model": str(folder.resolve()), **question}
        )
        assert answer["usage"]["completion_tokens"] <= 3
    finally:
        server.kill()
        server.wait()


def ask(server: subprocess.Popen[bytes], url: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    for _ in range(300):
        assert server.poll() is None
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return json.load(response)
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the server did not answer within a minute")
