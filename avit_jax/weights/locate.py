"""Resolves the name of a network: of the zoo, or of the hub without its prefix."""

import pathlib
import re

from etils import epath

from avit_jax import zoo
from avit_jax.weights import tensor_files


def locate(name: epath.PathLike) -> epath.PathLike:
    """Returns the path or `hf-hub:` name that a name stands for.

    A path that exists is itself. Otherwise a name of the zoo is its file, and `owner/name` is a
    name on the hub, unless there is a folder `owner`.

    Raises:
      errors.UserError: a file of the zoo is damaged.
    """
    text = str(name)
    if "://" in text or pathlib.Path(text).exists():
        return name
    if text in zoo.NETWORKS:
        return str(zoo.file(text))
    # `runs` is where runs go by default: runs/x is a run that is not here.
    if text.startswith("runs/") or pathlib.Path(text).parent.exists():
        return name
    return hub_name(text) or name


def hub_name(text: str) -> str | None:
    """Returns `hf-hub:owner/name` for `owner/name`; None for other texts and for names of files."""
    is_file = text.lower().endswith((*tensor_files.SUFFIXES, *tensor_files.PROGRAMS))
    if is_file or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", text):
        return None
    return f"{tensor_files.HUB}{text}"
