"""Checks by digests whether the files of a checkpoint have changed since they were written."""

import hashlib
import json
import os
from typing import Any

from etils import epath

from avit_jax.utils import errors

DIGESTS = "sha256.json"  # of every file except itself and `_ORBAX_METADATA`
_ORBAX_METADATA = "_CHECKPOINT_METADATA"  # Orbax changes this file after the checkpoint exists
_ORBAX_TYPES = {
    "item_handlers": dict,
    "metrics": dict,
    "performance_metrics": dict,
    "custom_metadata": dict,
    "init_timestamp_nsecs": int,
    "commit_timestamp_nsecs": int,
}


def is_bucket(path: epath.PathLike) -> bool:
    """Returns whether a path is an address such as gs://, where renaming is not atomic."""
    return "://" in str(path)


def describe(folder: epath.Path, step: int) -> str:
    """Returns what is wrong with a checkpoint; "" if it is valid.

    Args:
      folder: folder of the checkpoint.
      step: the step that its metadata must name.
    """
    try:
        if os.path.islink(folder):
            return "it is a link"
        saved, found = _read_json(folder / DIGESTS), digests(folder)
        names = saved.keys() | {name for name in found if _is_written_by_orbax(name)}
        changed = [name for name in names if saved.get(name) != found.get(name)]
        if changed:
            return f"{min(changed)} has changed since it was written"
        _check_orbax_metadata(_read_json(folder / _ORBAX_METADATA))
        if (folder / "metrics/metrics").exists():
            _check_metrics(_read_json(folder / "metrics/metrics"))
        # Older versions did not save the step.
        saved_step = _read_json(folder / "extra/metadata").get("step", step)
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        return errors.first_line(error)
    is_right = type(saved_step) is int and saved_step == step
    return "" if is_right else f"its metadata is of step {saved_step}"


def digests(folder: epath.Path) -> dict[str, str]:
    """Returns the SHA-256 of every file in a checkpoint by its path in the folder."""
    found = {}
    for parent, _, names in folder.walk():
        for path in (parent / name for name in set(names) - {DIGESTS, _ORBAX_METADATA}):
            if _is_file(path):
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256")
                found[str(path.relative_to(folder))] = digest.hexdigest()
    return dict(sorted(found.items()))


def _is_file(path: epath.Path) -> bool:
    """Returns whether a path is a regular file; for epath, a local pipe is a file too."""
    return path.is_file() if is_bucket(path) else os.path.isfile(path)


def _read_json(path: epath.Path) -> Any:
    """Returns what a JSON file holds; raises ValueError if it is no file."""
    if not _is_file(path):  # reading a pipe could block forever
        raise ValueError(f"{path.name} is missing")
    return json.loads(path.read_text())


def _is_written_by_orbax(name: str) -> bool:
    """Returns whether Orbax wrote a file before the digests were written.

    Orbax adds files to the top folder later. Operating systems add files that start with a dot.

    Args:
      name: path of the file in the checkpoint's folder.
    """
    folder, _, file = name.rpartition("/")
    return bool(folder) and not file.startswith(".")


def _check_metrics(values: Any) -> None:
    """Raises ValueError if the saved metrics lack the accuracy that picks the best checkpoint."""
    if not isinstance(values, dict) or type(values.get("top1")) not in (int, float):
        raise ValueError("its metrics hold no top1")


def _check_orbax_metadata(values: Any) -> None:
    """Raises ValueError if the file without a digest holds types that Orbax cannot read."""
    if not isinstance(values, dict):
        raise ValueError(f"{_ORBAX_METADATA} holds no object")
    for key, kind in _ORBAX_TYPES.items():
        if not isinstance(values.get(key), kind | None):
            raise ValueError(f"{key} in {_ORBAX_METADATA} is no {kind.__name__}")
