"""The halting rule, under its public name."""

from avit_jax.core.halting import (
    HaltingConfig,
    HaltingState,
    accumulate,
    depth_prior,
    init,
    ponder_cost,
    score,
    score_by_layer,
)

__all__ = [
    "HaltingConfig",
    "HaltingState",
    "accumulate",
    "depth_prior",
    "init",
    "ponder_cost",
    "score",
    "score_by_layer",
]
