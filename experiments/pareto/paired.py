"""Two networks on the same images: how far their accuracies differ, with its errors, and by the
cost of an image.
"""

import functools
from collections.abc import Callable, Sequence
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
    apply = adaptive.make_apply(model) if model.halting else model.apply

    @jax.jit
    def run(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits, aux = apply(
            {"params": params}, augment.normalize(images, config.data.mean, config.data.std)
        )
        macs = aux.macs
        return logits.argmax(-1), macs / flops.static_macs(model)

    label, guess, ratio = over_images(config, model, functools.partial(run, params))
    return (guess == label).astype(float), ratio.astype(float)


def over_images(
    config: ConfigDict, model: vit.AViT, apply: Callable[[np.ndarray], Sequence[jax.Array]]
) -> list[np.ndarray]:
    """Applies a function to all images of the evaluation split.

    Args:
      config: names the split and the batch size.
      model: for its sizes.
      apply: maps uint8 images `(B, H, W, C)` to arrays `(B, ...)`.

    Returns:
      `(n,)` labels, then `(n, ...)` what each array holds of the images.
    """
    reader, rows = evaluate.Evaluator(config, model).reader, []
    for one in loader.eval_batches(
        reader, batch_size=config.eval.batch_size, num_threads=config.data.num_threads
    ):
        real = one["weight"] > 0
        rows.append([x[real] for x in (one["label"], *jax.device_get(apply(one["image"])))])
    return [np.concatenate(column) for column in zip(*rows, strict=True)]


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
