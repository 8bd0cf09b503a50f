"""AdamW with DeiT's schedule and its usual exceptions from weight decay."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

_LAST = ("head", "head_dist", "norm", "gate")


def schedule(
    *,
    steps: int,
    learning_rate: float,
    warmup: float,
    warmup_learning_rate: float,
    min_learning_rate: float,
) -> optax.Schedule:
    """Linear warm-up over the share `warmup` of the steps, then half a cosine down to
    `min_learning_rate`.
    """
    rate = optax.warmup_cosine_decay_schedule(
        init_value=warmup_learning_rate,
        peak_value=learning_rate,
        warmup_steps=min(round(warmup * steps), steps - 1),
        decay_steps=steps,
        end_value=min_learning_rate,
    )
    return _promoting(rate)


def _promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of Optax. It promotes dtypes implicitly, which strict promotion would refuse."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return run


def decays(params: Any) -> Any:
    """Tree of bools: weight decay is for kernels, not for biases, norms, tokens, position embedding
    or gate.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def layer_scales(params: Any, decay: float) -> Any:
    """Factors of the learning rate: 1 for heads, last norm and gate, `decay` ** distance from them
    for the rest.

    The distance of the last layer is 1, that of the first L, that of patch, position and token
    embeddings L + 1.

    Reference: Bao et al., BEiT, arXiv 2106.08254, appendix; the layers are stacked along the first
      axis.
    """
    depth = jax.tree.leaves(params["layers"])[0].shape[0]

    def scale(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if path[0].key == "layers":
            return (decay ** (depth - jnp.arange(depth, dtype=jnp.float32))).reshape(
                -1, *[1] * (leaf.ndim - 1)
            )
        return jnp.float32(1.0 if path[0].key in _LAST else decay ** (depth + 1))

    return jax.tree_util.tree_map_with_path(scale, params)


def create(
    learning_rate: optax.Schedule,
    *,
    weight_decay: float,
    clip_norm: float,
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW behind a clip of the global gradient norm, where `clip_norm` is above 0; `layer_decay`
    as in `layer_scales`.
    """

    def scaled(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return jax.tree.map(jnp.multiply, updates, layer_scales(updates, layer_decay))

    # Always three: the state is the same with and without each, so that a run may go on with
    # another setting of them.
    chain = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity(),
        optax.adamw(learning_rate, weight_decay=weight_decay, mask=decays),
        optax.stateless(scaled) if layer_decay < 1 else optax.identity(),
    )
    return chain._replace(update=_promoting(chain.update))
