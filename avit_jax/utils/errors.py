"""The exception for mistakes that a user can fix, and the display of errors on a terminal."""

import contextlib
import functools
import logging
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from typing import NoReturn

# Control characters, lone surrogates, and separators of lines and paragraphs.
_UNPRINTABLE = {"Cc", "Cs", "Zl", "Zp"}
# Characters that reorder the text around them.
_DIRECTIONS = {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}


class UserError(Exception):
    """A mistake outside of the program. The user sees the message alone.

    The message is one sentence that says what to do.
    """


def stop(message: object, *, at_once: bool = False, status: int = 2) -> NoReturn:
    """Ends the program with one sentence on stderr.

    Args:
      message: the sentence.
      at_once: whether the process ends without waiting for threads or exit handlers.
      status: exit status.
    """
    with contextlib.suppress(OSError):  # stderr may be closed
        print(f"error: {printable(' '.join(str(message).split()))}", file=sys.stderr, flush=True)
    if at_once:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


def printable(text: str) -> str:
    r"""Returns text that is safe on a terminal: escapes control characters, as in `\x1b`."""
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
    """Formats each message as one line that is safe on a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def exit_on_user_error(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """Wraps a main function: a `UserError` or an `OSError` ends it with `stop`."""

    @functools.wraps(main)
    def run(argv: list[str]) -> None:
        try:
            main(argv)
        except (UserError, OSError) as error:
            stop(error)

    return run


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type."""
    if isinstance(error, KeyError) and error.args:  # the message of a KeyError is the key alone
        return f"{error.args[0]} is missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def innermost_message(error: Exception) -> str:
    """Returns what absl, ml_collections or a recipe reports, without wrapped errors and traces."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    text = re.sub(r"Traceback .*\n( .*\n)*", "", text)
    text = re.sub(r"(?s)^.*(?=\[Errno )", "", text).replace("\nDid you", ". Did you")
    is_unknown_key = re.match(r"'\w+'(\.|$)", text)
    return f"unknown configuration key {text}" if is_unknown_key else text
