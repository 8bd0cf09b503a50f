"""Checkpoints come back exactly; the last and the best are kept; what does not fit is told in a sentence."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax import checkpoint, errors

State = dict[str, object]


def _state(seed: int = 0) -> State:
    a, b = np.random.default_rng(seed).normal(size=(2, 3, 4)).astype(np.float32)
    return {"step": jnp.int32(seed), "params": {"a": jnp.asarray(a), "b": jnp.asarray(b, jnp.bfloat16)}, "ema": None}


def _equal(a: State, b: State) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


@pytest.mark.parametrize("abstract", [False, True])
def test_comes_back_exactly(tmp_path: pathlib.Path, abstract: bool) -> None:
    extra = {"train_seconds": 1.5, "config": {"seed": 0, "mean": [0.5]}}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.step() is None
        checkpoints.save(7, _state(7), top1=0.5, extra=extra)
    target = _state(1)
    target = jax.eval_shape(lambda: target) if abstract else target
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.step() == 7
        restored, restored_extra = checkpoints.restore(target)
    _equal(restored, _state(7))
    assert restored_extra == extra
    assert all(x.devices() == {jax.local_devices()[0]} for x in jax.tree.leaves(restored))


def test_last_and_best_are_kept(tmp_path: pathlib.Path) -> None:
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        for step, top1 in ((1, 0.2), (2, 0.9), (3, 0.4), (4, 0.3)):
            checkpoints.save(step, _state(step), top1=top1, extra={})
    assert {path.name for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()} == {"2", "4"}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.step("last"), checkpoints.step("best")) == (4, 2)
        _equal(checkpoints.restore(_state())[0], _state(4))
        _equal(checkpoints.restore(_state(), "best")[0], _state(2))


def test_state_may_be_donated_right_after_saving(tmp_path: pathlib.Path) -> None:
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    state = _state(3)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, top1=0.0, extra={})
        overwrite(state)
        assert state["params"]["a"].is_deleted()
        restored, _ = checkpoints.restore(_state())
    _equal(restored, _state(3))
    _equal(overwrite(restored), jax.tree.map(jnp.zeros_like, _state(3)))  # and so may be what comes back


@pytest.mark.parametrize("which", ["last", "best"])
def test_no_checkpoint(tmp_path: pathlib.Path, which: str) -> None:
    with checkpoint.Checkpoints(tmp_path) as checkpoints, pytest.raises(errors.UserError, match=r"no checkpoint.*--workdir"):
        checkpoints.restore(_state(), which)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"params": {"a": np.zeros((3, 5)), "b": np.zeros((3, 4))}}, r"params/a is \(3, 4\) there and \(3, 5\) here"),
        ({"params": {"a": np.zeros((3, 4))}}, r"params/b is \(3, 4\) there and missing here"),
        (
            {"params": {"a": np.zeros((3, 4)), "b": np.zeros((3, 4)), "c": np.zeros(())}},
            r"params/c is missing there and \(\) here",
        ),
        ({"ema": np.zeros(2)}, r"ema is missing there and \(2,\) here"),
        ({"ema": {"a": np.zeros(2)}}, r"ema/a is missing there and \(2,\) here"),
    ],
)
def test_misfit(tmp_path: pathlib.Path, change: State, expected: str) -> None:
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _state(1), top1=0.0, extra={})
    with (
        checkpoint.Checkpoints(tmp_path) as checkpoints,
        pytest.raises(errors.UserError, match=rf"step 1 .*{expected}.*--config"),
    ):
        checkpoints.restore(_state() | change)
