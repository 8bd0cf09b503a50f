"""Where weights are, and the tensors and metadata in a file of any kind; what they mean is up to
`weight_files`.

A file is a stranger's: nothing of it is run, and it is taken whole or not.
"""

import contextlib
import logging
import pathlib
import re
import zipfile

import numpy as np
from etils import epath

from avit_jax.utils import errors
from avit_jax.weights import name_maps, torch_pickle

HUB = "hf-hub:"
_DTYPES = ("float16", "bfloat16", "float32", "float64")
_INDEX = ".index.json"  # lists the parts of a model in several files


def find(path: epath.PathLike) -> pathlib.Path:
    """The file that a path or a name on the hub stands for; raises errors.UserError if there is
    none that is whole.
    """
    return (
        _from_hub(str(path).removeprefix(HUB))
        if str(path).startswith(HUB)
        else _whole_file(pathlib.Path(path))
    )


def is_weights(path: epath.PathLike) -> bool:
    """Whether a path names weights that `read` reads, or else the workdir of a run.

    Raises:
      errors.UserError: it is of a kind of storage that cannot be reached.
    """
    if str(path).startswith(HUB):
        return True
    try:
        folder = epath.Path(path)
        return not folder.is_dir() or (
            not (folder / "checkpoints").is_dir()
            and any(map(pathlib.Path.exists, _in_folder(path)))
        )
    except (KeyError, ImportError, ValueError) as error:
        why = (
            "no such storage is known" if isinstance(error, KeyError) else errors.first_line(error)
        )
        raise errors.UserError(
            f"{path} cannot be reached ({why}): name a file or a folder."
        ) from error


def _in_folder(path: epath.PathLike) -> list[pathlib.Path]:
    """Lists the names that weights have in a folder of Hugging Face or timm."""
    names = ("model.safetensors", "pytorch_model.bin")
    return [pathlib.Path(path) / (name + end) for end in ("", _INDEX) for name in names]


def _whole_file(path: pathlib.Path) -> pathlib.Path:
    """Returns the file to read; raises errors.UserError if it is missing or only a part."""
    if path.is_dir():
        path = next((file for file in _in_folder(path) if file.exists()), path)
    if re.search(r"-\d+-of-\d+$", path.stem) or path.name.endswith(_INDEX):
        raise errors.UserError(
            f"{path} is one part of a model in several files, which are not read: save it as one "
            "file, for example by "
            'save_pretrained(folder, max_shard_size="100GB").'
        )
    if not path.exists():
        raise errors.UserError(f"there is no {path}: name a weight file, or the workdir of a run.")
    return path


def read(path: pathlib.Path) -> tuple[name_maps.Tensors, dict[str, str]]:
    """Tensors and metadata, as they are in a file; raises errors.UserError where they are not
    numbers with names.
    """
    readers = dict.fromkeys((".pth", ".pt", ".bin"), _read_torch) | {
        ".npz": _read_npz,
        ".safetensors": _read_safetensors,
    }
    if path.suffix.lower() not in readers:
        raise errors.UserError(
            f"{path} is no weight file by its name: they end in {', '.join(readers)}."
        )
    try:
        tensors, metadata = readers[path.suffix.lower()](path)
        for name in [name for name in tensors if not name.isprintable()]:
            raise torch_pickle.Refused(f"the name of a tensor, {name[:80]}, is no plain text")
    except torch_pickle.Refused as error:
        raise errors.UserError(f"{path} is refused: {errors.printable(str(error))}.") from error
    except Exception as error:
        raise errors.UserError(
            f"{path} cannot be read: {errors.printable(errors.first_line(error))}."
        ) from error
    for name, array in tensors.items():
        if array.dtype.name not in _DTYPES:
            raise errors.UserError(
                f"{path} is refused: {name} is of dtype {array.dtype}, and not one of "
                f"{', '.join(_DTYPES)}."
            )
        with np.errstate(over="ignore"):  # beyond float32 is infinity
            finite = np.isfinite(array.astype(np.float32)).all()
        if not finite:
            raise errors.UserError(f"{path} is refused: {name} holds nan or infinity.")
    return tensors, metadata


def _from_hub(name: str) -> pathlib.Path:
    """The weights of a model on the hub, in its local cache, with `config.json` beside them where
    there is one.
    """
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError
    except ImportError as error:
        raise errors.UserError(
            f"{HUB}{name} has to be fetched: pip install huggingface_hub, or name a file."
        ) from error
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries are no news
    try:
        with contextlib.suppress(RemoteEntryNotFoundError):
            hf_hub_download(name, "config.json")
        return pathlib.Path(hf_hub_download(name, "model.safetensors"))
    except Exception as error:  # no such model, no safetensors, no network
        raise errors.UserError(
            f"{HUB}{name} cannot be fetched ({errors.first_line(error)}): name a file instead."
        ) from error


def _read_safetensors(path: pathlib.Path) -> tuple[name_maps.Tensors, dict[str, str]]:
    import safetensors.flax

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if 10**7 < size <= path.stat().st_size:  # of a larger one the library tells that it is damaged
        raise torch_pickle.Refused(
            f"its header of {size} bytes is larger than that of any vision transformer"
        )
    with safetensors.safe_open(path, framework="flax") as file:
        names = file.keys()
        torch_pickle.check_count(len(names))
        for name in names:
            dtype = file.get_slice(name).get_dtype()
            if not re.fullmatch(r"B?F16|F32|F64|[IU]\d+|BOOL", dtype):  # NumPy has no other
                raise torch_pickle.Refused(
                    f"{name} is of dtype {dtype}, and not one of {', '.join(_DTYPES)}"
                )
        return {name: np.asarray(file.get_tensor(name)) for name in names}, file.metadata() or {}


def _read_torch(path: pathlib.Path) -> tuple[name_maps.Tensors, dict[str, str]]:
    return torch_pickle.read(path), {}


def _read_npz(path: pathlib.Path) -> tuple[name_maps.Tensors, dict[str, str]]:
    with zipfile.ZipFile(path) as archive:
        torch_pickle.check_stored(archive)
        members = archive.namelist()
    if len({name.removesuffix(".npy") for name in members}) < len(members):
        raise torch_pickle.Refused("two of its arrays have one name")
    with np.load(path, allow_pickle=False) as arrays:
        names = [
            name for name in arrays.files if name.startswith("params/")
        ] or arrays.files  # beside them: an optimizer's
        tensors = {name.removeprefix("params/"): arrays[name] for name in names}
    for name, array in tensors.items():
        if not isinstance(array, np.ndarray):
            raise torch_pickle.Refused(f"{name} in it is no array")
    return tensors, {}
