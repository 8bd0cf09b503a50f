"""Metrics as sums over images, and where they are written."""

import json
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from avit_jax.core import halting
from avit_jax.models import flops, vit
from avit_jax.training import losses
from avit_jax.utils import files

_logger = logging.getLogger(__name__)
Sums = dict[str, jax.Array]


def eval_sums(
    model: vit.AViT,
    logits: jax.Array,
    aux: vit.Aux,
    labels: jax.Array,
    weight: jax.Array,
) -> Sums:
    """Sums over a batch; divided by `images`, after adding batches up, they are means over the
    images.

    Depths and scores are those of tokens that have to compute: of a finished image, one whose
    read-out tokens have halted, the other tokens count as halted too. So they are the same whether
    tokens are masked or removed.

    Args:
      model: for its sizes.
      logits: `(B, C)`.
      aux: of the same forward pass.
      labels: `(B,)` int.
      weight: `(B,)` 1 for an image, 0 for padding.

    Returns:
      `images`, `loss` (nats), `top1`, `top5`, `depth_patch` and `depth_class` (layers), `macs`, and
      two vectors `(L,)`: `patch_depth`, the share of patch tokens that halt at each layer, and
        `score`, the mean score of each layer.
    """
    label_logits = jnp.take_along_axis(logits, labels[:, None], axis=1)
    first = (
        jnp.arange(logits.shape[1])[None, :] < labels[:, None]
    )  # of equal logits the first wins, as in argmax
    rank = jnp.where(first, ~(logits < label_logits), ~(logits <= label_logits)).sum(
        axis=1
    )  # and nan is above all
    ran = flops.is_computed(aux.active, model.num_prefix_tokens)
    depth = ran.sum(axis=0)
    patches = depth[:, model.num_prefix_tokens :]
    each = {
        "images": jnp.ones_like(weight),
        "loss": jax.vmap(lambda x, y: losses.cross_entropy(x[None], y[None]))(logits, labels),
        "top1": rank < 1,
        "top5": rank < 5,
        "depth_patch": patches.mean(axis=1),
        "depth_class": depth[:, 0],
        "macs": aux.macs,
        "patch_depth": jax.nn.one_hot(patches - 1, model.depth).mean(axis=1),
        "score": jax.vmap(halting.score_by_layer, in_axes=1)(aux.score, ran),
    }
    return {name: jnp.tensordot(weight, x.astype(jnp.float32), axes=1) for name, x in each.items()}


def means(batches: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Adds up the sums of batches, in float64, and divides by the number of images; `images` stays
    the number.
    """
    totals = {
        name: np.sum([batch[name] for batch in batches], axis=0, dtype=np.float64)
        for name in batches[0]
    }
    images = totals.pop("images")
    return {"images": images} | {name: total / images for name, total in totals.items()}


class Writer:
    """Appends rows to `metrics.jsonl` and `timing.jsonl` in the workdir, and to TensorBoard event
    files beside them.

    All that depends on the clock is in `timing.jsonl`, so that `metrics.jsonl` is the same whenever
    the run is the same.

    Args:
      workdir: of the run.
      step: the last one done; TensorBoard drops what comes after it.
      sizes: of the files at that step, in bytes, as `sizes` gave them; what comes after that is cut
        off.
    """

    def __init__(self, workdir: epath.Path, step: int, sizes: dict[str, int]) -> None:
        self._workdir, self._is_bucket = workdir, "://" in str(workdir)
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
        # Events are written at once. A SummaryWriter would leave them to a thread; when that has
        # met one error, such as a full disk, all who write wait for it forever.
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
        """Writes one row: the step, "train" or "eval", and the values."""
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
        """Bytes written to each file so far, from the first start on."""
        return dict(self._sizes)

    def _append(self, name: str, row: dict[str, object]) -> None:
        line = (json.dumps(row) + "\n").encode()
        self._sizes[name] += len(line)
        if self._is_bucket:  # what lies there is replaced as a whole: nothing can be appended to it
            self._rows[name] += line
            (self._workdir / name).write_bytes(bytes(self._rows[name]))
        else:
            with (self._workdir / name).open("ab") as file:
                file.write(line)

    def close(self) -> None:
        """Closes the event file; all is written already."""
        self._board.close()


def _rows(path: epath.Path, size: int) -> bytes:
    """The first `size` bytes of a file; what comes after them is cut off."""
    rows = path.read_bytes() if path.exists() else b""
    if len(rows) < size:
        _logger.warning(
            "%s has lost %d bytes since the checkpoint was saved; it goes on without them",
            path,
            size - len(rows),
        )
        size = rows.rfind(b"\n") + 1
    if len(rows) > size:
        files.write(path, rows[:size])
    return rows[:size]
