"""Batches for this process's devices; where a batch lies follows from the global step alone.

A batch is a dict of arrays with the axes `(local devices, images a device, ...)`: `image` uint8 `(H, W, C)`, `label` int32, and
`index` int32, the place of each image in the global batch (training) or `weight` float32, 0 for padding (evaluation).
"""

from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from flax import jax_utils

from avit_jax.data import sources

Batch = dict[str, Any]
_PREFETCH = 2  # batches on the devices ahead of the step


def train_batches(
    source: sources.Source,
    transform: Callable[[sources.Record, np.random.Generator], sources.Record],
    *,
    batch_size: int,
    seed: int,
    start_step: int,
    num_threads: int,
) -> Iterator[Batch]:
    """Endless training batches from `start_step` on, shuffled anew each epoch.

    Args:
      source: images.
      transform: host transform; its generator is seeded by the place of the image in the endless sequence.
      batch_size: global batch, over all processes.
      seed: of the order and of the transforms.
      start_step: number of batches that have been taken before.
      num_threads: that read and transform.
    """
    dataset = grain.MapDataset.source(source.records).seed(seed).shuffle().repeat().random_map(transform)
    dataset = dataset[start_step * batch_size :][jax.process_index() :: jax.process_count()]
    local = batch_size // jax.process_count()
    index = np.arange(local, dtype=np.int32) * jax.process_count() + jax.process_index()
    dataset = dataset.batch(local).map(lambda batch: _split(batch | {"index": index}))
    return _on_devices(dataset, num_threads)


def eval_batches(
    source: sources.Source,
    transform: Callable[[sources.Record], sources.Record],
    *,
    batch_size: int,
    num_threads: int,
) -> Iterator[Batch]:
    """Batches that hold every image exactly once, in order; the last is filled up with images of weight 0.

    Args:
      source: images.
      transform: host transform.
      batch_size: global batch, over all processes.
      num_threads: that read and transform.
    """
    length = len(source.records)

    def read(i: int) -> sources.Record:
        return transform(source.records[min(i, length - 1)]) | {"weight": np.float32(i < length)}

    dataset = grain.MapDataset.range(-(-length // batch_size) * batch_size).map(read)
    dataset = dataset[jax.process_index() :: jax.process_count()]
    return _on_devices(dataset.batch(batch_size // jax.process_count()).map(_split), num_threads)


def _split(batch: Batch) -> Batch:
    return {key: x.reshape(jax.local_device_count(), -1, *x.shape[1:]) for key, x in batch.items()}


def _on_devices(dataset: grain.MapDataset, num_threads: int) -> Iterator[Batch]:
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=2 * num_threads)
    return jax_utils.prefetch_to_device(iter(dataset.to_iter_dataset(options)), _PREFETCH)
