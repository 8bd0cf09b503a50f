"""Tensors out of a PyTorch file (`.pth`, `.pt`, `.bin`), without PyTorch and without trust.

Such a file is a pickle, which is a program. Here it is run by a reader that can build tensors and
plain containers and nothing
else: whatever else a file asks for is refused by name, before anything of it has been called.
"""

import dataclasses
import io
import math
import pathlib
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from avit_jax.utils import errors

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_MOST_TENSORS = 10_000  # of a file; vision transformers have hundreds
_MOST_INSTRUCTIONS = 300_000  # of a pickle: thirty for each tensor; they take seconds
_LARGEST_KEY = 2**32  # of a dictionary; larger numbers can be chosen so that all have one hash
_LARGEST = 10**7  # objects inside one, counted as often as they are there
_DEEPEST = 1000  # of objects in objects
_MOST_ODD_KEYS = 1000  # of dictionaries and sets, that are neither text nor small numbers
# Which of what an instruction takes, the last first, become keys.
_KEYS = {"SETITEM": slice(1, -1, 2), "SETITEMS": slice(1, -1, 2), "DICT": slice(1, None, 2)}
_KEYS |= {"ADDITEMS": slice(0, -1), "FROZENSET": slice(0, None)}
_NAMES = (
    "GLOBAL",
    "INST",
    "PERSID",
    "EXT1",
    "EXT2",
    "EXT4",
)  # their value names what they put on the stack
_GROWING = (
    "APPEND",
    "APPENDS",
    "SETITEM",
    "SETITEMS",
    "ADDITEMS",
    "BUILD",
)  # put what is above it into the lowest


class Refused(Exception):
    """The file is damaged, or asks for more than tensors; the message says what."""


class _Sealed:
    """An unpickler may set the attributes of what it has made; not of these."""

    def __setstate__(self, state: object) -> None:
        raise Refused("it changes what it has made")


@dataclasses.dataclass
class _Storage(_Sealed):
    """A flat array of a file; in a file of the old layout its numbers come after the tensors that
    look into it.
    """

    dtype: np.dtype
    size: int
    data: np.ndarray | None = None


@dataclasses.dataclass
class _Tensor(_Sealed):
    """A view into a storage, checked when it is made."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """Its numbers, not copied."""
        data = self.storage.data
        if data is None:
            raise Refused("the numbers of a tensor are missing")
        strides = [stride * data.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(
            data[self.offset :], self.shape, strides, writeable=False
        )


class _StorageType(_Sealed, str):
    """Name of a dtype, as `torch.FloatStorage` is one."""


class _RebuildTensor(_Sealed):
    """In place of `torch._utils._rebuild_tensor_v2`."""

    def __call__(
        self, storage: object, offset: object, shape: object, strides: object, *_: object
    ) -> _Tensor:
        numbers = (
            (offset, *shape, *strides)
            if isinstance(shape, tuple) and isinstance(strides, tuple)
            else (-1,)
        )
        if (
            not isinstance(storage, _Storage)
            or not all(type(number) is int and number >= 0 for number in numbers)
            or len(shape) != len(strides)
        ):
            raise Refused("a tensor whose sizes make no sense")
        count = math.prod(shape)
        last = offset + sum(
            (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
        )
        if count and (
            last >= storage.size or count > storage.size
        ):  # a view must not be larger than what it looks at
            raise Refused("a tensor that is larger than its data")
        return _Tensor(storage, offset if count else 0, shape, strides)


class _RebuildParameter(_Sealed):
    """In place of `torch._utils._rebuild_parameter`."""

    def __call__(self, data: object, *_: object) -> object:
        return data


def _is_key(key: object) -> bool:
    """Whether a dictionary may have this key: others may collide, which takes quadratic time."""
    return type(key) is str or (type(key) is int and abs(key) < _LARGEST_KEY)


class _Dict(dict):
    """In place of `collections.OrderedDict`: attributes that a file sets, such as `_metadata`, are
    dropped.
    """

    __slots__ = ()

    def __init__(self, pairs: object = ()) -> None:
        if not isinstance(pairs, list | tuple):
            raise Refused("a dictionary that makes no sense")
        for key, value in pairs:
            if not _is_key(key):
                raise Refused("a key of a dictionary is neither text nor a small number")
            self[key] = value

    def __setstate__(self, state: object) -> None:
        pass


class _Namespace:
    """In place of `argparse.Namespace`, in which training scripts keep their options: they are
    dropped.
    """

    def __setstate__(self, state: object = None) -> None:
        pass


_ALLOWED = {
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("argparse", "Namespace"): _Namespace,
}


def check_count(count: int) -> None:
    """Refuses a file of more tensors than any vision transformer has."""
    if count > _MOST_TENSORS:
        raise Refused(
            f"it holds {count} tensors or files, and a vision transformer has at most "
            f"{_MOST_TENSORS}"
        )


def check_stored(archive: zipfile.ZipFile) -> None:
    """Refuses an archive whose files are too many, compressed or lie over each other: read, they
    may be of any size.
    """
    entries = archive.infolist()
    check_count(len(entries))
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise Refused("its archive is compressed, which PyTorch's and NumPy's plain ones never are")
    if sum(entry.file_size for entry in entries) > archive.start_dir:
        raise Refused("the files in its archive lie over each other")


def _check(file: IO[bytes]) -> None:
    """Refuses a pickle in which a few bytes stand for more than memory, time or the stack of calls
    can hold.

    That is: a memo with holes, which takes memory of any size; an object inside which, written out,
    are too many others, as in tuples that hold another one twice, and that again, whose hash would
    never be done; many uses of a large one; and one nested too deeply; and many keys of
    dictionaries or sets that may collide. Each place of the stack stands for how many objects are
    in it, how deep they go, and whether it is a plain key; None is a mark.
    """
    stack: list[tuple[int, int, bool] | None] = []
    memo: dict[int, tuple[int, int, bool] | None] = {}
    used = odd_keys = 0
    for count, (instruction, value, _) in enumerate(pickletools.genops(file)):
        name, before = instruction.name, instruction.stack_before
        if count > _MOST_INSTRUCTIONS:
            raise Refused("its pickle is longer than that of any vision transformer")
        if name.endswith("PUT") or name == "MEMOIZE":
            place = len(memo) if value is None else value
            if place > count:
                raise Refused("it is no pickle that a program wrote")
            memo[place] = stack[-1]
            continue
        again = memo[value] if name.endswith("GET") else stack[-1] if name == "DUP" else None
        size, depth, is_key = again or (1, 0, name not in _NAMES and _is_key(value))
        used += size if again else 0
        inside = []
        if pickletools.markobject in before:
            while (top := stack.pop()) is not None:
                inside.append(top)
            before = before[: before.index(pickletools.markobject)]
        inside += [stack.pop() or (0, 0, False) for _ in before]
        size += sum(one[0] for one in inside)
        grows = name in _GROWING and inside
        depth = max(
            [
                depth,
                *(one[1] + 1 for one in (inside[:-1] if grows else inside)),
                inside[-1][1] if grows else 0,
            ]
        )
        odd_keys += sum(not one[2] for one in inside[_KEYS[name]]) if name in _KEYS else 0
        if max(size, used) > _LARGEST or depth > _DEEPEST or odd_keys > _MOST_ODD_KEYS:
            raise Refused("it is no pickle that a program wrote")
        stack += [
            None if each is pickletools.markobject else (size, depth, is_key)
            for each in instruction.stack_after
        ]


class _Unpickler(pickle.Unpickler):
    """Finds what is allowed, and storages by the given function.

    Looks at the instructions first, for what makes a few bytes into more than fits: see `_check`.
    """

    def __init__(self, file: IO[bytes], storage: Callable[..., _Storage]) -> None:
        begin = file.tell()
        _check(file)
        file.seek(begin)
        super().__init__(file, encoding="latin1")
        self._storage = storage

    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and name in _STORAGES:
            return _StorageType(name)
        if (module, name) not in _ALLOWED:
            raise Refused(
                f"it asks for {module}.{name}, which is neither a tensor nor a plain container"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: object) -> _Storage:
        if (
            not isinstance(pid, tuple)
            or len(pid) < 5
            or pid[0] != "storage"
            or not isinstance(pid[1], _StorageType)
            or not isinstance(pid[2], str)
            or type(pid[4]) is not int
            or pid[4] < 0
        ):
            raise Refused("a storage that makes no sense")
        return self._storage(np.dtype(_STORAGES[pid[1]]), pid[2], pid[4], *pid[5:])


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The state dict of a PyTorch file: that of "model" or "state_dict" in it, or itself.

    Returns:
      Name -> array; arrays may look into the same numbers, and cannot be written.

    Raises:
      Refused: it is damaged, holds no state dict, or asks for anything but tensors and plain
        containers; nothing of it has run.
      OSError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
        for key in ("model", "state_dict"):
            if isinstance(content, dict) and isinstance(content.get(key), dict):
                content = content[key]
        if not isinstance(content, dict) or not content:
            raise Refused("there is no state dict in it")
        check_count(len(content))
        for name, value in content.items():
            if not isinstance(name, str) or not isinstance(value, _Tensor):
                raise Refused(f"{str(name)[:80]} in its state dict is no tensor")
        seen = sum(
            math.prod(tensor.shape) * tensor.storage.dtype.itemsize for tensor in content.values()
        )
        storages = {id(tensor.storage): tensor.storage for tensor in content.values()}
        if seen > 4 * sum(storage.size * storage.dtype.itemsize for storage in storages.values()):
            raise Refused("its tensors show the same numbers again and again")
        return {name: value.array() for name, value in content.items()}
    except (Refused, OSError):
        raise
    except (
        Exception
    ) as error:  # the unpickler may raise anything at all on bytes that are no pickle
        raise Refused(f"it is damaged ({errors.first_line(error)})") from error


def _read_zip(file: IO[bytes]) -> Any:
    """The layout since PyTorch 1.6: a zip archive of a pickle and one file for each storage, none
    of them compressed.
    """
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise Refused("it is a zip archive, but not one that PyTorch wrote")
        root = names[0].removesuffix("data.pkl")
        check_stored(archive)
        if (
            root + "byteorder" in archive.namelist()
            and archive.read(root + "byteorder") != b"little"
        ):
            raise Refused("its numbers are big-endian")
        storages: dict[str, _Storage] = {}

        def storage(dtype: np.dtype, key: str, size: int, *_: object) -> _Storage:
            if key not in storages:
                data = np.frombuffer(archive.read(f"{root}data/{key}"), np.uint8)
                if data.size != size * dtype.itemsize:
                    raise Refused("a storage of another size than it says")
                storages[key] = _Storage(dtype, size, data.view(dtype))
            return storages[key]

        return _Unpickler(io.BytesIO(archive.read(names[0])), storage).load()


def _read_legacy(file: IO[bytes]) -> Any:
    """Reads the layout before PyTorch 1.6: several pickles, then the numbers of all storages."""
    file.seek(0)
    storages: dict[str, _Storage] = {}

    def storage(dtype: np.dtype, key: str, size: int, *view: object) -> _Storage:
        if view and view[0] is not None:
            raise Refused("a storage that is a view of another one")
        return storages.setdefault(key, _Storage(dtype, size))

    def load() -> Any:
        return _Unpickler(file, storage).load()

    if load() != _LEGACY_MAGIC or load() != _LEGACY_PROTOCOL:
        raise Refused("it is not a file that PyTorch wrote")
    system, content, keys = load(), load(), load()
    if not isinstance(system, dict) or not system.get("little_endian"):
        raise Refused("its numbers are big-endian")
    for key in keys:
        one = storages[key]
        size = int.from_bytes(file.read(8), "little")
        data = file.read(size * one.dtype.itemsize) if size == one.size else b""
        if len(data) != one.size * one.dtype.itemsize:
            raise Refused("a storage of another size than it says")
        one.data = np.frombuffer(data, one.dtype)
    return content
