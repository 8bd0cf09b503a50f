"""Translates the tensors of big_vision and of AugReg to timm's names and layouts."""

import re
from typing import Any

import numpy as np

from avit_jax.weights.name_maps import Tensors, add

_MAX_LAYERS = 1000
# Parts of a network of images and texts that are not the image network.
_OTHER_TOWER = re.compile(r"txt/.*|t|b")
_IMAGE_TOWER = "img/"
_POOLING = "MAPHead_0"


def matches(tensors: Tensors) -> bool:
    """Returns whether the names are those of big_vision or AugReg."""
    return any(name.removeprefix(_IMAGE_TOWER).startswith("Transformer/") for name in tensors)


def to_timm(tensors: Tensors) -> tuple[Tensors, dict[str, Any], list[str]]:
    """Translates names and layouts of the current big_vision, or of AugReg, to timm's.

    Its GELU is the approximation by tanh. Without a class token it averages the patch tokens, or
    pools them by attention.

    Returns:
      The tensors; the number of heads and the attributes of `AViT`; names that are left out.

    Raises:
      KeyError: a tensor is missing.
      ValueError: a tensor has no place in timm's layout, or layers differ in their number of heads.
    """
    left = dict(tensors)  # used tensors are removed
    dropped = []
    if any(name.startswith(_IMAGE_TOWER) for name in left):
        dropped = [name for name in left if _OTHER_TOWER.fullmatch(name)]
        image: Tensors = {}
        for name in left.keys() - set(dropped):
            add(image, name.removeprefix(_IMAGE_TOWER), left[name])
        left = image
    _unstack(left)
    attributes: dict[str, Any] = {"mlp": "gelu_tanh"}
    result: Tensors = {}
    if "cls" in left:
        result["cls_token"] = left.pop("cls")
    else:
        attributes["pool"] = "map" if f"{_POOLING}/probe" in left else "avg"
    if "pos_embedding" in left:
        result["pos_embed"] = left.pop("pos_embedding")
        attributes["position_class"] = "cls_token" not in result  # added before the class token
    else:
        result["pos_embed"] = left.pop("Transformer/posembed_input/pos_embedding")
    result["patch_embed.proj.weight"] = left.pop("embedding/kernel").transpose(3, 2, 0, 1)
    result["patch_embed.proj.bias"] = left.pop("embedding/bias")
    if "head/kernel" in left:
        _move(left, "head", result, "head")
    _move(left, "Transformer/encoder_norm", result, "norm")
    is_current = "Transformer/encoderblock_0/LayerNorm_1/scale" in left
    start = "Transformer/encoderblock_"
    head_shapes = set()
    for i in range(len({name.split("/")[1] for name in left if name.startswith(start)})):
        head_shapes |= _move_layer(left, f"{start}{i}", result, f"blocks.{i}", is_current)
    if attributes.get("pool") == "map":
        head_shapes |= _move_pooling(left, result)
    if left:
        raise ValueError(f"no place for {', '.join(sorted(left)[:3])}")
    if len(head_shapes) != 1:
        numbers = sorted({shape[0] for shape in head_shapes})
        raise ValueError(
            f"its attention has {' and '.join(map(str, numbers)) or 'no'} heads, and every layer "
            "must have the same"
        )
    return result, {"num_heads": head_shapes.pop()[0], **attributes}, dropped


def _move_layer(
    source: Tensors, there: str, result: Tensors, here: str, is_current: bool
) -> set[tuple[int, ...]]:
    """Moves the tensors of a layer; returns the (heads, head width) of its attention."""
    norm2, mlp, attention = ("1", "MlpBlock_0", "0") if is_current else ("2", "MlpBlock_3", "1")
    _move(source, f"{there}/LayerNorm_0", result, f"{here}.norm1")
    _move(source, f"{there}/LayerNorm_{norm2}", result, f"{here}.norm2")
    _move(source, f"{there}/{mlp}/Dense_0", result, f"{here}.mlp.fc1")
    _move(source, f"{there}/{mlp}/Dense_1", result, f"{here}.mlp.fc2")
    names = {"attn.qkv": ("query", "key", "value")}
    there = f"{there}/MultiHeadDotProductAttention_{attention}"
    return _move_attention(source, there, result, names | {"attn.proj": ("out",)}, f"{here}.")


def _move_pooling(source: Tensors, result: Tensors) -> set[tuple[int, ...]]:
    """Moves the attention pooling; returns the (heads, head width) of its attention."""
    result["attn_pool.latent"] = source.pop(f"{_POOLING}/probe")
    _move(source, f"{_POOLING}/LayerNorm_0", result, "attn_pool.norm")
    for i in range(2):
        _move(source, f"{_POOLING}/MlpBlock_0/Dense_{i}", result, f"attn_pool.mlp.fc{i + 1}")
    names = {"q": ("query",), "kv": ("key", "value"), "proj": ("out",)}
    there = f"{_POOLING}/MultiHeadDotProductAttention_0"
    return _move_attention(source, there, result, names, "attn_pool.")


def _move_attention(
    source: Tensors, there: str, result: Tensors, names: dict[str, tuple[str, ...]], start: str
) -> set[tuple[int, ...]]:
    """Moves an attention; returns its (heads, head width). `names` maps timm's names to parts."""
    shapes = set()
    for here, parts in names.items():
        kernels = [source.pop(f"{there}/{part}/kernel") for part in parts]
        biases = [source.pop(f"{there}/{part}/bias") for part in parts]
        if parts == ("out",):
            shapes.add(kernels[0].shape[:2])
            kernels = [kernels[0].reshape(-1, kernels[0].shape[2])]
        else:
            shapes |= {*(x.shape[1:] for x in kernels), *(x.shape for x in biases)}
            kernels = [x.reshape(len(x), -1) for x in kernels]
        result[f"{start}{here}.weight"] = np.concatenate([x.T for x in kernels])
        result[f"{start}{here}.bias"] = np.concatenate([x.ravel() for x in biases])
    return shapes


def _move(source: Tensors, there: str, result: Tensors, here: str) -> None:
    """Moves the weight and bias of a linear layer or a norm; a kernel becomes (out, in)."""
    weight = "scale" if "norm" in here else "kernel"
    result[f"{here}.weight"] = source.pop(f"{there}/{weight}").T
    result[f"{here}.bias"] = source.pop(f"{there}/bias")


def _unstack(tensors: Tensors) -> None:
    """Splits, in place, layers that big_vision's option `scan` stacks along the first axis."""
    start = "Transformer/encoderblock/"
    for name in [name for name in tensors if name.startswith(start)]:
        stacked = tensors.pop(name)
        if not 0 < len(stacked) <= _MAX_LAYERS:
            raise ValueError(f"{name} is of {len(stacked)} layers")
        for i, array in enumerate(stacked):
            tensors[f"Transformer/encoderblock_{i}/{name.removeprefix(start)}"] = array
