"""Reads the tensors of a PyTorch file (`.pth`, `.pt`, `.bin`) without PyTorch.

Such a file is a pickle, which is a program, and it is untrusted. The unpickler here can build
tensors and plain containers only. It never imports or calls any other name: harmless ones become
objects that do nothing, and for others it refuses the file.
"""

import dataclasses
import io
import logging
import math
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from avit_jax.utils import errors
from avit_jax.weights import file_limits, pickle_extras
from avit_jax.weights.file_limits import RefusedFile

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
# Entries of a training checkpoint that hold its weights, and the moving average of its weights.
_PLAIN = ("model", "state_dict", "model_state_dict", "module", "net", "network", "student")
_EMA = ("model_ema", "state_dict_ema", "ema_state_dict", "ema_model", "ema", "teacher")
_MAX_NAMED = 5  # entries in one message
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_logger = logging.getLogger(__name__)


class _Sealed:
    """A base class whose attributes a pickle cannot set."""

    def __setstate__(self, state: object) -> None:
        raise RefusedFile("it changes an object after building it")


@dataclasses.dataclass
class _Storage(_Sealed):
    """A flat array. In the legacy layout, `data` follows after the tensors that view it."""

    dtype: np.dtype
    size: int
    data: np.ndarray | None = None


@dataclasses.dataclass
class _Tensor(_Sealed):
    """A view of a storage; `_RebuildTensor` checks its bounds."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self) -> np.ndarray:
        """Returns a read-only array that shares memory with the storage."""
        data = self.storage.data
        if data is None:
            raise RefusedFile("it lacks the data of a tensor")
        strides = [stride * data.itemsize for stride in self.strides]
        return np.lib.stride_tricks.as_strided(
            data[self.offset :], self.shape, strides, writeable=False
        )


class _StorageType(_Sealed, str):
    """The name of a storage class, such as `FloatStorage`."""


class _RebuildTensor(_Sealed):
    """Replaces `torch._utils._rebuild_tensor_v2`."""

    def __call__(
        self, storage: object, offset: object, shape: object, strides: object, *_: object
    ) -> _Tensor:
        sizes = isinstance(shape, tuple) and isinstance(strides, tuple)
        numbers = (offset, *shape, *strides) if sizes and len(shape) == len(strides) else (-1,)
        if not isinstance(storage, _Storage) or not all(map(_is_count, numbers)):
            raise RefusedFile("the shape, strides or offset of a tensor make no sense")
        count = math.prod(shape)
        last = offset + sum(
            (size - 1) * stride for size, stride in zip(shape, strides, strict=True)
        )
        # With strides of 0 a view could be larger than its storage.
        if count and (last >= storage.size or count > storage.size):
            raise RefusedFile("a tensor is larger than its data")
        return _Tensor(storage, offset if count else 0, shape, strides)


class _RebuildParameter(_Sealed):
    """Replaces `torch._utils._rebuild_parameter`."""

    def __call__(self, data: object, *_: object) -> object:
        return data


class _Dict(dict):
    """Replaces `collections.OrderedDict`; drops attributes, such as `_metadata`."""

    __slots__ = ()

    def __init__(self, pairs: object = ()) -> None:
        if not isinstance(pairs, list | tuple):
            raise RefusedFile("the items of a dictionary make no sense")
        for key, value in pairs:
            if not file_limits.is_safe_key(key):
                raise RefusedFile("a key of a dictionary is neither text nor a small number")
            self[key] = value

    def __setstate__(self, state: object) -> None:
        pass


class _Namespace:
    """Replaces `argparse.Namespace`, which holds the options of training scripts; drops them."""

    def __setstate__(self, state: object = None) -> None:
        pass


_ALLOWED = {
    **dict.fromkeys(pickle_extras.NAMES, pickle_extras.PassedOver),
    ("collections", "OrderedDict"): _Dict,
    ("torch._utils", "_rebuild_tensor_v2"): _RebuildTensor(),
    ("torch._utils", "_rebuild_parameter"): _RebuildParameter(),
    ("torch._utils", "_rebuild_parameter_with_state"): _RebuildParameter(),
    ("argparse", "Namespace"): _Namespace,
}


class _Unpickler(pickle.Unpickler):
    """An unpickler that resolves allowed names only.

    Args:
      file: the pickle; `file_limits.check_pickle` accepts it first.
      storage: maps (dtype, key, size, ...) of a pickle to a storage.
    """

    def __init__(self, file: IO[bytes], storage: Callable[..., _Storage]) -> None:
        start = file.tell()
        file_limits.check_pickle(file)
        file.seek(start)
        super().__init__(file, encoding="latin1")
        self._storage = storage

    def find_class(self, module: str, name: str) -> object:
        if module == "torch" and name in _STORAGES:
            return _StorageType(name)
        if (module, name) not in _ALLOWED:
            raise RefusedFile(
                f"it asks for {module}.{name}, which is neither a plain tensor nor a container; "
                "save its state dict alone"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, pid: object) -> _Storage:
        match pid:
            case ("storage", _StorageType() as kind, str() as key, _, size, *rest) if isinstance(
                pid, tuple
            ) and _is_count(size):
                return self._storage(np.dtype(_STORAGES[kind]), key, size, *rest)
        raise RefusedFile("the description of a storage makes no sense")


def read(path: pathlib.Path, *, ema: bool = False) -> dict[str, np.ndarray]:
    """Reads the state dict of a PyTorch file: the whole file, or an entry of a checkpoint.

    Objects that are no tensors are passed over; a log line names them.

    Args:
      path: the file.
      ema: reads the moving average of the weights, such as the entry "model_ema" or "teacher",
        instead of the weights, such as the entry "model", "state_dict" or "student".

    Returns:
      Name -> read-only array; arrays may share memory.

    Raises:
      RefusedFile: the file is damaged, holds no such state dict, or asks for more than tensors,
        plain containers and harmless objects. Nothing of it has run.
      OSError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            content = _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
        tensors = _tensors_in(path, _state_dict(path, content, ema))
        storages = {id(tensor.storage): tensor.storage for tensor in tensors.values()}.values()
        stored = sum(storage.size * storage.dtype.itemsize for storage in storages)
        used = sum(math.prod(x.shape) * x.storage.dtype.itemsize for x in tensors.values())
        if used > 4 * stored:
            raise RefusedFile("too many of its tensors share the same data")
        return {name: value.array() for name, value in tensors.items()}
    except (RefusedFile, OSError):
        raise
    except Exception as error:  # an unpickler can raise anything if the bytes are no pickle
        raise RefusedFile(f"it is damaged ({errors.first_line(error)})") from error


def _state_dict(path: pathlib.Path, content: object, ema: bool) -> dict[Any, Any]:
    """Returns the dictionary of a checkpoint that holds its weights, or their moving average."""
    if not isinstance(content, dict):
        raise RefusedFile("it holds no state dict")
    inside = {key: value for key, value in content.items() if _holds_tensors(value)}
    averages = [key for key in _EMA if key in inside]
    plain = [key for key in _PLAIN if key in inside]
    is_state_dict = any(isinstance(value, _Tensor) for value in content.values())
    if ema:
        if not averages:
            raise RefusedFile(f"it holds no moving average (EMA), such as {' or '.join(_EMA[:2])}")
        return _state_dict(path, inside[averages[0]], False)
    if is_state_dict and not plain:
        return content
    if not plain and len(inside) > 1:
        names = ", ".join(str(key)[:80] for key in list(inside)[:_MAX_NAMED])
        raise RefusedFile(f"it holds several networks, {names}: save one of them")
    if not inside:
        raise RefusedFile("it holds no state dict")
    if plain and averages:
        message = "%s: the weights %s are read, and not their moving average %s"
        _logger.warning(message, errors.printable(str(path)), plain[0], averages[0])
    return _state_dict(path, inside[(plain or list(inside))[0]], False)


def _holds_tensors(value: object, depth: int = 2) -> bool:
    """Returns whether a value is a state dict, or a dictionary of state dicts."""
    if not isinstance(value, dict) or not depth:
        return False
    named = [inside for key, inside in value.items() if isinstance(key, str)]
    return any(isinstance(inside, _Tensor) or _holds_tensors(inside, depth - 1) for inside in named)


def _tensors_in(path: pathlib.Path, state: dict[Any, Any]) -> dict[str, _Tensor]:
    """Returns the tensors of a state dict; a log line names what else is in it."""
    file_limits.check_count(len(state))
    tensors: dict[str, _Tensor] = {}
    others = []
    for name, value in state.items():
        if isinstance(value, _Tensor) and isinstance(name, str):
            tensors[name] = value
        elif isinstance(value, _Tensor):
            raise RefusedFile(f"{str(name)[:80]} in its state dict is no tensor's name")
        else:
            others.append(errors.printable(str(name))[:80])
    if others:
        named = ", ".join(others[:_MAX_NAMED])
        _logger.info("%s: what is no tensor is passed over: %s", errors.printable(str(path)), named)
    return tensors


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _read_zip(file: IO[bytes]) -> Any:
    """Reads the layout since PyTorch 1.6: a zip of a pickle and one file per storage."""
    with zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise RefusedFile("it is a zip archive that PyTorch did not write")
        root = names[0].removesuffix("data.pkl")
        if f"{root}constants.pkl" in archive.namelist():
            raise RefusedFile("it is a program of TorchScript; save its state dict alone")
        file_limits.check_archive(archive)
        byte_order = root + "byteorder"
        if byte_order in archive.namelist() and archive.read(byte_order) != b"little":
            raise RefusedFile("its numbers are big-endian")
        storages: dict[str, _Storage] = {}

        def storage(dtype: np.dtype, key: str, size: int, *_: object) -> _Storage:
            if key not in storages:
                storages[key] = _Storage(dtype, size)
                _fill(storages[key], archive.read(f"{root}data/{key}"))
            return storages[key]

        return _Unpickler(io.BytesIO(archive.read(names[0])), storage).load()


def _read_legacy(file: IO[bytes]) -> Any:
    """Reads the layout before PyTorch 1.6: several pickles, then the data of all storages."""
    file.seek(0)
    storages: dict[str, _Storage] = {}

    def storage(dtype: np.dtype, key: str, size: int, *view: object) -> _Storage:
        if view and view[0] is not None:
            raise RefusedFile("a storage is a view of another one")
        return storages.setdefault(key, _Storage(dtype, size))

    def load() -> Any:
        return _Unpickler(file, storage).load()

    if load() != _LEGACY_MAGIC or load() != _LEGACY_PROTOCOL:
        raise RefusedFile("PyTorch did not write it")
    system, content, keys = load(), load(), load()
    if not isinstance(system, dict) or not system.get("little_endian"):
        raise RefusedFile("its numbers are big-endian")
    for key in keys:
        size = int.from_bytes(file.read(8), "little")
        known = storages[key]
        _fill(known, file.read(size * known.dtype.itemsize) if size == known.size else b"")
    return content


def _fill(storage: _Storage, data: bytes) -> None:
    if len(data) != storage.size * storage.dtype.itemsize:
        raise RefusedFile("a storage has another size than its description says")
    storage.data = np.frombuffer(data, storage.dtype)
