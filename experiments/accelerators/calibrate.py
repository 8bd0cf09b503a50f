"""Stores the gate shifts at which the networks of the removal section cost the shares of the MACs
that it names.

JAX_PLATFORMS=cpu python -m experiments.accelerators.calibrate
AVIT_DATA_DIR=... JAX_PLATFORMS=cpu python -m experiments.accelerators.calibrate
"""

from typing import Any

import jax
from absl import app, flags

import avit_jax
from avit_jax.models import flops
from avit_jax.tools import calibrate
from avit_jax.utils import errors
from experiments import results
from experiments.accelerators import bench

_COUNT = flags.DEFINE_integer("images", 48, "the first so many", lower_bound=1)
_MODELS = flags.DEFINE_multi_enum(
    "model", ["tiny", "deit_tiny", "deit_small"], ["tiny", "deit_tiny", "deit_small"], "networks"
)
_RATIOS = (0.8, 0.62, 0.4)
_AT_ONCE = 8  # images


def main(_: list[str]) -> None:
    """Adds to the file; what it holds of other images stays."""
    pixels, where = bench.images(_COUNT.value)
    images = jax.device_put(pixels)
    for name in _MODELS.value:
        model, params = bench.network(name, "float32"), bench.parameters(name)

        @jax.jit
        def macs(
            shift: jax.Array, images: jax.Array, model: avit_jax.AViT = model, params: Any = params
        ) -> jax.Array:
            """Mean of the images; masking compiles faster than removal and counts the same."""
            active = lambda image: model.apply(bench.gated(params, shift), image[None])[1].active  # noqa: E731
            return jax.lax.map(
                lambda image: flops.image_macs(model, active(image))[0], images, batch_size=_AT_ONCE
            ).mean()

        def share(shift: float, model: avit_jax.AViT = model, macs: Any = macs) -> float:
            return float(macs(shift, images)) / flops.static_macs(model)

        found, start = {}, 0.0
        for ratio in _RATIOS:
            start = found[str(ratio)] = calibrate.find_bias(
                share, ratio, start=start, tolerance=0.006
            )
            print(where, name, ratio, start, flush=True)
        results.add(bench.SHIFTS, where, results.load(bench.SHIFTS).get(where, {}) | {name: found})


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
