"""The files that figures are written to."""

import fcntl
import json
import os
import pathlib
from typing import Any

from avit_jax.utils import files


def save(path: os.PathLike | str, result: object) -> None:
    """Writes JSON, whole or not at all; the folder is made where it is missing."""
    files.write(path, json.dumps(result, indent=2) + "\n")


def load(path: os.PathLike | str) -> dict[str, Any]:
    """What `save` has written; {} where there is no file."""
    path = pathlib.Path(path)
    return json.loads(path.read_text()) if path.exists() else {}


def add(path: os.PathLike | str, key: str, row: dict[str, Any]) -> None:
    """Adds to one row of a file to which other processes may be adding others."""
    folder = os.open(pathlib.Path(path).parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        rows = load(path)
        save(path, rows | {key: rows.get(key, {}) | row})
    finally:
        os.close(folder)  # and with it the lock
