"""Files that are written whole or not at all, and the paths that a user gives."""

import os
import re

from etils import epath

from avit_jax.utils import errors, signals


def resolve(path: str, option: str) -> str:
    """Expands `~` in a path that a user gives; see `write` for the paths there are.

    Raises:
      errors.UserError: it is empty, or an address such as https://, which cannot be read or
        written; `option` names it.
    """
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path)
    if not path.strip() or "\0" in path:
        raise errors.UserError(f"{option} is not a path; got {path!r}.")
    if scheme and scheme[0] != "gs://":
        raise errors.UserError(
            f"{option} must be a local path or gs://..., as {scheme[0]} is not supported; got "
            f"{path}."
        )
    expanded = os.path.expanduser(path)
    if expanded.startswith("~") and not os.path.lexists(path):
        raise errors.UserError(
            f"{option} names the home of an unknown user; got {path}. Write ./{path} for a file "
            "of that name."
        )
    return expanded


def write(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file; what was there before stays until the new content is complete.

    Args:
      path: a local one, whose folder is made where it is missing, or of a bucket, where files come
        into being whole anyway. A link stays one.
      content: text is written as UTF-8.

    Raises:
      OSError: it cannot be written.
    """
    path = epath.Path(path)
    content = content.encode() if isinstance(content, str) else content
    if "://" in str(path):
        path.write_bytes(content)
    elif re.match(r"/dev/(stdout$|stderr$|fd/)|/proc/[^/]+/fd/", str(path)) or (
        path.exists() and not os.path.isfile(path)
    ):
        # Behind /dev/stdout there may be a file in which something is already. epath takes devices
        # for files, hence os.path.
        with path.open("ab") as file:
            file.write(content)
    else:
        path = epath.Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        signals.unfinished.add(str(whole))
        try:
            whole.write_bytes(content)
            whole.replace(path)
        except BaseException:  # a full disk is not to stay full of halves
            whole.unlink(missing_ok=True)
            raise
        finally:
            signals.unfinished.discard(str(whole))
