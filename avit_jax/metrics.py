"""Metrics as sums over images, and where they are written."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tensorboardX

from avit_jax import adaptive, flops, halting, losses, vit

Sums = dict[str, jax.Array]


def eval_sums(model: vit.AViT, logits: jax.Array, aux: vit.Aux | adaptive.Aux, labels: jax.Array, weight: jax.Array) -> Sums:
    """Sums over a batch; divided by `images`, after adding batches up, they are means over the images.

    Depths and scores are those of tokens that have to compute: of a finished image, one whose read-out tokens have halted, the
    other tokens count as halted too. So they are the same whether tokens are masked or removed.

    Args:
      model: for its sizes.
      logits: `(B, C)`.
      aux: of the same forward pass.
      labels: `(B,)` int.
      weight: `(B,)` 1 for an image, 0 for padding.

    Returns:
      `images`, `loss` (nats), `top1`, `top5`, `depth_patch` and `depth_class` (layers), `macs`, and two vectors `(L,)`:
      `patch_depth`, the share of patch tokens that halt at each layer, and `score`, the mean score of each layer.
    """
    rank = (logits > jnp.take_along_axis(logits, labels[:, None], axis=1)).sum(axis=1)
    ran = flops.computing(aux.active, model.num_readout)
    depth = ran.sum(axis=0)
    patches = depth[:, model.num_readout :]
    each = {
        "images": jnp.ones_like(weight),
        "loss": jax.vmap(lambda x, y: losses.cross_entropy(x[None], y[None]))(logits, labels),
        "top1": rank < 1,
        "top5": rank < 5,
        "depth_patch": patches.mean(axis=1),
        "depth_class": depth[:, 0],
        "macs": flops.image_macs(model, aux.active),
        "patch_depth": jax.nn.one_hot(patches - 1, model.depth).mean(axis=1),
        "score": jax.vmap(halting.score_by_layer, in_axes=1)(aux.score, ran),
    }
    return {name: jnp.tensordot(weight, x.astype(jnp.float32), axes=1) for name, x in each.items()}


def means(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Adds up the sums of batches, in float64, and divides by the number of images; `images` stays the number."""
    totals = {name: np.sum([batch[name] for batch in batches], axis=0, dtype=np.float64) for name in batches[0]}
    images = totals.pop("images")
    return {"images": images} | {name: total / images for name, total in totals.items()}


class Writer:
    """Appends rows to `<workdir>/metrics.jsonl` and to TensorBoard event files beside it."""

    def __init__(self, workdir: pathlib.Path) -> None:
        self._file = (workdir / "metrics.jsonl").open("a")
        self._board = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))

    def write(self, step: int, split: str, values: dict[str, float]) -> None:
        """Writes one row: the step, "train" or "eval", and the values."""
        self._file.write(json.dumps({"step": step, "split": split} | values) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._board.close()
