"""Finds a weight file and reads its tensors and metadata; `weight_files` gives them a meaning.

Files are untrusted: no code in them runs, and a damaged file is refused as a whole.
"""

import contextlib
import logging
import pathlib
import re
import zipfile

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
    """Returns the files that hold the weights in a folder of Hugging Face or timm."""
    names = ("model.safetensors", "pytorch_model.bin")
    return [pathlib.Path(folder) / (name + end) for end in ("", _INDEX) for name in names]


def _local(path: pathlib.Path) -> pathlib.Path:
    if path.is_dir():
        path = next((file for file in _names_in(path) if file.exists()), path)
    if re.search(r"-\d+-of-\d+$", path.stem) or path.name.endswith(_INDEX):
        raise errors.UserError(
            f"{path} belongs to a model in several files, which are not read: save it as one "
            'file, for example by save_pretrained(folder, max_shard_size="100GB").'
        )
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
    try:
        with contextlib.suppress(RemoteEntryNotFoundError):
            hf_hub_download(name, "config.json")
        return pathlib.Path(hf_hub_download(name, "model.safetensors"))
    except Exception as error:  # no such model, no safetensors, no network
        raise errors.UserError(
            f"{HUB}{name} cannot be downloaded ({errors.first_line(error)}): name a file instead."
        ) from error


def read(path: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
    """Reads the tensors and metadata of a file under the names that the file gives them.

    Raises:
      errors.UserError: the file cannot be read, or holds more than finite numbers with plain names.
    """
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise errors.UserError(
            f"{path} is no weight file by its name: rename it to end in one of "
            f"{', '.join(_READERS)}."
        )
    try:
        tensors, metadata = reader(path)
        for name, array in tensors.items():
            _check_tensor(name, array)
    except RefusedFile as error:
        raise errors.UserError(f"{path} is refused: {errors.printable(str(error))}.") from error
    except Exception as error:
        raise errors.UserError(
            f"{path} cannot be read: {errors.printable(errors.first_line(error))}."
        ) from error
    return tensors, metadata


def _check_tensor(name: str, array: np.ndarray) -> None:
    if not name.isprintable():
        raise RefusedFile(f"the name of a tensor, {name[:80]}, is no plain text")
    if not isinstance(array, np.ndarray):
        raise RefusedFile(f"{name} in it is no array")
    if array.dtype.name not in _DTYPES:
        raise _refused_dtype(name, array.dtype)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinity
        if not np.isfinite(array.astype(np.float32)).all():
            raise RefusedFile(f"{name} holds nan or infinity")


def _refused_dtype(name: str, dtype: object) -> RefusedFile:
    return RefusedFile(f"{name} is of dtype {dtype}, and not one of {', '.join(_DTYPES)}")


def _read_safetensors(path: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
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
        return {name: np.asarray(file.get_tensor(name)) for name in names}, file.metadata() or {}


def _read_npz(path: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
    with zipfile.ZipFile(path) as archive:
        file_limits.check_archive(archive)
        members = archive.namelist()
    if len({name.removesuffix(".npy") for name in members}) < len(members):
        raise RefusedFile("two of its arrays have one name")
    with np.load(path, allow_pickle=False) as arrays:
        # Checkpoints of big_vision hold the state of an optimizer beside "params/".
        names = [name for name in arrays.files if name.startswith("params/")] or arrays.files
        return {name.removeprefix("params/"): arrays[name] for name in names}, {}


_READERS = {
    **dict.fromkeys((".pth", ".pt", ".bin"), lambda path: (torch_pickle.read(path), {})),
    ".npz": _read_npz,
    ".safetensors": _read_safetensors,
}
