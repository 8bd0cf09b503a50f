"""The training step and the loop: devices, resumption, evaluation, what a run leaves behind."""

import dataclasses
import functools
import json
import pathlib
import signal
import time
import types
from collections.abc import Callable, Iterator
from unittest import mock

import chex
import fakes
import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import variants
from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax.data import loader
from avit_jax.inference import adaptive
from avit_jax.models import flops
from avit_jax.training import (
    build,
    devices,
    distributed,
    evaluate,
    loop,
    progress,
    state,
    train_step,
)
from avit_jax.training import parts as parts_lib
from avit_jax.utils import errors


def batch_of(step: int, size: int, num_devices: int) -> dict[str, np.ndarray]:
    """Random images; the same for any number of devices."""
    rng = np.random.default_rng(step)
    batch = {
        "image": rng.integers(0, 256, (size, 16, 16, 1), np.uint8),
        "label": rng.integers(0, 10, size).astype(np.int32),
        "index": np.arange(size, dtype=np.int32),
        "skipped": (np.arange(size) == step).astype(np.int32),
    }
    return {name: x.reshape(num_devices, -1, *x.shape[1:]) for name, x in batch.items()}


def run_steps(
    config: ConfigDict, num_devices: int, steps: int = 5
) -> tuple[state.TrainState, list[dict]]:
    """State and metrics after some steps on the first `num_devices` devices."""
    used = jax.devices()[:num_devices]
    model = build.model(config)
    tx, _ = build.optimizer(config)
    run = jax.jit(lambda: build.new_state(model, tx, seed=config.seed, ema=True))()
    run = devices.replicate(run, used)
    step = train_step.make_train_step(model, tx, build.step_options(config))
    step_fn = devices.parallel(step, devices=used, donate=True)
    rows = []
    for step in range(steps):
        run, values = step_fn(run, batch_of(step, config.train.batch_size, num_devices))
        rows.append(devices.first(jax.device_get(values)))
    return devices.first(jax.device_get(run)), rows


@pytest.mark.parametrize("mode", ["paper", "official"])
def test_one_and_eight_devices_agree(mode: str) -> None:
    # With augmentation, mixing and drop path on; the prior is of the global batch.
    config = fixtures.small_config(**{"loss.prior_mode": mode, "loss.label_smoothing": 0.1})
    config.augment.update({"erase": 0.5, "mixup": 0.8, "cutmix": 1.0})
    one, rows_one = run_steps(config, 1)
    eight, rows_eight = run_steps(config, 8)
    chex.assert_trees_all_close(one.params, eight.params, atol=1e-6, rtol=0)
    chex.assert_trees_all_close(one.ema_params, eight.ema_params, atol=1e-6, rtol=0)
    chex.assert_trees_all_close(rows_one, rows_eight, atol=2e-5, rtol=1e-5)
    moved = jax.tree.map(
        lambda a, b: np.abs(a - b).max(), run_steps(config, 1, steps=0)[0].params, one.params
    )
    assert max(jax.tree.leaves(moved)) > 1e-3  # or nothing would have been compared


def test_same_seed_same_result_other_seed_other() -> None:
    config = fixtures.small_config()
    first, again = run_steps(config, 8)[0], run_steps(config, 8)[0]
    chex.assert_trees_all_equal(first, again)
    other = run_steps(fixtures.small_config(seed=1), 8, steps=0)[0]
    assert not np.array_equal(first.params["pos_embed"], other.params["pos_embed"])


@pytest.mark.parametrize(("learnable", "moved"), [(False, {"beta"}), (True, {"beta", "gamma"})])
def test_a_budget_leaves_the_gate_out_of_the_gradient(learnable: bool, moved: set[str]) -> None:
    config = fixtures.small_config(
        **{"budget": 0.6, "halting.learnable": learnable, "optimizer.clip_norm": 1e-3}
    )
    after, (row, *_) = run_steps(config, 1, steps=1)
    before = jax.jit(
        lambda: build.new_state(build.model(config), build.optimizer(config)[0], seed=0, ema=True)
    )().params
    assert {
        name for name, value in after.params["gate"].items() if value != before["gate"][name]
    } == moved
    moments = after.opt_state[1][0].mu["gate"]
    assert {name for name, value in moments.items() if value} == moved - {"beta"}
    assert row["grad_norm"] > 0


def test_ema_is_the_moving_average() -> None:
    config = fixtures.small_config(**{"optimizer.ema_decay": 0.25})
    before, after = run_steps(config, 1, steps=2)[0], run_steps(config, 1, steps=3)[0]
    expected = jax.tree.map(
        lambda ema, new: 0.25 * ema + 0.75 * new, before.ema_params, after.params
    )
    chex.assert_trees_all_close(after.ema_params, expected, atol=1e-6)
    assert after.eval_params is after.ema_params


def test_halting_off_leaves_only_the_task_loss() -> None:
    rows = run_steps(fixtures.small_config(**{"halting.enabled": False}), 1, steps=1)[1]
    assert "ponder_loss" not in rows[0] and rows[0]["loss"] == rows[0]["task_loss"]


def test_distilled_model_trains_both_heads() -> None:
    config = fixtures.small_config(**{"model.distilled": True})
    before, after = run_steps(config, 1, steps=0)[0].params, run_steps(config, 1)[0].params
    for head in ("head", "head_dist"):
        assert np.abs(after[head]["kernel"] - before[head]["kernel"]).max() > 1e-4


@pytest.mark.parametrize("kind", ["dinov2_registers", "siglip_average", "qk_norm"])
def test_every_parameter_of_other_networks_trains(kind: str) -> None:
    changes = {f"model.{name}": value for name, value in variants.KINDS[kind].items()}
    config = fixtures.small_config(**changes)
    before, after = run_steps(config, 1, steps=0)[0].params, run_steps(config, 1)[0].params
    for (path, old), new in zip(
        jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True
    ):
        assert np.abs(new - old).max() > 1e-5, jax.tree_util.keystr(path)


def test_parts_of_a_batch_that_run_in_turn_give_the_same_step() -> None:
    # The prior is that of each part.
    config = fixtures.small_config(**{"loss.prior_weight": 0.0, "budget": 0.7})
    whole, rows_whole = run_steps(config, 2, steps=2)
    config.train.accumulate = 4
    parts, rows_parts = run_steps(config, 2, steps=2)
    chex.assert_trees_all_close(whole.params, parts.params, atol=1e-6, rtol=0)
    for name in ("loss", "top1", "macs_ratio", "grad_norm"):
        assert rows_parts[1][name] == pytest.approx(float(rows_whole[1][name]), rel=1e-4), name
    config.train.accumulate = 3
    with pytest.raises(errors.UserError, match="accumulate 3 must divide the batch"):
        build.check(config, "train")


def test_parts_of_a_batch_do_not_depend_on_the_number_of_devices() -> None:
    config = fixtures.small_config(**{"loss.prior_weight": 1.0, "train.accumulate": 2})
    one, two = (run_steps(config, devices, steps=2)[0] for devices in (1, 2))
    chex.assert_trees_all_close(one.params, two.params, atol=1e-6, rtol=0)


def test_options_of_the_loss_reach_the_step() -> None:
    def loss(**changes: object) -> float:
        options = build.step_options(fixtures.small_config(**changes))
        logits = np.random.default_rng(0).standard_normal((4, 10)).astype(np.float32)
        labels = jnp.arange(4)
        return float(train_step.task_loss(logits, labels, None, options, distilled=False)[0])

    plain = loss()
    weighted = loss(**{"loss.class_weights": (2.0,) * 10})
    assert weighted == pytest.approx(2 * plain, rel=1e-5)
    assert loss(**{"loss.sigmoid": True}) < plain / 2  # the mean over 10 classes
    config = fixtures.small_config(**{"loss.class_weights": (1.0, 2.0)})
    with pytest.raises(errors.UserError, match=r"class_weights .* each of the 10 classes"):
        config_lib.check(config)


def test_no_compilation_after_the_first_step() -> None:
    config = fixtures.small_config()
    model, (tx, _) = build.model(config), build.optimizer(config)
    step = train_step.make_train_step(model, tx, build.step_options(config))
    step_fn = devices.parallel(step, donate=True)
    run = devices.replicate(jax.jit(lambda: build.new_state(model, tx, seed=0, ema=True))())
    batches = parts_lib.train_batches(
        config, model, build.source(config, model, config.data.train_split)
    )
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: (
            compiled.append(name) if name.endswith("backend_compile_duration") else None
        )
    )
    for step in range(4):
        run, _ = step_fn(run, next(batches))
        if step == 0:
            assert compiled  # the listener hears
            compiled.clear()
    jax.block_until_ready(run)
    assert not compiled


def test_the_steps_asked_for_are_traced(tmp_path: pathlib.Path) -> None:
    for name, steps, traces in (("none", (0, 0), 0), ("some", (2, 3), 1)):
        fakes.run(fakes.config(**{"train.steps": 4, "debug.profile": steps}), tmp_path / name)
        assert len(list((tmp_path / name).glob("profile/**/*.xplane.pb"))) == traces
    # A run that goes on in their midst traces none.
    fakes.run(
        fakes.config(**{"train.steps": 6, "debug.profile": (2, 5)}),
        tmp_path / "none",
        allow_changed_config=True,
    )
    assert not list((tmp_path / "none").glob("profile/**/*"))


def test_a_trace_is_written_if_the_run_ends_among_its_steps(tmp_path: pathlib.Path) -> None:
    def fail() -> None:
        raise errors.UserError("no batch")

    config = fakes.config(**{"debug.profile": (2, 5)})
    fakes.run(config, tmp_path / "stopped", at={3: lambda: signal.raise_signal(signal.SIGTERM)})
    with pytest.raises(errors.UserError, match="no batch"):
        fakes.run(config, tmp_path / "failed", at={3: fail})
    for name in ("stopped", "failed"):
        assert len(list((tmp_path / name).glob("profile/**/*.xplane.pb"))) == 1


def test_a_run_end_to_end_and_its_evaluation(tmp_path) -> None:
    config = fixtures.small_config(
        **{"train.steps": 40, "train.eval_every": 20, "train.batch_size": 64}
    )
    loop.train(config, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["images"] == 360
    assert (
        0.0 <= summary["top1"] <= 1.0
        and 0.0 < summary["macs_ratio"] <= 1.0
        and 1.0 <= summary["mean_depth"] <= 3.0
    )
    assert np.mean(list(summary["class_top1"].values())) == pytest.approx(summary["top1"], abs=0.05)
    assert summary["macs_per_image"] == pytest.approx(
        summary["macs_ratio"] * flops.static_macs(build.model(config))
    )
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "tensorboard").iterdir())
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert losses[-1] < losses[0]
    assert all(row["skipped"] == row["nonfinite"] == 0 for row in train_rows(tmp_path))
    timing = [json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in timing] == [row["step"] for row in train_rows(tmp_path)]
    assert all(0 <= row["data_wait"] < 1 and row["images_per_second"] > 0 for row in timing)
    assert [row["step"] for row in rows if row["split"] == "eval"] == [20, 40]

    evaluate.evaluate_checkpoint(config, tmp_path)
    assert (
        json.loads((tmp_path / "eval.json").read_text())
        == json.loads((tmp_path / "summary.json").read_text())
        == summary
    )
    assert (tmp_path / "eval.png").exists()


@pytest.mark.parametrize(("decay", "told"), [(0.999, True), (0.9, False), (0.0, False)])
def test_an_average_longer_than_the_run_is_told(
    caplog: pytest.LogCaptureFixture, decay: float, told: bool
) -> None:
    config = fixtures.small_config(**{"train.steps": 300, "optimizer.ema_decay": decay})
    loop.warn_of_long_average(build.run_options(config))
    assert ("initial weights will be 74% of the moving average" in caplog.text) == told


def pictures_folder(root: pathlib.Path, good: int, bad: int) -> str:
    """Training pictures of two classes, of which some are damaged, and four of each to evaluate."""
    rng = np.random.default_rng(0)
    for i in range(good + bad):
        path = root / f"train/{'ab'[i % 2]}/{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = fixtures.png(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
        path.write_bytes(data if i < good else data[: 9 * (i - good)])
    for i in range(8):
        path = root / f"val/{'ab'[i % 2]}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(fixtures.png(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)))
    return str(root)


def folder_config(folder: str, **overrides: object) -> ConfigDict:
    """The small model on a folder of pictures, with all of DeiT's augmentation."""
    config = fixtures.small_config()
    config.data.update(
        {"name": "folder", "dir": folder, "eval_split": "val", "mean": (0.5,), "std": (0.25,)}
    )
    config.augment.update(
        {"magnitude": 9.0, "repeats": 3, "erase": 0.25, "mixup": 0.8, "cutmix": 1.0}
    )
    config.model.update({"channels": 3, "num_classes": 2})
    config.eval.update({"batch_size": 8})
    with config.unlocked():
        config.update_from_flattened_dict(overrides)
    return config


def train_rows(workdir: pathlib.Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"]


def test_bad_records_stop_training_or_are_counted(
    tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pictures_folder(tmp_path, good=20, bad=30)

    def run(workdir: str, **overrides: object) -> Callable[[int], Iterator[loader.Batch]]:
        config = folder_config(folder, **overrides)
        model = build.model(config)
        batches = functools.partial(
            parts_lib.train_batches,
            config,
            model,
            build.source(config, model, config.data.train_split),
        )
        parts = dataclasses.replace(fakes.parts(config), batches=batches)
        loop.run(parts, tmp_path / workdir)
        return batches

    with pytest.raises(
        errors.UserError, match=rf"cannot read {folder}/train/[ab]/\d+\.png: .*bad_records=skip"
    ):
        run("raise")
    skip = {"data.bad_records": "skip", "data.max_bad_share": 1.0}
    with caplog.at_level("WARNING", logger="avit_jax"):
        batches = run("skip", **skip)(0)
    rows = train_rows(tmp_path / "skip")
    assert [row["step"] for row in rows] == [2, 4, 6]
    expected = [sum(int(next(batches)["skipped"].sum()) for _ in range(2)) for _ in range(3)]
    assert [row["skipped"] for row in rows] == expected
    assert sum(expected) > 30
    assert f"skipped {folder}/train" in caplog.text
    with pytest.raises(errors.UserError, match=r"\d+ records, .*% of all, could not be read"):
        run("share", **skip | {"data.max_bad_share": 0.1})


def test_an_evaluation_that_fails_does_not_cost_what_was_trained(tmp_path) -> None:
    class Failing(fakes.Evaluator):
        def __call__(self, *_: object) -> evaluate.Results | None:
            raise errors.UserError("an image cannot be read")

    config = fakes.config(**{"train.steps": 2})
    with pytest.raises(errors.UserError, match="cannot be read"):
        loop.run(dataclasses.replace(fakes.parts(config), evaluator=Failing()), tmp_path)
    assert fakes.restored(tmp_path).step == 2
    fakes.run(config, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["images"] == 8


def test_batches_that_fail_do_not_cost_what_was_trained(tmp_path) -> None:
    def fail() -> None:
        raise errors.UserError("no more")

    config = fakes.config(**{"train.steps": 6})
    fakes.run(config, tmp_path / "whole")
    for step in (2, 4):
        with pytest.raises(errors.UserError, match="no more"):
            fakes.run(config, tmp_path / "run", at={step + 1: fail})
        assert fakes.restored(tmp_path / "run").step == step
    fakes.run(config, tmp_path / "run")
    chex.assert_trees_all_equal(
        fakes.restored(tmp_path / "run"), fakes.restored(tmp_path / "whole")
    )


def test_pictures_that_cannot_be_read_are_left_out_of_the_evaluation(
    tmp_path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = pictures_folder(tmp_path, good=8, bad=0)
    (tmp_path / "val/a/0.png").write_bytes(b"torn")
    config = folder_config(folder, **{"data.bad_records": "skip", "data.max_bad_share": 0.2})
    model = build.model(config)
    evaluator = evaluate.Evaluator(config, model)
    params = model.init(jax.random.key(3), jnp.zeros((1, 16, 16, 3)))["params"]
    with caplog.at_level("WARNING", logger="avit_jax"):
        assert evaluator(devices.replicate(params))["images"] == 7
    assert "1 of 8 images could not be read" in caplog.text
    config.data.max_bad_share = 0.1
    with pytest.raises(errors.UserError, match=r"1 of the 8 images .*max_bad_share"):
        evaluate.Evaluator(config, model)(devices.replicate(params))
    config.data.bad_records = "raise"
    with pytest.raises(errors.UserError, match=r"cannot read .*val/a/0\.png"):
        evaluate.Evaluator(config, model)(devices.replicate(params))


def test_waiting_counts_only_where_the_devices_are_idle() -> None:
    def slow() -> Iterator[dict]:
        while True:
            time.sleep(0.05)
            yield {}

    class Value:
        def __init__(self, ready: bool) -> None:
            self.is_ready = lambda: ready

    assert loop.next_batch(slow(), None)[1] == 0
    assert loop.next_batch(slow(), {"loss": Value(False)})[1] == 0
    assert loop.next_batch(slow(), {"loss": Value(True)})[1] >= 0.05


def test_the_devices_are_at_most_two_steps_behind() -> None:
    waited = []
    options = build.run_options(fixtures.small_config(**{"train.log_every": 9}))
    log = progress.Log(options, None, lambda step: 0.1, 0, state.LogState())
    for step in range(1, 6):
        loss = types.SimpleNamespace(block_until_ready=functools.partial(waited.append, step))
        log.add(step, {"loss": loss}, 0.0)
        assert waited == [1, *range(1, step - 1)]  # the first step, which compiles, ends at once


def test_removal_in_training_ends_where_masking_does() -> None:
    overrides = {"model.remat": True, "halting.gamma": 5.0, "halting.beta": -1.0}
    states = {}
    for removes in (False, True):
        config = fixtures.small_config(**overrides, **{"train.adaptive": removes})
        assert (build.model(config).removal is not None) == removes
        states[removes], rows = run_steps(config, 2, steps=3)
        assert rows[-1]["macs_ratio"] < 0.95
    chex.assert_trees_all_close(states[True].params, states[False].params, atol=1e-5)
    assert (
        build.model(
            fixtures.small_config(**{"train.adaptive": True, "halting.enabled": False})
        ).removal
        is None
    )
    with pytest.raises(errors.UserError, match=r"official.*config\.train\.adaptive=False"):
        build.check(
            fixtures.small_config(**{"train.adaptive": True, "loss.prior_mode": "official"})
        )


@pytest.mark.parametrize(("batch_size", "adaptive"), [(56, True), (512, True), (56, False)])
def test_evaluation_counts_every_image_once(batch_size: int, adaptive: bool, monkeypatch) -> None:
    removed = mock.Mock(side_effect=evaluate.adaptive.apply)
    monkeypatch.setattr(evaluate.adaptive, "apply", removed)
    config = fixtures.small_config(**{"eval.batch_size": batch_size, "eval.adaptive": adaptive})
    model = build.model(config)
    evaluator = evaluate.Evaluator(config, model)
    params = model.init(jax.random.key(3), jnp.zeros((1, 16, 16, 1)))["params"]
    scalars = evaluator.measure(params)
    images = np.stack([record["image"] for record in evaluator.source.records])
    labels = np.array([record["label"] for record in evaluator.source.records])
    logits, aux = model.apply({"params": params}, (images / 255.0 - 0.3) / 0.36)
    assert removed.called == adaptive
    depth = flops.is_computed(aux.active, 1).sum(axis=0)
    assert scalars["images"] == 360
    assert scalars["top1"] == pytest.approx(
        float((np.argmax(logits, -1) == labels).mean()), abs=0.003
    )
    assert scalars["depth_patch"] == pytest.approx(float(depth[:, 1:].mean()), abs=1e-3)
    assert scalars["depth_class"] == pytest.approx(float(depth[:, 0].mean()), abs=1e-3)
    assert scalars["macs"] == pytest.approx(
        float(flops.image_macs(model, aux.active).mean()), rel=1e-4
    )


def test_on_a_gpu_evaluation_and_training_mask_where_removal_is_slower(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    sizes = {"model.width": 192, "train.adaptive": True}
    for batch, budget, evaluation, training in (
        (1024, 0.6, True, False),
        (1024, 0.0, False, False),
        (512, 0.6, False, False),
        (1024, 0.4, True, True),
    ):
        images = batch * jax.device_count()
        config = fixtures.small_config(
            **sizes, **{"budget": budget, "eval.batch_size": images, "train.batch_size": images}
        )
        model = build.model(config)
        assert (model.removal is not None, model.remat) == (training, not training)
        apply = evaluate.Evaluator(config, model)._apply
        assert (getattr(apply, "func", None) is adaptive.apply) == evaluation


def test_configuration_mistakes_are_user_errors() -> None:
    for overrides, words in (
        ({"model.patch_size": 5}, "patch_size"),
        ({"model.num_heads": 3}, "num_heads"),
        ({"halting.epsilon": 1.5}, "epsilon"),
        ({"model.dtype": "float13"}, "float13"),
    ):
        with pytest.raises(errors.UserError, match=words):
            build.model(fixtures.small_config(**overrides))
    with pytest.raises(errors.UserError, match="multiple of the number of devices, 8"):
        build.check(fixtures.small_config(**{"train.batch_size": 12}), "train")
    with pytest.raises(errors.UserError, match="num_classes=10"):
        config = fixtures.small_config(**{"model.num_classes": 7})
        evaluate.Evaluator(config, build.model(config))


def test_a_stop_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes agree on one call; a later call must not ask the others again."""
    asked: list[int] = []

    def reached(call: int) -> bool:
        asked.append(call)
        return call == 2

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed.multihost_utils, "reached_preemption_sync_point", reached)
    with distributed.Stop() as stop:
        assert [stop() for _ in range(4)] == [False, True, True, True]
    assert asked == [1, 2] and stop.name == "SIGTERM"


def test_the_prior_lies_where_the_budget_does() -> None:
    config = fixtures.small_config(**{"budget": 0.6, "model.depth": 4})
    assert build.step_options(config).loss.target_depth == pytest.approx(0.6 * 4)
    config = fixtures.small_config(**{"budget": 0.0, "loss.target_depth": 1.5})
    assert build.step_options(config).loss.target_depth == 1.5
