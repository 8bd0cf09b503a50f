"""Files that are written whole or not at all."""

import os

from etils import epath


def write(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file; what was there before stays until the new content is complete.

    Args:
      path: a local one, whose folder is made where it is missing, or of a bucket, where files come into being whole anyway. A
        link stays one.
      content: text is written as UTF-8.

    Raises:
      OSError: it cannot be written.
    """
    path = epath.Path(path)
    content = content.encode() if isinstance(content, str) else content
    if "://" in str(path):
        path.write_bytes(content)
    elif str(path).startswith(("/dev/", "/proc/")) or (path.exists() and not path.is_file()):
        with path.open("ab") as file:  # behind /dev/stdout there may be a file in which something is already
            file.write(content)
    else:
        path = epath.Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            whole.write_bytes(content)
            whole.replace(path)
        except BaseException:  # a full disk is not to stay full of halves
            whole.unlink(missing_ok=True)
            raise
