"""Moves the gate bias of a trained network so that inference meets a MACs ratio."""

import logging

from etils import epath
from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax import run_config
from avit_jax.inference.adapt import RATIO_TOLERANCE, BudgetOutOfReach, find_bias, with_bias
from avit_jax.training import build, distributed, evaluate, metrics, restore
from avit_jax.utils import errors

_logger = logging.getLogger(__name__)


def from_checkpoint(
    out: epath.PathLike, config: ConfigDict, checkpoint: epath.PathLike, budget: float
) -> None:
    """Writes a weight file whose gate bias meets a budget on `config.data.eval_split`.

    The MACs ratio may jump over the budget. Then the file has the ratio above it, with a warning.

    Args:
      out: the safetensors file to write; its metadata contains the gate.
      config: the recipe of the run. Its `data.eval_split` must not contain the images of the final
        evaluation.
      checkpoint: workdir of the run, or a weight file.
      budget: the target MACs ratio, mean over the images.

    Raises:
      errors.UserError: the checkpoint cannot be read; the network does not halt; or no gate bias
        meets the budget.
    """
    config_lib.check(config)
    trained = build.model(config).clone(removal=None)
    if trained.halting is None:
        raise errors.UserError(
            "a network without halting has a fixed MACs ratio: set --config.halting.enabled=True."
        )
    params, names = restore.trained(config, trained, checkpoint)
    start = float(params["gate"]["beta"]) if "gate" in params else trained.halting.beta
    evaluator = evaluate.Evaluator(config, with_bias(trained, params, start)[0])
    ratios: dict[float, float] = {}

    def cost(beta: float) -> float:
        values = evaluator.measure(with_bias(trained, params, beta)[1])
        ratios[beta], (name, quality) = values["macs_ratio"], metrics.quality(values)
        message = "beta %.4f: MACs ratio %.4f, %s %.2f%%"
        _logger.info(message, beta, ratios[beta], name, 100 * quality)
        return ratios[beta]

    try:
        beta = find_bias(cost, budget, start=start)
    except BudgetOutOfReach as error:
        raise errors.UserError(str(error)) from error
    model, params = with_bias(trained, params, beta)
    if abs(ratios[beta] - budget) > RATIO_TOLERANCE:
        message = "no gate bias meets the MACs ratio %g: the cost jumps over it; the ratio is %.3f"
        _logger.warning(message, budget, ratios[beta])
    if distributed.is_first():
        run_config.write_weights(out, params, model, config, names)
    options = {"gamma": params["gate"]["gamma"], "beta": params["gate"]["beta"]}
    if model.halting.merge:
        options |= {"merge": True, "redundancy": f"{model.halting.redundancy:.6g}"}
    text = " ".join(f"--config.halting.{key}={value!s}" for key, value in options.items())
    _logger.info("wrote %s with its recipe; its gate as flags of another recipe: %s", out, text)
