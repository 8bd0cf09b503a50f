"""Two networks on the same images: how far their accuracies differ, with its errors, and by the
cost of an image.
"""

from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from avit_jax.data import augment, loader
from avit_jax.inference import adaptive
from avit_jax.models import flops, vit
from avit_jax.training import evaluate

_RESAMPLES = 10_000
_PARTS = 5


def outcomes(config: ConfigDict, model: vit.AViT, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Whether the network is right `(n,)` float, and its MACs ratio `(n,)`, for each image of the
    evaluation split.
    """
    reader = evaluate.Evaluator(config, model).reader
    apply = adaptive.make_apply(model) if model.halting else model.apply

    @jax.jit
    def run(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, aux = apply(
            {"params": params}, augment.normalize(images, config.data.mean, config.data.std)
        )
        macs = aux.macs
        return logits.argmax(-1), macs / flops.static_macs(model)

    right, ratio = [], []
    for one in loader.eval_batches(
        reader, batch_size=config.eval.batch_size, num_threads=config.data.num_threads
    ):
        guess, cost = jax.device_get(run(params, one["image"]))
        right.append((guess == one["label"])[one["weight"] > 0])
        ratio.append(cost[one["weight"] > 0])
    return np.concatenate(right).astype(float), np.concatenate(ratio).astype(float)


def paired(right: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Difference of top-1 in points between two networks on the same images, with its errors over
    images.

    Args:
      right: `(n,)` 1 where the first network is right, else 0; or the expected value of that.
      other: `(n,)` the same of the second.

    Returns:
      `mean`; `error`, its standard error; `bootstrap`, the limits of 95% of resampled means;
      `changed`, the share of images on which exactly one of the two is right.
    """
    difference = 100 * (right - other)
    values, counts = np.unique(difference, return_counts=True)  # an image's has few values
    drawn = np.random.default_rng(0).multinomial(len(right), counts / len(right), size=_RESAMPLES)
    means = drawn @ values / len(right)
    return {
        "mean": float(difference.mean()),
        "error": float(difference.std(ddof=1) / np.sqrt(len(difference))),
        "bootstrap": [float(limit) for limit in np.percentile(means, (2.5, 97.5))],
        "changed": float((difference != 0).mean()),
    }


def by_cost(cost: np.ndarray, **right: np.ndarray) -> list[dict[str, float]]:
    """Means over the images of equal parts, the cheapest first: `macs_ratio`, and top-1 in per cent
    of each network.
    """
    parts = np.array_split(np.argsort(cost, kind="stable"), _PARTS)
    return [
        {"macs_ratio": float(cost[part].mean())}
        | {name: float(100 * each[part].mean()) for name, each in right.items()}
        for part in parts
    ]
