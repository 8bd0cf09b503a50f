"""Real pictures, and a network that costs a given share of the static one on them."""

import os
from typing import Any

import jax
import numpy as np

import avit_jax
from avit_jax import adaptive
from avit_jax import calibrate as calibrate_lib
from avit_jax.data import augment, loader, sources, transforms


def load_images(count: int) -> tuple[np.ndarray, str]:
    """Normalised pictures `(count, 224, 224, 3)`, and where they are from."""
    data_dir = os.environ.get("AVIT_DATA_DIR")
    if data_dir:
        name, split, where = "imagenet2012", "validation+train", "ImageNet sample"
    else:
        name, split, where = "digits", "train", "digits"
    source = sources.load(name, split=split, data_dir=data_dir or "", image_size=(224, 224))
    read = loader.Reader(source=source, transform=transforms.Evaluate(image_size=(224, 224), crop_ratio=0.875))
    images = np.stack([read(i)["image"] for i in range(count)])
    images = np.broadcast_to(images, (*images.shape[:-1], 3))
    return np.asarray(augment.normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))), where


def gated(params: Any, shift: float) -> Any:
    """Variables of a network with a learnable gate, at the given shift."""
    return {"params": {**params, "gate": {"gamma": np.float32(1.0), "beta": np.float32(shift)}}}


def calibrate(model: avit_jax.AViT, params: Any, images: np.ndarray, budgets: list[float]) -> dict[float, float]:
    """Gate shift for each share of the static network's MACs."""
    static = avit_jax.flops.static_macs(model)
    cost = jax.jit(lambda variables: adaptive.apply(model, variables, images)[1].macs.mean() / static)
    at = lambda shift: float(cost(gated(params, shift)))  # noqa: E731
    return {budget: calibrate_lib.find_shift(at, budget, start=0.0, tolerance=0.004) for budget in budgets}
