"""The command line: one file per group of commands; nothing in it computes."""
