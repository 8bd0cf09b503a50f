"""Checkpoints come back exactly, or the one before does; the last two and the best are kept;
failures end in a sentence.
"""

import concurrent.futures
import dataclasses
import errno
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint._src.path import atomicity, atomicity_defaults

from avit_jax.training import build, checkpoint, damage, progress, state
from avit_jax.utils import errors

State = dict[str, object]


def _state(seed: int = 0) -> State:
    a, b = np.random.default_rng(seed).normal(size=(2, 3, 4)).astype(np.float32)
    return {
        "step": jnp.int32(seed),
        "params": {"a": jnp.asarray(a), "b": jnp.asarray(b, jnp.bfloat16)},
        "ema": None,
    }


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
    assert restored_extra == extra | {"step": 7}
    assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(restored))


def _saved(workdir: pathlib.Path, *steps: tuple[int, float | None]) -> None:
    with checkpoint.Checkpoints(workdir) as checkpoints:
        for step, top1 in steps:
            checkpoints.save(step, _state(step), top1=top1, extra={"step": step})


def _steps(workdir: pathlib.Path) -> set[int]:
    return {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}


def test_the_last_two_and_the_best_are_kept(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path, (1, 0.2), (2, 0.9), (3, None), (4, 0.4), (5, None), (6, None))
    assert _steps(tmp_path) == {2, 5, 6}
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.step("last"), checkpoints.step("best")) == (6, 2)
        _equal(checkpoints.restore(_state())[0], _state(6))
        _equal(checkpoints.restore(_state(), "best")[0], _state(2))


def test_a_step_that_is_saved_again_takes_the_place_of_the_first(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path, (1, 0.5), (2, None))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, _state(9), top1=0.6, extra={"again": True})
        assert checkpoints.step("best") == 2
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        restored, extra = checkpoints.restore(_state())
        assert checkpoints.step("best") == 2
    _equal(restored, _state(9))
    assert extra == {"again": True, "step": 2}


def test_a_replaced_checkpoint_is_not_lost_on_the_way(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _saved(tmp_path, (2, None))

    def killed(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    with (
        monkeypatch.context() as patch,
        pytest.raises(errors.UserError, match="step 2 cannot be written"),
        checkpoint.Checkpoints(tmp_path) as checkpoints,
    ):
        patch.setattr(checkpoints._manager, "save", killed)
        checkpoints.save(2, _state(9), top1=0.6, extra={})
    assert _steps(tmp_path) == set()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:  # put back
        _equal(checkpoints.restore(_state())[0], _state(2))
        checkpoints.save(2, _state(9), top1=0.6, extra={})
    shutil.copytree(tmp_path / "checkpoints/2", tmp_path / "checkpoints/replaced_checkpoint_2")
    (tmp_path / "checkpoints/replaced_checkpoint_2/sha256.json").unlink()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:  # the new one was whole
        _equal(checkpoints.restore(_state())[0], _state(9))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]


def test_orbax_does_not_ask_whether_to_stop(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked.append)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, _state(1), top1=None, extra={})
    assert not asked


def test_a_bucket_stays_a_bucket() -> None:
    for path, expected in (
        ("gs://bucket/run", "gs://bucket/run/checkpoints"),
        ("run", str(pathlib.Path("run").absolute())),
    ):
        assert str(checkpoint.epath.Path(path)) == path
        assert expected in str(checkpoint.folder(path))


@pytest.fixture
def as_on_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are finished by a file of their own, not by a name."""
    for name in ("get_default_temporary_path_class", "get_item_default_temporary_path_class"):
        monkeypatch.setattr(
            atomicity_defaults, name, lambda *_, **__: atomicity.CommitFileTemporaryPath
        )
    monkeypatch.setattr(damage, "is_bucket", lambda _: True)


def _unfinished(tmp_path: pathlib.Path, step: int) -> None:
    folder = tmp_path / "checkpoints" / str(step)
    for name in ("commit_success.txt", "sha256.json"):
        (folder / name).unlink()


@pytest.mark.usefixtures("as_on_a_bucket")
def test_a_bucket_s_unfinished_checkpoints_are_none(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path, (1, 0.1))
    _unfinished(tmp_path, 1)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:  # the first one of a run that was killed
        assert checkpoints.step() is None
    _saved(tmp_path, (1, 0.1), (2, 0.2))
    _unfinished(tmp_path, 2)
    for read_only in (True, False):
        with checkpoint.Checkpoints(tmp_path, read_only=read_only) as checkpoints:
            _equal(checkpoints.restore(_state())[0], _state(1))
    (tmp_path / "checkpoints/1/sha256.json").unlink()
    with pytest.raises(errors.UserError, match="is damaged"), checkpoint.Checkpoints(tmp_path):
        pass  # finished, and damaged since


@pytest.mark.usefixtures("as_on_a_bucket")
def test_a_bucket_s_replaced_checkpoint_comes_back_unless_the_new_one_is_finished(
    tmp_path: pathlib.Path,
) -> None:
    _saved(tmp_path, (2, None))
    there = tmp_path / "checkpoints"
    shutil.copytree(there / "2", there / "replaced_checkpoint_2")
    _unfinished(tmp_path, 2)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        _equal(checkpoints.restore(_state())[0], _state(2))
    assert [path.name for path in there.iterdir()] == ["2"]


def test_an_operation_that_would_block_is_no_other_run(tmp_path: pathlib.Path) -> None:
    claimed = checkpoint.lock_workdir(checkpoint.epath.Path(tmp_path))
    with pytest.raises(errors.UserError, match="a pipe is full: correct that"), claimed:
        raise BlockingIOError("a pipe is full")


def test_folders_that_are_no_checkpoints(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path, (1, 0.1))
    for name in ("050", "²", "notes"):
        (tmp_path / "checkpoints" / name).mkdir()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        _equal(checkpoints.restore(_state())[0], _state(1))


@pytest.fixture
def slow_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is given to a background thread waits there before it runs."""
    submit = concurrent.futures.ThreadPoolExecutor.submit

    def submit_late(
        self: concurrent.futures.ThreadPoolExecutor,
        run: Callable[..., object],
        *args: object,
        **more: object,
    ):
        def late() -> object:
            time.sleep(0.3)
            return run(*args, **more)

        return submit(self, late)

    monkeypatch.setattr(concurrent.futures.ThreadPoolExecutor, "submit", submit_late)


@pytest.mark.usefixtures("slow_writer")
def test_a_checkpoint_is_a_snapshot(tmp_path: pathlib.Path) -> None:
    config = fixtures.small_config(
        **{"train.log_every": 3, "train.nonfinite": "skip", "data.max_bad_share": 1.0}
    )

    def add(log: progress.Log, step: int) -> None:
        names = ("task_loss", "loss", "top1", "grad_norm")
        values = dict.fromkeys(names, jnp.array([float(step)]))
        log.add(step, values | {"skipped": jnp.array([2]), "nonfinite": jnp.array([0])}, 0.0)

    weights = np.arange(6.0)
    metadata = state.RunMetadata(config={}, label_names=["a"], parent={"parent_top1": 0.5})
    with (
        checkpoint.Checkpoints(tmp_path) as checkpoints,
        progress.Log(
            build.run_options(config), epath.Path(tmp_path), lambda step: 0.1, 0, state.LogState()
        ) as log,
    ):
        for step in range(1, 5):
            add(log, step)
        extra = dataclasses.replace(metadata, log=log.snapshot()).to_json()
        expected = json.loads(json.dumps(extra))
        checkpoints.save(4, {"weights": weights}, top1=0.5, extra=extra)
        weights[:] = -1.0
        extra["label_names"].append("b")
        extra["parent"]["parent_top1"] = 0.1
        extra["rows"][0][1]["loss"] = "changed"
        extra["sizes"].clear()
        metadata.label_names.append("b")
        add(log, 5)
        log.collect()
        add(log, 6)  # writes a row: counters and sizes change, and the list of rows is another one
        restored, saved = checkpoints.restore({"weights": weights})
    assert (
        [row[0] for row in saved["rows"]] == [4]
        and saved["steps"] == 3
        and saved["skipped"] == 6
        and saved["sizes"]
    )
    assert saved == expected | {"step": 4}
    np.testing.assert_array_equal(restored["weights"], np.arange(6.0))


def test_what_a_killed_run_has_half_written_is_cleaned_up(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path, (1, 0.1))
    half = tmp_path / "checkpoints/2.orbax-checkpoint-tmp"
    half.mkdir()
    with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.step() == 1
    assert half.exists()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.step() == 1
        checkpoints.save(
            3, _state(3), top1=0.3, extra={}
        )  # Orbax cleans up in the background, and waits for it here
        assert not half.exists()


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 20 kB, as on a disk that is full; what is written then fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Orbax closes event loops that have work left
@pytest.mark.usefixtures("small_files")
def test_a_full_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        threading, "excepthook", lambda args: None
    )  # as the program does; what fails is raised as well
    _saved(tmp_path, (1, 0.1))
    large = _state(2) | {"large": np.random.default_rng(0).normal(size=(100, 100))}
    message = rf"step 2 cannot be written into {tmp_path}.*earlier checkpoints are still valid"
    with (
        pytest.raises(errors.UserError, match=message),
        checkpoint.Checkpoints(tmp_path) as checkpoints,
    ):
        checkpoints.save(2, large, top1=0.2, extra={})
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        _equal(checkpoints.restore(_state())[0], _state(1))


def test_a_workdir_that_cannot_be_written(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(errors.UserError, match=r"Not a directory.*file/run"),
        checkpoint.lock_workdir(tmp_path / "file/run"),
    ):
        pass
    with (
        pytest.raises(errors.UserError, match=r"no space.*still valid"),
        checkpoint.lock_workdir(tmp_path / "run"),
    ):
        raise OSError(errno.ENOSPC, "no space")


_HOLD = """
import pathlib, sys, time
from avit_jax.training import checkpoint
with checkpoint.lock_workdir(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(1000)
"""


def test_two_runs_in_one_workdir(tmp_path: pathlib.Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tmp_path)], stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with (
            pytest.raises(errors.UserError, match=rf"another run uses {tmp_path}"),
            checkpoint.lock_workdir(tmp_path),
        ):
            pass
        other.kill()
    with checkpoint.lock_workdir(tmp_path):  # a killed run holds nothing
        pass


def test_state_may_be_donated_right_after_saving(tmp_path: pathlib.Path) -> None:
    overwrite = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    state = _state(3)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, state, top1=0.0, extra={})
        overwrite(state)
        assert state["params"]["a"].is_deleted()
        restored, _ = checkpoints.restore(_state())
    _equal(restored, _state(3))
    _equal(
        overwrite(restored), jax.tree.map(jnp.zeros_like, _state(3))
    )  # and so may be what comes back


@pytest.mark.parametrize("which", ["last", "best"])
def test_no_checkpoint(tmp_path: pathlib.Path, which: str) -> None:
    with (
        checkpoint.Checkpoints(tmp_path / "run", read_only=True) as checkpoints,
        pytest.raises(errors.UserError, match=r"no checkpoint.*--workdir"),
    ):
        checkpoints.restore(_state(), which)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"params": {"a": np.zeros((3, 5)), "b": np.zeros((3, 4))}},
            r"params/a is \(3, 4\) there and \(3, 5\) here",
        ),
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
