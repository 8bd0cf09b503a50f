"""Makes a static vision transformer adaptive, without training."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avit_jax.core import halting
from avit_jax.inference import adaptive
from avit_jax.models import flops, vit

# A static network has no trained gate channel. So only the similarity to earlier tokens decides
# which tokens halt.
SIMILARITY_GATE = halting.HaltingConfig(gamma=0.0, beta=-42.0, merge=True, redundancy=50.0)
RATIO_TOLERANCE = 0.005  # largest difference of MACs ratio and budget that meets the budget
_MAX_BIAS = 1000.0  # no gate needs a larger one
_BIAS_TOLERANCE = 1e-4


class BudgetOutOfReach(ValueError):
    """No gate bias brings the network to the budget."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapted:
    """An adaptive network, measured on some images and compared with the static network.

    Attributes:
      model: the network with the gate that meets the budget.
      params: of the model.
      macs_ratio: its MACs as a ratio to those of the static network, mean over the images.
      agreement: fraction of the images to which it gives the class of the static network; None for
        a network without classes.
      similarity: cosine similarity of its logits to those of the static network, mean over the
        images; without classes, of its features.
    """

    model: vit.AViT
    params: Any
    macs_ratio: float
    agreement: float | None
    similarity: float


def find_bias(
    cost: Callable[[float], float], budget: float, *, start: float, tolerance: float = 0.002
) -> float:
    """Finds the gate bias beta for which a network meets a budget, by bisection.

    Args:
      cost: maps beta to the MACs ratio, from 0 to 1. The ratio falls as beta rises.
      budget: the target MACs ratio.
      start: beta to start from.
      tolerance: largest accepted difference of MACs ratio and budget.

    Returns:
      Beta. The MACs ratio may jump over the budget. Then it is a beta just before the jump, with a
      ratio above the budget.

    Raises:
      BudgetOutOfReach: the MACs ratio stays above, or stays below, the budget for all beta between
        -1000 and 1000.
    """
    low, high, step = start, start, 0.5
    ratio = cost(start)
    if abs(ratio - budget) <= tolerance:
        return start
    rises = ratio > budget  # whether beta must rise
    while (ratio > budget) == rises:  # doubles the step until low and high enclose the budget
        low, high = (high, high + step) if rises else (low - step, low)
        if max(abs(low), abs(high)) > _MAX_BIAS:
            raise BudgetOutOfReach(
                f"no gate bias brings the MACs ratio to {budget}, as it stays at {ratio:.3f}: set "
                "another budget."
            )
        ratio, step = cost(high if rises else low), 2 * step
        if abs(ratio - budget) <= tolerance:
            return high if rises else low
    while high - low > _BIAS_TOLERANCE:
        middle = (low + high) / 2
        ratio = cost(middle)
        if abs(ratio - budget) <= tolerance:
            return middle
        low, high = (middle, high) if ratio > budget else (low, middle)
    return low


def with_bias(model: vit.AViT, params: Any, beta: float) -> tuple[vit.AViT, Any]:
    """Returns the network and its parameters with another gate bias.

    Gamma and the bias become parameters, so another bias needs no compilation. The network
    must halt.
    """
    gate = model.halting
    assert gate is not None
    gamma = params["gate"]["gamma"] if "gate" in params else gate.gamma
    learnable = model.clone(halting=dataclasses.replace(gate, learnable=True))
    return learnable, {**params, "gate": {"gamma": np.float32(gamma), "beta": np.float32(beta)}}


def add_gate(
    model: vit.AViT,
    params: Any,
    images: jax.Array,
    *,
    budget: float,
    gate: halting.HaltingConfig = SIMILARITY_GATE,
) -> Adapted:
    """Adds a gate to a static network, with the bias that meets a budget on some images.

    Args:
      model: a network without halting.
      params: of the model.
      images: typical images `(B, H, W, C)`, float, normalized.
      budget: MACs as a ratio to those of the static network, in (0, 1].
      gate: the search starts from its bias. The default merges similar tokens.

    Returns:
      The adaptive network. If its MACs ratio jumps over the budget, it has the larger ratio, as in
      `find_bias`.

    Raises:
      ValueError: the model halts already, the budget is outside (0, 1], or no bias between
        -1000 and 1000 reaches it; or the images do not fit the model.
    """
    if model.halting is not None:
        raise ValueError("the network halts already: change its gate by model.clone(halting=...).")
    if not 0.0 < budget <= 1.0:
        raise ValueError(f"budget must be above 0 and at most 1; got {budget}.")
    static, _ = jax.jit(model.apply)({"params": params}, images)
    gated = model.clone(halting=gate)
    run = jax.jit(functools.partial(adaptive.apply, with_bias(gated, params, gate.beta)[0]))

    def outcome(beta: float) -> tuple[jax.Array, float]:
        logits, aux = run({"params": with_bias(gated, params, beta)[1]}, images)
        return logits, float(aux.macs.mean()) / flops.static_macs(model)

    beta = find_bias(lambda beta: outcome(beta)[1], budget, start=gate.beta)
    logits, ratio = outcome(beta)
    agrees = jnp.mean(logits.argmax(-1) == static.argmax(-1))
    return Adapted(
        model=model.clone(halting=dataclasses.replace(gate, beta=beta, learnable=False)),
        params=params,
        macs_ratio=ratio,
        agreement=float(agrees) if model.num_classes else None,
        similarity=float(_cosine(logits, static).mean()),
    )


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns the cosine similarity `(B,)` of the rows of `(B, C)`."""
    x, y = (a.astype(halting.at_least_float32(a.dtype)) for a in (x, y))
    product = (x * y).sum(axis=-1)
    return product / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1))


def fold_layer_scale(model: vit.AViT, params: Any) -> tuple[vit.AViT, Any]:
    """Folds the factors of LayerScale into the dense layers before it.

    The results are equal up to rounding. Fold after training: the factors are no longer parameters.

    Args:
      model: any network.
      params: of the model.

    Returns:
      The network with `layer_scale=False`, and its parameters. A network without LayerScale does
      not change.
    """
    if not model.layer_scale:
        return model, params
    layers = dict(params["layers"])
    for scale, dense in (("ls1", "proj"), ("ls2", "fc2")):
        gamma = layers.pop(scale)["gamma"]
        kernel, bias = layers[dense]["kernel"], layers[dense]["bias"]
        layers[dense] = {"kernel": kernel * gamma[:, None, :], "bias": bias * gamma}
    return model.clone(layer_scale=False), {**params, "layers": layers}
