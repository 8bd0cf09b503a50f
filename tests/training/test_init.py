"""Training that starts from a weight file: its numbers, the accuracy of the parent, resumption."""

import contextlib
import json
import os
import pathlib
import signal
from collections.abc import Callable

import chex
import fakes
import fixtures
import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax.training import build, checkpoint, devices, evaluate, loop, restore, teacher
from avit_jax.training import parts as parts_lib
from avit_jax.training.state import RunMetadata
from avit_jax.utils import errors
from avit_jax.weights import weight_files

_METADATA = RunMetadata(config={}, label_names=[])


@pytest.fixture
def parent(tmp_path: pathlib.Path) -> pathlib.Path:
    """A weight file of the small network."""
    config = fixtures.small_config()
    model, (tx, _) = build.model(config), build.optimizer(config)
    state = build.new_state(model, tx, seed=5, ema=False)
    weight_files.write(tmp_path / "parent.safetensors", state.params, model)
    return tmp_path / "parent.safetensors"


def _config(parent: pathlib.Path, **overrides: object) -> ConfigDict:
    still = {"learning_rate": 1e-9, "warmup_learning_rate": 0.0, "min_learning_rate": 0.0}
    start = {"init": str(parent), "train.steps": 2} | {
        f"optimizer.{key}": value for key, value in still.items()
    }
    return fixtures.small_config(**start | overrides)


def _summary(workdir: pathlib.Path) -> dict[str, float]:
    return json.loads((workdir / "summary.json").read_text())


def test_a_run_starts_from_the_file_and_knows_its_parent(
    parent: pathlib.Path, tmp_path: pathlib.Path, monkeypatch
) -> None:
    config = _config(parent)
    loop.train(config, tmp_path / "run")
    model = build.model(config)
    params = weight_files.load(parent, model)
    state = fixtures.restored_state(config, tmp_path / "run")
    for tree in (state.params, state.ema_params):
        chex.assert_trees_all_close(tree, params, atol=1e-6)
    static = model.clone(halting=None)
    expected = float(evaluate.Evaluator(config, static)(devices.replicate(params))["top1"])
    assert _summary(tmp_path / "run")["parent_top1"] == expected

    # Evaluated from the run, and without one.
    evaluate.evaluate_checkpoint(config, tmp_path / "run")
    assert json.loads((tmp_path / "run/eval.json").read_text())["parent_top1"] == expected
    config.eval.checkpoint = "init"
    evaluate.evaluate_checkpoint(config, tmp_path / "none")
    evaluated = json.loads((tmp_path / "none/eval.json").read_text())
    assert evaluated["top1"] == pytest.approx(_summary(tmp_path / "run")["top1"], abs=0.01)


def test_a_resumed_run_takes_its_checkpoint_and_remembers(
    parent: pathlib.Path, tmp_path: pathlib.Path, monkeypatch
) -> None:
    config = _config(parent, **{"train.save_every": 1, "optimizer.learning_rate": 1e-3})
    fakes.real_run(config, tmp_path / "whole")

    save = checkpoint.Checkpoints.save

    def save_once(self: checkpoint.Checkpoints, step: int, *args: object, **kwargs: object) -> None:
        if step > 1:
            raise ZeroDivisionError
        save(self, step, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(checkpoint.Checkpoints, "save", save_once)
        fakes.real_run(config, tmp_path / "parts")
    parent.unlink()
    fakes.real_run(config, tmp_path / "parts")
    chex.assert_trees_all_equal(
        *(fixtures.restored_state(config, tmp_path / name) for name in ("whole", "parts"))
    )
    assert (
        _summary(tmp_path / "parts")["parent_top1"] == _summary(tmp_path / "whole")["parent_top1"]
    )


def test_the_grid_of_the_file_is_that_of_the_configuration(
    parent: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    safetensors.numpy.save_file(
        safetensors.numpy.load_file(parent), parent
    )  # without metadata, as others write them
    wide = {
        "model.image_size": (8, 32),
        "model.patch_size": 4,
        "eval.checkpoint": "init",
    }  # 2 x 8 patches, and 4 x 4 there
    expected = weight_files.load(parent, build.model(_config(parent)))["pos_embed"]
    for grid in ((), (2, 8), (4, 4)):
        config = _config(parent, **wide | {"init_grid": grid})
        config_lib.check(config)
        params = restore.params(config, build.model(config), tmp_path)[0]
        assert np.array_equal(params["pos_embed"], expected) == (grid != (4, 4))
        of_file, _ = restore.trained(config, build.model(config), parent)
        np.testing.assert_array_equal(of_file["pos_embed"], params["pos_embed"])
    for grid in ((4,), (0, 4), (2.0, 8.0), ("2", "8"), (2, 8, 1)):
        with pytest.raises(errors.UserError, match=r"config\.init_grid must be"):
            config_lib.check(_config(parent, init_grid=grid))


def test_a_folder_of_hugging_face_is_a_start(parent: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = _config(parent)
    model, folder = build.model(config), tmp_path / "hf"
    params = weight_files.load(parent, model)
    weight_files.write(folder / "model.safetensors", params, model, names="huggingface")
    chex.assert_trees_all_equal(restore.trained(config, model, folder)[0], params)
    config.update({"init": str(folder)})
    config.eval.checkpoint = "init"
    chex.assert_trees_all_equal(restore.params(config, model, tmp_path)[0], params)


def test_another_number_of_classes(parent: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = fixtures.small_config(**{"model.num_classes": 7})
    model = build.model(config)
    other = tmp_path / "other.safetensors"
    weight_files.write(other, build.creation(config, model)().params, model)
    config = _config(other, init_new_head=True)
    model = build.model(config)
    parts = parts_lib.of_config(config)
    run = restore.begin(parts.create, parts.initial_params, None, _METADATA, steps=2)
    state = run.train
    for params in (state.params, state.ema_params):
        assert params["head"]["kernel"].shape == (16, 10) and not params["head"]["kernel"].any()
    assert parts.parent == ""
    none = teacher.measure_baselines(run, model, None, parts.top1, lambda: False)
    assert none == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_parent_is_evaluated_ends_the_run(
    parent: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
) -> None:
    class Signalled(evaluate.Evaluator):
        def __call__(
            self, params: object, stop: Callable[[], bool] = lambda: False
        ) -> evaluate.Results | None:
            stop()
            os.kill(os.getpid(), number)
            return super().__call__(params, stop)

    caplog.set_level("INFO", logger="avit_jax")
    config = _config(parent)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "Evaluator", Signalled)
        with (
            pytest.raises(KeyboardInterrupt)
            if number == signal.SIGINT
            else contextlib.nullcontext()
        ):
            fakes.real_run(config, tmp_path / "run")
    if number == signal.SIGTERM:
        assert caplog.messages[-1] == "stopped by SIGTERM before training"
    fakes.real_run(config, tmp_path / "run")
    assert 0 < _summary(tmp_path / "run")["parent_top1"] < 1


def test_options_of_reading_the_start(parent: pathlib.Path, tmp_path: pathlib.Path) -> None:
    config = _config(parent, **{"model.image_size": (8, 8), "init_antialias": True})
    config.eval.checkpoint = "init"
    model = build.model(config)
    expected = weight_files.load(parent, model, antialias=True)
    assert model.grid != build.model(_config(parent)).grid
    chex.assert_trees_all_equal(restore.params(config, model, tmp_path)[0], expected)
    chex.assert_trees_all_equal(restore.trained(config, model, parent)[0], expected)
    config = _config(parent, **{"init_ema": True, "eval.checkpoint": "init"})
    for start in (restore.params, restore.trained):
        with pytest.raises(errors.UserError, match="only one PyTorch file can hold a moving"):
            start(config, build.model(config), parent)
