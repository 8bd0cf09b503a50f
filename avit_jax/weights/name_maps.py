"""Names and layouts of weights: PyTorch state dicts to and from our parameter tree, without torch.

The naming is that of timm, DeiT and the released A-ViT: `blocks.3.attn.qkv.weight` and so on; those
of Hugging Face, big_vision and AugReg are translated into it.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Tensors = dict[str, np.ndarray]

# Our layer module -> PyTorch name inside `blocks.{i}`.
_LAYER_MODULES = {
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "proj": "attn.proj",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_TOKENS = ("cls_token", "dist_token", "pos_embed")
_HEADS = ("head", "head_dist")
# Inside a layer: Hugging Face's name -> timm's; query, key and value are joined.
_HUGGING_FACE = {
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}
# The same in the models of transformers 5 in memory; files of `save_pretrained` keep the names
# above.
_HUGGING_FACE_5 = _HUGGING_FACE | {
    "attention.o_proj": "attn.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_HUGGING_FACE_LAYER = re.compile(r"(?:encoder\.layer|layers)\.(\d+)\.(.+)\.(weight|bias)")
_QKV = {
    "query": "q",
    "key": "k",
    "value": "v",
}  # Hugging Face's name -> the first letter of q_proj and so on
_HUGGING_FACE_OUTSIDE = {
    "embeddings.cls_token": "cls_token",
    "embeddings.distillation_token": "dist_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
    "classifier": "head",
    "cls_classifier": "head",
    "distillation_classifier": "head_dist",
}


def from_torch(state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameter tree of `AViT` from a PyTorch state dict.

    Args:
      state_dict: PyTorch name -> array, as timm, DeiT and the released A-ViT name them; depth and
        distillation follow from it.

    Returns:
      Tree for `model.apply({"params": tree}, images)`, dtypes unchanged; layers stacked along the
      first axis.

    Raises:
      ValueError: tensors are missing or surplus; all are named.
    """
    depth = len({name.split(".")[1] for name in state_dict if name.startswith("blocks.")})
    expected = _torch_names(depth, distilled="dist_token" in state_dict)
    missing, surplus = (
        sorted(set(expected) - set(state_dict)),
        sorted(set(state_dict) - set(expected)),
    )
    if not depth or missing or surplus:
        raise ValueError(
            "not the state dict of a vision transformer in timm's names: missing "
            f"{missing or 'blocks.*'}, surplus {surplus}."
        )
    params: dict[str, Any] = {}
    for name, array in state_dict.items():
        path, layer = _path(name)
        array = jnp.asarray(_to_ours(name, np.asarray(array)))
        *parents, leaf = path
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        if layer is None:
            node[leaf] = array
        else:
            node.setdefault(leaf, {})[layer] = array
    stack = lambda layers: jnp.stack([layers[i] for i in range(depth)])  # noqa: E731
    params["layers"] = jax.tree.map(stack, params["layers"], is_leaf=lambda node: 0 in node)
    return params


def to_torch(
    params: Mapping[str, Any], *, patch_shape: tuple[int, int, int]
) -> dict[str, np.ndarray]:
    """State dict in PyTorch's names and layouts, the inverse of `from_torch`.

    Args:
      params: parameter tree of `AViT`, or a tree of gradients; the gate's own parameters, if any,
        are left out.
      patch_shape: (height, width, channels) of a patch, which the tree does not hold.
    """
    depth = params["layers"]["norm1"]["scale"].shape[0]
    state_dict = {}
    for name in _torch_names(depth, distilled="dist_token" in params):
        path, layer = _path(name)
        node = params
        for key in path:
            node = node[key]
        array = np.asarray(node if layer is None else node[layer])
        if name == "patch_embed.proj.weight":
            array = array.reshape(*patch_shape, -1).transpose(3, 2, 0, 1)
        elif array.ndim == 2:
            array = array.T
        state_dict[name] = array
    return state_dict


def _torch_names(depth: int, *, distilled: bool) -> list[str]:
    """All names of a state dict."""
    names = [token for token in _TOKENS if distilled or token != "dist_token"]
    modules = [
        "patch_embed.proj",
        "norm",
        *(head for head in _HEADS if distilled or head != "head_dist"),
    ]
    modules += [f"blocks.{i}.{module}" for i in range(depth) for module in _LAYER_MODULES.values()]
    return names + [f"{module}.{kind}" for module in modules for kind in ("weight", "bias")]


def _path(name: str) -> tuple[tuple[str, ...], int | None]:
    """Path in our tree, and the layer's index where it is one of a stack."""
    if name in _TOKENS:
        return (name,), None
    module, kind = name.rsplit(".", 1)
    if kind == "weight":
        kind = "scale" if "norm" in module else "kernel"
    if not module.startswith("blocks."):
        return (module.removesuffix(".proj"), kind), None
    _, layer, module = module.split(".", 2)
    ours = next(ours for ours, theirs in _LAYER_MODULES.items() if theirs == module)
    return ("layers", ours, kind), int(layer)


def _to_ours(name: str, array: np.ndarray) -> np.ndarray:
    """Kernels are (in, out) here; a patch is flattened as rows, columns, channels."""
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    return array.T if array.ndim == 2 else array


def without_prefix(tensors: Tensors) -> tuple[Tensors, str]:
    """The tensors without a prefix such as `module.` that a wrapper put before the names, and the
    prefix, or "".

    The prefix is what stands before the class token. Names without it, such as those of a head,
    stay as they are.

    Raises:
      ValueError: there are several networks, or two names become one.
    """
    class_token = r"((?:.*?\.)??)(?:(?:(?:vit|deit)\.)?embeddings\.cls_token|cls_token)"
    prefixes = sorted(
        match[1] for match in (re.fullmatch(class_token, name) for name in tensors) if match
    )
    if not prefixes or "" in prefixes:
        return tensors, ""
    if len(prefixes) > 1:
        raise ValueError(
            f"it holds several networks, whose names begin with {' and '.join(prefixes[:5])}: "
            "save one of them"
        )
    stripped: Tensors = {}
    for full_name, array in tensors.items():
        _add(stripped, full_name.removeprefix(prefixes[0]), array)
    return stripped, prefixes[0]


def _add(tensors: Tensors, name: str, array: np.ndarray) -> None:
    """Adds a tensor; raises ValueError if another one has the same name already."""
    if name in tensors and not np.array_equal(tensors[name], array):
        raise ValueError(
            f"two of its tensors, with different values, are both {name} in timm's names"
        )
    tensors[name] = array


def is_hugging_face(tensors: Tensors) -> bool:
    """Whether the names are Hugging Face's."""
    return any(
        _HUGGING_FACE_LAYER.fullmatch(re.sub(r"^(vit|deit)\.", "", name)) for name in tensors
    )


def from_hugging_face(tensors: Tensors) -> Tensors:
    """Timm's names for Hugging Face's; a name that is not known stays as it is, and is reported
    when it does not fit.

    Raises:
      KeyError: a part of query, key and value is missing.
      ValueError: two tensors with different values have one name in timm's.
    """
    ours: Tensors = {}
    qkv: dict[str, Tensors] = {}
    for full_name, array in tensors.items():
        name = re.sub(r"^(vit|deit)\.", "", full_name)
        if name.startswith("pooler."):  # of a model without a head
            continue
        layer = _HUGGING_FACE_LAYER.fullmatch(name)
        if layer:
            index, module, kind = layer.groups()
            part = re.fullmatch(r"attention\.(?:attention\.)?(query|key|value|[qkv]_proj)", module)
            if part:
                _add(
                    qkv.setdefault(f"blocks.{index}.attn.qkv.{kind}", {}),
                    _QKV.get(part[1], part[1][0]),
                    array,
                )
            else:
                _add(ours, f"blocks.{index}.{_HUGGING_FACE_5.get(module, module)}.{kind}", array)
            continue
        module, _, kind = name.rpartition(".")
        outside = (
            _HUGGING_FACE_OUTSIDE.get(name) or f"{_HUGGING_FACE_OUTSIDE.get(module, module)}.{kind}"
        )
        _add(ours, outside, array)
    for name, parts in qkv.items():
        missing = [theirs for theirs, letter in _QKV.items() if letter not in parts]
        if missing:
            raise KeyError(missing[0])
        _add(ours, name, np.concatenate([parts[letter] for letter in "qkv"]))
    return ours


def to_hugging_face(tensors: Tensors) -> Tensors:
    """Hugging Face's names for timm's, the inverse of `from_hugging_face`."""
    distilled = "dist_token" in tensors
    layer_names = {ours: theirs for theirs, ours in _HUGGING_FACE.items()}
    outside = {
        ours: theirs
        for theirs, ours in _HUGGING_FACE_OUTSIDE.items()
        if distilled or theirs != "cls_classifier"
    }
    if not distilled:
        outside["head"] = "classifier"
    prefix, theirs = "deit." if distilled else "vit.", {}
    for name, array in tensors.items():
        module, _, kind = name.rpartition(".")
        if name in outside:
            theirs[prefix + outside[name]] = array
        elif module.startswith("blocks."):
            _, index, inner = module.split(".", 2)
            start = f"{prefix}encoder.layer.{index}."
            if inner == "attn.qkv":
                for key, part in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                    theirs[f"{start}attention.attention.{key}.{kind}"] = part
            else:
                theirs[f"{start}{layer_names[inner]}.{kind}"] = array
        else:
            there = outside[module]
            theirs[("" if "classifier" in there else prefix) + f"{there}.{kind}"] = array
    return theirs


def from_big_vision(tensors: Tensors) -> tuple[Tensors, int]:
    """Timm's names and layouts for those of big_vision, today's and those of AugReg, and the number
    of heads.

    Today's big_vision adds the position embeddings before it puts the class token in front, which
    has none: it gets zeros.

    Raises:
      KeyError: a tensor is missing.
      ValueError: a tensor has no place in timm's layout, or the layers differ in their number of
        heads.
    """
    tensors = dict(tensors)  # each tensor that is used leaves it
    ours: Tensors = {"cls_token": tensors.pop("cls")}
    if "pos_embedding" in tensors:
        positions = tensors.pop("pos_embedding")
        ours["pos_embed"] = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
    else:
        ours["pos_embed"] = tensors.pop("Transformer/posembed_input/pos_embedding")
    ours["patch_embed.proj.weight"] = tensors.pop("embedding/kernel").transpose(3, 2, 0, 1)
    ours["patch_embed.proj.bias"] = tensors.pop("embedding/bias")
    if "head/kernel" in tensors:
        ours["head.weight"], ours["head.bias"] = (
            tensors.pop("head/kernel").T,
            tensors.pop("head/bias"),
        )

    def norm(there: str, here: str) -> None:
        ours[f"{here}.weight"], ours[f"{here}.bias"] = (
            tensors.pop(f"{there}/scale"),
            tensors.pop(f"{there}/bias"),
        )

    def dense(there: str, here: str) -> None:
        ours[f"{here}.weight"], ours[f"{here}.bias"] = (
            tensors.pop(f"{there}/kernel").T,
            tensors.pop(f"{there}/bias"),
        )

    norm("Transformer/encoder_norm", "norm")
    _unstack(tensors)
    today = "Transformer/encoderblock_0/LayerNorm_1/scale" in tensors
    norm2, mlp, attention = ("1", "MlpBlock_0", "0") if today else ("2", "MlpBlock_3", "1")
    depth = len(
        {name.split("/")[1] for name in tensors if name.startswith("Transformer/encoderblock_")}
    )
    heads = set()
    for i in range(depth):
        there, here = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        norm(f"{there}/LayerNorm_0", f"{here}.norm1")
        norm(f"{there}/LayerNorm_{norm2}", f"{here}.norm2")
        dense(f"{there}/{mlp}/Dense_0", f"{here}.mlp.fc1")
        dense(f"{there}/{mlp}/Dense_1", f"{here}.mlp.fc2")
        out = tensors.pop(f"{there}/MultiHeadDotProductAttention_{attention}/out/kernel")
        width = out.shape[2]
        parts = [
            f"{there}/MultiHeadDotProductAttention_{attention}/{key}"
            for key in ("query", "key", "value")
        ]
        kernels, biases = (
            [tensors.pop(f"{part}/{kind}") for part in parts] for kind in ("kernel", "bias")
        )
        heads |= {
            out.shape[:2],
            *(kernel.shape[1:] for kernel in kernels),
            *(bias.shape for bias in biases),
        }
        ours[f"{here}.attn.qkv.weight"] = np.concatenate(
            [kernel.reshape(width, width).T for kernel in kernels]
        )
        ours[f"{here}.attn.qkv.bias"] = np.concatenate([bias.reshape(width) for bias in biases])
        ours[f"{here}.attn.proj.weight"] = out.reshape(width, width).T
        ours[f"{here}.attn.proj.bias"] = tensors.pop(
            f"{there}/MultiHeadDotProductAttention_{attention}/out/bias"
        )
    if tensors:
        raise ValueError(f"no place for {', '.join(sorted(tensors)[:3])}")
    if len(heads) != 1:
        numbers = sorted({shape[0] for shape in heads})
        raise ValueError(
            f"its attention has {' and '.join(map(str, numbers)) or 'no'} heads, and every layer "
            "must have the same"
        )
    return ours, heads.pop()[0]


def _unstack(tensors: Tensors) -> None:
    """Splits, in place, layers that are stacked along the first axis, as big_vision's `scan` option
    keeps them.
    """
    start = "Transformer/encoderblock/"
    for name in [name for name in tensors if name.startswith(start)]:
        stacked = tensors.pop(name)
        if not 0 < len(stacked) <= 1000:
            raise ValueError(f"{name} is of {len(stacked)} layers")
        for i, array in enumerate(stacked):
            tensors[f"Transformer/encoderblock_{i}/{name.removeprefix(start)}"] = array
