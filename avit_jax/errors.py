"""The one exception that means: the user can mend this; and what is shown of those of other libraries."""

import re
import sys
from typing import NoReturn


class UserError(Exception):
    """A mistake outside the program; its message is one sentence that says what to do, and is all that is shown."""


def stop(message: object) -> NoReturn:
    """Ends the program with one sentence and a non-zero exit."""
    sys.exit(f"error: {' '.join(str(message).split())}")


def sentence(error: Exception) -> str:
    """What an error of absl, of ml_collections or of a recipe says, out of the errors and traces that are wrapped around it."""
    while error.args and isinstance(error.args[0], Exception):
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    text = re.sub(r"Traceback .*\n( .*\n)*", "", text)
    text = re.sub(r"(?s)^.*(?=\[Errno )", "", text).replace("\nDid you", ". Did you")
    unknown_key = re.match(r"'\w+'(\.|$)", text)
    return f"unknown configuration key {text}" if unknown_key else text
