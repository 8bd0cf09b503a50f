"""The one exception that means: the user can mend this; and what is shown of those of other libraries."""

import functools
import os
import re
import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(Exception):
    """A mistake outside the program; its message is one sentence that says what to do, and is all that is shown."""


def stop(message: object, *, at_once: bool = False) -> NoReturn:
    """Ends the program with one sentence and exit status 2; at once: nothing is waited for."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr, flush=True)
    if at_once:
        sys.stdout.flush()
        os._exit(2)
    sys.exit(2)


def told(main: Callable[[list[str]], None]) -> Callable[[list[str]], None]:
    """A main function whose `UserError`, or output that cannot be written, ends the program as `stop` does."""

    @functools.wraps(main)
    def run(argv: list[str]) -> None:
        try:
            main(argv)
        except (UserError, OSError) as error:
            stop(error)

    return run


def printable(text: str) -> str:
    """The text with control characters, and those that cannot be encoded, as backslash escapes: harmless on a terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name where it has none."""
    if isinstance(error, KeyError) and error.args:  # its message is the key alone
        return f"{error.args[0]} is missing"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def sentence(error: Exception) -> str:
    """What an error of absl, of ml_collections or of a recipe says, out of the errors and traces that are wrapped around it."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    text = re.sub(r"Traceback .*\n( .*\n)*", "", text)
    text = re.sub(r"(?s)^.*(?=\[Errno )", "", text).replace("\nDid you", ". Did you")
    unknown_key = re.match(r"'\w+'(\.|$)", text)
    return f"unknown configuration key {text}" if unknown_key else text
