"""What looking at the image is worth if images may end early, without any training of the network.

python -m experiments.pareto.early_end --data_dir=...

ToMe merges equally many tokens of every image. On top of it, an image ends after layer 3, 4 or 5
once a linear probe on its class token is sure enough of a class. The probes are fitted on training
images. The probability at which an image ends is chosen on images that no probe has seen; 2,000 of
these 10,000 the parent has not seen either. The test images are used once, for the result.

It is compared with ToMe alone at equal mean MACs (a coin chooses between the two nearest rates for
each image), and with the same ends given to random images ("twin"). Writes early_end.json.
"""

import dataclasses
import json
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict
from sklearn import exceptions, linear_model

from avit_jax.data import augment
from avit_jax.models import flops
from avit_jax.training import build
from avit_jax.utils import errors
from avit_jax.weights import weight_files
from experiments import results, timing
from experiments.pareto import arms, paired
from experiments.rivals import tome, unrolled

_PARENT = "experiments/pareto/parent.safetensors"
_RATES = (0, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20)  # tokens that ToMe merges in each layer
_BASES = (11, 15, 17)  # those under which images may end early
_LAYERS = (2, 3, 4)  # after which an image may end, counted from 0
_PROBE, _CHOICE, _TEST = "train[:20000]", "train[40000:]", "test"
_THRESHOLDS = np.linspace(0.5, 0.99, 50)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What ToMe gives on the images of a split.

    Attributes:
      label: `(n,)`.
      logits: `(n, C)`.
      class_token: `(n, L, D)` after each layer.
      cost: `(L,)` MACs ratio of an image that ends after each layer, with one head.
      head: MACs of a head, or of a probe, as a ratio to those of the static network.
    """

    label: np.ndarray
    logits: np.ndarray
    class_token: np.ndarray
    cost: np.ndarray
    head: float

    @property
    def right(self) -> np.ndarray:
        """`(n,)` float, 1 where the whole network is right."""
        return (self.logits.argmax(axis=1) == self.label).astype(float)


def run(config: ConfigDict, params: Any, merges: int, split: str) -> Outcome:
    """Runs ToMe with a rate on a split, without augmentation."""
    config = config.copy_and_resolve_references()
    config.data.eval_split = split
    static = build.model(config)
    model = tome.ToMe(**unrolled.attributes(static), merges=merges)

    @jax.jit
    def apply(images: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        images = augment.normalize(images, config.data.mean, config.data.std)
        (logits, _), kept = model.apply({"params": params}, images, mutable=["intermediates"])
        token, macs = (
            jnp.stack(kept["intermediates"][name], axis=-1) for name in ("class_token", "macs")
        )
        return logits, token.swapaxes(1, 2), jnp.broadcast_to(macs, (len(images), len(macs)))

    label, logits, token, macs = paired.over_images(config, model, apply)
    total = flops.static_macs(static)
    cost = (macs[0] + flops.fixed_macs(model)) / total
    return Outcome(label, logits, token, cost, static.width * static.num_classes / total)


def fit(outcome: Outcome) -> list[linear_model.LogisticRegression]:
    """Fits a linear probe of the class to the class token after each of the layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", exceptions.ConvergenceWarning)
        return [
            linear_model.LogisticRegression(C=0.1, max_iter=100).fit(
                outcome.class_token[:, layer], outcome.label
            )
            for layer in _LAYERS
        ]


def end(
    probability: np.ndarray, label: np.ndarray, right: np.ndarray, cost: np.ndarray, least: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ends each image at the first probe that is sure enough.

    Args:
      probability: `(n, K, C)` of the probes.
      label: `(n,)`.
      right: `(n,)` whether the whole network is right.
      cost: `(K + 1,)` MACs ratio of an image that ends at each probe, and of the whole network.
      least: an image ends once its likeliest class has this probability.

    Returns:
      `(n,)` at which probe it ends, K for none; `(n,)` whether it is right; `(n,)` its MACs ratio.
    """
    sure = probability.max(axis=2) >= least
    place = np.where(sure.any(axis=1), sure.argmax(axis=1), sure.shape[1])
    guesses = probability.argmax(axis=2) == label[:, None]
    outcomes = np.concatenate([guesses, right[:, None]], axis=1)
    return place, np.take_along_axis(outcomes, place[:, None], axis=1)[:, 0], cost[place]


def mixture(costs: list[float], rights: list[np.ndarray], cost: float) -> np.ndarray:
    """Expected correctness `(n,)` of networks with fixed rates at a mean cost.

    Each image gets one of the two networks whose costs are nearest, by a coin.

    Args:
      costs: of the networks, the cheapest first.
      rights: `(n,)` of each.
      cost: between the first and the last of them.
    """
    above = int(np.clip(np.searchsorted(costs, cost), 1, len(costs) - 1))
    share = (cost - costs[above - 1]) / (costs[above] - costs[above - 1])
    return (1 - share) * rights[above - 1] + share * rights[above]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What early ends on one split need.

    Attributes:
      here: outcome of ToMe under which images end.
      probability: `(n, K, C)` of the probes.
      cost: `(K + 1,)` as in `end`.
      costs: of ToMe at all rates, the cheapest first.
      rights: `(n,)` of each of them.
    """

    here: Outcome
    probability: np.ndarray
    cost: np.ndarray
    costs: list[float]
    rights: list[np.ndarray]

    def end(self, least: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `end`."""
        return end(self.probability, self.here.label, self.here.right, self.cost, least)

    def alone(self, cost: float) -> np.ndarray:
        """Returns the expected correctness `(n,)` of ToMe alone at a mean cost."""
        return mixture(self.costs, self.rights, cost)

    def gain(self, least: float) -> float:
        """Returns the points of top-1 over ToMe alone; -100 outside the costs of its rates."""
        _, right, spent = self.end(least)
        if not self.costs[0] <= spent.mean() <= self.costs[-1]:
            return -100.0
        return 100 * float(right.mean() - self.alone(float(spent.mean())).mean())


def setting(here: Outcome, probes: list[Any], fixed: list[Outcome]) -> Setting:
    """Applies the probes; `fixed` are outcomes of ToMe on the same split, the cheapest first."""
    tokens = [here.class_token[:, layer] for layer in _LAYERS]
    likely = [probe.predict_proba(x) for probe, x in zip(probes, tokens, strict=True)]
    # An image that ends at a probe needs no head; the costs contain one.
    cost = here.cost[[*_LAYERS, -1]] + here.head * np.arange(len(_LAYERS) + 1)
    costs = [float(outcome.cost[-1]) for outcome in fixed]
    return Setting(here, np.stack(likely, axis=1), cost, costs, [o.right for o in fixed])


def compare(base: int, outcomes: dict[tuple[int, str], Outcome]) -> dict[str, Any]:
    """Early ends on top of ToMe at a rate, with all comparisons."""
    probes = fit(outcomes[base, _PROBE])
    rates = sorted(_RATES[1:], reverse=True)
    choice, test = (
        setting(outcomes[base, split], probes, [outcomes[rate, split] for rate in rates])
        for split in (_CHOICE, _TEST)
    )
    least = float(max(_THRESHOLDS, key=choice.gain))
    place, right, spent = test.end(least)
    shares = np.bincount(place, minlength=len(test.cost)) / len(place)
    alone = test.alone(float(spent.mean()))
    guesses = test.probability.argmax(axis=2) == test.here.label[:, None]
    twin = np.concatenate([guesses, test.here.right[:, None]], axis=1) @ shares
    static = outcomes[0, _TEST]
    return {
        "merges": base,
        "probability": least,
        "gain_where_chosen": choice.gain(least),
        "macs_ratio": float(spent.mean()),
        "ends_after_layer": dict(zip(["3", "4", "5", "6"], shares.tolist(), strict=True)),
        "top1": 100 * float(right.mean()),
        "tome_top1": 100 * float(alone.mean()),
        "minus_tome": paired.paired(right, alone),
        "minus_twin": paired.paired(right, twin),
        "minus_static": paired.paired(right, static.right),
        "fifths": paired.by_cost(spent, static=static.right, tome=alone, early_end=right),
        "correlation_of_cost_and_static_correctness": float(np.corrcoef(spent, static.right)[0, 1]),
    }


def main(_: list[str]) -> None:
    """Runs all rates, compares, and writes."""
    config = arms.config("static", 0, data_dir=flags.FLAGS.data_dir, parent=_PARENT)
    params = weight_files.load(_PARENT, build.model(config))
    outcomes = {}
    for split, rates in ((_PROBE, _BASES), (_CHOICE, _RATES), (_TEST, _RATES)):
        for rate in rates:
            outcomes[rate, split] = run(config, params, rate, split)
            print(split, rate, outcomes[rate, split].right.mean(), flush=True)
    fixed = {
        str(rate): {
            "macs_ratio": float(outcomes[rate, _TEST].cost[-1]),
            "top1": 100 * float(outcomes[rate, _TEST].right.mean()),
        }
        for rate in _RATES
    }
    rows = [compare(base, outcomes) for base in _BASES]
    result = timing.environment() | {"fixed": fixed, "rows": rows}
    results.save(pathlib.Path(flags.FLAGS.out), result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":  # a test that imports this module has the flags of the program too
    flags.DEFINE_string("data_dir", None, "folder of the prepared data set", required=True)
    flags.DEFINE_string("out", "experiments/pareto/early_end.json", "file to write")
    app.run(errors.exit_on_user_error(main))
