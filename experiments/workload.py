"""Real pictures, and a network that costs a given share of the static one on them."""

import concurrent.futures
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import avit_jax
from avit_jax.data import augment, loader, sources, transforms
from avit_jax.models import flops
from avit_jax.tools import calibrate as calibrate_lib
from avit_jax.training import devices
from avit_jax.utils import errors


def pixels(
    name: str,
    split: str,
    data_dir: str,
    *,
    size: tuple[int, int],
    crop_ratio: float,
    count: int,
    channels: int = 3,
) -> np.ndarray:
    """The first `count` pictures of a split, as evaluation sees them, `(count, H, W, C)` uint8;
    again if there are fewer.
    """
    source = sources.load(name, split=split, data_dir=data_dir, image_size=size)
    transform = transforms.Evaluate(image_size=size, crop_ratio=crop_ratio, channels=channels)
    read = loader.Reader(source=source, transform=transform)
    with concurrent.futures.ThreadPoolExecutor() as threads:
        images = list(
            threads.map(lambda i: read(i)["image"], range(min(count, len(source.records))))
        )
    return np.stack([images[i % len(images)] for i in range(count)])


def load_images(count: int) -> tuple[np.ndarray, str]:
    """Normalised pictures `(count, 224, 224, 3)`, and where they are from."""
    data_dir = os.environ.get("AVIT_DATA_DIR")
    if data_dir:
        name, split, where = "imagenet2012", "validation+train", "ImageNet sample"
    else:
        name, split, where = "digits", "train", "digits"
    images = pixels(name, split, data_dir or "", size=(224, 224), crop_ratio=0.875, count=count)
    images = np.broadcast_to(images, (*images.shape[:-1], 3))
    return np.asarray(
        augment.normalize(images, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ), where


class Devices:
    """Local devices, as many as share out a batch evenly, each with images of its own.

    On CPU `XLA_FLAGS=--xla_force_host_platform_device_count=2` makes two, so that each of two cores
    may have one.
    """

    def __init__(self, batch: int) -> None:
        self._devices = jax.local_devices()[: math.gcd(batch, jax.local_device_count())]

    def __len__(self) -> int:
        return len(self._devices)

    def compile(self, function: Callable[..., Any], variables: Any, images: jax.Array) -> Any:
        """A function of variables and images, compiled for arguments like these, as `replicate` and
        `split` give them.
        """
        return devices.parallel(function, devices=self._devices).lower(variables, images).compile()

    def replicate(self, variables: Any) -> Any:
        """Variables for all devices."""
        return devices.replicate(variables, self._devices)

    def split(self, images: np.ndarray) -> jax.Array:
        """A batch, shared out."""
        return devices.split(images, self._devices)


def chunked(apply: Callable[..., Any], chunk: int) -> Callable[[Any, jax.Array], jax.Array]:
    """Logits of images `(B, H, W, C)`, `chunk` of them, of which B is a multiple, at a time through
    all layers.
    """

    def run(variables: Any, images: jax.Array) -> jax.Array:
        chunks = images.reshape(-1, chunk, *images.shape[1:])
        return jax.lax.map(lambda x: apply(variables, x)[0], chunks).reshape(len(images), -1)

    return run


def gated(params: Any, shift: float) -> Any:
    """Variables of a network with a learnable gate, at the given shift."""
    return {"params": {**params, "gate": {"gamma": np.float32(1.0), "beta": np.float32(shift)}}}


def calibrate(
    model: avit_jax.AViT, macs: Callable[[float], float], budgets: list[float]
) -> dict[float, float]:
    """Gate shift for each share of the static network's MACs; raises errors.UserError for one that
    it cannot come to.

    Args:
      model: for the MACs of the static network.
      macs: mean MACs of an image at a gate shift.
      budgets: shares.
    """
    share = lambda shift: macs(shift) / flops.static_macs(model)  # noqa: E731
    try:
        return {
            budget: calibrate_lib.find_bias(share, budget, start=0.0, tolerance=0.004)
            for budget in budgets
        }
    except calibrate_lib.BudgetOutOfReach as error:
        raise errors.UserError(str(error)) from error
