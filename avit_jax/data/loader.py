"""Batches for this process's devices; where a batch lies follows from the global step alone.

A batch is a dict of arrays with the axes `(local devices, images a device, ...)`: `image` uint8 `(H, W, C)`, `label` int32,
`skipped` int32, how many records could not be read before one could, and `index` int32, the place of each image in the global
batch (training) or `weight` float32, 0 for padding and for what could not be read (evaluation).
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from flax import jax_utils

from avit_jax import errors
from avit_jax.data import pictures, sources

Batch = dict[str, Any]
_PREFETCH = 2  # batches on the devices ahead of the step
_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads and transforms records of a source.

    Attributes:
      source: images.
      transform: host transform, of a record and, in training, a random generator.
      skip_bad: where a record cannot be read, the next one takes its place, and a warning names it; else it is an error.
    """

    source: sources.Source
    transform: Callable[..., sources.Record]
    skip_bad: bool = False

    def __call__(self, i: int, *rng: np.random.Generator) -> sources.Record:
        """The transformed i-th record, with `skipped`; raises errors.UserError naming a record that cannot be read."""
        length = len(self.source.records)
        for skipped in range(length):
            try:
                return self._read((i + skipped) % length, *rng) | {"skipped": np.int32(skipped)}
            except errors.UserError as error:
                if not self.skip_bad:
                    raise
                _logger.warning("skipped: %s", error)
        raise errors.UserError(f"not one record of {self.source.name} can be read.")

    def _read(self, i: int, *rng: np.random.Generator) -> sources.Record:
        record: sources.Record = {}
        try:
            record = self.source.records[i]
            return self.transform(record, *rng)
        except (pictures.BadPicture, OSError) as error:
            raise errors.UserError(
                f"cannot read {self.source.where(i, record)}: {error}; "
                "mend or remove it, or set --config.data.bad_records=skip."
            ) from error


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

    The same batches, whatever the number of threads, workers or processes: the random generator of a host transform is
    seeded by the place of the image in the endless sequence.

    Args:
      reader: with a transform that takes a random generator.
      batch_size: global batch, over all processes.
      seed: of the order and of the transforms.
      start_step: number of batches that have been taken before.
      num_threads: that read and transform, in this process or in each worker.
      num_workers: processes that read and transform; 0: this one. Needs parsed absl flags.
      repeats: copies of an image that follow each other, each transformed by itself; an epoch stays as long as the source,
        so it takes one of `repeats` images. DeiT's repeated augmentation: 3.
    """
    length = len(reader.source.records)
    order = grain.MapDataset.range(length).seed(seed).shuffle().repeat()

    def read(place: int, rng: np.random.Generator) -> sources.Record:
        epoch, i = divmod(place, length)
        return reader(order[epoch * length + i // repeats], rng)

    dataset = grain.MapDataset.range(sys.maxsize).seed(seed).random_map(read)
    dataset = dataset[start_step * batch_size :][jax.process_index() :: jax.process_count()]
    local = batch_size // jax.process_count()
    index = np.arange(local, dtype=np.int32) * jax.process_count() + jax.process_index()
    dataset = dataset.batch(local).map(lambda batch: batch | {"index": index})
    return _on_devices(dataset, num_threads, num_workers)


def eval_batches(reader: Reader, *, batch_size: int, num_threads: int) -> Iterator[Batch]:
    """Batches that hold every image exactly once, in order; the last is filled up with images of weight 0.

    Args:
      reader: with a transform of a record alone.
      batch_size: global batch, over all processes.
      num_threads: that read and transform.
    """
    length = len(reader.source.records)

    def read(i: int) -> sources.Record:
        record = reader(min(i, length - 1))
        return record | {"weight": np.float32(i < length and not record["skipped"])}

    dataset = grain.MapDataset.range(-(-length // batch_size) * batch_size).map(read)
    dataset = dataset[jax.process_index() :: jax.process_count()]
    return _on_devices(dataset.batch(batch_size // jax.process_count()), num_threads, num_workers=0)


def _split(batch: Batch, *, devices: int) -> Batch:
    return {key: x.reshape(devices, -1, *x.shape[1:]) for key, x in batch.items()}


def _on_devices(dataset: grain.MapDataset, num_threads: int, num_workers: int) -> Iterator[Batch]:
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    batches = dataset.map(functools.partial(_split, devices=jax.local_device_count())).to_iter_dataset(options)
    if num_workers:
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return jax_utils.prefetch_to_device(iter(batches), _PREFETCH)
