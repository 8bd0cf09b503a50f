"""Metrics as sums over images, and the files of their rows."""

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from avit_jax.core import halting
from avit_jax.models import flops, vit
from avit_jax.training import damage, losses
from avit_jax.utils import errors, files

_logger = logging.getLogger(__name__)
Sums = dict[str, jax.Array]


def eval_sums(
    model: vit.AViT,
    logits: jax.Array,
    aux: vit.Aux,
    labels: jax.Array,
    weight: jax.Array,
) -> Sums:
    """Returns sums over a batch.

    To get a mean, divide a sum over all batches by the sum of `images`.

    Depths and scores are the same for masking and removal: once the tokens of an image that the
    classifier reads have halted, all of its tokens count as halted.

    Args:
      model: for its sizes.
      logits: `(B, C)`.
      aux: of the same forward pass.
      labels: `(B,)` int. For any number of labels: `(B, C)`, 1 for each label, 0 for other classes.
      weight: `(B,)` 1 for an image, 0 for padding.

    Returns:
      Float32 sums by name. Scalars: `images`, `loss` (nats), `top1`, `top5`, `macs`, `depth_patch`
      and `depth_class` (layers). With pooling, `depth_class` is the number of layers until the
      image is finished. Vectors `(L,)`: `patch_depth`, the fraction of patch tokens that halt at
      each layer; `score`, the mean score of each layer, with 0 for halted tokens. Vectors `(C,)`:
      `class_images`, the images of each class; `class_top1`, those that are classified correctly.
      For any number of labels, the loss is the mean binary cross entropy of the classes, and
      `top1`, `top5`, `class_images` and `class_top1` are missing.
    """
    ran = flops.is_computed(aux.active, model.readout)
    depth = ran.sum(axis=0)
    patches = depth[:, model.num_prefix_tokens :]
    multi_label = labels.ndim == 2
    loss = lambda x, y: losses.cross_entropy(x[None], y[None], sigmoid=multi_label)  # noqa: E731
    each = {
        "images": jnp.ones_like(weight),
        "loss": jax.vmap(loss)(logits, labels),
        "depth_patch": patches.mean(axis=1),
        "depth_class": depth[:, 0] if model.pool == "token" else ran.any(axis=2).sum(axis=0),
        "macs": aux.macs,
        "patch_depth": jax.nn.one_hot(patches - 1, model.depth).mean(axis=1),
        "score": jax.vmap(halting.score_by_layer, in_axes=1)(aux.score, ran),
    }
    each |= {} if multi_label else _correct(logits, labels)
    return {name: jnp.tensordot(weight, x.astype(jnp.float32), axes=1) for name, x in each.items()}


def _correct(logits: jax.Array, labels: jax.Array) -> Sums:
    """Returns which images are classified correctly, `(B,)` or, by class, `(B, C)`."""
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=1)
    # Of equal logits, the first one ranks higher, as in argmax. A nan of another class ranks above
    # the label. A label whose logit is nan ranks last.
    is_before = jnp.arange(logits.shape[1])[None, :] < labels[:, None]
    is_larger = jnp.where(is_before, ~(logits < label_logits), ~(logits <= label_logits))
    rank = is_larger.sum(axis=1)
    is_label = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
    return {
        "top1": rank < 1,
        "top5": rank < 5,
        "class_images": is_label,
        "class_top1": is_label & (rank < 1)[:, None],
    }


def means(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns means over all images from the sums of batches, in float64; `images` is a sum."""
    totals = {
        name: np.sum([batch[name] for batch in batches], axis=0, dtype=np.float64)
        for name in batches[0]
    }
    images = totals.pop("images")
    return {"images": images} | {name: total / images for name, total in totals.items()}


def average_precision(logits: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Measures how well the logits of each class rank the images.

    Args:
      logits: `(images, C)`; nan ranks last.
      labels: `(images, C)` 1 for each label of an image, 0 for other classes.

    Returns:
      `class_average_precision` `(C,)`, nan for classes without images, and
      `mean_average_precision`, the mean over the others.

    Raises:
      errors.UserError: no image has a label.

    Reference: `average_precision_score` of scikit-learn: the sum of precision times gain in recall.
    """
    from sklearn.metrics import average_precision_score

    largest = np.finfo(np.float32).max
    logits = np.nan_to_num(logits.astype(np.float32), nan=-largest)
    if not labels.any():
        raise errors.UserError(
            "no image of the evaluation has a label, so nothing can be measured: set "
            "--config.data.eval_split to another split."
        )
    each = np.array(
        [
            average_precision_score(label, logit) if label.any() else np.nan
            for label, logit in zip(labels.T, logits.T, strict=True)
        ]
    )
    return {"mean_average_precision": np.nanmean(each), "class_average_precision": each}


def quality(values: Mapping[str, Any]) -> tuple[str, float]:
    """Returns the metric that picks the best checkpoint: its name in messages, and its value."""
    if "mean_average_precision" in values:
        return "mean average precision", float(values["mean_average_precision"])
    return "top-1", float(values["top1"])


def in_words(values: Mapping[str, float]) -> str:
    """Returns one line about an evaluation, from `Evaluator.scalars`."""
    name, best = quality(values)
    top5 = f"  top-5 {values['top5']:.2%}" if "top5" in values else ""
    return (
        f"evaluation of {values['images']:.0f} images: {name} {best:.2%}{top5}  loss "
        f"{values['loss']:.4f}  {values['macs'] / 1e6:.4g} million MACs an image, MACs ratio "
        f"{values['macs_ratio']:.3f}  depth of patch tokens {values['depth_patch']:.2f}, of class "
        f"token {values['depth_class']:.2f}"
    )


class Writer:
    """Appends rows to `metrics.jsonl`, `timing.jsonl` and the TensorBoard files of a workdir.

    Values that depend on the clock are in `timing.jsonl`, so that equal runs write the same
    `metrics.jsonl`.

    Args:
      workdir: of the run.
      step: number of steps done; TensorBoard drops events of later steps.
      sizes: bytes of each file at that step, from the method `sizes`; the rest is cut off.
    """

    def __init__(self, workdir: epath.Path, step: int, sizes: dict[str, int]) -> None:
        self._workdir, self._is_bucket = workdir, damage.is_bucket(workdir)
        rows = {
            name: _rows(workdir / name, sizes.get(name, 0))
            for name in ("metrics.jsonl", "timing.jsonl")
        }
        self._sizes = {name: len(content) for name, content in rows.items()}
        self._rows = (
            {name: bytearray(content) for name, content in rows.items()} if self._is_bucket else {}
        )
        board = workdir / "tensorboard"
        event_file_writer.directory_check(str(board))
        # Writes events at once. A SummaryWriter uses a thread; after one error of that thread, such
        # as a full disk, every later write would block forever.
        self._board = event_file_writer.EventsWriter(str(board / "events"))
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._board.write_event(
            event_pb2.Event(wall_time=time.time(), step=step + 1, session_log=start)
        )

    def write(
        self,
        step: int,
        split: str,
        values: dict[str, float],
        timing: dict[str, float] | None = None,
    ) -> None:
        """Writes one row.

        Args:
          step: of the training.
          split: "train" or "eval".
          values: by name.
          timing: values that depend on the clock, by name.
        """
        head = {"step": step, "split": split}
        self._append("metrics.jsonl", head | values)
        if timing:
            self._append("timing.jsonl", head | timing)
        for name, value in (values | (timing or {})).items():
            event = event_pb2.Event(
                wall_time=time.time(), step=step, summary=summary.scalar(f"{split}/{name}", value)
            )
            self._board.write_event(event)
        self._board.flush()

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of each file."""
        return dict(self._sizes)

    def _append(self, name: str, row: dict[str, object]) -> None:
        line = (json.dumps(row) + "\n").encode()
        self._sizes[name] += len(line)
        if self._is_bucket:  # files of a bucket can only be replaced
            self._rows[name] += line
            (self._workdir / name).write_bytes(bytes(self._rows[name]))
        else:
            with (self._workdir / name).open("ab") as file:
                file.write(line)

    def close(self) -> None:
        """Closes the event file."""
        self._board.close()


def _rows(path: epath.Path, size: int) -> bytes:
    """Returns the first `size` bytes of a file, and cuts the rest of it off."""
    rows = path.read_bytes() if path.exists() else b""
    if len(rows) < size:
        _logger.warning(
            "%s has lost %d bytes since the checkpoint was saved; it continues without them",
            *(path, size - len(rows)),
        )
        size = rows.rfind(b"\n") + 1
    if len(rows) > size:
        files.write(path, rows[:size])
    return rows[:size]
