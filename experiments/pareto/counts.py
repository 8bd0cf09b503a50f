"""What it is worth to merge more tokens in one image than in another, without any training.

python -m experiments.pareto.counts --data_dir=...

ToMe merges equally many tokens of every image. Here the number depends on the image: it is the
number of tokens whose similarity exceeds the threshold of the layer. The thresholds are set on the
images that are held back from training, so that the mean number is that of ToMe in each layer. All
else is ToMe, so the difference is what adapting the number is worth. `blend` 0.5 takes half of the
difference in numbers. All networks have the parent's weights. Writes counts.json.
"""

import json
import pathlib
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from avit_jax.data import augment
from avit_jax.training import build, evaluate
from avit_jax.utils import errors
from avit_jax.weights import weight_files
from experiments import results, timing
from experiments.pareto import arms, early_end, paired
from experiments.rivals import counted_tome, tome, unrolled

_PARENT = "experiments/pareto/parent.safetensors"
_RATES = (
    4,
    6,
    8,
    9,
    10,
    11,
    12,
    13,
    14,
    15,
    16,
    17,
    18,
)  # of ToMe, for the comparison at equal MACs
_BASES = (8, 11, 15)  # numbers of merges around which images differ
_BLENDS = (0.25, 0.5, 1.0)


def held_out(config: ConfigDict) -> jax.Array:
    """The images held back from training, normalised, `(n, H, W, C)`."""
    config = config.copy_and_resolve_references()
    config.data.eval_split = arms.HELD_OUT
    reader = evaluate.Evaluator(config, build.model(config)).reader
    images = np.stack([reader(i)["image"] for i in range(len(reader.source.records))])
    return augment.normalize(images, config.data.mean, config.data.std)


def thresholds(model: counted_tome.CountedToMe, params: Any, images: jax.Array) -> list[float]:
    """Thresholds with which images merge `model.merges` tokens in each layer on average.

    They are found one layer after the other, as each depends on those before it.
    """

    @jax.jit
    def similarities(values: list[float]) -> tuple[jax.Array, ...]:
        network = model.clone(thresholds=tuple(values))
        _, kept = network.apply({"params": params}, images, mutable=["intermediates"])
        return kept["intermediates"]["similarity"]

    found = [2.0] * model.depth  # nothing exceeds it
    for layer in range(model.depth):
        similarity = np.asarray(similarities(found)[layer])
        own = np.isfinite(similarity).sum(axis=1)
        target = int(np.minimum(own, model.merges).sum())
        ranked = np.sort(similarity, axis=None)[::-1]
        found[layer] = float(ranked[target])  # `target` tokens exceed it
    return found


def compare(
    config: ConfigDict,
    params: Any,
    model: counted_tome.CountedToMe,
    fixed: tuple[list[float], list[np.ndarray]],
    static: np.ndarray,
) -> dict[str, Any]:
    """One network against ToMe alone at equal MACs.

    Args:
      config: names the test images.
      params: of the static network.
      model: the network, with its thresholds.
      fixed: costs and outcomes `(n,)` of ToMe at all rates, the cheapest first.
      static: `(n,)` where the static network is right.
    """
    right, cost = paired.outcomes(config, model, params)
    alone = early_end.mixture(*fixed, float(cost.mean()))
    return {
        "merges": model.merges,
        "blend": model.blend,
        "thresholds": list(model.thresholds),
        "macs_ratio": float(cost.mean()),
        "macs_ratio_std": float(cost.std()),
        "top1": 100 * float(right.mean()),
        "tome_top1": 100 * float(alone.mean()),
        "minus_tome": paired.paired(right, alone),
        "minus_static": paired.paired(right, static),
        "fifths": paired.by_cost(cost, static=static, tome=alone, counts=right),
        "correlation_of_cost_and_static_correctness": float(np.corrcoef(cost, static)[0, 1]),
    }


def main(_: list[str]) -> None:
    """Runs ToMe at all rates, sets the thresholds, compares, and writes."""
    config = arms.config("static", 0, data_dir=flags.FLAGS.data_dir, parent=_PARENT)
    network = build.model(config)
    params = weight_files.load(_PARENT, network)
    static, _ = paired.outcomes(config, network, params)
    attributes = unrolled.attributes(network)
    rates = {
        rate: paired.outcomes(config, tome.ToMe(**attributes, merges=rate), params)
        for rate in sorted(_RATES, reverse=True)
    }
    fixed = ([float(cost.mean()) for _, cost in rates.values()], [r for r, _ in rates.values()])
    images, rows = held_out(config), []
    for merges in _BASES:
        for blend in _BLENDS:
            model = counted_tome.CountedToMe(**attributes, merges=merges, blend=blend)
            model = model.clone(thresholds=tuple(thresholds(model, params, images)))
            rows.append(compare(config, params, model, fixed, static))
            print(json.dumps(rows[-1]), flush=True)
    shown = {
        str(rate): {"macs_ratio": float(cost.mean()), "top1": 100 * float(right.mean())}
        for rate, (right, cost) in rates.items()
    }
    result = timing.environment() | {"fixed": shown, "rows": rows}
    results.save(pathlib.Path(flags.FLAGS.out), result)


if __name__ == "__main__":  # a test that imports this module has the flags of the program too
    flags.DEFINE_string("data_dir", None, "folder of the prepared data set", required=True)
    flags.DEFINE_string("out", "experiments/pareto/counts.json", "file to write")
    app.run(errors.exit_on_user_error(main))
