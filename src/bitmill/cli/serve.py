"""bitmill serve."""

from __future__ import annotations

import socket
import sys
from typing import Annotated

import typer

from bitmill.cli.execute import run_program
from bitmill.cli.options import Device, QuantizedFolder, TrustRemoteCode
from bitmill.errors import UsageError, one_line

Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")]
More = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- OPTION]...", help="Options of transformers serve.", show_default=False),
]


def serve(
    folder: QuantizedFolder,
    more: More = None,
    host: Host = "localhost",
    port: Port = 8000,
    device: Device = "cpu",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a quantized folder by the protocol of OpenAI, with the server of transformers."""
    from transformers.utils.import_utils import is_serve_available

    from bitmill.checkpoint.reader import open_checkpoint
    from bitmill.config.paths import user_path

    if not is_serve_available():
        raise UsageError(
            'The server of transformers needs packages that are not installed; pip install "bitmill[serve]".'
        )
    path = open_checkpoint(user_path(folder)).folder
    try:
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        raise UsageError(
            f"No server can listen on {host}:{port} ({one_line(error)}); choose another --port."
        ) from None
    options = ["--host", host, "--port", str(port), "--device", device]
    options += ["--trust-remote-code"] if trust_remote_code else []
    module = "transformers.cli.transformers"
    run_program([sys.executable, "-P", "-m", module, "serve", str(path.resolve()), *options, *(more or ())])
