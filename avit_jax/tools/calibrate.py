"""One trained network at many budgets: the shift of the gate at which it takes a given share of the
static network's MACs.
"""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax.models import vit
from avit_jax.training import build, distributed, evaluate, restore
from avit_jax.utils import errors
from avit_jax.weights import weight_files

_logger = logging.getLogger(__name__)
_FARTHEST = 1000.0  # shift that no gate needs
_FINEST = 1e-4  # a shift smaller than this is none
_NEAR = 0.005  # a budget missed by less is met


class OutOfReach(ValueError):
    """No shift of the gate brings the network to the budget."""


def find_shift(
    cost: Callable[[float], float], budget: float, *, start: float, tolerance: float = 0.002
) -> float:
    """The shift beta of a gate that brings its network to a budget, by bisection.

    Args:
      cost: beta to the share of the static network's MACs, from 0 to 1; falls as beta rises.
      budget: the share that is wanted.
      start: beta to search from.
      tolerance: of the share.

    Returns:
      Beta. Where the cost jumps over the budget, the last beta before, at which it is still above.

    Raises:
      OutOfReach: no beta comes near: the network cannot be that cheap, or that costly.
    """
    low, high, step = start, start, 0.5
    ratio = cost(start)
    if abs(ratio - budget) <= tolerance:
        return start
    dear = ratio > budget
    while (ratio > budget) == dear:  # doubles its steps until the budget lies between low and high
        low, high = (high, high + step) if dear else (low - step, low)
        if max(abs(low), abs(high)) > _FARTHEST:
            raise OutOfReach(
                f"no gate shift brings the network to {budget} of the static MACs: it stays at "
                f"{ratio:.3f}."
            )
        ratio, step = cost(high if dear else low), 2 * step
        if abs(ratio - budget) <= tolerance:
            return high if dear else low
    while high - low > _FINEST:
        middle = (low + high) / 2
        ratio = cost(middle)
        if abs(ratio - budget) <= tolerance:
            return middle
        low, high = (middle, high) if ratio > budget else (low, middle)
    return low


def with_gate(model: vit.AViT, params: Any, beta: float) -> tuple[vit.AViT, Any]:
    """The network with a gate whose shift is a parameter, so that another one compiles nothing
    anew, and its parameters.
    """
    learnable = model.clone(halting=dataclasses.replace(model.halting, learnable=True))
    gamma = params["gate"]["gamma"] if "gate" in params else model.halting.gamma
    return learnable, {**params, "gate": {"gamma": np.float32(gamma), "beta": np.float32(beta)}}


def from_checkpoint(
    out: epath.PathLike, config: ConfigDict, checkpoint: epath.PathLike, budget: float
) -> None:
    """Writes a weight file of a trained network whose gate is shifted to a budget on
    `config.data.eval_split`.

    Args:
      out: file to write, safetensors; the gate is in its metadata.
      config: of the run; name pictures as `data.eval_split` that it is not judged by in the end.
      checkpoint: workdir of the run, or a weight file.
      budget: share of the static network's MACs.

    Raises:
      errors.UserError: it cannot be read, does not halt, or cannot come to the budget.
    """
    config_lib.check(config)
    trained = build.model(config).clone(removal=None)
    if trained.halting is None:
        raise errors.UserError(
            "a network without halting costs what it costs: set --config.halting.enabled=True."
        )
    params, _ = restore.trained(config, trained, checkpoint)
    start = float(params["gate"]["beta"]) if "gate" in params else trained.halting.beta
    evaluator = evaluate.Evaluator(config, with_gate(trained, params, start)[0])
    ratios: dict[float, float] = {}

    def cost(beta: float) -> float:
        values = evaluator.measure(with_gate(trained, params, beta)[1])
        _logger.info(
            "beta %.4f: %.4f of the static MACs, top-1 %.2f%%",
            beta,
            values["macs_ratio"],
            100 * values["top1"],
        )
        ratios[beta] = values["macs_ratio"]
        return ratios[beta]

    try:
        beta = find_shift(cost, budget, start=start)
    except OutOfReach as error:
        raise errors.UserError(str(error)) from error
    model, shifted = with_gate(trained, params, beta)
    if abs(ratios[beta] - budget) > _NEAR:
        _logger.warning(
            "no gate shift comes to %g of the static MACs, at which the cost jumps: it is %.3f",
            budget,
            ratios[beta],
        )
    if distributed.is_first():
        weight_files.write(out, shifted, model)
    gate = shifted["gate"]
    merges = (
        f" --config.halting.merge=True --config.halting.redundancy={model.halting.redundancy:.6g}"
        * model.halting.merge
    )
    _logger.info(
        "wrote %s; where the gate is no parameter, it is used with --config.halting.gamma=%s "
        "--config.halting.beta=%s%s",
        *(out, gate["gamma"], gate["beta"], merges),
    )
