"""Converts PyTorch state dicts to and from our parameter tree, without PyTorch.

The names are those of timm, DeiT and the released A-ViT, such as `blocks.3.attn.qkv.weight`.
`hugging_face` and `big_vision` translate other names into them.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

Tensors = dict[str, np.ndarray]

# A module in a layer of our tree -> its PyTorch name inside `blocks.{i}`.
_LAYER_MODULES = {
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}


def from_torch(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts a PyTorch state dict to the parameter tree of `AViT`.

    Args:
      state_dict: PyTorch name -> array, as timm, DeiT and the released A-ViT name them. The number
        of layers and the distillation token follow from the names.

    Returns:
      Tree for `model.apply({"params": tree}, images)`. Layers are stacked along the first axis;
      dtypes do not change.

    Raises:
      ValueError: tensors are missing or unexpected; the message names all of them.

    Example:
      params = from_torch({name: x.numpy() for name, x in module.state_dict().items()})
    """
    num_layers = len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")})
    layout = _layout(num_layers, distilled="dist_token" in state_dict)
    expected = {name for names in layout.values() for name in names}
    missing, unexpected = sorted(expected - set(state_dict)), sorted(set(state_dict) - expected)
    if not num_layers:
        missing.append("blocks.*")
    if missing or unexpected:
        raise ValueError(
            "not the state dict of a vision transformer in timm's names: missing "
            f"{missing}, unexpected {unexpected}."
        )
    params: dict[str, Any] = {}
    for (*parents, leaf), names in layout.items():
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        arrays = [jnp.asarray(_from_torch_layout(np.asarray(state_dict[name]))) for name in names]
        node[leaf] = jnp.stack(arrays) if parents[:1] == ["layers"] else arrays[0]
    return params


def to_torch(
    params: Mapping[str, Any], *, patch_shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """Converts a parameter tree to a PyTorch state dict; the inverse of `from_torch`.

    Args:
      params: parameter tree of `AViT`, or a tree of gradients. The parameters of a gate are left
        out.
      patch_shape: (height, width, channels) of a patch, which the tree does not contain.

    Returns:
      PyTorch name -> array.
    """
    num_layers = params["layers"]["norm1"]["scale"].shape[0]
    state_dict = {}
    for path, names in _layout(num_layers, distilled="dist_token" in params).items():
        node = params
        for key in path:
            node = node[key]
        for i, name in enumerate(names):
            array = np.asarray(node[i] if path[0] == "layers" else node)
            if name == "patch_embed.proj.weight":
                array = array.reshape(*patch_shape, -1).transpose(3, 2, 0, 1)
            state_dict[name] = array.T if array.ndim == 2 else array
    return state_dict


def _layout(num_layers: int, *, distilled: bool) -> dict[tuple[str, ...], list[str]]:
    """Returns path in our tree -> its PyTorch name; a path of stacked layers has one name each."""
    names = ["cls_token", "pos_embed"] + ["dist_token"] * distilled
    layout = {(name,): [name] for name in names}
    modules = ["patch_embed.proj", "norm", "head"] + ["head_dist"] * distilled
    for kind in ("weight", "bias"):
        for module in modules:
            layout[module.removesuffix(".proj"), _leaf(module, kind)] = [f"{module}.{kind}"]
        for ours, theirs in _LAYER_MODULES.items():
            names = [f"blocks.{i}.{theirs}.{kind}" for i in range(num_layers)]
            layout["layers", ours, _leaf(ours, kind)] = names
    return layout


def _leaf(module: str, kind: str) -> str:
    return "bias" if kind == "bias" else "scale" if "norm" in module else "kernel"


def _from_torch_layout(array: np.ndarray) -> np.ndarray:
    """Returns (in, out) kernels; the input of the patch embedding is rows, columns, channels."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    return array.T if array.ndim == 2 else array


def without_prefix(tensors: Tensors) -> tuple[Tensors, str]:
    """Removes a prefix, such as `module.`, that a wrapper put before the names.

    The prefix is what stands before the class token. Names without it, such as those of a head, do
    not change.

    Returns:
      The tensors, and the prefix, which may be empty.

    Raises:
      ValueError: there are several networks, or two names become one.
    """
    class_token = r"((?:.*?\.)??)(?:(?:(?:vit|deit)\.)?embeddings\.cls_token|cls_token)"
    matches = [re.fullmatch(class_token, name) for name in tensors]
    prefixes = sorted(match[1] for match in matches if match)
    if not prefixes or "" in prefixes:
        return tensors, ""
    if len(prefixes) > 1:
        raise ValueError(
            f"it holds several networks, whose names begin with {' and '.join(prefixes[:5])}: "
            "save one of them"
        )
    stripped: Tensors = {}
    for name, array in tensors.items():
        add(stripped, name.removeprefix(prefixes[0]), array)
    return stripped, prefixes[0]


def add(tensors: Tensors, name: str, array: np.ndarray) -> None:
    """Adds a tensor under a name that is free.

    Raises:
      ValueError: the name belongs to a tensor of other values.
    """
    if name in tensors and not np.array_equal(tensors[name], array):
        raise ValueError(
            f"two of its tensors, with different values, are both {name} in timm's names"
        )
    tensors[name] = array
