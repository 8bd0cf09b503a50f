"""AdamW with DeiT's schedule, weight decay of kernels only, and layer-wise learning rates."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

_LAST = ("head", "head_dist", "norm", "fc_norm", "attn_pool", "gate")


def schedule(
    *,
    steps: int,
    learning_rate: float,
    warmup: float,
    warmup_learning_rate: float,
    min_learning_rate: float,
) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then half a cosine period.

    Args:
      steps: of the run.
      learning_rate: after the warm-up.
      warmup: fraction of the steps.
      warmup_learning_rate: at the first step.
      min_learning_rate: limit, reached one step after the last.
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
    """Lets a function of Optax promote dtypes even if strict promotion is on."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args)

    return run


def decays(params: Any) -> Any:
    """Returns a tree of bools: True for kernels, the only parameters with weight decay."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def layer_scales(params: Any, decay: float) -> Any:
    """Returns the factor of the learning rate of each parameter.

    It is 1 for heads, attention pooling, last norm and gate. For the others it is `decay` to the
    power of their distance from the head: 1 for the last layer, L for the first layer, and L + 1
    for the embeddings and the norm before the first layer.

    Args:
      params: parameter tree; arrays of `layers` have L as their first axis.
      decay: per layer, in (0, 1].

    Reference: Bao et al., BEiT, arXiv 2106.08254, appendix.
    """
    num_layers = jax.tree.leaves(params["layers"])[0].shape[0]

    def scale(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        if path[0].key == "layers":
            distance = num_layers - jnp.arange(num_layers, dtype=jnp.float32)
            return (decay**distance).reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.float32(1.0 if path[0].key in _LAST else decay ** (num_layers + 1))

    return jax.tree_util.tree_map_with_path(scale, params)


def create(
    learning_rate: optax.Schedule,
    *,
    weight_decay: float,
    clip_norm: float,
    layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """Returns AdamW.

    Args:
      learning_rate: as a function of the step.
      weight_decay: of kernels.
      clip_norm: largest global norm of the gradient; 0: off.
      layer_decay: as in `layer_scales`.
    """

    def scaled(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        return jax.tree.map(jnp.multiply, updates, layer_scales(updates, layer_decay))

    # The chain always has three parts. So the state keeps its structure, and a run can resume
    # with another clip or layer decay.
    chain = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm > 0 else optax.identity(),
        optax.adamw(learning_rate, weight_decay=weight_decay, mask=decays),
        optax.stateless(scaled) if layer_decay < 1 else optax.identity(),
    )
    return chain._replace(update=_promoting(chain.update))
