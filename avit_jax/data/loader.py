"""Batches for this process; where a batch lies follows from the global step alone.

A batch is a dict of arrays with the axes `(images of this process, ...)`: `image` uint8
`(H, W, C)`, `label` int32, `skipped` int32, how many records could not be read before one could,
and `index` int32, the place of each image in the global batch; in evaluation also `weight` float32,
0 for padding and for what could not be read.
"""

import dataclasses
import functools
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from avit_jax.data import pictures, sources
from avit_jax.utils import errors

Batch = dict[str, Any]
Decoded = Callable[[int], sources.Record]  # the record of a number, decoded
_logger = logging.getLogger(__name__)


class _Unreadable(Exception):
    """A record that cannot be read or decoded; which, and why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads, decodes and transforms records of a source.

    Attributes:
      source: images.
      transform: host transform, of an image and, in training, a random generator.
      skip_bad: where a record cannot be read, the next one takes its place, and a warning names it;
        else it is an error.
    """

    source: sources.Source
    transform: Callable[..., np.ndarray]
    skip_bad: bool = False

    def __call__(self, i: int) -> sources.Record:
        """The i-th record, transformed, with `skipped`; raises errors.UserError naming a record
        that cannot be read.
        """
        return self.apply(self.decoded(i))

    def decoded(self, i: int) -> sources.Record:
        """The i-th record before its transform, the image a picture or an array."""
        length = len(self.source.records)
        for skipped in range(length):
            try:
                return self._decoded((i + skipped) % length) | {"skipped": np.int32(skipped)}
            except _Unreadable as error:
                if not self.skip_bad:
                    raise errors.UserError(
                        f"cannot read {error}; mend or remove it, or set "
                        "--config.data.bad_records=skip."
                    ) from error
                _logger.warning("skipped %s", error)
        raise errors.UserError(f"not one record of {self.source.name} can be read.")

    def apply(self, record: sources.Record, *rng: np.random.Generator) -> sources.Record:
        """A decoded record, transformed."""
        return record | {"image": self.transform(record["image"], *rng)}

    def _decoded(self, i: int) -> sources.Record:
        record: sources.Record = {}
        try:
            record = self.source.records[i]
        except (
            Exception
        ) as error:  # a file that is gone, or whatever array_record says of a damaged shard
            raise _Unreadable(f"{self.source.where(i, record)}: {error}") from error
        if not 0 <= record["label"] < len(self.source.label_names):
            raise errors.UserError(
                f"{self.source.where(i, record)} has the label {record['label']}, of no class: "
                "name a split that has labels."
            )
        try:
            image = (
                record["image"]
                if isinstance(record["image"], np.ndarray)
                else pictures.decode(record["image"])
            )
            return {"image": image, "label": np.int32(record["label"])}
        except pictures.BadPicture as error:
            raise _Unreadable(f"{self.source.where(i, record)}: {error}") from error


def train_batches(
    reader: Reader,
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    num_threads: int,
    num_workers: int = 0,
    repeats: int = 1,
) -> Iterator[Batch]:
    """Endless training batches from `start_step` on, shuffled anew each epoch.

    The same batches, whatever the number of threads, workers or processes: the random generator of
    a host transform is seeded by the place of the image in the endless sequence.

    Args:
      reader: with a transform that takes a random generator.
      batch_size: global batch, over all processes.
      seed: of the order and of the transforms.
      start_step: number of batches that have been taken before.
      num_threads: that read and transform, in this process or in each worker.
      num_workers: processes that read and transform; 0: this one. Needs parsed absl flags.
      repeats: copies of an image that follow each other, each transformed by itself; an epoch stays
        as long as the source, so it takes one of `repeats` images. DeiT's repeated augmentation: 3.
    """
    length = len(reader.source.records)
    order = grain.MapDataset.range(length).seed(seed).shuffle().repeat()

    def read(place: int, decoded: Decoded) -> sources.Record:
        epoch, i = divmod(place, length)
        rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, place]))
        return reader.apply(decoded(order[epoch * length + i // repeats]), rng)

    return _batches(
        reader, read, range(start_step, sys.maxsize), batch_size, num_threads, num_workers
    )


def eval_batches(reader: Reader, *, batch_size: int, num_threads: int) -> Iterator[Batch]:
    """Batches that hold every image exactly once, in order; the last is filled up with images of
    weight 0.

    Args:
      reader: with a transform of a record alone.
      batch_size: global batch, over all processes.
      num_threads: that read and transform.
    """
    length = len(reader.source.records)

    def read(place: int, decoded: Decoded) -> sources.Record:
        record = reader.apply(decoded(min(place, length - 1)))
        return record | {"weight": np.float32(place < length and not record["skipped"])}

    return _batches(
        reader, read, range(-(-length // batch_size)), batch_size, num_threads, num_workers=0
    )


def _batches(
    reader: Reader,
    read: Callable[[int, Decoded], sources.Record],
    steps: range,
    batch_size: int,
    num_threads: int,
    num_workers: int,
) -> Iterator[Batch]:
    """Batches of what `read` makes of the places in the endless sequence; each process takes its
    part of a batch.
    """
    index = np.split(np.arange(batch_size, dtype=np.int32), jax.process_count())[
        jax.process_index()
    ]

    def batch(step: int) -> Batch:
        # A whole batch at once: grain's own work on each image is not small beside Pillow's.
        decoded = functools.lru_cache(maxsize=1)(
            reader.decoded
        )  # copies of an image follow each other
        records = [read(step * batch_size + int(i), decoded) | {"index": i} for i in index]
        return {key: np.stack([record[key] for record in records]) for key in records[0]}

    # Whole batches are buffered, so only so many that no thread has to wait for another.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 2)
    batches = grain.MapDataset.range(steps.start, steps.stop).map(batch).to_iter_dataset(options)
    if num_workers:
        batches = batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=num_workers), worker_init_fn=_serve
        )
    return _of_workers(iter(batches)) if num_workers else iter(batches)


def _of_workers(batches: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except RuntimeError as error:  # grain's, where one has been killed
        raise errors.UserError(
            f"a process that reads the training data has ended ({errors.first_line(error)}): most "
            "often the memory, or "
            "/dev/shm, is too small for so many; lower --config.data.num_workers, or set it to 0."
        ) from error


def _serve(*_: int) -> None:
    """A worker lives as long as the training process, which ends it, whatever signals are sent to
    the whole group.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
