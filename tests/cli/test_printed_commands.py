"""Commands that bitmill prints for users to copy are accepted as they stand."""

from __future__ import annotations

import re
import shlex

import pytest
import typer.main

from bitmill.cli.help import EXAMPLES
from bitmill.cli.main import app
from bitmill.report import card
from bitmill.report.text import next_commands

COMMANDS = typer.main.get_command(app)
NEXT = [
    line for line in next_commands("org/name", "a folder", "AutoModelForCausalLM", True) if "bitmill" in line[:8]
]
CARD = re.findall(r"^bitmill [a-z].*$", card._CARD, re.MULTILINE)
HELP = [line for lines in EXAMPLES.values() for line in lines]


@pytest.mark.parametrize("line", [*NEXT, *CARD, *HELP])
def test_command_parses(line):
    program, *words = shlex.split(line)
    assert program == "bitmill"
    command = COMMANDS
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("test", words)
