"""What a trained network with early ends does at several budgets; see `rivals.ends`.

The probability at which images end is chosen on held-back images. The twin has the same weights and
ends equally many images at each exit, but random ones.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from avit_jax.data import augment
from avit_jax.models import flops
from avit_jax.training import build
from experiments.pareto import arms, paired
from experiments.rivals import ends

BUDGETS = (0.38, 0.399, 0.41, 0.42, 0.43)  # 0.399 is the MACs ratio of tome_0.4
_STEPS = 40  # of bisection


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What the exits and the last layer give.

    Attributes:
      logits: `(n, K + 1, C)`.
      right: `(n, K + 1)` float, 1 where they are right.
      cost: `(K + 1,)` MACs ratio of an image that ends there.
    """

    logits: np.ndarray
    right: np.ndarray
    cost: np.ndarray

    def end(self, confidence: float) -> np.ndarray:
        """Returns where each image ends, `(n,)`."""
        return np.asarray(ends.end(jnp.asarray(self.logits), confidence))

    def confidence(self, budget: float) -> float:
        """Returns the probability at which the mean cost of these images is the budget."""
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            is_cheap = self.cost[self.end(middle)].mean() <= budget
            low, high = (middle, high) if is_cheap else (low, middle)
        return low


def run(config: ConfigDict, model: ends.Ends, params: Any, split: str) -> Outcomes:
    """Runs the network on all images of a split, without augmentation."""
    config = config.copy_and_resolve_references()
    config.data.eval_split = split

    @jax.jit
    def apply(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = augment.normalize(images, config.data.mean, config.data.std)
        _, kept = model.apply({"params": params}, images, mutable=["intermediates"])
        (logits,), (cost,) = (kept["intermediates"][name] for name in ("logits", "cost"))
        return logits, jnp.broadcast_to(cost, (len(images), len(cost)))

    label, logits, cost = paired.over_images(config, model, apply)
    right = (logits.argmax(axis=-1) == label[:, None]).astype(float)
    return Outcomes(logits, right, cost[0] / flops.static_macs(build.model(config)))


def curve(config: ConfigDict, model: ends.Ends, params: Any) -> list[dict[str, Any]]:
    """Returns top-1, MACs ratio, ends and difference to the twin at each budget."""
    held_out = run(config, model, params, arms.HELD_OUT)
    test = run(config, model, params, config.data.eval_split)
    rows = []
    for budget in BUDGETS:
        confidence = held_out.confidence(budget)
        place = test.end(confidence)
        shares = np.bincount(place, minlength=len(test.cost)) / len(place)
        right = np.take_along_axis(test.right, place[:, None], axis=1)[:, 0]
        rows.append(
            {
                "knob": confidence,
                "budget": budget,
                "top1": float(right.mean()),
                "macs_ratio": float(test.cost[place].mean()),
                "ends": shares.tolist(),
                "minus_twin": paired.paired(right, test.right @ shares),
                "correlation_of_cost_and_correctness": float(
                    np.corrcoef(test.cost[place], test.right[:, -1])[0, 1]
                ),
            }
        )
    return rows
