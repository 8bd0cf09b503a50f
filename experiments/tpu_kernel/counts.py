"""Stores how many tokens each layer of an image computes, on ImageNet's images and random weights.

AVIT_DATA_DIR=... JAX_PLATFORMS=cpu python -m experiments.tpu_kernel.counts

counts.json: by network and MACs ratio, for each of 48 images a list over the layers. The gate
shifts are those of experiments/accelerators. There, 48 images calibrated DeiT-T, and 8 DeiT-S; and
embedding and head counted too. So the MACs ratio of the layers differs a little.
"""

import json
import pathlib

import jax
import numpy as np
from absl import app

import avit_jax
from avit_jax.models import flops
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


def main(_: list[str]) -> None:
    """Masking decides as the kernel does, and compiles faster."""
    images, where = bench.images(_IMAGES)
    if where != "ImageNet sample":
        raise errors.UserError("set AVIT_DATA_DIR to the folder with ImageNet's images.")
    counts: dict[str, dict[str, list[list[int]]]] = {}
    for name in ("deit_tiny", "deit_small"):
        model, params = bench.network(name, "float32"), bench.parameters(name)
        run = jax.jit(lambda variables, images, model=model: model.apply(variables, images)[1])
        counts[name] = {}
        for ratio, shift in bench.shifts(name).items():
            active = [
                run(bench.gated(params, shift), images[i : i + _AT_ONCE]).active
                for i in range(0, _IMAGES, _AT_ONCE)
            ]
            computed = flops.is_computed(np.concatenate(active, 1), model.num_prefix_tokens)
            counts[name][str(ratio)] = np.asarray(computed.sum(-1)).T.tolist()
            print(name, ratio, macs_ratio(model, np.array(counts[name][str(ratio)])), flush=True)
    files.write(FILE, json.dumps(counts) + "\n")


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
