"""Stores how many tokens each layer of an image computes, on ImageNet's images and random weights.

AVIT_DATA_DIR=... JAX_PLATFORMS=cpu python -m experiments.tpu_kernel.counts

counts.json: by network and MACs ratio, for each of 48 images a list over the layers. The gate bias
is searched anew, because the layers alone count here: MACs of embedding and head are left out.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import app

import avit_jax
from avit_jax.models import flops
from avit_jax.tools import calibrate
from avit_jax.utils import errors, files
from experiments.accelerators import bench

FILE = pathlib.Path(__file__).parent / "counts.json"
_IMAGES, _AT_ONCE = 48, 8


def macs_ratio(model: avit_jax.AViT, counts: np.ndarray) -> float:
    """Returns the MACs of the layers as a ratio to those of the static network.

    Args:
      model: for its sizes.
      counts: `(B, L)` tokens that each image computes in each layer.
    """
    macs = flops.layer_macs(counts.astype(float), model).mean()
    return float(macs) / flops.layer_macs(model.num_tokens, model)


def _counter(model: avit_jax.AViT, params: Any, images: Any) -> Callable[[float], np.ndarray]:
    """Returns the function from a gate bias to counts `(B, L)`."""
    # Masking decides as the kernel does, and compiles faster.
    run = jax.jit(lambda shift, images: model.apply(bench.gated(params, shift), images)[1].active)

    def count(shift: float) -> np.ndarray:
        chunks = np.split(images, range(_AT_ONCE, _IMAGES, _AT_ONCE))
        active = np.concatenate([run(shift, chunk) for chunk in chunks], axis=1)
        return np.asarray(flops.is_computed(active, model.num_prefix_tokens).sum(axis=-1)).T

    return count


def main(_: list[str]) -> None:
    """Writes the file."""
    images, where = bench.images(_IMAGES)
    if where != "ImageNet sample":
        raise errors.UserError("set AVIT_DATA_DIR to the folder with ImageNet's images.")
    found: dict[str, dict[str, list[list[int]]]] = {}
    for name in ("deit_tiny", "deit_small"):
        model, params = bench.network(name, "float32"), bench.parameters(name)
        count = _counter(model, params, images)
        cost = lambda shift, count=count, model=model: macs_ratio(model, count(shift))  # noqa: E731
        shifts = bench.shifts(name)
        found[name] = {"1.0": count(shifts.pop(1.0)).tolist()}
        for ratio, start in shifts.items():
            shift = calibrate.find_bias(cost, ratio, start=start, tolerance=0.006)
            found[name][str(ratio)] = count(shift).tolist()
            print(name, ratio, shift, np.mean(found[name][str(ratio)], axis=0), flush=True)
    files.write(FILE, json.dumps(found) + "\n")


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
