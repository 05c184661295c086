"""What a command prints: its result to stdout, its faults to stderr. Knows no commands."""

from __future__ import annotations

import argparse
import os
import sys
from io import TextIOWrapper
from typing import TextIO

from glmbatch.errors import GlmbatchError


class Unshown(GlmbatchError):
    """The result of a command that is done cannot be written to stdout."""


def accept_all_names() -> None:
    """Let a file name that cannot be encoded be shown: it must not fail a finished run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # tests and notebooks replace the streams
            stream.reconfigure(errors="backslashreplace")


def show(text: str, end: str = "\n") -> None:
    """Print `text` to stdout at once. Quiet if its reader has read enough, as `head` has.

    Unshown if it cannot be written, as to a full disk.
    """
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        _drop_the_rest(sys.stdout)
    except OSError as error:
        _drop_the_rest(sys.stdout)
        raise Unshown(
            f"the result cannot be written to stdout: {error.strerror}. Free space, then "
            "run the command again; finished work is kept."
        ) from error


def complain(text: object) -> None:
    """Print each line of `text` to stderr, where this can be done: an exit code says it too."""
    _print_faults("".join(f"glmbatch: {line}\n" for line in str(text).splitlines()))


class Parser(argparse.ArgumentParser):
    """argparse's parser, whose help is shown like a result; its own ignores a full disk."""

    def _print_message(self, message, file=None):  # type: ignore[no-untyped-def]
        if file is sys.stdout:
            show(message, end="")
        elif message:
            _print_faults(message)


def _print_faults(lines: str) -> None:
    try:
        print(lines, end="", file=sys.stderr, flush=True)
    except OSError:
        _drop_the_rest(sys.stderr)


def _drop_the_rest(stream: TextIO) -> None:
    # Otherwise Python writes what it has buffered at exit, and ends with an exit code of its own.
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
