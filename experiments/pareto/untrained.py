"""What adapting to the image is worth, without any training: one similarity threshold for all images against ToMe's fixed rate.

python -m experiments.pareto.untrained --data_dir=...

Both run on the parent's weights, with equal mean MACs. The threshold is found on the images that are held back from
training. Both are then evaluated on the same test images, and errors are of the paired differences. It also measures how
much the task tells the gate: the gradient of its loss, and the class token's score. Writes untrained.json.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from avit_jax import adaptive, build, calibrate, errors, evaluate, flops, losses, vit, weight_files
from avit_jax.data import augment, loader
from experiments import results, timing
from experiments.pareto import arms
from experiments.rivals import tome, unrolled

_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder of the prepared data set", required=True)
_OUT = flags.DEFINE_string("out", "experiments/pareto/untrained.json", "file to write")
_PARENT = "experiments/pareto/parent.safetensors"
_ROW = "merging_gamma_0"  # its gate is the similarity threshold alone
_MERGES = (8, 15)  # of ToMe, in each layer: about 0.62 and 0.4 of the static network's MACs
_TOLERANCE = 5e-4  # of the MACs ratio
_GATES = ("avit_0.6", "avit_merging_0.6")  # the paper's, and that of threshold merging
_IMAGES = 256
_RESAMPLES = 10_000
_PARTS = 5


def outcomes(config: ConfigDict, model: vit.AViT, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Whether the network is right `(n,)` float, and its MACs ratio `(n,)`, for each image of the evaluation split."""
    reader = evaluate.Evaluator(config, model).reader
    apply = adaptive.removes(model) if model.halting else model.apply

    @jax.jit
    def run(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, aux = apply({"params": params}, augment.normalize(images, config.data.mean, config.data.std))
        macs = flops.image_macs(model, aux.active) if aux.macs is None else aux.macs
        return logits.argmax(-1), macs / flops.static_macs(model)

    right, ratio = [], []
    for batch in loader.eval_batches(reader, batch_size=config.eval.batch_size, num_threads=config.data.num_threads):
        one = {name: np.concatenate(x) for name, x in jax.device_get(batch).items()}  # of all devices
        guess, cost = jax.device_get(run(params, one["image"]))
        right.append((guess == one["label"])[one["weight"] > 0])
        ratio.append(cost[one["weight"] > 0])
    return np.concatenate(right).astype(float), np.concatenate(ratio).astype(float)


def paired(right: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Difference of top-1 in points between two networks on the same images, with its errors over images.

    Args:
      right: `(n,)` 1 where the first network is right, else 0.
      other: `(n,)` the same of the second.

    Returns:
      `mean`; `error`, its standard error; `bootstrap`, the limits of 95% of resampled means; `changed`, the share of images
      on which exactly one of the two is right.
    """
    difference = 100 * (right - other)
    counts = np.array([(difference == value).sum() for value in (-100, 0, 100)])  # an image's difference has three values
    drawn = np.random.default_rng(0).multinomial(len(right), counts / len(right), size=_RESAMPLES)
    means = 100 * (drawn[:, 2] - drawn[:, 0]) / len(right)
    return {
        "mean": float(difference.mean()),
        "error": float(difference.std(ddof=1) / np.sqrt(len(difference))),
        "bootstrap": [float(limit) for limit in np.percentile(means, (2.5, 97.5))],
        "changed": float((difference != 0).mean()),
    }


def by_cost(cost: np.ndarray, **right: np.ndarray) -> list[dict[str, float]]:
    """Means over the images of equal parts, the cheapest first: `macs_ratio`, and top-1 in per cent of each network."""
    parts = np.array_split(np.argsort(cost, kind="stable"), _PARTS)
    return [
        {"macs_ratio": float(cost[part].mean())} | {name: float(100 * each[part].mean()) for name, each in right.items()}
        for part in parts
    ]


def compare(config: ConfigDict, params: Any, merges: int, static: np.ndarray) -> dict[str, Any]:
    """ToMe and the threshold at equal MACs.

    Args:
      config: of a network whose gate is the threshold.
      params: of the static network.
      merges: of ToMe, in each layer.
      static: `(n,)` where the static network is right.
    """
    model = build.model(config).clone(removal=None)
    gated = functools.partial(calibrate.with_gate, model, params)
    start = model.halting.beta
    fixed = tome.ToMe(**unrolled.attributes(model.clone(halting=None)), merges=merges)
    fixed_right, fixed_cost = outcomes(config, fixed, params)
    held_out = config.copy_and_resolve_references()
    held_out.data.eval_split = arms.HELD_OUT
    search = evaluate.Evaluator(held_out, gated(start)[0])
    budget = float(fixed_cost.mean())
    beta = calibrate.find_shift(
        lambda beta: search.measure(gated(beta)[1])["macs_ratio"], budget, start=start, tolerance=_TOLERANCE
    )
    right, cost = outcomes(config, *gated(beta))
    return {
        "merges": merges,
        "beta": beta,
        "cosine": -beta / model.halting.redundancy,
        "tome": {"top1": float(fixed_right.mean()), "macs_ratio": budget},
        "threshold": {"top1": float(right.mean()), "macs_ratio": float(cost.mean()), "macs_ratio_std": float(cost.std())},
        "threshold_minus_tome": paired(right, fixed_right),
        "threshold_minus_static": paired(right, static),
        "tome_minus_static": paired(fixed_right, static),
        "fifths": by_cost(cost, static=static, tome=fixed_right, threshold=right),
        "correlation_of_cost_and_correctness": float(np.corrcoef(cost, right)[0, 1]),
        "correlation_of_cost_and_static_correctness": float(np.corrcoef(cost, static)[0, 1]),
    }


def gate(config: ConfigDict, params: Any) -> dict[str, float]:
    """What the task's loss on the first test images says to the gate.

    Args:
      config: of a network that halts.
      params: of the static network.

    Returns:
      `gamma` and `beta`, the size of their gradients; `class_score`, the class token's largest score before the last layer.
    """
    model = build.model(config).clone(removal=None)
    model, gated = calibrate.with_gate(model, params, model.halting.beta)
    reader = evaluate.Evaluator(config, model).reader
    records = [reader(i) for i in range(_IMAGES)]
    images = augment.normalize(np.stack([record["image"] for record in records]), config.data.mean, config.data.std)
    labels = np.array([record["label"] for record in records])

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits, aux = model.apply({"params": params}, images)
        return losses.cross_entropy(logits, labels), aux.score[:-1, :, 0].max()

    gradient, score = jax.jit(jax.grad(loss, has_aux=True))(gated)
    return {name: float(abs(value)) for name, value in gradient["gate"].items()} | {"class_score": float(score)}


def main(_: list[str]) -> None:
    """Compares at each rate, looks at the gates, and writes."""
    config = arms.config(_ROW, 0, data_dir=_DATA_DIR.value, parent=_PARENT)
    network = build.model(config).clone(halting=None, removal=None)
    params = weight_files.load(_PARENT, network)
    static, _ = outcomes(config, network, params)
    rows = [compare(config, params, merges, static) for merges in _MERGES]
    result = timing.environment() | {"images": len(static), "static_top1": float(static.mean()), "rows": rows}
    result["gates"] = {row: gate(arms.config(row, 0, data_dir=_DATA_DIR.value, parent=_PARENT), params) for row in _GATES}
    results.save(pathlib.Path(_OUT.value), result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    app.run(errors.told(main))
