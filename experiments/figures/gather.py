"""What the figures are drawn from: what a network does with each image of a data set."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from avit_jax.core import halting
from avit_jax.data import augment, loader
from avit_jax.inference import adaptive
from avit_jax.models import flops, vit
from avit_jax.tools import calibrate
from avit_jax.training import build, evaluate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """One entry for each image; `n` images, `L` layers.

    Attributes:
      index: `(n,)` place in the data set.
      label: `(n,)` int.
      guess: `(n,)` int, the likeliest class.
      macs_ratio: `(n,)` share of the static network's MACs.
      depth: `(n, rows, columns)` layers that each patch token has used.
      score: `(n, L)` mean halting score of each layer, over the tokens that compute there; nan
        where none does.
      halting: `(n, L)` share of the patch tokens that halt at each layer.
    """

    index: np.ndarray
    label: np.ndarray
    guess: np.ndarray
    macs_ratio: np.ndarray
    depth: np.ndarray
    score: np.ndarray
    halting: np.ndarray


def gather(config: ConfigDict, model: vit.AViT, params: Any, reader: loader.Reader) -> Images:
    """Runs the network, with removal of halted tokens, over all images that can be read."""

    @jax.jit
    def run(params: Any, images: jax.Array) -> dict[str, jax.Array]:
        logits, aux = adaptive.apply(model, {"params": params}, images)
        ran = flops.is_computed(aux.active, model.num_prefix_tokens)
        depth = flops.patch_depth(model, aux.active)
        return {
            "guess": logits.argmax(-1),
            "macs_ratio": flops.image_macs(model, aux.active) / flops.static_macs(model),
            "depth": depth,
            "score": jnp.where(
                ran.any(axis=2).T,
                jax.vmap(halting.score_by_layer, in_axes=1)(aux.score, ran),
                jnp.nan,
            ),
            "halting": jax.nn.one_hot(depth.reshape(len(images), -1) - 1, model.depth).mean(axis=1),
        }

    rows: dict[str, list[np.ndarray]] = {}
    size, total, real = config.eval.batch_size, len(reader.source.records), []
    batches = loader.eval_batches(reader, batch_size=size, num_threads=config.data.num_threads)
    for one in tqdm(batches, desc="images", total=-(-total // size), unit="batch"):
        values = jax.device_get(
            run(params, augment.normalize(one["image"], config.data.mean, config.data.std))
        )
        for name, value in (values | {"label": one["label"]}).items():
            rows.setdefault(name, []).append(value)
        real.append(one["weight"] > 0)
    keep = np.concatenate(real)
    columns = {name: np.concatenate(values)[keep] for name, values in rows.items()}
    return Images(index=np.flatnonzero(keep), **columns)


def sweep(config: ConfigDict, params: Any, shifts: list[float]) -> list[dict[str, float]]:
    """Top-1 and share of MACs of one network whose gate is shifted, without training.

    Args:
      config: of the run.
      params: as they are evaluated.
      shifts: of beta, in units of gamma.
    """
    model = build.model(config).clone(removal=None)
    gate = params.get("gate", {"gamma": model.halting.gamma, "beta": model.halting.beta})
    gamma, beta = float(gate["gamma"]), float(gate["beta"])
    evaluator = evaluate.Evaluator(
        config, calibrate.with_bias(model, params, beta)[0]
    )  # compiles once for all shifts
    rows = []
    for shift in tqdm(shifts, desc="gate shifts"):
        _, shifted = calibrate.with_bias(model, params, beta + shift * gamma)
        values = evaluator.measure(shifted)
        rows.append({"shift": shift, "top1": values["top1"], "macs_ratio": values["macs_ratio"]})
    return rows
