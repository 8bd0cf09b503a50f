"""The configuration that a run or a weight file holds: written as JSON, and read as a recipe.

`--config=avit_jax/run_config.py:runs/digits` is the recipe of the run in runs/digits.
"""

import dataclasses
import json
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax.models import vit
from avit_jax.utils import errors, files
from avit_jax.weights import tensor_files, weight_files, writing

FILE = "config.json"
_KEY = "avit_jax"  # of a safetensors file's metadata
_MAX_BYTES = 10**7  # of a header or a config.json
_UNUSABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """What a run or a weight file tells about its network.

    Attributes:
      config: the configuration.
      label_names: names of the classes; empty if unknown.
    """

    config: ConfigDict
    label_names: tuple[str, ...] = ()


def write(workdir: epath.PathLike, config: Mapping[str, Any]) -> None:
    """Writes `config.json` into the folder of a run; `config` is from `config.to_json`."""
    files.write(epath.Path(workdir) / FILE, json.dumps(config, indent=2) + "\n")


def write_weights(
    path: epath.PathLike,
    params: Any,
    model: vit.AViT,
    config: ConfigDict,
    label_names: Sequence[str],
) -> None:
    """Writes safetensors with timm's names, whose metadata holds the configuration.

    Paths of this machine are left out. A learned gate becomes a fixed one.

    Args:
      path: of the file.
      params: parameters of the model.
      model: the network.
      config: of the network.
      label_names: names of the classes; empty if unknown.
    """
    gate, values = writing.gate_of(params, model), config_lib.to_json(config)
    values |= {"init": "", "init_grid": [], "init_ema": False, "init_new_head": False}
    values["budget"] = 0.0
    values["distill"] = values["distill"] | {"teacher": ""}
    values["data"] = values["data"] | {"dir": ""}
    values["halting"] = values["halting"] | {"enabled": gate is not None, **(gate or {})}
    metadata = {_KEY: json.dumps({"config": values, "label_names": list(label_names)})}
    weight_files.write(path, params, model, more_metadata=metadata)


def read(where: epath.PathLike) -> Saved | None:
    """Returns what a run or a weight file tells about its network; None if it tells nothing.

    Args:
      where: workdir of a run, weight file, or hf-hub:owner/name; see `locate` for other names.

    Raises:
      errors.UserError: the configuration is damaged or of another version, or a name on the hub
        cannot be downloaded.
    """
    try:
        if not tensor_files.is_weights(where):
            content = _of_run(epath.Path(where) / FILE)
        elif str(where).startswith(tensor_files.HUB) or pathlib.Path(where).exists():
            content = _of_weights(tensor_files.find(where))
        else:
            content = None
        if content is None:
            return None
        names = content.get("label_names", [])
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a class name is no text")
        if not isinstance(content["config"], dict):
            raise TypeError("the configuration is no table")
        config = config_lib.from_json(content["config"])
    except (*_UNUSABLE, OSError) as error:
        raise errors.UserError(
            f"the configuration in {where} cannot be read ({errors.first_line(error)}): name its "
            "recipe with --config."
        ) from error
    return Saved(config=config, label_names=tuple(names))


def _of_run(path: epath.Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    if path.stat().length > _MAX_BYTES:
        raise ValueError("it is too large")
    content = json.loads(path.read_text())
    return {"config": content} if "halting" in content else None


def _of_weights(path: pathlib.Path) -> dict[str, Any] | None:
    """Returns our metadata of a safetensors file."""
    if path.suffix.lower() != ".safetensors":
        return None
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        if size > _MAX_BYTES:
            raise ValueError("its header is too large")
        header = json.loads(file.read(size))
    text = header.get("__metadata__", {}).get(_KEY)
    return None if text is None else json.loads(text)


def get_config(where: str) -> ConfigDict:
    """Returns the configuration as a recipe does.

    Raises:
      errors.UserError: there is none, or it is damaged.
    """
    saved = read(where)
    if saved is None:
        raise errors.UserError(f"{where} holds no configuration: name its recipe with --config.")
    return saved.config
