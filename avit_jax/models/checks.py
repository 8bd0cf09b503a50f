"""Checks of a network's attributes and images. Axes as in `vit`."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from avit_jax.core.arrays import UncheckedArray
from avit_jax.models.layer_spec import ACTIVATIONS

if TYPE_CHECKING:
    from avit_jax.models import vit

POOLS = ("token", "avg", "max", "map")
_FLOATS = ("float32", "bfloat16", "float16", "float64")


def check(model: "vit.AViT") -> None:
    """Raises ValueError if the attributes are invalid; the message says what to change."""
    if isinstance(model.image_size, Sequence) and len(model.image_size) != 2:
        raise ValueError(
            f"image_size must be one number or (height, width); got {model.image_size}."
        )
    for name in ("patch_size", "channels", "width", "depth", "num_heads"):
        if getattr(model, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(model, name)}.")
    if min(model.pixels) < 1:
        raise ValueError(f"image_size must be at least 1; got {model.image_size}.")
    for name in ("num_classes", "num_registers"):
        if getattr(model, name) < 0:
            raise ValueError(f"{name} must be at least 0; got {getattr(model, name)}.")
    for name, choices in (("pool", POOLS), ("mlp", ACTIVATIONS)):
        if getattr(model, name) not in choices:
            names = " or ".join(f'"{choice}"' for choice in choices)
            raise ValueError(f'{name} must be {names}; got "{getattr(model, name)}".')
    if model.pool == "token" and not model.class_token:
        raise ValueError('pool "token" reads the class token: set class_token=True or pool="avg".')
    if model.pool == "map" and model.fc_norm:
        raise ValueError('pool "map" reads the patches after the norm: unset fc_norm.')
    if model.distilled and (model.pool != "token" or not model.num_classes):
        raise ValueError(
            'a distilled model needs pool "token" and at least one class: unset distilled.'
        )
    if model.pixels[0] % model.patch_size or model.pixels[1] % model.patch_size:
        raise ValueError(
            f"patch_size {model.patch_size} must divide the image size {model.pixels}."
        )
    if model.width % model.num_heads:
        raise ValueError(f"width {model.width} must be divisible by num_heads {model.num_heads}.")
    if not 0 <= model.rope_theta < math.inf:
        raise ValueError(f"rope_theta must be at least 0 and finite; got {model.rope_theta}.")
    if model.rope_theta and model.width // model.num_heads % 4:
        raise ValueError(
            f"rope_theta {model.rope_theta} needs heads whose width is a multiple of 4; got "
            f"{model.width // model.num_heads}: change width or num_heads, or set rope_theta=0."
        )
    if model.mlp_width < 1:
        raise ValueError(
            f"mlp_ratio {model.mlp_ratio} gives the MLP no hidden channel at width "
            f"{model.width}: raise it."
        )
    for name in ("drop_path", "dropout"):
        if not 0.0 <= getattr(model, name) < 1.0:
            raise ValueError(f"{name} must lie in [0, 1); got {getattr(model, name)}.")
    if model.removal is not None and (model.halting is None or model.dropout or model.remat):
        raise ValueError(
            "removal in training needs halting, dropout=0 and remat=False: its backward pass "
            "always recomputes the layers."
        )
    if model.halting is not None and not -model.width <= model.halting.channel < model.width:
        raise ValueError(
            f"halting channel {model.halting.channel} is not among the {model.width} channels "
            f"of a token: set a number from {-model.width} to {model.width - 1}."
        )


def check_images(model: "vit.AViT", images: UncheckedArray) -> None:
    """Raises ValueError if the images do not have the model's dtype or shape.

    The batch may be symbolic.
    """
    dtype, shape = getattr(images, "dtype", None), getattr(images, "shape", None)
    if dtype is None or not isinstance(shape, tuple):
        raise ValueError(
            f"images must be one array of floats; got a {type(images).__name__}: use jnp.asarray."
        )
    if str(dtype) not in _FLOATS:  # not np.issubdtype: other libraries have dtypes too
        raise ValueError(
            f"images must be normalized floats ({', '.join(_FLOATS)}); got {dtype}. For "
            "pixels from 0 to 255 call "
            "avit_jax.data.augment.normalize(images, mean, std) first."
        )
    if len(shape) != 4 or shape[1:] != (*model.pixels, model.channels):
        raise ValueError(
            f"images must be (B, {model.pixels[0]}, {model.pixels[1]}, {model.channels}); got "
            f"{shape}."
        )
    if isinstance(shape[0], int) and not shape[0]:
        raise ValueError("there are no images: the batch must hold at least one.")
