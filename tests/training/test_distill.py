"""Distillation: its loss, its teachers, and what a run remembers of them."""

import json
import pathlib

import chex
import fakes
import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from avit_jax.models import vit
from avit_jax.training import (
    build,
    devices,
    evaluate,
    loop,
    losses,
    progress,
    restore,
    train_step,
)
from avit_jax.training import parts as parts_lib
from avit_jax.training import teacher as teacher_lib
from avit_jax.training.state import RunMetadata
from avit_jax.utils import errors
from avit_jax.weights import weight_files

_LOGITS = jnp.array([[2.0, 0.0, -1.0], [0.5, 1.5, 0.0]])
_TEACHER = jnp.array([[0.0, 3.0, 1.0], [1.0, 2.0, 0.0]])


def test_hard_targets_are_the_teachers_choice() -> None:
    expected = losses.cross_entropy(_LOGITS, jnp.array([1, 1]))
    np.testing.assert_allclose(losses.distillation_loss(_LOGITS, _TEACHER), expected, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_targets_are_the_teachers_probabilities(temperature: float) -> None:
    p, q = (np.exp(np.asarray(x, np.float64) / temperature) for x in (_TEACHER, _LOGITS))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = (p * np.log(p / q)).sum(1).mean() * temperature**2
    loss = losses.distillation_loss(_LOGITS, _TEACHER, targets="soft", temperature=temperature)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_the_teacher_gets_no_gradient_and_the_loss_is_float32(targets: str) -> None:
    gradient = jax.grad(
        lambda teacher: losses.distillation_loss(_LOGITS, teacher, targets=targets)
    )(_TEACHER)
    assert not gradient.any()
    half = losses.distillation_loss(
        _LOGITS.astype(jnp.bfloat16), _TEACHER.astype(jnp.bfloat16), targets=targets
    )
    assert half.dtype == jnp.float32
    with pytest.raises(ValueError, match='"hard" or "soft"'):
        losses.distillation_loss(_LOGITS, _TEACHER, targets="none")


def test_the_distillation_token_learns_from_the_teacher_and_the_class_token_from_labels() -> None:
    config = fixtures.small_config(**{"distill.weight": 0.25, "loss.label_smoothing": 0.1})
    labels, other = jnp.array([0, 2]), jnp.array([[1.0, 0.0, 3.0], [0.0, 0.0, 1.0]])
    task = losses.cross_entropy(_LOGITS, labels, label_smoothing=0.1)
    for logits, taught in (((_LOGITS, other), other), (_LOGITS, _LOGITS)):
        distilled = isinstance(logits, tuple)
        total, parts = train_step.task_loss(
            logits, labels, _TEACHER, build.step_options(config), distilled=distilled
        )
        np.testing.assert_allclose(parts["task_loss"], task, rtol=1e-6)
        np.testing.assert_allclose(
            parts["distill_loss"], losses.distillation_loss(taught, _TEACHER), rtol=1e-6
        )
        np.testing.assert_allclose(
            total, 0.75 * parts["task_loss"] + 0.25 * parts["distill_loss"], rtol=1e-6
        )


def test_labels_and_teacher_speak_to_every_exit_of_another_network() -> None:
    config = fixtures.small_config(**{"distill.weight": 0.25})
    labels, exits = jnp.array([0, 2]), (_LOGITS, 2 * _LOGITS, -_LOGITS)
    _, parts = train_step.task_loss(
        exits, labels, _TEACHER, build.step_options(config), distilled=False
    )
    expected = np.mean([losses.cross_entropy(logits, labels) for logits in exits])
    np.testing.assert_allclose(parts["task_loss"], expected, rtol=1e-6)
    expected = np.mean([losses.distillation_loss(logits, _TEACHER) for logits in exits])
    np.testing.assert_allclose(parts["distill_loss"], expected, rtol=1e-6)


@pytest.fixture
def teacher(tmp_path: pathlib.Path) -> pathlib.Path:
    """A weight file of a static network of another width, patch size and number of layers than the
    small one.
    """
    sizes = {
        "image_size": 16,
        "patch_size": 8,
        "channels": 1,
        "width": 12,
        "depth": 2,
        "num_heads": 3,
        "num_classes": 10,
    }
    model = vit.AViT(**sizes, mlp_ratio=3.0, halting=None)
    params = model.init(jax.random.key(3), jnp.zeros((1, 16, 16, 1)))["params"]
    weight_files.write(tmp_path / "teacher.safetensors", params, model)
    return tmp_path / "teacher.safetensors"


def _config(teacher: pathlib.Path, **overrides: object) -> ConfigDict:
    return fixtures.small_config(
        **{"distill.teacher": str(teacher), "train.steps": 2, "train.save_every": 1} | overrides
    )


def _summary(workdir: pathlib.Path) -> dict[str, float]:
    return json.loads((workdir / "summary.json").read_text())


def test_the_step_asks_the_teacher_about_the_augmented_pictures(teacher: pathlib.Path) -> None:
    config = _config(
        teacher, **{"distill.weight": 1.0, "distill.targets": "soft", "halting.enabled": False}
    )
    model, (tx, _) = build.model(config), build.optimizer(config)
    found = teacher_lib.load(config.distill.teacher, model)
    assert (
        found.model.patch_size,
        found.model.num_heads,
        found.model.mlp_width,
        found.model.depth,
    ) == (8, 3, 36, 2)
    options = build.step_options(config)
    step = train_step.make_train_step(model, tx, options, found.model)
    state = devices.replicate(build.new_state(model, tx, seed=0, ema=True), jax.devices()[:1])
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (1, 16, 16, 16, 1), np.uint8),
        "label": np.zeros((1, 16), np.int32),
        "index": np.arange(16, dtype=np.int32)[None],
        "skipped": np.zeros((1, 16), np.int32),
    }
    params = devices.replicate(found.params, jax.devices()[:1])
    _, values = devices.parallel(step, devices=jax.devices()[:1])(state, batch, params)
    # The same by hand.
    key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
    batch_of_one = {name: x[0] for name, x in batch.items()}
    images, _ = train_step.augment_batch(batch_of_one, key[0], options.augmentation, 10)
    before = jax.tree.map(lambda x: np.asarray(x)[0], state.params)
    logits, _ = model.apply(
        {"params": before},
        images,
        train=True,
        image_index=batch_of_one["index"],
        rngs={"dropout": key[1]},
    )
    taught = found.model.apply({"params": found.params}, images)[0]
    expected = losses.distillation_loss(logits, taught, targets="soft")
    np.testing.assert_allclose(values["distill_loss"][0], expected, rtol=1e-4)
    np.testing.assert_allclose(values["loss"][0], expected, rtol=1e-4)


def test_a_distilled_run_resumes_and_knows_its_teacher(
    teacher: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = _config(teacher, **{"model.distilled": True})
    loop.train(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["distill_loss"] > 0
    network, params = weight_files.infer(weight_files.read(teacher), image_size=(16, 16), name="")
    expected = float(evaluate.Evaluator(config, network)(devices.replicate(params))["top1"])
    assert _summary(tmp_path / "run")["teacher_top1"] == expected

    more = _config(teacher, **{"model.distilled": True, "train.steps": 3})
    fakes.real_run(
        more, tmp_path / "run", allow_changed_config=True
    )  # the same teacher: it goes on
    assert _summary(tmp_path / "run")["teacher_top1"] == expected
    for other in (network.clone(num_heads=2), network.clone(norm_eps=1e-3)):
        weight_files.write(teacher, params, other)
        with pytest.raises(errors.UserError, match="has changed since the run started"):
            fakes.real_run(more, tmp_path / "run")


def test_a_teacher_may_leave_in_the_midst_of_a_run(
    teacher: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    fakes.real_run(_config(teacher), tmp_path / "run")
    config = fixtures.small_config(**{"train.steps": 5, "train.log_every": 5})
    fakes.real_run(config, tmp_path / "run", allow_changed_config=True)
    assert "teacher_top1" not in _summary(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows[-2]["split"] == "train" and "distill_loss" not in rows[-2]
    # Stopped between two rows of the metrics, it has values of steps with the teacher and without.
    without = {"loss": 2.0, "skipped": 0.0, "nonfinite": 0.0}
    for last, expected in (
        (without, {"loss": 1.5}),
        (without | {"distill_loss": 3.0}, {"loss": 1.5, "distill_loss": 3.0}),
    ):
        first = (
            without | {"loss": 1.0} | ({"distill_loss": 5.0} if "distill_loss" not in last else {})
        )
        assert progress.mean_row((first, last)).items() >= expected.items()


def test_a_run_can_be_the_teacher_or_the_start(tmp_path: pathlib.Path) -> None:
    parent = fixtures.small_config(
        **{"train.steps": 2, "halting.learnable": True, "model.num_heads": 4}
    )
    fakes.real_run(parent, tmp_path / "parent")
    state = fixtures.restored_state(parent, tmp_path / "parent")
    config = _config(tmp_path / "parent", init=str(tmp_path / "parent"), **{"model.num_heads": 4})
    model = build.model(config)
    found = teacher_lib.load(config.distill.teacher, model)
    assert found.model.num_heads == 4
    gate = state.ema_params.pop("gate")
    assert (found.model.halting.gamma, found.model.halting.beta) == (
        gate["gamma"],
        gate["beta"],
    )  # fixed as it was learnt
    chex.assert_trees_all_equal(found.params, state.ema_params)
    parts = parts_lib.of_config(config)
    metadata = RunMetadata(config={}, label_names=[])
    begun = restore.begin(parts.create, parts.initial_params, None, metadata, steps=2)
    chex.assert_trees_all_equal(begun.train.params, state.ema_params)


def test_teachers_that_do_not_fit(teacher: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "empty").mkdir()
    for overrides, message in (
        ({"model.num_classes": 7}, "num_classes=10, and the model has num_classes=7"),
        ({"model.image_size": (20, 20)}, "patch_size 8 must divide"),
        ({"distill.teacher": str(tmp_path / "none.pth")}, "there is no .*none.pth"),
        ({"distill.teacher": str(tmp_path / "empty")}, "no checkpoint"),
    ):
        config = _config(teacher, **overrides)
        with pytest.raises(errors.UserError, match=message):
            teacher_lib.load(config.distill.teacher, build.model(config))
    assert teacher_lib.load("", build.model(fixtures.small_config())) is None
    (tmp_path / "broken.safetensors").write_bytes(teacher.read_bytes())
    tensors = weight_files.read(teacher).tensors
    del tensors["blocks.0.mlp.fc1.weight"]
    with pytest.raises(errors.UserError, match="holds no vision transformer that can be run"):
        weight_files.infer(weight_files.WeightFile(tensors=tensors), image_size=(16, 16), name="it")
