"""The `config.json` beside a weight file, of Hugging Face or timm: what it says of the network,
compared with the tensors.
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

_LARGEST = 10 * 2**20  # bytes
# Sizes of our network -> the keys that tell them.
_SIZES = {
    "width": ("hidden_size", "embed_dim", "num_features"),
    "depth": ("num_hidden_layers", "depth"),
    "num_heads": ("num_attention_heads", "num_heads"),
    "mlp_width": ("intermediate_size",),
    "patch_size": ("patch_size",),
    "channels": ("num_channels", "in_chans"),
    "num_classes": ("num_classes", "num_labels"),
}
# Keys that change what a network computes -> the values with which it computes what ours does; null
# is timm's default.
_SAME = {
    "model_type": ("vit", "deit", "vit_msn"),
    "hidden_act": ("gelu", "gelu_python"),
    "act_layer": ("gelu",),
    "norm_layer": ("layernorm",),
    "global_pool": ("token",),
    "pos_embed": ("learn",),
    **dict.fromkeys(("class_token", "qkv_bias", "proj_bias", "final_norm"), (True,)),
    **dict.fromkeys(
        ("pre_norm", "fc_norm", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "reg_tokens"),
        (False,),
    ),
    **dict.fromkeys(("init_values", "embed_norm_layer", "mlp_layer", "block_fn"), ()),
}
_FAMILIES = (
    "vit_",
    "deit_",
    "deit3_",
    "flexivit_",
    "test_vit",
)  # of timm, whose networks may be ours
_NO_EMBED_CLASS = ("deit3_", "flexivit_")  # those of them that have it without saying so
# What timm's names of architectures say: width, depth, heads.
_VARIANTS = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_logger = logging.getLogger(__name__)


def check(
    path: pathlib.Path, tensors: Mapping[str, np.ndarray], *, required: bool
) -> dict[str, Any]:
    """Compares the `config.json` beside a weight file with the file's tensors.

    Args:
      path: of the weight file.
      tensors: by timm's names.
      required: whether it has to be there and tell Hugging Face's epsilon and number of heads.

    Returns:
      norm_eps, num_heads, grid and no_embed_class, as far as it tells them.

    Raises:
      errors.UserError: it is missing, cannot be read, or is of another network.
    """
    config = path.with_name("config.json")
    if not config.exists() and required:
        raise errors.UserError(
            f"{config} is missing: it tells the epsilon of the layer norms of {path}."
        )
    if not config.exists():
        return {}
    try:
        if config.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        told = json.loads(config.read_text())
        needed = [told[key] for key in ("layer_norm_eps", "num_attention_heads") if required]
        if not isinstance(told, dict) or None in needed:
            raise TypeError("it does not name the values of a network")
        return _compare(config, path, told, _sizes(tensors))
    except (
        KeyError,
        TypeError,
        ValueError,
        ArithmeticError,
        RecursionError,
        AttributeError,
        OSError,
    ) as error:
        what = (
            "does not tell layer_norm_eps, num_attention_heads and the like"
            if required
            else f"beside {path} makes no sense"
        )
        raise errors.UserError(f"{config} {what} ({_text(errors.first_line(error))}).") from error


def _sizes(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The sizes that the tensors tell."""
    sizes: dict[str, Any] = {"distilled": "dist_token" in tensors}
    if np.ndim(tensors.get("patch_embed.proj.weight")) == 4:
        sizes["width"], sizes["channels"], sizes["patch_size"], _ = tensors[
            "patch_embed.proj.weight"
        ].shape
    sizes["depth"] = len([name for name in tensors if name.endswith("attn.qkv.weight")])
    for size, name in (("mlp_width", "blocks.0.mlp.fc1.weight"), ("num_classes", "head.weight")):
        if np.ndim(tensors.get(name)) == 2:
            sizes[size] = len(tensors[name])
    if np.ndim(tensors.get("pos_embed")) == 3:
        sizes["positions"] = tensors["pos_embed"].shape[1]
    return sizes


def _compare(
    config: pathlib.Path, path: pathlib.Path, told: dict[str, Any], actual: dict[str, Any]
) -> dict[str, Any]:
    """Compares the sections of a config with the sizes that the tensors tell.

    Top level and `model_args` are of this very network. `pretrained_cfg` and the architecture are
    of the one that it started
    from, which may have had other sizes: a warning tells of them, and they are not used.
    """
    own = [told, told.get("model_args") or {}]
    source = told.get("pretrained_cfg") or {}
    architecture = str(told.get("architecture") or source.get("architecture") or "")
    for section in (*own, source):
        for key, values in _SAME.items():
            if section.get(key) is not None and section[key] not in values:
                raise errors.UserError(
                    f"{config} tells of another network than ours: its {key} is "
                    f"{_text(section[key])}."
                )
    if "quickgelu" in architecture:
        raise errors.UserError(
            f"{config} tells of another network than ours: its architecture is "
            f"{_text(architecture)}."
        )
    if architecture and not architecture.startswith(_FAMILIES):
        _warn(
            "%s tells of the architecture %s, and its tensors are taken for a vision transformer's",
            config,
            architecture,
        )
    no_embed_class = any(section.get("no_embed_class", False) for section in own)
    no_embed_class |= architecture.startswith(_NO_EMBED_CLASS)
    claims: dict[str, Any] = {}
    for section in own:
        for key, value in _claims(section, actual).items():
            if claims.setdefault(key, value) != value:
                raise errors.UserError(
                    f"{config} contradicts itself: it tells a {key} of {claims[key]} and of "
                    f"{value}."
                )
    for key, value in claims.items():
        if not _agrees(key, value, actual, no_embed_class):
            raise errors.UserError(
                f"{config} contradicts {path}: it tells a {key} of {value}, and the tensors have "
                f"{_shown(key, actual)}; "
                "correct it, or move it away if it belongs to another file."
            )
    for section in (_claims(source, actual, input_size=True), _variant(architecture, actual)):
        wrong = [
            key
            for key, value in section.items()
            if key not in claims and not _agrees(key, value, actual, no_embed_class)
        ]
        for key in wrong:
            message = (
                "%s tells a %s of %s by its pretrained_cfg or architecture, and the tensors "
                "of %s have %s, which counts"
            )
            _warn(message, config, key, section[key], path, _shown(key, actual))
        if not {"width", "depth"} & set(wrong):  # else it is of another network altogether
            claims = {key: value for key, value in section.items() if key not in wrong} | claims
    result = {key: claims[key] for key in ("norm_eps", "num_heads", "grid") if key in claims}
    return result | ({"no_embed_class": True} if no_embed_class else {})


def _claims(
    section: Mapping[str, Any], actual: Mapping[str, Any], *, input_size: bool = False
) -> dict[str, Any]:
    """What a section of a config tells, by our names."""
    claims: dict[str, Any] = {}

    def claim(name: str, value: Any) -> None:
        if claims.setdefault(name, value) != value:
            raise ValueError(f"it contradicts itself: a {name} of {claims[name]} and of {value}")

    for name, keys in _SIZES.items():
        for key in keys:
            value = section.get(key)
            if value is not None:
                if isinstance(value, list) and len(set(value)) == 1:  # of a patch
                    value = value[0]
                claim(name, _whole(key, value))
    for key in ("layer_norm_eps", "norm_eps"):
        if section.get(key) is not None:
            if not math.isfinite(float(section[key])):
                raise ValueError(f"{key} is {section[key]}")
            claim("norm_eps", float(section[key]))
    if section.get("mlp_ratio") is not None and "width" in actual:
        claim("mlp_width", int(actual["width"] * float(section["mlp_ratio"])))
    if section.get("id2label"):
        claim("num_classes", len(section["id2label"]))
    if "model_type" in section:
        claims["distilled"] = section["model_type"] == "deit"
    images = [section[key] for key in ("image_size", "img_size") if section.get(key) is not None]
    if len(images) == 2 and images[0] != images[1]:
        raise ValueError(f"it contradicts itself: images of {images[0]} and of {images[1]} pixels")
    image = images[0] if images else None
    if image is None and section.get("input_size") is not None and input_size:
        claims["channels"], *image = section["input_size"]
    if isinstance(image, dict):
        image = [image["height"], image["width"]]
    patch = claims.get("patch_size", actual.get("patch_size"))
    if image is not None and patch is not None:
        sides = image if isinstance(image, list) else [image, image]
        claims["grid"] = tuple(_whole("image_size", side) // patch for side in sides)
        if len(claims["grid"]) != 2:
            raise ValueError(f"an image size of {image}")
    return claims


def _whole(key: str, value: Any) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or value != int(value)
        or value < 0
    ):
        raise ValueError(f"{key} is {value}, and must be a whole number")
    return int(value)


def _variant(architecture: str, actual: Mapping[str, Any]) -> dict[str, Any]:
    """What the name of an architecture of timm tells."""
    parts = re.fullmatch(
        r"(?:vit|deit)_(tiny|small|base|large|huge)(_distilled)?_patch(\d{1,3})_(\d{1,5})(\..*)?",
        architecture,
    )
    if parts is None:
        return {}
    sizes = dict(zip(("width", "depth", "num_heads"), _VARIANTS[parts[1]], strict=True))
    grid = _claims({"patch_size": int(parts[3]), "image_size": int(parts[4])}, actual)
    return sizes | grid | {"distilled": parts[2] is not None}


def _agrees(key: str, value: Any, actual: Mapping[str, Any], no_embed_class: bool) -> bool:
    if key == "grid":
        positions = actual.get("positions")
        extra = 0 if no_embed_class else 2 if actual["distilled"] else 1
        return positions is None or positions == value[0] * value[1] + extra
    return actual.get(key, value) == value


def _shown(key: str, actual: Mapping[str, Any]) -> Any:
    return f"{actual['positions']} position embeddings" if key == "grid" else actual[key]


def _text(value: Any) -> str:
    return errors.printable(str(value))[:200]


def _warn(message: str, *values: Any) -> None:
    _logger.warning(message, *map(_text, values))


def of_model(model: vit.AViT) -> dict[str, Any]:
    """Hugging Face's `config.json` of a model."""
    kind = "deit" if model.distilled else "vit"
    return {
        "architectures": [
            "DeiTForImageClassificationWithTeacher"
            if model.distilled
            else "ViTForImageClassification"
        ],
        "model_type": kind,
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
