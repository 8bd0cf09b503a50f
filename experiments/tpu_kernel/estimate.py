"""Compiles the TPU kernel, and estimates its speed-up from its bundles; see `run.py`."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import avit_jax
from avit_jax.kernels import vit_tpu, vit_tpu_layer
from experiments.aot import compile as aot
from experiments.tpu_kernel import bundles, static
from experiments.tpu_kernel import counts as counts_lib

_BATCH = 16


def compile_kernel(
    chip: str, model: avit_jax.AViT, sizes: vit_tpu_layer.Sizes, *, is_static: bool = False
) -> float:
    """Compiles the kernel, or its static twin, for a chip; returns the seconds."""
    here = jax.sharding.SingleDeviceSharding(aot.devices(f"{chip}:2x2")[0])

    def on_chip(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    images = jax.ShapeDtypeStruct((1, *model.pixels, model.channels), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]["layers"]
    params = jax.tree.map(lambda x: on_chip(x.shape, x.dtype), params)
    x = on_chip((_BATCH, model.num_tokens, model.width), model.dtype or jnp.float32)
    run: Callable[..., Any]
    if is_static:
        run = lambda x, exists, gamma, beta, params: static.run(x, params, sizes)  # noqa: E731
    else:
        run = lambda x, exists, gamma, beta, params: vit_tpu.run(  # noqa: E731
            x, exists, (gamma, beta), params, sizes
        )
    scalar = on_chip((), jnp.float32)
    started = time.perf_counter()
    jax.jit(run).lower(x, on_chip((_BATCH,), bool), scalar, scalar, params).compile()
    return time.perf_counter() - started


def estimate(
    kernel: bundles.Kernel, static_image: int, counts: list[list[int]], model: avit_jax.AViT
) -> dict[str, float]:
    """Returns MACs ratio of the layers, estimated speed-up, and its share of the ideal.

    Args:
      kernel: bundles of the kernel.
      static_image: bundles of an image in the static kernel.
      counts: tokens that each image computes in each layer.
      model: for its sizes.
    """
    ratio = counts_lib.macs_ratio(model, np.asarray(counts))
    speed_up = static_image / statistics.fmean(kernel.image(image) for image in counts)
    return {"macs_ratio": ratio, "speed_up": speed_up, "share_of_ideal": speed_up * ratio}
