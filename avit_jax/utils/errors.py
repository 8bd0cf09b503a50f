"""The one exception that means: the user can mend this; and what is shown of those of other
libraries.
"""

import contextlib
import functools
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake outside the program; its message is one sentence that says what to do, and is all
    that is shown.
    """


def stop(message: object, *, at_once: bool = False, status: int = 2) -> NoReturn:
    """Ends the program with one sentence and an exit status; at once: nothing is waited for."""
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"error: {printable(' '.join(str(message).split()))}", file=sys.stderr, flush=True)
    if at_once:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}  # control characters, lone surrogates, separators of lines
_DIRECTIONS = {
    "LRE",
    "RLE",
    "PDF",
    "LRO",
    "RLO",
    "LRI",
    "RLI",
    "FSI",
    "PDI",
}  # reorder what is around them


def printable(text: str) -> str:
    r"""The text with control characters and lone surrogates as escapes such as `\x1b`, so that it
    is safe on a terminal.
    """
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if unicodedata.category(char) in _UNPRINTABLE
        or unicodedata.bidirectional(char) in _DIRECTIONS
        else char
        for char in text
    )


class Formatter(logging.Formatter):
    """Formats messages so that they are safe on a terminal, one line each."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def told(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """A main function whose `UserError`, or output that cannot be written, ends the program as
    `stop` does.
    """

    @functools.wraps(main)
    def run(argv: list[str]) -> None:
        try:
            main(argv)
        except (UserError, OSError) as error:
            stop(error)

    return run


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name where it has none."""
    if isinstance(error, KeyError) and error.args:  # its message is the key alone
        return f"{error.args[0]} is missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def sentence(error: Exception) -> str:
    """What an error of absl, of ml_collections or of a recipe says, out of the errors and traces
    that are wrapped around it.
    """
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    text = re.sub(r"Traceback .*\n( .*\n)*", "", text)
    text = re.sub(r"(?s)^.*(?=\[Errno )", "", text).replace("\nDid you", ". Did you")
    unknown_key = re.match(r"'\w+'(\.|$)", text)
    return f"unknown configuration key {text}" if unknown_key else text
