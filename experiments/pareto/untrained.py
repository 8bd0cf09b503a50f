"""What adapting to the image is worth, without any training: one similarity threshold for all
images against ToMe's fixed rate.

python -m experiments.pareto.untrained --data_dir=...

Both run on the parent's weights, with equal mean MACs. The threshold is found on the images that
are held back from training. Both are then evaluated on the same test images, and errors are of the
paired differences. It also measures how
much the task tells the gate: the gradient of its loss, and the class token's score. Writes
  untrained.json.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from avit_jax.data import augment
from avit_jax.tools import calibrate
from avit_jax.training import build, evaluate, losses
from avit_jax.utils import errors
from avit_jax.weights import weight_files
from experiments import results, timing
from experiments.pareto import arms, paired
from experiments.rivals import tome, unrolled

_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder of the prepared data set", required=True)
_OUT = flags.DEFINE_string("out", "experiments/pareto/untrained.json", "file to write")
_PARENT = "experiments/pareto/parent.safetensors"
_ROW = "merging_gamma_0"  # its gate is the similarity threshold alone
_MERGES = (8, 15)  # of ToMe, in each layer: about 0.62 and 0.4 of the static network's MACs
_TOLERANCE = 5e-4  # of the MACs ratio
_GATES = ("avit_0.6", "avit_merging_0.6")  # the paper's, and that of threshold merging
_IMAGES = 256


def compare(config: ConfigDict, params: Any, merges: int, static: np.ndarray) -> dict[str, Any]:
    """ToMe and the threshold at equal MACs.

    Args:
      config: of a network whose gate is the threshold.
      params: of the static network.
      merges: of ToMe, in each layer.
      static: `(n,)` where the static network is right.
    """
    model = build.model(config).clone(removal=None)
    gated = functools.partial(calibrate.with_bias, model, params)
    start = model.halting.beta
    fixed = tome.ToMe(**unrolled.attributes(model.clone(halting=None)), merges=merges)
    fixed_right, fixed_cost = paired.outcomes(config, fixed, params)
    held_out = config.copy_and_resolve_references()
    held_out.data.eval_split = arms.HELD_OUT
    search = evaluate.Evaluator(held_out, gated(start)[0])
    budget = float(fixed_cost.mean())
    beta = calibrate.find_bias(
        lambda beta: search.measure(gated(beta)[1])["macs_ratio"],
        budget,
        start=start,
        tolerance=_TOLERANCE,
    )
    right, cost = paired.outcomes(config, *gated(beta))
    return {
        "merges": merges,
        "beta": beta,
        "cosine": -beta / model.halting.redundancy,
        "tome": {"top1": float(fixed_right.mean()), "macs_ratio": budget},
        "threshold": {
            "top1": float(right.mean()),
            "macs_ratio": float(cost.mean()),
            "macs_ratio_std": float(cost.std()),
        },
        "threshold_minus_tome": paired.paired(right, fixed_right),
        "threshold_minus_static": paired.paired(right, static),
        "tome_minus_static": paired.paired(fixed_right, static),
        "fifths": paired.by_cost(cost, static=static, tome=fixed_right, threshold=right),
        "correlation_of_cost_and_correctness": float(np.corrcoef(cost, right)[0, 1]),
        "correlation_of_cost_and_static_correctness": float(np.corrcoef(cost, static)[0, 1]),
    }


def gate(config: ConfigDict, params: Any) -> dict[str, float]:
    """What the task's loss on the first test images says to the gate.

    Args:
      config: of a network that halts.
      params: of the static network.

    Returns:
      `gamma` and `beta`, the size of their gradients; `class_score`, the class token's largest
      score before the last layer.
    """
    model = build.model(config).clone(removal=None)
    model, gated = calibrate.with_bias(model, params, model.halting.beta)
    reader = evaluate.Evaluator(config, model).reader
    records = [reader(i) for i in range(_IMAGES)]
    images = augment.normalize(
        np.stack([record["image"] for record in records]), config.data.mean, config.data.std
    )
    labels = np.array([record["label"] for record in records])

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits, aux = model.apply({"params": params}, images)
        return losses.cross_entropy(logits, labels), aux.score[:-1, :, 0].max()

    gradient, score = jax.jit(jax.grad(loss, has_aux=True))(gated)
    return {name: float(abs(value)) for name, value in gradient["gate"].items()} | {
        "class_score": float(score)
    }


def main(_: list[str]) -> None:
    """Compares at each rate, looks at the gates, and writes."""
    config = arms.config(_ROW, 0, data_dir=_DATA_DIR.value, parent=_PARENT)
    network = build.model(config).clone(halting=None, removal=None)
    params = weight_files.load(_PARENT, network)
    static, _ = paired.outcomes(config, network, params)
    rows = [compare(config, params, merges, static) for merges in _MERGES]
    result = timing.environment() | {
        "images": len(static),
        "static_top1": float(static.mean()),
        "rows": rows,
    }
    result["gates"] = {
        row: gate(arms.config(row, 0, data_dir=_DATA_DIR.value, parent=_PARENT), params)
        for row in _GATES
    }
    results.save(pathlib.Path(_OUT.value), result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
