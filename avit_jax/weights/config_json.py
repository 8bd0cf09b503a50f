"""The `config.json` that Hugging Face and timm put beside a weight file.

It gives sizes that tensors do not show, such as the number of heads. Its other sizes must agree
with the tensors.
"""

import json
import logging
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from avit_jax.models import vit
from avit_jax.utils import errors

_MAX_BYTES = 10 * 2**20
# Sizes of our network -> keys of a config that give them.
_SIZES = {
    "width": ("hidden_size", "embed_dim", "num_features"),
    "depth": ("num_hidden_layers", "depth"),
    "num_heads": ("num_attention_heads", "num_heads"),
    "mlp_width": ("intermediate_size",),
    "patch_size": ("patch_size",),
    "channels": ("num_channels", "in_chans"),
    "num_classes": ("num_classes", "num_labels"),
}
# Keys that change what a network computes -> values for which it computes what ours does. None,
# timm's default, is always such a value.
_SUPPORTED = {
    "model_type": ("vit", "deit", "vit_msn"),
    "hidden_act": ("gelu", "gelu_python"),
    "act_layer": ("gelu",),
    "norm_layer": ("layernorm",),
    "global_pool": ("token",),
    "pos_embed": ("learn",),
    **dict.fromkeys(("class_token", "qkv_bias", "proj_bias", "final_norm"), (True,)),
    **dict.fromkeys(("pre_norm", "fc_norm", "qk_norm", "reg_tokens"), (False,)),
    **dict.fromkeys(("scale_attn_norm", "scale_mlp_norm"), (False,)),
    **dict.fromkeys(("init_values", "embed_norm_layer", "mlp_layer", "block_fn"), ()),
}
# Architectures of timm that may be ours; the last two have no_embed_class without saying so.
_FAMILIES = ("vit_", "deit_", "test_vit", "deit3_", "flexivit_")
_NO_EMBED_CLASS = _FAMILIES[-2:]
# Sizes in timm's names of architectures -> width, number of layers, number of heads.
_VARIANTS = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
# What parsing an untrusted config can raise.
_UNUSABLE = (LookupError, TypeError, ValueError, ArithmeticError, AttributeError)
_UNUSABLE += (RecursionError, OSError)
_logger = logging.getLogger(__name__)


def read(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], *, required: bool
) -> dict[str, Any]:
    """Reads the `config.json` beside a weight file and compares it with the file's tensors.

    Args:
      path: the weight file.
      tensors: timm's name -> array.
      required: whether the config must exist and give Hugging Face's epsilon and number of heads.

    Returns:
      norm_eps, num_heads, grid and no_embed_class, if the config gives them.

    Raises:
      errors.UserError: the config is missing, cannot be read, or describes another network.
    """
    config = path.with_name("config.json")
    if not config.exists() and required:
        raise errors.UserError(
            f"{config} is missing: put it there, as it gives the epsilon of the layer norms of "
            f"{path}."
        )
    if not config.exists():
        return {}
    try:
        if config.stat().st_size > _MAX_BYTES:
            raise ValueError("it is too large")
        content = json.loads(config.read_text())
        needed = [content[key] for key in ("layer_norm_eps", "num_attention_heads") if required]
        if not isinstance(content, dict) or None in needed:
            raise TypeError("it does not describe a network")
        return _compare(config, path, content, _sizes_of(tensors))
    except _UNUSABLE as error:
        problem = f"beside {path} makes no sense"
        if required:
            problem = "does not give layer_norm_eps, num_attention_heads and other sizes"
        reason = _text(errors.first_line(error))
        raise errors.UserError(f"{config} {problem} ({reason}): correct it.") from error


def _sizes_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the sizes that the tensors show."""
    dims = {name: np.shape(array) for name, array in tensors.items()}
    sizes: dict[str, Any] = {"distilled": "dist_token" in tensors}
    sizes["depth"] = len([name for name in tensors if name.endswith("attn.qkv.weight")])
    if len(kernel := dims.get("patch_embed.proj.weight", ())) == 4:
        sizes["width"], sizes["channels"], sizes["patch_size"], _ = kernel
    for size, name in (("mlp_width", "blocks.0.mlp.fc1.weight"), ("num_classes", "head.weight")):
        if len(dims.get(name, ())) == 2:
            sizes[size] = dims[name][0]
    if len(embedding := dims.get("pos_embed", ())) == 3:
        sizes["positions"] = embedding[1]
    return sizes


def _compare(
    config: pathlib.Path, path: pathlib.Path, content: dict[str, Any], actual: dict[str, Any]
) -> dict[str, Any]:
    """Compares the sections of a config with the sizes that the tensors show.

    The top level and `model_args` describe this network, and must agree. `pretrained_cfg` and
    `architecture` describe the network that training started from, which may have other sizes.
    Sizes of theirs that do not agree are ignored with a warning.
    """
    own = [content, content.get("model_args") or {}]
    source = content.get("pretrained_cfg") or {}
    architecture = str(content.get("architecture") or source.get("architecture") or "")
    _check_supported(config, [*own, source], architecture)
    no_embed_class = any(section.get("no_embed_class", False) for section in own)
    no_embed_class |= architecture.startswith(_NO_EMBED_CLASS)
    sizes: dict[str, Any] = {}
    for section in own:
        for key, value in _parse(section, actual).items():
            _put(sizes, key, value)
    for key, value in sizes.items():
        if not _agrees(key, value, actual, no_embed_class):
            raise errors.UserError(
                f"{config} contradicts {path}: it gives {key}={value}, and the tensors have "
                f"{_shown(key, actual)}; correct it, or move it away if it belongs to another file."
            )
    for section in (_parse(source, actual, use_input_size=True), _parse_name(architecture, actual)):
        other = {key: value for key, value in section.items() if key not in sizes}
        wrong = [key for key in other if not _agrees(key, other[key], actual, no_embed_class)]
        for key in wrong:
            message = (
                "%s: pretrained_cfg or architecture gives %s=%s, and the tensors of %s have %s; "
                "the tensors count"
            )
            _warn(message, config, key, other[key], path, _shown(key, actual))
        if not {"width", "depth"} & set(wrong):  # otherwise it describes another network
            sizes |= {key: value for key, value in other.items() if key not in wrong}
    result = {key: sizes[key] for key in ("norm_eps", "num_heads", "grid") if key in sizes}
    return result | ({"no_embed_class": True} if no_embed_class else {})


def _check_supported(
    config: pathlib.Path, sections: list[dict[str, Any]], architecture: str
) -> None:
    unsupported = {
        key: section[key]
        for section in sections
        for key, values in _SUPPORTED.items()
        if section.get(key) is not None and section[key] not in values
    }
    if "quickgelu" in architecture:
        unsupported["architecture"] = architecture
    for key, value in unsupported.items():
        raise errors.UserError(
            f"{config} describes a network that is not supported: its {key} is {_text(value)}."
        )
    if architecture and not architecture.startswith(_FAMILIES):
        message = "%s has the architecture %s; its tensors are read as a vision transformer's"
        _warn(message, config, architecture)


def _parse(
    section: Mapping[str, Any], actual: Mapping[str, Any], *, use_input_size: bool = False
) -> dict[str, Any]:
    """Returns the sizes that a section of a config gives, by our names."""
    given = {key: value for key, value in section.items() if value is not None}
    sizes: dict[str, Any] = {}
    for name, keys in _SIZES.items():
        for key in [key for key in keys if key in given]:
            value = given[key]
            if isinstance(value, list) and len(set(value)) == 1:  # the sides of a patch
                value = value[0]
            _put(sizes, name, _whole(key, value))
    for key in [key for key in ("layer_norm_eps", "norm_eps") if key in given]:
        if not math.isfinite(float(given[key])):
            raise ValueError(f"{key} is {given[key]}")
        _put(sizes, "norm_eps", float(given[key]))
    if "mlp_ratio" in given and "width" in actual:
        _put(sizes, "mlp_width", int(actual["width"] * float(given["mlp_ratio"])))
    if given.get("id2label"):
        _put(sizes, "num_classes", len(given["id2label"]))
    if "model_type" in section:
        sizes["distilled"] = section["model_type"] == "deit"
    image = given.get("image_size", given.get("img_size"))
    if given.get("img_size", image) != image:
        raise ValueError(f"it contradicts itself: images of {image} and {given['img_size']} pixels")
    if image is None and "input_size" in given and use_input_size:
        sizes["channels"], *image = given["input_size"]
    if isinstance(image, dict):
        image = [image["height"], image["width"]]
    patch = sizes.get("patch_size", actual.get("patch_size"))
    if image is not None and patch is not None:
        sides = image if isinstance(image, list) else [image, image]
        sizes["grid"] = tuple(_whole("image_size", side) // patch for side in sides)
        if len(sizes["grid"]) != 2:
            raise ValueError(f"image_size is {image}")
    return sizes


def _parse_name(architecture: str, actual: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the sizes that timm's name of an architecture gives."""
    parts = re.fullmatch(
        r"(?:vit|deit)_(tiny|small|base|large|huge)(_distilled)?_patch(\d{1,3})_(\d{1,5})(\..*)?",
        architecture,
    )
    if parts is None:
        return {}
    sizes = dict(zip(("width", "depth", "num_heads"), _VARIANTS[parts[1]], strict=True))
    images = _parse({"patch_size": int(parts[3]), "image_size": int(parts[4])}, actual)
    return sizes | images | {"distilled": parts[2] is not None}


def _put(sizes: dict[str, Any], key: str, value: Any) -> None:
    if sizes.setdefault(key, value) != value:
        raise ValueError(f"it contradicts itself: {key}={sizes[key]} and {key}={value}")


def _whole(key: str, value: Any) -> int:
    if type(value) not in (int, float) or value != int(value) or value < 0:
        raise ValueError(f"{key} is {value}, and must be a whole number")
    return int(value)


def _agrees(key: str, value: Any, actual: Mapping[str, Any], no_embed_class: bool) -> bool:
    if key != "grid":
        return actual.get(key, value) == value
    num_prefix_tokens = 0 if no_embed_class else 2 if actual["distilled"] else 1
    return actual.get("positions") in (None, value[0] * value[1] + num_prefix_tokens)


def _shown(key: str, actual: Mapping[str, Any]) -> Any:
    return f"{actual['positions']} position embeddings" if key == "grid" else actual[key]


def _text(value: Any) -> str:
    return errors.printable(str(value))[:200]


def _warn(message: str, *values: Any) -> None:
    _logger.warning(message, *map(_text, values))


def of_model(model: vit.AViT) -> dict[str, Any]:
    """Returns the `config.json` of a model in Hugging Face's format."""
    suffix = "WithTeacher" if model.distilled else ""
    return {
        "architectures": [f"{'DeiT' if model.distilled else 'ViT'}ForImageClassification{suffix}"],
        "model_type": "deit" if model.distilled else "vit",
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": model.mlp_width,
        "layer_norm_eps": model.norm_eps,
        "image_size": model.pixels[0] if len(set(model.pixels)) == 1 else list(model.pixels),
        "patch_size": model.patch_size,
        "num_channels": model.channels,
        "id2label": {str(i): str(i) for i in range(model.num_classes)},
        "label2id": {str(i): i for i in range(model.num_classes)},
    }
