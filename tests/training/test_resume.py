"""A run that is interrupted, by whatever and whenever, ends where an undisturbed one does; what
cannot go on says why.
"""

import dataclasses
import json
import pathlib
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator

import chex
import fakes
import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax.training import (
    build,
    checkpoint,
    devices,
    distributed,
    evaluate,
    loop,
    progress,
    restore,
    state,
    train_step,
)
from avit_jax.training import parts as parts_lib
from avit_jax.utils import errors


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], pathlib.Path]:
    """The workdir of a run that nothing has disturbed."""
    done: list[pathlib.Path] = []

    def workdir() -> pathlib.Path:  # runs within a test, whose settings it needs
        if not done:
            done.append(tmp_path_factory.mktemp("undisturbed"))
            fakes.run(fakes.config(), done[0])
        return done[0]

    return workdir


@pytest.fixture(scope="module")
def real_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], pathlib.Path]:
    """The workdir of a run whose checkpoint holds a network."""
    done: list[pathlib.Path] = []

    def workdir() -> pathlib.Path:
        if not done:
            done.append(tmp_path_factory.mktemp("real"))
            fakes.real_run(fixtures.small_config(), done[0])
        return done[0]

    return workdir


def _assert_same_end(workdir: pathlib.Path, other: pathlib.Path) -> None:
    chex.assert_trees_all_equal(*(fakes.restored(path) for path in (workdir, other)))
    assert (workdir / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    with (
        checkpoint.Checkpoints(workdir, read_only=True) as a,
        checkpoint.Checkpoints(other, read_only=True) as b,
    ):
        assert a.step("best") == b.step("best")


def _steps(workdir: pathlib.Path, split: str) -> list[int]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if row["split"] == split]


def _crash() -> None:
    raise ZeroDivisionError


def test_rows_of_an_undisturbed_run(undisturbed: Callable[[], pathlib.Path]) -> None:
    assert _steps(undisturbed(), "train") == [4, 6, 8, 9]
    assert _steps(undisturbed(), "eval") == [6, 9]


@pytest.mark.parametrize("step", [2, 5])
def test_a_crash(undisturbed, tmp_path: pathlib.Path, step: int) -> None:
    with pytest.raises(ZeroDivisionError):
        fakes.run(fakes.config(), tmp_path, at={step: _crash})
    fakes.run(fakes.config(), tmp_path)
    _assert_same_end(tmp_path, undisturbed())


def test_a_crash_of_a_real_run(tmp_path: pathlib.Path) -> None:
    """Batches and random keys go on too where they were; an epoch is 90 steps."""
    config = fakes.config()

    def failing(start: int) -> Iterator[object]:
        batches = parts.batches(start)
        yield from (next(batches) for _ in range(4))
        _crash()

    loop.train(config, tmp_path / "whole")
    parts = parts_lib.of_config(config)
    with pytest.raises(ZeroDivisionError):
        loop.run(dataclasses.replace(parts, batches=failing), tmp_path / "run")
    loop.train(config, tmp_path / "run")
    chex.assert_trees_all_equal(
        *(fixtures.restored_state(config, tmp_path / name) for name in ("whole", "run"))
    )
    assert len({(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "run")}) == 1
    assert len({(tmp_path / name / "depth.png").read_bytes() for name in ("whole", "run")}) == 1


@pytest.mark.parametrize(("name", "step"), [("SIGTERM", 5), ("SIGINT", 9)])
def test_a_signal(
    undisturbed, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, name: str, step: int
) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with caplog.at_level("INFO", logger="avit_jax"):
        fakes.run(
            fakes.config(), tmp_path, at={step: lambda: signal.raise_signal(signal.Signals[name])}
        )
    assert f"stopped by {name} after step {step}" in caplog.text
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
        saved, metadata = checkpoints.restore(jax.device_get(fakes.create()))
    assert saved.step == step
    started = time.monotonic()
    fakes.run(fakes.config(), tmp_path)
    total = json.loads((tmp_path / "summary.json").read_text())["train_seconds"]
    before = metadata["train_seconds"]
    assert before < total < before + time.monotonic() - started
    _assert_same_end(tmp_path, undisturbed())


def test_a_signal_during_evaluation(undisturbed, tmp_path: pathlib.Path) -> None:
    class Signalling(fakes.Evaluator):
        def __call__(
            self, params: object, stop: Callable[[], bool] = lambda: False
        ) -> evaluate.Results | None:
            signal.raise_signal(signal.SIGTERM)
            return super().__call__(params, stop)

    parts = dataclasses.replace(fakes.parts(fakes.config()), evaluator=Signalling())
    loop.run(parts, tmp_path)
    assert fakes.restored(tmp_path).step == 6
    assert _steps(tmp_path, "train") == [4, 6]
    assert _steps(tmp_path, "eval") == []
    fakes.run(fakes.config(), tmp_path)
    _assert_same_end(tmp_path, undisturbed())


def test_a_row_of_earlier_starts_tells_no_speed(caplog: pytest.LogCaptureFixture) -> None:
    row = {"loss": 1.0, "top1": 0.5, "skipped": 0.0, "nonfinite": 0.0}
    before = state.LogState(rows=((1, row),))
    options = build.run_options(fakes.config())
    with (
        caplog.at_level("INFO", logger="avit_jax"),
        progress.Log(options, None, lambda step: 0.1, 1, before) as log,
    ):
        log.flush()
    assert "step 1/9  loss 1.0000  top-1 50.0%" in caplog.text
    assert "images/s" not in caplog.text and "ETA" not in caplog.text


def test_a_run_that_is_prolonged_has_not_ended(undisturbed, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "longer"
    shutil.copytree(undisturbed(), workdir)
    with pytest.raises(ZeroDivisionError):
        fakes.run(
            fakes.config(**{"train.steps": 12}), workdir, allow_changed_config=True, at={10: _crash}
        )
    assert not (workdir / "summary.json").exists()


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Orbax closes event loops that have work left
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
        fakes.run(fakes.config(**{"train.steps": 12}), workdir, allow_changed_config=True)
    assert not (workdir / "summary.json").exists()


def test_a_finished_run_only_reports(undisturbed, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "again"
    shutil.copytree(undisturbed(), workdir)
    (workdir / "summary.json").unlink()
    fakes.run(fakes.config(), workdir)
    assert (workdir / "summary.json").exists()
    _assert_same_end(workdir, undisturbed())


def test_a_damaged_checkpoint(
    undisturbed, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    workdir = tmp_path / "damaged"
    shutil.copytree(undisturbed(), workdir)
    (file, *_) = (workdir / "checkpoints/9/state/ocdbt.process_0/d").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with caplog.at_level("INFO", logger="avit_jax"):
        fakes.run(fakes.config(), workdir)
    assert f"the checkpoint of step 9 in {workdir}/checkpoints is damaged" in caplog.text
    assert "continuing from the checkpoint of step 6" in caplog.text
    _assert_same_end(workdir, undisturbed())


def test_a_changed_configuration(undisturbed, tmp_path: pathlib.Path) -> None:
    workdir = tmp_path / "changed"
    shutil.copytree(undisturbed(), workdir)
    changed = {"optimizer.learning_rate": 2e-3, "train.steps": 10}
    with pytest.raises(
        errors.UserError,
        match=r"optimizer\.learning_rate from 0\.001 to 0\.002, train\.steps from 9 to 10\. "
        r".*--allow_changed_config",
    ):
        fakes.run(fakes.config(**changed), workdir)
    free = {
        "data.num_threads": 3,
        "data.dir": str(tmp_path),
        "train.save_every": 4,
        "eval.pictures": 1,
    }
    fakes.run(fakes.config(**free), workdir)
    fakes.run(fakes.config(**changed), workdir, allow_changed_config=True)
    assert fakes.restored(workdir).step == 10
    assert _steps(workdir, "train") == [4, 6, 8, 9, 10]


def test_classes_of_other_names(undisturbed, tmp_path: pathlib.Path) -> None:
    workdir, config = tmp_path / "renamed", fakes.config()
    shutil.copytree(undisturbed(), workdir)
    parts = fakes.parts(config)
    source = dataclasses.replace(parts.source, label_names=["a", "c"])
    renamed = dataclasses.replace(parts, source=source)
    with pytest.raises(
        errors.UserError,
        match=r'class 1 .* is "c", and was "b" in training: .*--allow_changed_config',
    ):
        loop.run(renamed, workdir)
    loop.run(renamed, workdir, allow_changed_config=True)
    assert "has 1 classes, and had 2" in restore.changed_class(["a", "b"], ["a"])


def test_classes_of_other_names_in_an_evaluation(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    of_folder = {
        "data.name": "folder",
        "data.dir": str(tmp_path),
        "model.channels": 3,
        "model.num_classes": 2,
    }
    config = fixtures.small_config(**of_folder, **{"eval.batch_size": 8})
    for split in ("train", "test"):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(8):
                (tmp_path / split / name / f"{i}.png").write_bytes(
                    fixtures.png(np.zeros((16, 16, 3), np.uint8))
                )
    config.data.mean, config.data.std = (0.5,), (0.25,)
    fakes.real_run(config, tmp_path / "run")
    (tmp_path / "test/b").rename(tmp_path / "test/c")
    with caplog.at_level("WARNING", logger="avit_jax"):
        evaluate.evaluate_checkpoint(config, tmp_path / "run")
    assert 'class 1 of the data set is "c", and was "b" in training' in caplog.text


def test_data_of_another_length(undisturbed, tmp_path: pathlib.Path) -> None:
    workdir, config = tmp_path / "grown", fakes.config()
    shutil.copytree(undisturbed(), workdir)
    fewer = fakes.Evaluator(dataclasses.replace(fakes.SOURCES[1], records=range(7)))
    parts = dataclasses.replace(fakes.parts(config), evaluator=fewer)
    with pytest.raises(
        errors.UserError, match=r"the evaluation split has other files.*--allow_changed_config"
    ):
        loop.run(parts, workdir)
    loop.run(parts, workdir, allow_changed_config=True)
    assert not restore.changed_data({}, {"training": "of a run that has not kept it"})


def test_an_operation_that_fails_on_several_processes_says_why(monkeypatch) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    told = r"another process of the run has ended .* \(INTERNAL: no such collective\): read"
    with pytest.raises(errors.UserError, match=told), distributed.ended_together():
        raise jax.errors.JaxRuntimeError("INTERNAL: no such collective\nmore")


def test_processes_that_do_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    config = fakes.config()
    others = fakes.config(**{"optimizer.learning_rate": 2e-3, "data.dir": "/elsewhere"})
    with monkeypatch.context() as patch:
        patch.setattr(
            distributed, "from_first_json", lambda _: json.loads(others.to_json_best_effort())
        )
        with pytest.raises(
            errors.UserError,
            match=r"that of the first process: optimizer\.learning_rate from 0\.002 to 0\.001; start",
        ):
            build.check(config, "train")
    monkeypatch.setattr(distributed, "from_first_json", lambda _: "another fingerprint")
    for load in (evaluate.Evaluator, parts_lib.of_config):
        with pytest.raises(
            errors.UserError,
            match=r'the digits, split ".*" differs from that of the first process',
        ):
            load(config, build.model(config))


@pytest.mark.parametrize("value", ["task_loss", "loss", "grad_norm", "param_norm"])
def test_a_loss_that_is_not_finite_stops_the_run_and_saves_nothing(
    tmp_path: pathlib.Path, value: str
) -> None:
    config = fakes.config(**{"train.save_every": 1})
    told = rf"{value} became nan at step 3, learning rate .*--config"
    with pytest.raises(errors.UserError, match=told):
        fakes.run(config, tmp_path, poisoned=(3,), value=value)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.step() == 2


def test_a_real_loss_that_is_not_finite(tmp_path: pathlib.Path) -> None:
    config = fixtures.small_config(
        **{"optimizer.learning_rate": 1e30, "optimizer.warmup": 0.0, "train.steps": 20}
    )
    with pytest.raises(
        errors.UserError,
        match=r"(\w+_loss|loss|\w+_norm) became (nan|inf) at step \d+, learning rate",
    ):
        loop.train(config, tmp_path)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_the_operation_of_a_nan_is_found(tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=r"nan.*debug\.nans"):
        fakes.run(fakes.config(**{"debug.nans": True}), tmp_path, poisoned=(2,))


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loss of a batch that holds an image of class 7 is nan."""
    total_loss = train_step.total_loss

    def patched(model, logits, aux, targets, *rest) -> tuple[jax.Array, dict[str, jax.Array]]:
        total, values = total_loss(model, logits, aux, targets, *rest)
        total *= jnp.where((targets == 7).any(), jnp.nan, 1.0)
        return total, values | {"loss": total}

    monkeypatch.setattr(train_step, "total_loss", patched)


def test_a_skipped_step_between_two_rows_stops_nothing(tmp_path: pathlib.Path) -> None:
    config = fakes.config(**{"train.nonfinite": "skip", "train.log_every": 1, "train.steps": 12})
    fakes.run(config, tmp_path, poisoned=(1, 4, 5, 11))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "train"]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert [(row["step"], row["nonfinite"]) for row in rows if row["nonfinite"]] == [
        (2, 1),
        (6, 2),
        (12, 1),
    ]


def test_a_run_of_skipped_updates_alone_has_no_result(tmp_path: pathlib.Path) -> None:
    for steps, last in ((5, 5), (30, 20)):
        config = fakes.config(**{"train.nonfinite": "skip", "train.steps": steps})
        with pytest.raises(
            errors.UserError, match=rf"not finite in any of the {last} steps up to step {last}"
        ):
            fakes.run(config, tmp_path / str(steps), poisoned=tuple(range(1, 31)))
        assert not (tmp_path / str(steps) / "summary.json").exists()


@pytest.mark.usefixtures("poisoned")
def test_skipped_updates_leave_no_trace() -> None:
    config = fixtures.small_config(
        **{"model.drop_path": 0.0, "affine.rotate": 0.0, "affine.translate": 0.0}
    )
    config.train.nonfinite = "skip"
    model, (tx, _) = build.model(config), build.optimizer(config)
    step = train_step.make_train_step(model, tx, build.step_options(config))
    step_fn = devices.parallel(step, devices=jax.devices()[:2])
    rng = np.random.default_rng(0)

    def batch(label: int) -> dict[str, np.ndarray]:
        return {
            "image": rng.integers(0, 256, (2, 4, 16, 16, 1), np.uint8),
            "label": np.array([[1, 2, 3, 4], [1, 2, 3, label]], np.int32),  # of one device only
            "index": np.arange(8, dtype=np.int32).reshape(2, 4),
            "skipped": np.zeros((2, 4), np.int32),
        }

    def run(*batches: dict[str, np.ndarray]) -> tuple[state.TrainState, list[bool]]:
        after = build.new_state(model, tx, seed=0, ema=True)
        after, skipped = devices.replicate(after, jax.devices()[:2]), []
        for one in batches:
            after, values = step_fn(after, one)
            skipped.append(bool(values["nonfinite"][0]))
        return jax.device_get(after), skipped

    first, bad = batch(5), batch(7)
    after, skipped = run(first, bad)
    expected, none = run(first)
    assert skipped == [False, True] and none == [False]
    assert (after.step == 2).all()

    def compare(after: np.ndarray, before: np.ndarray) -> None:
        steps = after.dtype == np.int32  # the learning rate goes on
        np.testing.assert_array_equal(after, before + 1 if steps else before)

    jax.tree.map(compare, after, expected)


def test_skipped_updates_are_counted(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = fakes.config(**{"train.nonfinite": "skip", "train.log_every": 6, "train.steps": 6})
    with caplog.at_level("WARNING", logger="avit_jax"):
        fakes.run(config, tmp_path, poisoned=(2, 3))
    (row,) = [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()[:-1]
    ]
    assert row["nonfinite"] == 2
    assert np.isfinite([row["loss"], row["grad_norm"]]).all()
    assert "2 of the last 6 updates" in caplog.text


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda past: past.pop("evaluated"), "another version .*evaluated"),
        (lambda past: past.update(config=[]), "another version .*config"),
        (
            lambda past: past.update(rows="x", train_seconds="x"),
            "another version .*train_seconds, rows",
        ),
        (
            lambda past: past.update(rows=[[1, {"loss": "x"}]], skipped=-1, steps=True),
            "rows, skipped, steps",
        ),
        (lambda past: past.update(train_seconds=float("nan")), "train_seconds"),
        (
            lambda past: past.update(
                sizes={"metrics.jsonl": -5}, label_names=[1], parent={"x": []}, data={"training": 1}
            ),
            "data",
        ),
    ],
)
def test_a_checkpoint_with_other_contents(
    undisturbed, real_run, tmp_path: pathlib.Path, monkeypatch, change, told: str
) -> None:
    workdir = tmp_path / "other"
    shutil.copytree(undisturbed(), workdir)
    as_it_is = checkpoint.Checkpoints.restore

    def changed(self: checkpoint.Checkpoints, *args: object) -> tuple[object, dict[str, object]]:
        found, metadata = as_it_is(self, *args)
        change(metadata)
        return found, metadata

    monkeypatch.setattr(checkpoint.Checkpoints, "restore", changed)
    with pytest.raises(errors.UserError, match=told):
        fakes.run(fakes.config(), workdir)
    config = fixtures.small_config()
    with pytest.raises(errors.UserError, match=told):
        restore.params(config, build.model(config), real_run())


def test_fewer_steps_than_have_been_done(undisturbed) -> None:
    with pytest.raises(errors.UserError, match=r"of step 9, beyond config\.train\.steps, 8"):
        fakes.run(fakes.config(**{"train.steps": 8}), undisturbed(), allow_changed_config=True)
