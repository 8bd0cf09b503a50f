"""AdamW with DeiT's schedule and its usual exceptions from weight decay."""

from typing import Any

import jax
import optax


def schedule(
    *, steps: int, learning_rate: float, warmup: float, warmup_learning_rate: float, min_learning_rate: float
) -> optax.Schedule:
    """Linear warm-up over the share `warmup` of the steps, then half a cosine down to `min_learning_rate`."""
    return optax.warmup_cosine_decay_schedule(
        init_value=warmup_learning_rate,
        peak_value=learning_rate,
        warmup_steps=min(round(warmup * steps), steps - 1),
        decay_steps=steps,
        end_value=min_learning_rate,
    )


def decays(params: Any) -> Any:
    """Tree of bools: weight decay is for kernels, not for biases, norms, tokens, position embedding or gate."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def create(
    learning_rate: optax.Schedule, *, weight_decay: float, clip_norm: float, beta1: float = 0.9, beta2: float = 0.999
) -> optax.GradientTransformation:
    """AdamW behind a clip of the global gradient norm, where `clip_norm` is above 0."""
    adamw = optax.adamw(learning_rate, b1=beta1, b2=beta2, weight_decay=weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm > 0 else adamw
