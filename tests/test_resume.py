"""A run that is interrupted, by whatever and whenever, ends where an undisturbed one does; what cannot go on says why."""

import dataclasses
import json
import pathlib
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import chex
import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from avit_jax import build, checkpoint, distributed, errors, evaluate, restore, train, train_step
from avit_jax.data import sources

_OVERRIDES = {"train.steps": 9, "train.log_every": 4, "train.eval_every": 6, "train.save_every": 3}


def _config(**overrides: object) -> ConfigDict:
    """Windows of the log, evaluations and checkpoints that end at different steps; an epoch is 90 steps."""
    return fixtures.small_config(**_OVERRIDES | overrides)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], pathlib.Path]:
    """The workdir of a run that nothing has disturbed."""
    done: list[pathlib.Path] = []

    def workdir() -> pathlib.Path:  # runs within a test, whose settings it needs
        if not done:
            done.append(tmp_path_factory.mktemp("undisturbed"))
            train.train(_config(), done[0])
        return done[0]

    return workdir


def _assert_same_end(workdir: pathlib.Path, other: pathlib.Path) -> None:
    chex.assert_trees_all_equal(*(fixtures.restored_state(_config(), path) for path in (workdir, other)))
    assert (workdir / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    with (
        checkpoint.Checkpoints(workdir, read_only=True) as a,
        checkpoint.Checkpoints(other, read_only=True) as b,
    ):
        assert a.step("best") == b.step("best")


def _steps(workdir: pathlib.Path, split: str) -> list[int]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["split"] == split]


def _at_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Does something while a step of the next run is in hand."""
    next_, count = train._next, iter(range(1, 1000))

    def patched(*args: object) -> object:
        if next(count) == step:
            action()
        return next_(*args)

    monkeypatch.setattr(train, "_next", patched)


def test_rows_of_an_undisturbed_run(undisturbed: Callable[[], pathlib.Path]) -> None:
    assert _steps(undisturbed(), "train") == [4, 6, 8, 9]
    assert _steps(undisturbed(), "eval") == [6, 9]


@pytest.mark.parametrize("step", [2, 5])
def test_a_crash(undisturbed, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    def crash() -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        _at_step(patch, step, crash)
        train.train(_config(), tmp_path)
    train.train(_config(), tmp_path)
    _assert_same_end(tmp_path, undisturbed())


@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 5), ("SIGINT", 9)])
def test_a_signal(undisturbed, tmp_path: pathlib.Path, monkeypatch, caplog, name: str, step: int) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch, caplog.at_level("INFO", logger="avit_jax"):
        _at_step(patch, step, lambda: signal.raise_signal(signal.Signals[name]))
        train.train(_config(), tmp_path)
    assert f"stopped by {name} after step {step}" in caplog.text
    assert fixtures.restored_state(_config(), tmp_path).step == step
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
        seconds = checkpoints.restore(fixtures.restored_state(_config(), tmp_path))[1]["train_seconds"]
    started = time.monotonic()
    train.train(_config(), tmp_path)
    total = json.loads((tmp_path / "summary.json").read_text())["train_seconds"]
    assert seconds < total < seconds + time.monotonic() - started
    _assert_same_end(tmp_path, undisturbed())


def test_a_signal_during_evaluation(undisturbed, tmp_path: pathlib.Path, monkeypatch) -> None:
    class Signalling(evaluate.Evaluator):
        def __call__(self, params: object, stop: Callable[[], bool] = lambda: False) -> evaluate.Results | None:
            signal.raise_signal(signal.SIGTERM)
            return super().__call__(params, stop)

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "Evaluator", Signalling)
        train.train(_config(), tmp_path)
    assert fixtures.restored_state(_config(), tmp_path).step == 6
    assert _steps(tmp_path, "train") == [4, 6]
    assert _steps(tmp_path, "eval") == []
    train.train(_config(), tmp_path)
    _assert_same_end(tmp_path, undisturbed())


def test_a_second_signal_ends_at_once(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(distributed.os, "_exit", sys.exit)
    with distributed.Stop() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(SystemExit) as exit_:
            signal.raise_signal(signal.SIGTERM)
    assert exit_.value.code == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "SIGINT: stopping after the current step; a second signal stops at once\n"


def test_a_run_that_is_prolonged_has_not_ended(undisturbed, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir = tmp_path / "longer"
    shutil.copytree(undisturbed(), workdir)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        _at_step(patch, 1, lambda: 1 / 0)
        train.train(_config(**{"train.steps": 12}), workdir, allow_changed_config=True)
    assert not (workdir / "summary.json").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax closes event loops that have work left
def test_a_run_whose_last_checkpoint_is_not_written_has_not_ended(
    undisturbed, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: checkpoint.Checkpoints) -> None:
        raise OSError("no space left on device")

    workdir = tmp_path / "full"
    shutil.copytree(undisturbed(), workdir)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(checkpoint.Checkpoints, "_write_digests", full)
    with pytest.raises(errors.UserError, match=r"step 12 cannot be written .*no space left"):
        train.train(_config(**{"train.steps": 12}), workdir, allow_changed_config=True)
    assert not (workdir / "summary.json").exists()


def test_a_finished_run_only_reports(undisturbed, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "again"
    shutil.copytree(undisturbed(), workdir)
    (workdir / "summary.json").unlink()
    train.train(_config(), workdir)
    assert (workdir / "summary.json").exists()
    _assert_same_end(workdir, undisturbed())


def test_a_damaged_checkpoint(undisturbed, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    workdir = tmp_path / "damaged"
    shutil.copytree(undisturbed(), workdir)
    (file, *_) = (workdir / "checkpoints/9/state/ocdbt.process_0/d").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level("INFO", logger="avit_jax"):
        train.train(_config(), workdir)
    assert f"the checkpoint of step 9 in {workdir}/checkpoints is damaged" in caplog.text
    assert "going on from the checkpoint of step 6" in caplog.text
    _assert_same_end(workdir, undisturbed())


def test_a_changed_configuration(undisturbed, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "changed"
    shutil.copytree(undisturbed(), workdir)
    changed = {"optimizer.learning_rate": 2e-3, "train.steps": 10}
    with pytest.raises(
        errors.UserError,
        match=r"optimizer\.learning_rate from 0\.001 to 0\.002, train\.steps from 9 to 10\. .*--allow_changed_config",
    ):
        train.train(_config(**changed), workdir)
    free = {"data.num_threads": 3, "data.dir": str(tmp_path), "train.save_every": 4, "eval.pictures": 1}
    train.train(_config(**free), workdir)
    train.train(_config(**changed), workdir, allow_changed_config=True)
    assert fixtures.restored_state(_config(), workdir).step == 10
    assert _steps(workdir, "train") == [4, 6, 8, 9, 10]


def test_classes_of_other_names(undisturbed, tmp_path: pathlib.Path, monkeypatch, caplog: pytest.LogCaptureFixture) -> None:
    workdir, digits = tmp_path / "renamed", sources._digits
    shutil.copytree(undisturbed(), workdir)
    names = [str(i) for i in (0, 2, 1, *range(3, 10))]
    monkeypatch.setattr(sources, "_digits", lambda *args: dataclasses.replace(digits(*args), label_names=names))
    odd = 'class 1 of the data set is "2", and was "1" in training'
    with pytest.raises(errors.UserError, match=f"{odd}: .*--allow_changed_config"):
        train.train(_config(), workdir)
    with caplog.at_level("WARNING", logger="avit_jax"):
        train.restore_and_evaluate(_config(), workdir)
    assert odd in caplog.text
    train.train(_config(), workdir, allow_changed_config=True)
    assert "has 9 classes, and had 10" in restore.changed_class({"label_names": names}, names[1:])


def test_data_of_another_length(undisturbed, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir, digits = tmp_path / "grown", sources._digits
    shutil.copytree(undisturbed(), workdir)

    def fewer(split: str, *args: object) -> sources.Source:
        source = digits(split, *args)
        return source if split == "train" else dataclasses.replace(source, records=source.records[1:])

    monkeypatch.setattr(sources, "_digits", fewer)
    with pytest.raises(errors.UserError, match=r"the evaluation split has other files.*--allow_changed_config"):
        train.train(_config(), workdir)
    train.train(_config(), workdir, allow_changed_config=True)
    assert not restore._changed_data({}, {"training": "of a run that has not kept it"})


def test_processes_that_do_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config()
    others = _config(**{"optimizer.learning_rate": 2e-3, "data.dir": "/elsewhere"})
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "from_first_json", lambda _: json.loads(others.to_json_best_effort()))
        with pytest.raises(errors.UserError, match=r"first process's: optimizer\.learning_rate from 0\.002 to 0\.001; start"):
            train.check(config, "train")
    monkeypatch.setattr(distributed, "from_first_json", lambda _: "another fingerprint")
    for load in (evaluate.Evaluator, train.load_source):
        with pytest.raises(errors.UserError, match=r'the digits, split ".*" is not the same here as on the first process'):
            load(config, build.model(config))


def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path: pathlib.Path) -> None:
    config = fixtures.small_config(**{"optimizer.learning_rate": 1e30, "optimizer.warmup": 0.0, "train.steps": 20})
    config.train.save_every = 1
    told = r"(\w+_loss|loss|\w+_norm) became (nan|inf) at step \d+, learning rate .*--config"
    with pytest.raises(errors.UserError, match=told):
        train.train(config, tmp_path)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.step() is None
    config.train.update({"nonfinite": "skip", "steps": 30})
    with pytest.raises(errors.UserError, match=r"not finite in any of the 20 steps up to step \d+"):
        train.train(config, tmp_path / "skip")


def test_the_operation_of_a_nan_is_found(tmp_path: pathlib.Path) -> None:
    small = {"model.depth": 1, "halting.enabled": False, "affine.rotate": 0.0, "affine.translate": 0.0, "model.drop_path": 0.0}
    config = fixtures.small_config(**small | {"optimizer.learning_rate": 1e30, "optimizer.warmup": 0.0, "debug.nans": True})
    with pytest.raises(errors.UserError, match=r"nan.*debug\.nans"):
        train.train(config, tmp_path)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loss of a batch that holds an image of class 7 is nan."""
    total_loss = train_step.total_loss

    def patched(model, logits, aux, targets, *rest) -> tuple[jax.Array, dict[str, jax.Array]]:
        total, values = total_loss(model, logits, aux, targets, *rest)
        total *= jnp.where((targets == 7).any(), jnp.nan, 1.0)
        return total, values | {"loss": total}

    monkeypatch.setattr(train_step, "total_loss", patched)


@pytest.mark.usefixtures("poisoned")
def test_a_skipped_step_between_two_rows_stops_nothing(tmp_path: pathlib.Path) -> None:
    config = fixtures.small_config(
        **{"train.nonfinite": "skip", "train.log_every": 1, "train.steps": 12, "train.batch_size": 8}
    )
    train.train(config, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "train"]
    assert all(np.isfinite(row["loss"]) for row in rows)
    steps = [row["step"] for row in rows]
    assert [row["nonfinite"] for row in rows] == [now - before - 1 for before, now in zip([0, *steps], steps, strict=False)]
    assert sum(row["nonfinite"] for row in rows) > 0


def test_a_run_of_skipped_updates_alone_has_no_result(tmp_path: pathlib.Path) -> None:
    config = fixtures.small_config(**{"train.nonfinite": "skip", "train.steps": 5})
    config.optimizer.update({"learning_rate": 1e30, "warmup": 0.0, "weight_decay": 1e9})  # the first update is infinite
    with pytest.raises(errors.UserError, match=r"not finite in any of the 5 steps up to step 5"):
        train.train(config, tmp_path)
    assert not (tmp_path / "summary.json").exists()


@pytest.mark.usefixtures("poisoned")
def test_skipped_updates_leave_no_trace() -> None:
    config = fixtures.small_config(**{"model.drop_path": 0.0, "affine.rotate": 0.0, "affine.translate": 0.0})
    config.train.nonfinite = "skip"
    model, (tx, _) = build.model(config), build.optimizer(config)
    step_fn = jax.pmap(train_step.make_train_step(model, tx, config), axis_name=train_step.AXIS, devices=jax.devices()[:2])
    rng = np.random.default_rng(0)

    def batch(label: int) -> dict[str, np.ndarray]:
        return {
            "image": rng.integers(0, 256, (2, 4, 16, 16, 1), np.uint8),
            "label": np.array([[1, 2, 3, 4], [1, 2, 3, label]], np.int32),  # of one device only
            "index": np.arange(8, dtype=np.int32).reshape(2, 4),
            "skipped": np.zeros((2, 4), np.int32),
        }

    def run(*batches: dict[str, np.ndarray]) -> tuple[build.TrainState, list[bool]]:
        state = build.new_state(model, tx, seed=0, ema=True)
        state, skipped = evaluate.replicate(state, jax.devices()[:2]), []
        for one in batches:
            state, values = step_fn(state, one)
            skipped.append(bool(values["nonfinite"][0]))
        return jax.device_get(state), skipped

    first, bad = batch(5), batch(7)
    state, skipped = run(first, bad)
    expected, none = run(first)
    assert skipped == [False, True] and none == [False]
    assert (state.step == 2).all()

    def compare(after: np.ndarray, before: np.ndarray) -> None:
        steps = after.dtype == np.int32  # the learning rate goes on
        np.testing.assert_array_equal(after, before + 1 if steps else before)

    jax.tree.map(compare, state, expected)


@pytest.mark.usefixtures("poisoned")
def test_skipped_updates_are_counted(tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    config = fixtures.small_config(**{"train.nonfinite": "skip", "train.log_every": 6, "train.batch_size": 8})
    with caplog.at_level("WARNING", logger="avit_jax"):
        train.train(config, tmp_path)
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]]
    assert 0 < row["nonfinite"] < 6
    assert np.isfinite([row["loss"], row["grad_norm"]]).all()
    assert f"{row['nonfinite']} of the last 6 updates" in caplog.text


def test_an_update_that_overflows_is_not_saved(tmp_path: pathlib.Path) -> None:
    overflow = {"learning_rate": 1e38, "warmup": 0.0, "weight_decay": 5.0}  # the loss and the gradient of the step are finite
    config = fixtures.small_config(**{f"optimizer.{key}": value for key, value in overflow.items()} | {"train.save_every": 1})
    with pytest.raises(errors.UserError, match=r"param_norm became (nan|inf) at step 1,"):
        train.train(config, tmp_path)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.step() is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda past: past.pop("evaluated"), "another version .*evaluated"),
        (lambda past: past.update(config=[]), "another version .*config"),
        (lambda past: past.update(rows="x", train_seconds="x"), "another version .*train_seconds, rows"),
        (lambda past: past.update(rows=[[1, {"loss": "x"}]], skipped=-1, steps=True), "rows, skipped, steps"),
        (lambda past: past.update(train_seconds=float("nan")), "train_seconds"),
        (
            lambda past: past.update(sizes={"metrics.jsonl": -5}, label_names=[1], parent={"x": []}, data={"training": 1}),
            "data",
        ),
    ],
)
def test_a_checkpoint_with_other_contents(undisturbed, tmp_path: pathlib.Path, monkeypatch, change, told: str) -> None:
    workdir = tmp_path / "other"
    shutil.copytree(undisturbed(), workdir)
    restore = checkpoint.Checkpoints.restore

    def changed(self: checkpoint.Checkpoints, *args: object) -> tuple[object, dict[str, object]]:
        state, past = restore(self, *args)
        change(past)
        return state, past

    monkeypatch.setattr(checkpoint.Checkpoints, "restore", changed)
    for use in (train.train, train.restore_and_evaluate):
        with pytest.raises(errors.UserError, match=told):
            use(_config(), workdir)


def test_fewer_steps_than_have_been_done(undisturbed) -> None:
    with pytest.raises(errors.UserError, match=r"of step 9, beyond config\.train\.steps, 8"):
        train.train(_config(**{"train.steps": 8}), undisturbed(), allow_changed_config=True)
