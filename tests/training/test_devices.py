"""Replicated and distributed arrays: which device has which rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax.training import devices

_BATCH = {"image": np.arange(48.0, dtype=np.float32).reshape(16, 3), "label": np.arange(16)}


def test_a_batch_is_split_in_order() -> None:
    for batch in (devices.split(_BATCH), next(devices.prefetch(iter([_BATCH])))):
        assert {name: x.shape for name, x in batch.items()} == {"image": (8, 2, 3), "label": (8, 2)}
        for i, shard in enumerate(batch["label"].addressable_shards):
            assert shard.data.ravel().tolist() == [2 * i, 2 * i + 1]
            assert shard.device == jax.local_devices()[i]


def test_batches_end_with_their_source() -> None:
    assert len(list(devices.prefetch(iter([_BATCH] * 5)))) == 5


@pytest.mark.parametrize("count", [1, 8])
def test_every_device_has_a_copy(count: int) -> None:
    copies = devices.replicate({"a": np.arange(3.0)}, jax.devices()[:count])
    assert copies["a"].shape == (count, 3)
    np.testing.assert_array_equal(devices.first(copies)["a"], np.arange(3.0))


def test_mean_and_total_are_over_all_devices() -> None:
    step = devices.parallel(lambda x: (devices.mean(x.sum()), devices.total(x.sum())))
    mean, total = devices.first(step(devices.split(jnp.arange(16.0))))
    assert (mean, total) == (120 / 8, 120)


def test_the_first_argument_is_donated_if_asked() -> None:
    for donate in (False, True):
        state = devices.replicate(np.zeros(4))
        devices.parallel(lambda state, x: state + x, donate=donate)(
            state, devices.replicate(1.0 + np.zeros(4))
        )
        assert state.is_deleted() == donate
