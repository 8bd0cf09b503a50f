"""Files that are written completely or not at all, and paths that a user gives."""

import os
import re

from etils import epath

from avit_jax.utils import errors, signals


def resolve(path: str, option: str) -> str:
    """Expands `~` in a path that a user gives.

    Args:
      path: a local path, or gs://...
      option: where the user gave it, for messages.

    Raises:
      errors.UserError: the path is empty, or an unsupported address such as https://...
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
    """Writes a file; an existing file remains until the new content is complete.

    Args:
      path: a local path, whose missing folders are created, or a path in a bucket, where writes are
        atomic anyway. If it is a link, the target is replaced.
      content: text is encoded as UTF-8.

    Raises:
      OSError: the file cannot be written.
    """
    path = epath.Path(path)
    content = content.encode() if isinstance(content, str) else content
    is_descriptor = re.match(r"/dev/(stdout$|stderr$|fd/)|/proc/[^/]+/fd/", str(path))
    if "://" in str(path):
        path.write_bytes(content)
    # os.path, because epath takes devices for files.
    elif is_descriptor or (path.exists() and not os.path.isfile(path)):
        with path.open("ab") as file:  # appends, because /dev/stdout may be a file with content
            file.write(content)
    else:
        path = epath.Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        signals.partial_files.add(str(partial))
        try:
            partial.write_bytes(content)
            partial.replace(path)
        except BaseException:  # otherwise a full disk would keep partial files
            partial.unlink(missing_ok=True)
            raise
        finally:
            signals.partial_files.discard(str(partial))
