"""The `config.json` that Hugging Face and timm put beside a weight file.

It gives sizes that tensors do not show, such as the number of heads. Its other sizes must agree
with the tensors.
"""

import contextlib
import json
import logging
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from avit_jax.utils import errors
from avit_jax.weights import architecture, hugging_face_config, timm_names

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
# timm's default, is always such a value. `architecture.of_config` reads more keys.
_SUPPORTED = {
    "norm_layer": ("layernorm",),
    "pos_embed": ("learn",),
    **dict.fromkeys(("proj_bias", "mlp_bias", "final_norm", "qkv_fused"), (True,)),
    **dict.fromkeys(("scale_attn_norm", "scale_mlp_norm", "pool_include_prefix"), (False,)),
    **dict.fromkeys(("scale_attn_inner", "scale_mlp", "use_post_norm"), (False,)),
    "attn_only_layer_scale": (False,),
    "attn_type": ("eva", "rope"),
    **dict.fromkeys(("embed_norm_layer", "mlp_layer", "block_fn", "attn_layer"), ()),
    **dict.fromkeys(("num_kv_heads", "rope_parameters", "rope_scaling"), ()),
    **dict.fromkeys(("attn_pool_num_heads", "attn_pool_mlp_ratio"), ()),
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
      norm_eps, num_heads, grid and label_names, if the config gives them, and
      attributes: those of `AViT` that the config gives or the tensors show.

    Raises:
      errors.UserError: the config is missing, cannot be read, or describes another network.
    """
    config = beside(path)
    if not config.exists() and required:
        raise errors.UserError(
            f"{config} is missing: put it there, as it gives the epsilon of the layer norms of "
            f"{path}."
        )
    if not config.exists():
        return {"attributes": architecture.of_tensors(tensors)}
    try:
        content = _content(config)
        needed = [content[key] for key in ("layer_norm_eps", "num_attention_heads") if required]
        if not isinstance(content, dict) or None in needed:
            raise TypeError("it does not describe a network")
        if key := hugging_face_config.unread_bias(content, tensors):
            raise _contradiction(config, path, key, content[key], "such a bias")
        return _compare(config, path, content, _sizes_of(tensors)) | _about_data(content)
    except _UNUSABLE as error:
        problem = f"beside {path} makes no sense"
        if required:
            problem = "does not give layer_norm_eps, num_attention_heads and other sizes"
        reason = _text(errors.first_line(error))
        raise errors.UserError(f"{config} {problem} ({reason}): correct it.") from error


def beside(path: pathlib.Path) -> pathlib.Path:
    """Returns the path of the `config.json` of a weight file."""
    return path.with_name("config.json")


def _content(config: pathlib.Path) -> Any:
    if config.stat().st_size > _MAX_BYTES:
        raise ValueError("it is too large")
    return hugging_face_config.image_network(json.loads(config.read_text()))


def refuse_other_kinds(path: pathlib.Path) -> None:
    """Raises errors.UserError if the `model_type` of Hugging Face's config is not supported."""
    with contextlib.suppress(*_UNUSABLE):  # `read` reports these
        kind = _content(beside(path)).get("model_type")
        if kind is not None and kind not in hugging_face_config.MODEL_TYPES:
            raise _unsupported(beside(path), f"its model_type is {_text(kind)}")


def tells_rotation(path: pathlib.Path) -> bool:
    """Returns whether timm's `config.json` beside a file tells whether queries and keys rotate."""
    with contextlib.suppress(*_UNUSABLE):
        content = _content(beside(path))
        sections = (content, content.get("model_args") or {})
        return any("use_rot_pos_emb" in part or part.get("architecture") for part in sections)
    return False


def _about_data(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the names of the classes, if the config gives them."""
    source, result = content.get("pretrained_cfg") or {}, {}
    names = content.get("label_names") or source.get("label_names")
    if by_index := content.get("id2label"):
        names = [by_index[str(i)] for i in range(len(by_index))]
    if names and names != [f"LABEL_{i}" for i in range(len(names))]:
        result["label_names"] = tuple(str(name) for name in names)
    return result


def _sizes_of(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the sizes that the tensors show."""
    dims = {name: np.shape(array) for name, array in tensors.items()}
    sizes: dict[str, Any] = {"distilled": "dist_token" in tensors}
    sizes["shown"] = architecture.of_tensors(tensors)
    sizes["depth"] = len([name for name in tensors if name.endswith("attn.qkv.weight")])
    if len(kernel := dims.get("patch_embed.proj.weight", ())) == 4:
        sizes["width"], sizes["channels"], sizes["patch_size"], _ = kernel
    for size, name in (("mlp_width", "blocks.0.mlp.fc1.weight"), ("num_classes", "head.weight")):
        if len(dims.get(name, ())) == 2:
            sizes[size] = dims[name][0]
    if sizes["shown"].get("mlp") == "swiglu":
        sizes.pop("mlp_width", None)  # configs differ in what they call it
    if len(embedding := dims.get("pos_embed", ())) == 3:
        sizes["positions"] = embedding[1]
    return sizes


def _compare(
    config: pathlib.Path, path: pathlib.Path, content: dict[str, Any], actual: dict[str, Any]
) -> dict[str, Any]:
    """Compares the sections of a config with what the tensors show.

    The top level and `model_args` describe this network, and must agree. `pretrained_cfg` and
    `architecture` describe the network that training started from, which may have other sizes.
    Sizes of theirs that do not agree are ignored with a warning.
    """
    own = [content, content.get("model_args") or {}]
    source = content.get("pretrained_cfg") or {}
    name = str(content.get("architecture") or source.get("architecture") or "")
    _check_supported(config, [*own, source], name)
    attributes = _attributes(config, path, own, name, actual["shown"])
    sizes: dict[str, Any] = {}
    for section in own:
        for key, value in _parse(section, actual).items():
            _put(sizes, key, value)
    for key, value in sizes.items():
        if not _agrees(key, value, actual, attributes):
            raise _contradiction(config, path, key, value, _shown(key, actual))
    named = _parse(timm_names.sizes(name), actual)
    for section in (_parse(source, actual, use_input_size=True), named):
        other = {key: value for key, value in section.items() if key not in sizes}
        wrong = [key for key in other if not _agrees(key, other[key], actual, attributes)]
        for key in wrong:
            message = (
                "%s: pretrained_cfg or architecture gives %s=%s, and the tensors of %s have %s; "
                "the tensors count"
            )
            _warn(message, config, key, other[key], path, _shown(key, actual))
        if not {"width", "depth"} & set(wrong):  # otherwise it describes another network
            sizes |= {key: value for key, value in other.items() if key not in wrong}
    sizes = {"norm_eps": timm_names.norm_eps(name)} | sizes
    sizes = {"num_heads": timm_names.num_heads(name, actual.get("width", 0))} | sizes
    if "position_class" not in attributes and "grid" in sizes:
        has_none = actual.get("positions") == math.prod(sizes["grid"])
        attributes["position_class"] = not (has_none and _num_prefix_tokens(actual))
    result = {key: sizes.get(key) for key in ("norm_eps", "num_heads", "grid")}
    found = {key: value for key, value in result.items() if value is not None}
    return found | {"attributes": attributes}


def _attributes(
    config: pathlib.Path,
    path: pathlib.Path,
    own: list[dict[str, Any]],
    name: str,
    shown: dict[str, Any],
) -> dict[str, Any]:
    """Returns the attributes that a config gives or the tensors show."""
    shown = dict(shown)
    # A file may hold an attention pooling that its network does not use.
    pool = {"pool": shown.pop("pool")} if "pool" in shown else {}
    given: dict[str, Any] = {}
    known = timm_names.attributes(name) if name.startswith(timm_names.FAMILIES) else {}
    try:
        parts = [architecture.of_config(section, shown) for section in own]
        rotary = timm_names.rotary(name)
        for section in own:
            rotary |= {key: value for key, value in section.items() if value is not None}
        parts.append(architecture.of_rotary(rotary))
        if own[0].get("model_type") is None:
            architecture.check_pooling(
                own[0],
                shown | pool,
                known.get("pool"),
                norm_first=timm_names.may_average_last(name),
                may_drop="_siglip" in name,
                has_eva_name=name.startswith("eva_giant") or bool(timm_names.rotary(name)),
            )
    except ValueError as error:
        raise _unsupported(config, _text(error)) from error
    for key, value in [item for part in parts for item in part.items()]:
        _put(given, key, value)
    if own[0].get("model_type") in hugging_face_config.MODEL_TYPES and "mlp" not in {
        **given,
        **shown,
    }:
        default = {"hidden_act": hugging_face_config.MODEL_TYPES[own[0]["model_type"]]}
        given |= architecture.of_config(default, shown)
    for key in given.keys() & shown.keys():
        if given[key] != shown[key]:
            raise _contradiction(config, path, key, given[key], shown[key])
    if given.get("rope_theta"):  # there is no learned position; timm's default is the average
        given["position_class"] = True
        known = ({"pool": "avg"} if "use_rot_pos_emb" in rotary else {}) | known
    if not shown["class_token"] and known.get("pool") == "token":
        del known["pool"]
    if (known | given).get("pool") == "map" and not pool:
        key, value = ("global_pool", "map") if "pool" in given else ("architecture", name)
        raise _contradiction(config, path, key, value, "no attention pooling")
    return known | pool | given | shown


def _unsupported(config: pathlib.Path, reason: str) -> errors.UserError:
    return errors.UserError(f"{config} describes a network that is not supported: {reason}.")


def _contradiction(
    config: pathlib.Path, path: pathlib.Path, key: str, value: Any, shown: Any
) -> errors.UserError:
    return errors.UserError(
        f"{config} contradicts {path}: it gives {key}={value}, and the tensors have {shown}; "
        "correct it, or move it away if it belongs to another file."
    )


def _check_supported(config: pathlib.Path, sections: list[dict[str, Any]], name: str) -> None:
    unsupported = {
        key: section[key]
        for section in sections
        for key, values in _SUPPORTED.items()
        if section.get(key) is not None and section[key] not in values
    }
    is_other = timm_names.is_post_norm(name) or timm_names.pools_prefix(name)
    if is_other or timm_names.has_other_rotary(name):
        unsupported["architecture"] = name
    for key, value in unsupported.items():
        raise _unsupported(config, f"its {key} is {_text(value)}")
    if name and not name.startswith(timm_names.FAMILIES):
        message = "%s has the architecture %s; its tensors are read as a vision transformer's"
        _warn(message, config, name)


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
        is_deit = section["model_type"] == "deit"  # without its head, the token is a register
        sizes["distilled"] = is_deit and not actual["shown"]["num_registers"]
    elif "distilled" in section:  # of `timm_names`
        sizes["distilled"] = section["distilled"]
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


def _put(sizes: dict[str, Any], key: str, value: Any) -> None:
    if sizes.setdefault(key, value) != value:
        raise ValueError(f"it contradicts itself: {key}={sizes[key]} and {key}={value}")


def _whole(key: str, value: Any) -> int:
    if type(value) not in (int, float) or value != int(value) or value < 0:
        raise ValueError(f"{key} is {value}, and must be a whole number")
    return int(value)


def _agrees(key: str, value: Any, actual: Mapping[str, Any], attributes: Mapping[str, Any]) -> bool:
    if key != "grid":
        return actual.get(key, value) == value
    counts = {True: math.prod(value) + _num_prefix_tokens(actual), False: math.prod(value)}
    known = attributes.get("position_class")
    return actual.get("positions") in (
        {None, *counts.values()} if known is None else {None, counts[known]}
    )


def _num_prefix_tokens(actual: Mapping[str, Any]) -> int:
    shown = actual["shown"]
    return shown["class_token"] + actual["distilled"] + shown["num_registers"]


def _shown(key: str, actual: Mapping[str, Any]) -> Any:
    return f"{actual['positions']} position embeddings" if key == "grid" else actual[key]


def _text(value: Any) -> str:
    return errors.printable(str(value))[:200]


def _warn(message: str, *values: Any) -> None:
    _logger.warning(message, *map(_text, values))
