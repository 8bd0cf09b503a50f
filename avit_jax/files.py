"""Files that are written whole or not at all."""

from etils import epath


def write(path: epath.PathLike, content: bytes | str) -> None:
    """Writes a file; what was there before stays until the new content is complete.

    Args:
      path: a local one, or of a bucket, where files come into being whole anyway.
      content: text is written as UTF-8.

    Raises:
      OSError: it cannot be written.
    """
    path = epath.Path(path)
    content = content.encode() if isinstance(content, str) else content
    if "://" in str(path) or (path.exists() and not path.is_file()):  # such as /dev/stdout
        path.write_bytes(content)
        return
    whole = path.with_name(path.name + ".tmp")
    whole.write_bytes(content)
    whole.replace(path)
