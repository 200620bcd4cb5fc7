"""`python -m bitmill`, the command line."""

from runpy import run_module

run_module("bitmill.cli.main", run_name="__main__", alter_sys=True)
