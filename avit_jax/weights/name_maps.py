"""Converts PyTorch state dicts to and from our parameter tree, without PyTorch.

The names are those of timm, DeiT and the released A-ViT, such as `blocks.3.attn.qkv.weight`.
`hugging_face` and `big_vision` translate other names into them.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tensors = dict[str, np.ndarray]

# A module in a layer of our tree -> its PyTorch name inside `blocks.{i}`.
_LAYER_MODULES = {
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "q_norm": "attn.q_norm",
    "k_norm": "attn.k_norm",
    "proj": "attn.proj",
    "ls1": "ls1",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "ls2": "ls2",
}
# A module of the attention pooling in our tree -> its PyTorch name inside `attn_pool`.
_POOL_MODULES = {
    **{name: name for name in ("q", "kv", "proj", "norm")},
    **{name: f"mlp.{name}" for name in ("fc1", "fc2")},
}
# Modules that a layer may lack; all of a group are there, or none.
_LAYER_OPTIONS = (("q_norm", "k_norm"), ("ls1", "ls2"))
# In the order of a layer whose norms follow its branches.
_LAYER_PARTS = ("attn", "norm1", "mlp", "norm2")
# Names of tensors that every network has, in timm's and Hugging Face's names, after any prefix.
_ANCHOR = re.compile(
    r"((?:.*?\.)??)(?:patch_embed\.proj\.weight|cls_token"
    r"|(?:(?:vit|deit|ijepa|dinov2|dinov2_with_registers|vision_model)\.)?embeddings\."
    r"(?:cls_token|class_embedding|patch_embeddings?(?:\.projection)?\.weight))"
)
_TOKENS = ("cls_token", "dist_token", "reg_token")
# What tensors may hold, at the top of our tree. Other parts of a network keep their initial values.
PARTS = {*_TOKENS, "layers", "patch_embed", "pos_embed", "norm_pre", "norm", "fc_norm", "attn_pool"}
PARTS |= {"head", "head_dist"}
# What serves training only: losses, the decoders of MAE and SimMIM, heads of DINOv2 and DINOv3.
_UNUSED = re.compile(
    r"(embeddings\.)?mask_token|(criterion|loss_fn|decoder)\..+|decoder_(pos_embed|\w+\..+)"
    r"|(dino_head|ibot_head|local_cls_norm|projectors)\..+"
)
_DINO_HEAD = re.compile(r"head\.(mlp(\.\d+)?\.\w+|last_layer2?\..+)")
_LEAVES = {"scale": "weight", "kernel": "weight", "bias": "bias", "gamma": "gamma"}


def from_torch(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Converts a PyTorch state dict to the parameter tree of `AViT`.

    Args:
      state_dict: PyTorch name -> array, as timm, DeiT and the released A-ViT name them. The number
        of layers, the tokens and the optional parts follow from the names.

    Returns:
      Tree for `model.apply({"params": tree}, images)`. Layers are stacked along the first axis;
      dtypes do not change.

    Raises:
      ValueError: tensors are missing or unexpected; the message names all of them.

    Examples:
      >>> params = from_torch({name: x.numpy() for name, x in module.state_dict().items()})
    """
    missing, unexpected = mismatches(state_dict)
    if missing or unexpected:
        raise ValueError(
            "not the state dict of a vision transformer in timm's names: missing "
            f"{missing}, unexpected {unexpected}."
        )
    params: dict[str, Any] = {}
    for (*parents, leaf), names in _layout(state_dict).items():
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
    state_dict = {}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, array in [(tuple(key.key for key in keys), leaf) for keys, leaf in leaves]:
        if path[0] == "gate":
            continue
        for i, weight in enumerate(np.asarray(array if path[0] == "layers" else [array])):
            name = _name(path, i)
            if name == "patch_embed.proj.weight":
                weight = weight.reshape(*patch_shape, -1).transpose(3, 2, 0, 1)
            state_dict[name] = weight.T if weight.ndim == 2 else weight
    return state_dict


def _name(path: tuple[str, ...], layer: int) -> str:
    """Returns the PyTorch name of a path in our tree."""
    if len(path) == 1 or path[-1] == "latent":
        return ".".join(path)
    leaf = _LEAVES[path[-1]]
    if path[0] == "layers":
        return f"blocks.{layer}.{_LAYER_MODULES[path[1]]}.{leaf}"
    if path[0] == "attn_pool":
        return f"attn_pool.{_POOL_MODULES[path[1]]}.{leaf}"
    return f"{'patch_embed.proj' if path[0] == 'patch_embed' else path[0]}.{leaf}"


def mismatches(names: Collection[str]) -> tuple[list[str], list[str]]:
    """Returns the names that are missing in a network of `AViT`, and those it does not have."""
    expected = {name for names in _layout(names).values() for name in names}
    missing, unexpected = sorted(expected - set(names)), sorted(set(names) - expected)
    has_layers = any(name.startswith("blocks.") for name in names)
    return missing if has_layers else [*missing, "blocks.*"], unexpected


def _layout(present: Collection[str]) -> dict[tuple[str, ...], list[str]]:
    """Returns path in our tree -> its PyTorch name; a path of stacked layers has one name each.

    A part that a network may lack is expected if any of its names is present.
    """
    num_layers = len({name.split(".")[1] for name in present if name.startswith("blocks.")})

    def has(*names: str) -> bool:
        return any(name in present for name in names)

    paths: list[tuple[str, ...]] = [(token,) for token in _TOKENS if has(token)]
    norm = "fc_norm" if has("fc_norm.weight") and not has("norm.weight", "norm.bias") else "norm"
    modules = ["patch_embed", norm]
    heads = ("norm_pre", "head", "head_dist")
    modules += [name for name in heads if has(f"{name}.weight", f"{name}.bias")]
    paths += [("pos_embed",)] if has("pos_embed") else []  # rotary ones have no parameters
    paths += [(name, leaf) for name in modules for leaf in _leaves(name)]
    pooling = [("attn_pool", name, leaf) for name in _POOL_MODULES for leaf in _leaves(name)]
    pooling.append(("attn_pool", "latent"))
    paths += pooling if has(*(_name(path, 0) for path in pooling)) else []
    missing = set()
    for group in _LAYER_OPTIONS:
        options = [("layers", name, leaf) for name in group for leaf in _leaves(name)]
        if not has(*(_name(path, i) for path in options for i in range(num_layers))):
            missing |= set(group)
    for name in _LAYER_MODULES.keys() - missing:
        paths += [("layers", name, leaf) for leaf in _leaves(name)]
    if not has(*(_name(("layers", "qkv", "bias"), i) for i in range(num_layers))):
        paths.remove(("layers", "qkv", "bias"))
    count = {"layers": num_layers}
    return {path: [_name(path, i) for i in range(count.get(path[0], 1))] for path in paths}


def _leaves(module: str) -> tuple[str, ...]:
    """Returns the names of a module's parameters in our tree."""
    if module.startswith("ls"):
        return ("gamma",)
    return ("scale" if "norm" in module else "kernel", "bias")


def _from_torch_layout(array: np.ndarray) -> np.ndarray:
    """Returns (in, out) kernels; the input of the patch embedding is rows, columns, channels."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    return array.T if array.ndim == 2 else array


def to_timm(tensors: Tensors) -> tuple[Tensors, dict[str, Any], list[str]]:
    """Translates names of DINOv2's, DeiT-III's and MAE's own files, and of EVA, to timm's.

    Parts that timm's `Eva` splits are joined. It has no bias of the keys.

    Returns:
      The tensors; attributes of `AViT` that follow from the names; names that are left out.

    Raises:
      KeyError: a bias of the values is missing.
      ValueError: two tensors with different values get one name.
    """
    result: Tensors = {}
    dropped = unused(tensors)
    for name in tensors.keys() - set(dropped):
        module, _, kind = name.rpartition(".")
        if kind == "q_bias":
            parts = [tensors[name], np.zeros_like(tensors[name]), tensors[f"{module}.v_bias"]]
            add(result, f"{module}.qkv.bias", np.concatenate(parts))
        elif scale := re.fullmatch("gamma_([12])", kind):
            add(result, f"{module}.ls{scale[1]}.gamma", tensors[name])
        elif kind == "v_bias" and f"{module}.q_bias" in tensors:
            continue
        elif module.endswith(".mlp.fc1_g"):  # the gate comes first
            value = tensors.get(f"{module[:-2]}_x.{kind}")
            parts = [tensors[name]] if value is None else [tensors[name], value]
            add(result, f"{module[:-2]}.{kind}", np.concatenate(parts))
        elif not (module.endswith(".mlp.fc1_x") and f"{module[:-2]}_g.{kind}" in tensors):
            module = re.sub(r"\.mlp\.w12$", ".mlp.fc1", re.sub(r"\.mlp\.w3$", ".mlp.fc2", module))
            add(result, f"{module}.{kind}" if module else name, tensors[name])
    attributes: dict[str, Any] = {}
    if "register_tokens" in result:
        add(result, "reg_token", result.pop("register_tokens"))
        attributes |= fold_class_position(result)
    return result, attributes, dropped


def unused(tensors: Tensors) -> list[str]:
    """Returns the names of tensors that serve training only, which all networks leave out."""
    head = [name for name in tensors if _DINO_HEAD.fullmatch(name)]
    is_dino = any("last_layer" in name for name in head)
    return [name for name in tensors if _UNUSED.fullmatch(name)] + (head if is_dino else [])


def is_packed(tensors: Tensors) -> bool:
    """Returns whether names like timm's hold a gated MLP whose gate may be either half of `fc1`."""
    fc1, fc2 = (np.shape(tensors.get(f"blocks.0.mlp.{name}.weight")) for name in ("fc1", "fc2"))
    return len(fc1) == len(fc2) == 2 and fc1[0] == 2 * fc2[1]


def is_post_norm(tensors: Tensors) -> bool:
    """Returns whether the order of the names is that of layers whose norms follow the branches.

    PyTorch files keep the order in which a layer creates its parts. In such a layer of timm, norm1
    stands between attn and mlp. It comes before attn in a usual layer, and after mlp in a sorted
    file.
    """
    names = [name.split(".") for name in tensors if name.startswith("blocks.0.")]
    parts = [part for part in dict.fromkeys(name[2] for name in names) if part in _LAYER_PARTS]
    return parts == list(_LAYER_PARTS)


def fold_class_position(tensors: Tensors) -> dict[str, Any]:
    """Adds, in place, the position of the class token to the token, if there are registers.

    The registers of DINOv2's own files and of Hugging Face have no positions.

    Returns:
      position_class, if there are registers.
    """
    if not {"reg_token", "pos_embed", "cls_token"} <= tensors.keys():
        return {}
    positions = tensors["pos_embed"]
    tensors["cls_token"] = tensors["cls_token"] + positions[:, :1]
    tensors["pos_embed"] = positions[:, 1:]
    return {"position_class": False}


def without_prefix(tensors: Tensors) -> tuple[Tensors, str]:
    """Removes a prefix, such as `module.`, that a wrapper put before the names.

    The prefix is what stands before the patch embedding or the class token. Names without it, such
    as those of a head, lose the wrappers that they share with it.

    Returns:
      The tensors, and the prefix, which may be empty.

    Raises:
      ValueError: there are several networks, or two names become one.
    """
    matches = [_ANCHOR.fullmatch(name) for name in tensors]
    prefixes = sorted({match[1] for match in matches if match})
    if not prefixes or "" in prefixes:
        return tensors, ""
    if len(prefixes) > 1:
        raise ValueError(
            f"it holds several networks, whose names begin with {' and '.join(prefixes[:5])}: "
            "save one of them"
        )
    stripped: Tensors = {}
    wrappers = prefixes[0].split(".")[:-1]
    for name, array in tensors.items():
        parts = name.split(".")
        shared = [ours == theirs for ours, theirs in zip(wrappers, parts[:-1], strict=False)]
        count = (shared + [False]).index(False)
        add(stripped, ".".join(parts[count:]), array)
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
