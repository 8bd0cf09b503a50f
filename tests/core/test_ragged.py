"""Training with halted tokens removed against masking them: the same loss and gradients; and the
groups themselves.
"""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax.core import halting, ragged
from avit_jax.core.plan import Plan, removal_pays, training_plan
from avit_jax.models import vit
from avit_jax.training import losses

_MERGES = halting.HaltingConfig(learnable=True, merge=True, redundancy=2.0)


def _model(**changes: Any) -> vit.AViT:
    sizes = dict(
        image_size=(40, 32), patch_size=8, channels=2, width=24, depth=4, num_heads=3, num_classes=7
    )
    return vit.AViT(**(sizes | dict(halting=halting.HaltingConfig(learnable=True)) | changes))


def _images(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 40, 32, 2)).astype(np.float32)


@functools.cache
def _params(model: vit.AViT) -> Any:
    return jax.jit(model.init)(jax.random.key(1), _images(1))["params"]


def _variables(model: vit.AViT, beta: float = -1.0) -> dict[str, Any]:
    params = _params(model)
    return {"params": params | {"gate": {"gamma": jnp.float32(3.0), "beta": jnp.float32(beta)}}}


@functools.cache
def _loss_and_grads(model: vit.AViT) -> Callable[[Any, np.ndarray], Any]:
    def loss(variables: Any, images: jax.Array) -> tuple[jax.Array, vit.Aux]:
        logits, aux = model.apply(
            variables, images, train=True, rngs={"dropout": jax.random.key(3)}
        )
        heads = logits if isinstance(logits, tuple) else (logits,)
        total = sum((head**2).mean() for head in heads) + 0.1 * losses.ponder_loss(aux)
        return total + 0.1 * losses.prior_loss(aux, target_depth=3.0), aux

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@pytest.mark.parametrize(
    ("changes", "batch", "plan"),
    [
        ({}, 5, Plan(bucket=2, token_multiple=8)),
        (
            {"distilled": True, "drop_path": 0.3, "halting": _MERGES},
            7,
            Plan(bucket=3, token_multiple=32),
        ),
        ({}, 5, Plan(bucket=2, token_multiple=8, use_switch=True)),
        (
            {"distilled": True, "drop_path": 0.3, "halting": _MERGES},
            7,
            Plan(bucket=3, token_multiple=8, use_switch=True),
        ),
    ],
)
@pytest.mark.parametrize("beta", [-1.0, 100.0, -100.0])
def test_loss_and_gradients_equal_those_of_masking(
    changes, batch: int, plan: Plan, beta: float
) -> None:
    model = _model(**changes)
    variables, images = _variables(model, beta), _images(batch)
    (expected, masked), expected_grads = _loss_and_grads(model)(variables, images)
    (total, aux), grads = _loss_and_grads(model.clone(removal=plan))(variables, images)
    assert masked.active.all() == (beta == -100.0)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for name in ("active", "depth"):
        np.testing.assert_array_equal(getattr(aux, name), getattr(masked, name))
    np.testing.assert_allclose(aux.class_output, masked.class_output, rtol=0, atol=1e-5)
    chex.assert_trees_all_equal_structs(grads, expected_grads)
    for path, grad in jax.tree.leaves_with_path(expected_grads):
        got = grads
        for key in path:
            got = got[key.key]
        np.testing.assert_allclose(
            got, grad, rtol=0, atol=2e-5 * np.abs(grad).max() + 1e-7, err_msg=str(path)
        )


def test_the_parameters_are_the_same_however_tokens_halt() -> None:
    model = _model()
    shapes = [
        jax.eval_shape(each.init, jax.random.key(0), _images(1))
        for each in (model, model.clone(removal=Plan(bucket=2, token_multiple=8)))
    ]
    chex.assert_trees_all_equal(*shapes)


def test_halted_tokens_are_not_computed_in_training() -> None:
    """All tokens halt in the first layer: neither value nor gradient sees the later ones."""
    model = _model(removal=Plan(bucket=2, token_multiple=8))
    variables = _variables(model, beta=100.0)
    layers = jax.tree.map(lambda x: x.at[1:].set(jnp.nan), variables["params"]["layers"])
    (total, _), grads = _loss_and_grads(model)(
        {"params": variables["params"] | {"layers": layers}}, _images(3)
    )
    assert np.isfinite(total)
    chex.assert_tree_all_finite(grads)
    for leaf in jax.tree.leaves(grads["params"]["layers"]):
        np.testing.assert_array_equal(leaf[1:], 0.0)


def test_only_the_layers_input_is_kept_for_the_backward_pass() -> None:
    model = _model(width=48, depth=8)
    variables, images = _variables(model), _images(32)

    def temporaries(model: vit.AViT) -> int:
        def loss(variables: Any) -> jax.Array:
            return model.apply(variables, images)[0].sum()

        return (
            jax.jit(jax.grad(loss)).lower(variables).compile().memory_analysis().temp_size_in_bytes
        )

    assert temporaries(model.clone(removal=Plan(bucket=4, token_multiple=32))) < 0.5 * temporaries(
        model
    )


def test_buckets_are_sorted_and_padded() -> None:
    counts = np.array([3, 0, 9, 5, 5])
    active = np.arange(9)[None] < counts[:, None]
    buckets = ragged.make_buckets(active, Plan(bucket=2, token_multiple=8))
    np.testing.assert_array_equal(buckets.image, [[2, 3], [4, 0], [1, 5]])
    np.testing.assert_array_equal(buckets.count, [[9, 5], [5, 3], [0, 0]])


@pytest.mark.parametrize("use_switch", [False, True])
@pytest.mark.parametrize(("batch", "bucket"), [(1, 1), (5, 2), (6, 6), (7, 3)])
def test_every_active_token_is_in_one_bucket_once(
    batch: int, bucket: int, use_switch: bool
) -> None:
    plan = Plan(bucket=bucket, token_multiple=8, use_switch=use_switch)
    active = np.random.default_rng(batch).random((batch, 11)) < np.linspace(0, 1, batch)[:, None]
    buckets = jax.tree.map(np.asarray, ragged.make_buckets(jnp.asarray(active), plan))
    seen = np.zeros_like(active, int)
    for image, count in zip(buckets.image.ravel(), buckets.count.ravel(), strict=True):
        if image == batch:
            assert count == 0  # an empty place
            continue
        tokens = buckets.token[image, :count]
        assert count == active[image].sum() and (np.diff(tokens) > 0).all()
        np.testing.assert_array_equal(buckets.rank[image, tokens], np.arange(count))
        seen[image, tokens] += 1
    np.testing.assert_array_equal(seen, active)
    assert sorted(image for image in buckets.image.ravel() if image < batch) == list(range(batch))
    largest, smallest = buckets.count.max(axis=1), buckets.count.min(axis=1)
    assert (smallest[:-1] >= largest[1:]).all()  # so little is padding
    padding = (largest[:, None] - buckets.count).sum()
    assert padding == (largest * buckets.image.shape[1]).sum() - active.sum()


def test_token_counts() -> None:
    assert Plan(bucket=1, token_multiple=8).token_counts(65) == (16, 32, 40, 48, 56, 64, 65)
    assert Plan(bucket=1, token_multiple=100).token_counts(17) == (17,)
    assert Plan(bucket=1, token_multiple=2).token_counts(4) == (2, 4)


@pytest.mark.parametrize(("batch", "group"), [(1, 1), (8, 8), (9, 5), (16, 8), (17, 6), (257, 8)])
def test_groups_share_out_the_batch(batch: int, group: int) -> None:
    assert Plan(bucket=8, token_multiple=8).with_even_buckets(batch).bucket == group


def test_training_plans_of_small_and_large_pictures() -> None:
    plans = [training_plan(num_tokens, "cpu") for num_tokens in (17, 65, 197, 785, 4097)]
    assert [(plan.bucket, plan.token_multiple) for plan in plans] == [
        (64, 8),
        (32, 8),
        (8, 32),
        (2, 128),
        (1, 680),
    ]
    plan = training_plan(197, "gpu")
    assert (plan.bucket, plan.token_multiple, plan.use_switch) == (128, 32, True)


def test_a_gpu_removes_where_that_was_measured_to_be_faster() -> None:
    experiments = pathlib.Path(__file__).parents[2] / "experiments"
    compared = []
    for name, width in (("tiny", 192), ("small", 384)):
        for measured in json.loads(
            (experiments / f"inference_speed/h200_deit_{name}.json").read_text()
        )["batches"]:
            speed_up = {row: values["speed_up"] for row, values in measured["rows"].items()}
            for ratio in (1.0, 0.8, 0.62, 0.4):
                compared.append(removal_pays(width, measured["batch"], ratio, backend="gpu"))
                assert compared[-1] == (speed_up[f"adaptive {ratio}"] > speed_up["masked 0.4"])
    measured = json.loads((experiments / "training_removal/h200.json").read_text())
    for ratio, values in measured["budgets"].items():
        speed_up = {row: values["speed_up"] for row, values in values["rows"].items()}
        compared.append(
            removal_pays(192, measured["batch"], float(ratio), training=True, backend="gpu")
        )
        assert compared[-1] == (speed_up["removed"] > speed_up["masked, remat"])
    assert 0 < sum(compared) < len(compared) == 24
    for training in (False, True):
        assert not removal_pays(192, 16, 0.4, training=training, backend="gpu")
        assert all(
            removal_pays(12, 1, 1.0, training=training, backend=backend)
            for backend in ("cpu", "tpu")
        )


@pytest.mark.parametrize(
    ("batch", "size"), [(1, 1), (5, 5), (20, 20), (21, 12), (41, 16), (1000, 20)]
)
def test_waves_are_even_and_of_whole_groups(batch: int, size: int) -> None:
    assert Plan(bucket=4, token_multiple=8, chunk=20).chunk_size(batch) == size


def test_mistakes_are_value_errors() -> None:
    plan = Plan(bucket=2, token_multiple=8)
    for changes in ({"halting": None}, {"dropout": 0.1}, {"remat": True}):
        with pytest.raises(ValueError, match=r"removal in training needs"):
            _model(removal=plan, **changes).check()
    with pytest.raises(ValueError, match="at least 1"):
        Plan(bucket=0, token_multiple=8)
