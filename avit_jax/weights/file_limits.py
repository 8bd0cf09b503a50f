"""Limits for weight files, which are untrusted input: size, nesting and count of what they hold."""

import pickletools
import zipfile
from typing import IO

_MAX_TENSORS = 10_000  # in a file; a vision transformer has hundreds
_MAX_INSTRUCTIONS = 300_000  # in a pickle: thirty per tensor; checking them takes seconds
_MAX_INT_KEY = 2**32  # of a dictionary; larger integers can be chosen to share one hash
_MAX_OBJECTS = 10**7  # inside one object; a shared object counts each time it is used
_MAX_NESTING = 1000
_MAX_COMPRESSION = 20  # bytes for each compressed one; weights compress to a half at best
_MAX_UNSAFE_KEYS = 1000  # dictionary keys and set members that are not `is_safe_key`
# Which operands of an instruction become keys; the last operand comes first.
_KEY_OPERANDS = {
    **dict.fromkeys(("SETITEM", "SETITEMS"), slice(1, -1, 2)),
    "DICT": slice(1, None, 2),
    "ADDITEMS": slice(0, -1),
    "FROZENSET": slice(0, None),
}
# The argument of these instructions names an object; it is not the object.
_BY_NAME = {"GLOBAL", "INST", "PERSID", "EXT1", "EXT2", "EXT4"}
# These instructions put their operands into the lowest one.
_INSERTING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"}


class RefusedFile(Exception):
    """A file is damaged, or asks for more than tensors; the message gives the reason."""


def is_safe_key(key: object) -> bool:
    """Returns whether a dictionary may have this key.

    Other keys can be chosen to collide. A dictionary of colliding keys takes quadratic time.
    """
    return type(key) is str or (type(key) is int and abs(key) < _MAX_INT_KEY)


def check_count(count: int) -> None:
    """Raises RefusedFile if there are more tensors than any vision transformer has."""
    if count > _MAX_TENSORS:
        raise RefusedFile(
            f"it holds {count} tensors or files, and a vision transformer has at most "
            f"{_MAX_TENSORS}"
        )


def check_archive(archive: zipfile.ZipFile, *, compressed: bool = False) -> None:
    """Raises RefusedFile if reading an archive may need much more memory than it has bytes.

    This is so if it has too many members, or if members are compressed or overlap.

    Args:
      archive: the archive.
      compressed: accepts members that are compressed as weights are, but not much more.
    """
    members = archive.infolist()
    check_count(len(members))
    kinds = {zipfile.ZIP_STORED} | ({zipfile.ZIP_DEFLATED} if compressed else set())
    if any(member.compress_type not in kinds for member in members):
        raise RefusedFile("its archive is compressed, and its writer writes uncompressed ones")
    stored = sum(member.compress_size for member in members)
    size = sum(member.file_size for member in members)
    if stored > archive.start_dir or (size > archive.start_dir and not compressed):
        raise RefusedFile("the members of its archive overlap")
    if size > _MAX_COMPRESSION * archive.start_dir:
        raise RefusedFile("its archive is compressed more than weights can be")


def check_pickle(file: IO[bytes]) -> None:
    """Raises RefusedFile if loading a pickle may exhaust memory, time or the call stack.

    A few bytes can do so in five ways: memo indices with gaps, whose memory is unbounded; tuples
    that repeat tuples, whose hash takes exponential time; repeated use of a large object; deep
    nesting; and many colliding keys.

    The check interprets the instructions without building an object. Each stack entry is
    `(objects inside, nesting depth, is a safe key)`, or None for a mark.
    """
    stack: list[tuple[int, int, bool] | None] = []
    memo: dict[int, tuple[int, int, bool] | None] = {}
    reused = unsafe_keys = 0
    for count, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        name, operands = instruction.name, instruction.stack_before
        if count > _MAX_INSTRUCTIONS:
            raise RefusedFile("its pickle is longer than that of any vision transformer")
        if name.endswith("PUT") or name == "MEMOIZE":
            index = len(memo) if argument is None else argument
            if index > count:
                raise RefusedFile("its pickle was not written by PyTorch")
            memo[index] = stack[-1]
            continue
        again = memo[argument] if name.endswith("GET") else stack[-1] if name == "DUP" else None
        size, depth, is_key = again or (1, 0, name not in _BY_NAME and is_safe_key(argument))
        reused += size if again else 0
        inside = []
        if pickletools.markobject in operands:
            while (top := stack.pop()) is not None:
                inside.append(top)
            operands = operands[: operands.index(pickletools.markobject)]
        inside += [stack.pop() or (0, 0, False) for _ in operands]
        size += sum(entry[0] for entry in inside)
        keys = inside[_KEY_OPERANDS[name]] if name in _KEY_OPERANDS else []
        unsafe_keys += sum(not entry[2] for entry in keys)
        # The lowest operand of an inserting instruction is the container itself.
        container = inside.pop() if name in _INSERTING and inside else (0, 0, False)
        depth = max(depth, container[1], *(entry[1] + 1 for entry in inside))
        too_large = max(size, reused) > _MAX_OBJECTS or depth > _MAX_NESTING
        if too_large or unsafe_keys > _MAX_UNSAFE_KEYS:
            raise RefusedFile("its pickle was not written by PyTorch")
        stack += [
            None if kind is pickletools.markobject else (size, depth, is_key)
            for kind in instruction.stack_after
        ]
