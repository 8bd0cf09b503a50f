"""One trained network at many budgets: moves the gate bias so that inference meets a MACs ratio."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax import run_config
from avit_jax.models import vit
from avit_jax.training import build, distributed, evaluate, restore
from avit_jax.utils import errors

_logger = logging.getLogger(__name__)
_MAX_BIAS = 1000.0  # no gate needs a larger one
_BIAS_TOLERANCE = 1e-4
_RATIO_TOLERANCE = 0.005  # a budget is met if the MACs ratio differs by less


class BudgetOutOfReach(ValueError):
    """No gate bias brings the network to the budget."""


def find_bias(
    cost: Callable[[float], float], budget: float, *, start: float, tolerance: float = 0.002
) -> float:
    """Finds the gate bias beta for which a network meets a budget, by bisection.

    Args:
      cost: maps beta to the MACs ratio, from 0 to 1. The ratio falls as beta rises.
      budget: the MACs ratio that is wanted.
      start: beta to start from.
      tolerance: of the MACs ratio.

    Returns:
      Beta. If the cost jumps over the budget, the last beta before the jump, whose cost is above
      the budget.

    Raises:
      BudgetOutOfReach: no beta comes near, because the network cannot be so cheap, or so expensive.
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

    The bias becomes a parameter, so that the next bias needs no compilation.
    """
    learnable = model.clone(halting=dataclasses.replace(model.halting, learnable=True))
    gamma = params["gate"]["gamma"] if "gate" in params else model.halting.gamma
    return learnable, {**params, "gate": {"gamma": np.float32(gamma), "beta": np.float32(beta)}}


def from_checkpoint(
    out: epath.PathLike, config: ConfigDict, checkpoint: epath.PathLike, budget: float
) -> None:
    """Writes a weight file whose gate bias meets a budget on `config.data.eval_split`.

    Args:
      out: the safetensors file to write; its metadata contains the gate.
      config: the recipe of the run. Its `data.eval_split` must not contain the images of the final
        evaluation.
      checkpoint: workdir of the run, or a weight file.
      budget: MACs ratio.

    Raises:
      errors.UserError: the checkpoint cannot be read, does not halt, or cannot meet the budget.
    """
    config_lib.check(config)
    trained = build.model(config).clone(removal=None)
    if trained.halting is None:
        raise errors.UserError(
            "a network without halting has a fixed cost: set --config.halting.enabled=True."
        )
    params, names = restore.trained(config, trained, checkpoint)
    start = float(params["gate"]["beta"]) if "gate" in params else trained.halting.beta
    evaluator = evaluate.Evaluator(config, with_bias(trained, params, start)[0])
    ratios: dict[float, float] = {}

    def cost(beta: float) -> float:
        values = evaluator.measure(with_bias(trained, params, beta)[1])
        ratios[beta], top1 = values["macs_ratio"], 100 * values["top1"]
        _logger.info("beta %.4f: MACs ratio %.4f, top-1 %.2f%%", beta, ratios[beta], top1)
        return ratios[beta]

    try:
        beta = find_bias(cost, budget, start=start)
    except BudgetOutOfReach as error:
        raise errors.UserError(str(error)) from error
    model, params = with_bias(trained, params, beta)
    if abs(ratios[beta] - budget) > _RATIO_TOLERANCE:
        message = "no gate bias meets the MACs ratio %g, where the cost jumps: the ratio is %.3f"
        _logger.warning(message, budget, ratios[beta])
    if distributed.is_first():
        run_config.write_weights(out, params, model, config, names)
    options = {"gamma": params["gate"]["gamma"], "beta": params["gate"]["beta"]}
    if model.halting.merge:
        options |= {"merge": True, "redundancy": f"{model.halting.redundancy:.6g}"}
    text = " ".join(f"--config.halting.{key}={value!s}" for key, value in options.items())
    _logger.info("wrote %s; to use it with a recipe of halting.learnable=False, set %s", out, text)
