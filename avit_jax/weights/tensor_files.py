"""Finds a weight file and reads its tensors and metadata; `weight_files` gives them a meaning.

Files are untrusted: no code in them runs, and a damaged file is refused as a whole.
"""

import contextlib
import json
import logging
import pathlib
import re
import zipfile

import jax.numpy as jnp
import numpy as np
from etils import epath

from avit_jax.utils import errors
from avit_jax.weights import file_limits, torch_pickle
from avit_jax.weights.file_limits import RefusedFile
from avit_jax.weights.name_maps import Tensors

HUB = "hf-hub:"
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_MAX_HEADER = 10**7  # bytes of a safetensors header
_INDEX = ".index.json"  # lists the parts of a model in several files
_MAX_INDEX = 10 * 2**20  # bytes
_MAX_NAMED = 5  # tensors in one message
# Last words of parameters. Other arrays of integers are buffers, such as indices of positions.
_PARAMETERS = ("weight", "bias", "kernel", "scale", "gamma", "lambda1", "token", "cls", "latent")
_logger = logging.getLogger(__name__)


def find(path: epath.PathLike) -> pathlib.Path:
    """Returns the weight file of a path, or of `hf-hub:owner/name` after its download.

    Raises:
      errors.UserError: there is no such file, or it is one part of several.
    """
    name = str(path)
    if "://" in name:
        raise errors.UserError(
            f"{path} is in a bucket: copy the weight file to a local disk first."
        )
    return _download(name.removeprefix(HUB)) if name.startswith(HUB) else _local(pathlib.Path(path))


def is_weights(path: epath.PathLike) -> bool:
    """Returns whether a path names weights; otherwise it names the workdir of a run.

    Raises:
      errors.UserError: its kind of storage cannot be reached.
    """
    if str(path).startswith(HUB):
        return True
    try:
        folder = epath.Path(path)
        if not folder.is_dir():
            return True
        is_workdir = (folder / "checkpoints").is_dir()
        return not is_workdir and any(file.exists() for file in _names_in(path))
    except (KeyError, ImportError, ValueError) as error:
        unknown = isinstance(error, KeyError)
        reason = "no such storage is known" if unknown else errors.first_line(error)
        raise errors.UserError(
            f"{path} cannot be reached ({reason}): name a file or a folder."
        ) from error


def _names_in(folder: epath.PathLike) -> list[pathlib.Path]:
    """Returns the files that may hold the weights in a folder, the usual names first."""
    names = ("model.safetensors", "pytorch_model.bin")
    usual = [pathlib.Path(folder) / (name + end) for end in ("", _INDEX) for name in names]
    others = [path for path in pathlib.Path(folder).glob("*") if _suffix(path) in _READERS]
    return [*usual, *sorted(others)]


def _suffix(path: pathlib.Path) -> str:
    """Returns the ending that tells the format, such as `.npz` or `.pth.tar`."""
    name = path.name.lower()
    return next((suffix for suffix in _READERS if name.endswith(suffix)), path.suffix)


def _local(path: pathlib.Path) -> pathlib.Path:
    if path.is_dir():
        found = [file for file in _names_in(path) if file.exists()]
        if len(found) > 1 and not found[0].name.startswith(("model.safetensors", "pytorch_model")):
            names = ", ".join(file.name for file in found[:_MAX_NAMED])
            raise errors.UserError(f"{path} holds several weight files, {names}: name one of them.")
        path = next(iter(found), path)
    if part := re.fullmatch(r"(.+)-\d+-of-\d+(\.\w+)", path.name):
        index = path.with_name(part[1] + part[2] + _INDEX)  # lists all parts
        if path.exists() and not index.exists():
            raise errors.UserError(f"{path} is one part of several: put {index.name} beside it.")
        path = index
    if not path.exists():
        raise errors.UserError(f"there is no {path}: name a weight file, or the workdir of a run.")
    return path


def _download(name: str) -> pathlib.Path:
    """Fetches weights, and `config.json` if there is one, into the local cache of the hub."""
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError
    except ImportError as error:
        raise errors.UserError(
            f"{HUB}{name} needs a download: run `pip install huggingface_hub`, or name a file."
        ) from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # hides warnings about retries
    names = ("model.safetensors", "model.safetensors" + _INDEX, "pytorch_model.bin")
    try:
        with contextlib.suppress(RemoteEntryNotFoundError):
            hf_hub_download(name, "config.json")
        for file in names[:-1]:
            with contextlib.suppress(RemoteEntryNotFoundError):
                path = pathlib.Path(hf_hub_download(name, file))
                for part in sorted(set(_index(path).values())) if file.endswith(_INDEX) else ():
                    hf_hub_download(name, part)
                return path
        return pathlib.Path(hf_hub_download(name, names[-1]))
    except RefusedFile as error:
        raise errors.UserError(f"{HUB}{name} is refused: {error}.") from error
    except Exception as error:  # no such model, no safetensors, no network
        raise errors.UserError(
            f"{HUB}{name} cannot be downloaded ({errors.first_line(error)}): name a file instead."
        ) from error


def read(path: pathlib.Path, *, ema: bool = False) -> tuple[Tensors, dict[str, str]]:
    """Reads the tensors and metadata of a file under the names that the file gives them.

    Buffers of integers are passed over; a log line names them.

    Args:
      path: a file, or the index of a model in several files.
      ema: reads the moving average of the weights of a training checkpoint of PyTorch.

    Raises:
      errors.UserError: the file cannot be read, or holds more than finite numbers with plain names.
    """
    is_index = path.name.endswith(_INDEX)
    suffix = _suffix(pathlib.Path(path.name.removesuffix(_INDEX)))
    if suffix.lower() in PROGRAMS:
        raise errors.UserError(
            f"{path} is a program, whose weights are not read: name a run or a weight file."
        )
    if suffix not in _READERS:
        raise errors.UserError(
            f"{path} is no weight file by its name: rename it to end in one of "
            f"{', '.join(_READERS)}."
        )
    try:
        if ema and (_READERS[suffix] is not _read_torch or is_index):
            raise RefusedFile("only one PyTorch file can hold a moving average (EMA) of weights")
        tensors, metadata = (
            (_read_parts(path, suffix), {}) if is_index else _READERS[suffix](path, ema)
        )
        tensors = {name: x for name, x in tensors.items() if not _is_no_register(name, x)}
        buffers = [name for name, array in tensors.items() if _is_buffer(name, array)]
        for name, array in tensors.items():
            if name not in buffers:
                _check_tensor(name, array)
    except RefusedFile as error:
        raise errors.UserError(f"{path} is refused: {errors.printable(str(error))}.") from error
    except Exception as error:
        raise errors.UserError(
            f"{path} cannot be read: {errors.printable(errors.first_line(error))}."
        ) from error
    if buffers:
        names = errors.printable(", ".join(buffers[:_MAX_NAMED]))
        _logger.info("%s: buffers of integers are passed over: %s", path, names)
    return {name: array for name, array in tensors.items() if name not in buffers}, metadata


def _is_no_register(name: str, array: np.ndarray) -> bool:
    """Returns whether a tensor holds 0 register tokens, as files of DINOv3 do."""
    return np.size(array) == 0 and name.endswith(("register_tokens", "storage_tokens"))


def _is_buffer(name: str, array: np.ndarray) -> bool:
    is_integer = isinstance(array, np.ndarray) and array.dtype.kind in "iub"
    last = name.replace("/", ".").rpartition(".")[2]
    return is_integer and "embed" not in last and last.rpartition("_")[2] not in _PARAMETERS


def _index(path: pathlib.Path) -> dict[str, str]:
    """Reads the index of a model in several files: tensor -> name of a file in its folder."""
    try:
        if path.stat().st_size > _MAX_INDEX:
            raise ValueError("it is too large")
        parts = json.loads(path.read_text())["weight_map"]
        if not parts or not all(re.fullmatch(r"[\w-][\w.-]*", part) for part in parts.values()):
            raise ValueError("it does not name files beside it")
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RefusedFile(f"as an index it makes no sense ({errors.first_line(error)})") from error
    file_limits.check_count(len(parts))
    return parts


def _read_parts(path: pathlib.Path, suffix: str) -> Tensors:
    """Reads all files that an index lists."""
    index, tensors = _index(path), {}
    for part in sorted(set(index.values())):
        if not path.with_name(part).exists():
            raise RefusedFile(f"{part}, which it lists, is missing")
        read, _ = _READERS[suffix](path.with_name(part), False)
        if wrong := [name for name in read if index.get(name) != part]:
            raise RefusedFile(f"{part} holds {wrong[0]}, which it does not list there")
        tensors |= read
    if missing := sorted(index.keys() - tensors.keys()):
        raise RefusedFile(f"{index[missing[0]]} lacks {missing[0]}")
    return tensors


def _check_tensor(name: str, array: np.ndarray) -> None:
    if not name.isprintable():
        raise RefusedFile(f"the name of a tensor, {name[:80]}, is no plain text")
    if not isinstance(array, np.ndarray):
        raise RefusedFile(f"{name} in it is no array")
    if not array.size:
        raise RefusedFile(f"{name} is empty")
    if array.dtype.name not in _DTYPES:
        raise _refused_dtype(name, array.dtype)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity
        if not np.isfinite(array.astype(np.float32)).all():
            raise RefusedFile(f"{name} holds nan or infinity")


def _refused_dtype(name: str, dtype: object) -> RefusedFile:
    return RefusedFile(f"{name} is of dtype {dtype}, and not one of {', '.join(_DTYPES)}")


def _read_safetensors(path: pathlib.Path, _: bool) -> tuple[Tensors, dict[str, str]]:
    import safetensors.flax

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if _MAX_HEADER < size <= path.stat().st_size:  # the library reports an impossible size
        raise RefusedFile(
            f"its header of {size} bytes is larger than that of any vision transformer"
        )
    with safetensors.safe_open(path, framework="flax") as file:
        names = file.keys()
        file_limits.check_count(len(names))
        for name in names:
            dtype = file.get_slice(name).get_dtype()
            if not re.fullmatch(r"B?F16|F32|F64|[IU]\d+|BOOL", dtype):  # NumPy lacks the others
                raise _refused_dtype(name, dtype)
        shapes = {name: file.get_slice(name).get_shape() for name in names}
        # JAX takes hours for some shapes without elements.
        tensors = {
            name: np.zeros(shape, np.float32) if 0 in shape else np.asarray(file.get_tensor(name))
            for name, shape in shapes.items()
        }
        return tensors, file.metadata() or {}


def _read_npz(path: pathlib.Path, _: bool) -> tuple[Tensors, dict[str, str]]:
    with zipfile.ZipFile(path) as archive:
        file_limits.check_archive(archive, compressed=True)
        members = archive.namelist()
    if len({name.removesuffix(".npy") for name in members}) < len(members):
        raise RefusedFile("two of its arrays have one name")
    with np.load(path, allow_pickle=False) as arrays:
        # Training states of Flax hold the state of an optimizer beside the parameters.
        for start in ("params/", "opt/target/", "optimizer/target/", "target/", ""):
            if names := [name for name in arrays.files if name.startswith(start)]:
                break
        return {name.removeprefix(start): _as_bfloat16(arrays[name]) for name in names}, {}


def _as_bfloat16(array: np.ndarray) -> np.ndarray:
    """Returns an array of bfloat16 as such. NumPy saves it as pairs of bytes, dtype V2."""
    is_array = isinstance(array, np.ndarray)
    return array.view(jnp.bfloat16) if is_array and array.dtype == np.dtype("V2") else array


def _read_torch(path: pathlib.Path, ema: bool) -> tuple[Tensors, dict[str, str]]:
    return torch_pickle.read(path, ema=ema), {}


_READERS = {
    **dict.fromkeys((".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".pt.tar"), _read_torch),
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
}
SUFFIXES = tuple(_READERS)
PROGRAMS = (".avit", ".onnx")  # what `--mode=export` writes too
