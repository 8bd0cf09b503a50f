"""The static network as the same kind of kernel: all layers on all tokens, nothing halts."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from avit_jax.core import halting
from avit_jax.kernels import attention, vit_tpu, vit_tpu_layer


def _kernel(names: tuple[str, ...], sizes: vit_tpu_layer.Sizes, x: Any, *refs: Any) -> None:
    weights, (readout, tokens) = dict(zip(names, refs, strict=False)), refs[len(names) :]
    tokens[...] = jnp.zeros_like(tokens)
    tokens[: sizes.num_tokens] = x[...]
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, len(tokens)), 1)
    key_bias: Any = attention.key_bias(lane < sizes.num_tokens, None)

    def body(index: jax.Array, _: None) -> None:
        tokens[...] = vit_tpu_layer.layer(tokens[...], key_bias, weights, index, sizes)

    jax.lax.fori_loop(0, sizes.depth, body, None)
    readout[...] = tokens[: sizes.num_prefix_tokens].astype(jnp.float32)


def run(x: jax.Array, params: Mapping[str, Any], sizes: vit_tpu_layer.Sizes) -> jax.Array:
    """Returns the prefix tokens `(B, R, D)` after the last layer; arguments as `vit_tpu.run`."""
    weights = vit_tpu_layer.pack(params, sizes, x.dtype)
    whole = [
        pl.BlockSpec(w.shape, lambda _: (0, 0, 0), pipeline_mode=pl.Buffered(1))
        for w in weights.values()
    ]
    of_image = functools.partial(pl.BlockSpec, index_map=lambda i: (i, 0, 0))
    shape = (sizes.num_prefix_tokens, sizes.width)
    return pl.pallas_call(
        functools.partial(_kernel, tuple(weights), sizes),
        out_shape=jax.ShapeDtypeStruct((len(x), *shape), halting.at_least_float32(x.dtype)),
        grid=(len(x),),
        in_specs=[of_image((None, *x.shape[1:])), *whole],
        out_specs=of_image((None, *shape)),
        scratch_shapes=[pltpu.VMEM((sizes.token_counts()[-1], sizes.width), x.dtype)],
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=vit_tpu.VMEM),
        name="vit_tpu_static",
    )(x, *weights.values())
