"""Batches for this process. The content of a batch depends on the step alone.

A batch is a dict of arrays with the axes `(images of this process, ...)`:
  image: uint8 `(H, W, C)`.
  label: int32; float32 `(C,)`, 1 for each label, if images have any number of labels.
  skipped: int32, records that could not be read before this one.
  index: int32, index of the image in the global batch.
  weight: float32, only in evaluation: 0 for padding and for unreadable records, otherwise 1.
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

from avit_jax.data import image_files, sources
from avit_jax.utils import errors

Batch = dict[str, Any]
Decode = Callable[[int], sources.Record]  # maps the number of a record to its decoded content
_logger = logging.getLogger(__name__)


class _Unreadable(Exception):
    """A record cannot be read or decoded; the message names the record and the reason."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads, decodes and transforms the records of a source.

    Attributes:
      source: the images.
      transform: host transform of an image and, in training, a random generator.
      value_range: as in `image_files.decode`.
      skip_bad: whether the next record replaces an unreadable one, with a warning. Otherwise an
        unreadable record is an error.
    """

    source: sources.Source
    transform: Callable[..., np.ndarray]
    value_range: tuple[float, ...] = ()
    skip_bad: bool = False

    def __call__(self, i: int) -> sources.Record:
        """Returns the i-th record, transformed, with the entry `skipped`.

        Raises:
          errors.UserError: the record cannot be read.
        """
        return self.apply(self.decode(i))

    def decode(self, i: int) -> sources.Record:
        """Returns the i-th record before its transform; the image is a Pillow image or an array."""
        length = len(self.source.records)
        for skipped in range(length):
            try:
                return self._decode((i + skipped) % length) | {"skipped": np.int32(skipped)}
            except _Unreadable as error:
                if not self.skip_bad:
                    raise errors.UserError(
                        f"cannot read {error}; fix or remove it, or set "
                        "--config.data.bad_records=skip."
                    ) from error
                _logger.warning("skipped %s", error)
        raise errors.UserError(
            f"no record of {self.source.name} can be read: fix its files, or name another data set."
        )

    def apply(self, record: sources.Record, *rng: np.random.Generator) -> sources.Record:
        """Returns a decoded record, transformed."""
        return record | {"image": self.transform(record["image"], *rng)}

    def _decode(self, i: int) -> sources.Record:
        record: sources.Record = {}
        try:
            record = self.source.records[i]
        except Exception as error:  # a file is gone, or array_record reports a damaged shard
            raise _Unreadable(f"{self.source.describe(i, record)}: {error}") from error
        label, image = record[self.source.label_key], record["image"]
        count, numbers = len(self.source.label_names), np.asarray(label)
        if not ((numbers >= 0) & (numbers < count)).all():
            raise errors.UserError(
                f"{self.source.describe(i, record)} has the label {label}, which is no class: name "
                "a split that has labels."
            )
        try:
            if not isinstance(image, np.ndarray):
                image = image_files.decode(image, self.value_range)
        except image_files.BadImage as error:
            raise _Unreadable(f"{self.source.describe(i, record)}: {error}") from error
        if self.source.multi_label:
            return {"image": image, "label": np.isin(range(count), label).astype(np.float32)}
        return {"image": image, "label": np.int32(label)}


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
    """Yields endless training batches from `start_step` on; each epoch has a new random order.

    The number of threads, workers or processes does not change the batches. The index of an image
    in the endless sequence seeds its host transform.

    Args:
      reader: its transform takes a random generator.
      batch_size: images of the global batch, over all processes.
      seed: of the order and of the transforms.
      start_step: number of earlier batches.
      num_threads: threads that read and transform, in this process or in each worker.
      num_workers: processes that read and transform; 0 uses this process. Needs parsed absl flags.
      repeats: consecutive copies of an image, each with its own transform. An epoch has as many
        images as the source. So it contains one of `repeats` images. DeiT's repeated augmentation:
        3.
    """
    length = len(reader.source.records)
    order = grain.MapDataset.range(length).seed(seed).shuffle().repeat()

    def read(position: int, decode: Decode) -> sources.Record:
        epoch, i = divmod(position, length)
        rng = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position]))
        return reader.apply(decode(order[epoch * length + i // repeats]), rng)

    steps = range(start_step, sys.maxsize)
    return _batches(reader, read, steps, batch_size, num_threads, num_workers)


def eval_batches(reader: Reader, *, batch_size: int, num_threads: int) -> Iterator[Batch]:
    """Yields batches that contain every image once, in order.

    Images of weight 0 fill the last batch.

    Args:
      reader: its transform takes an image alone.
      batch_size: images of the global batch, over all processes.
      num_threads: threads that read and transform.
    """
    length = len(reader.source.records)

    def read(position: int, decode: Decode) -> sources.Record:
        record = reader.apply(decode(min(position, length - 1)))
        return record | {"weight": np.float32(position < length and not record["skipped"])}

    steps = range(-(-length // batch_size))
    return _batches(reader, read, steps, batch_size, num_threads, num_workers=0)


def _batches(
    reader: Reader,
    read: Callable[[int, Decode], sources.Record],
    steps: range,
    batch_size: int,
    num_threads: int,
    num_workers: int,
) -> Iterator[Batch]:
    """Yields this process's part of each batch; `read` maps positions to records."""
    parts = np.split(np.arange(batch_size, dtype=np.int32), jax.process_count())
    index = parts[jax.process_index()]

    def batch(step: int) -> Batch:
        # grain gets whole batches, because its overhead per element is large beside Pillow's work.
        decode = functools.lru_cache(maxsize=1)(reader.decode)  # copies of an image are consecutive
        records = [read(step * batch_size + int(i), decode) | {"index": i} for i in index]
        return {key: np.stack([record[key] for record in records]) for key in records[0]}

    # The buffer holds whole batches; this is the smallest one in which no thread waits.
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=num_threads + 2)
    batches = grain.MapDataset.range(steps.start, steps.stop).map(batch).to_iter_dataset(options)
    if num_workers:
        workers = grain.MultiprocessingOptions(num_workers=num_workers)
        batches = batches.mp_prefetch(workers, worker_init_fn=_start_worker)
        return _from_workers(iter(batches))
    return iter(batches)


def _from_workers(batches: Iterator[Batch]) -> Iterator[Batch]:
    try:
        yield from batches
    except RuntimeError as error:  # grain's, if a worker was killed
        raise errors.UserError(
            f"a process that reads the training data has died ({errors.first_line(error)}): most "
            "often the memory or /dev/shm is too small for so many; lower "
            "--config.data.num_workers, or set it to 0."
        ) from error


def _start_worker(*_: int) -> None:
    """Ties the life of a worker to the training process, whatever signals its group receives."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
