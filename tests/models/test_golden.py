"""The network and its official losses against the authors' implementation, on random weights (see
`golden.py`).
"""

from collections.abc import Mapping
from typing import Any

import chex
import golden
import jax
import numpy as np
import pytest

from avit_jax.training import losses

_LOSSES = ("task_loss", "ponder_loss", "distr_prior_loss")


def _assert_close(got: Any, expected: Any, atol: float, name: str = "") -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol, err_msg=name)


def _assert_same_gradient(
    grads: Mapping[str, np.ndarray], case: golden.Case, key: str, slack: float = 1.0
) -> None:
    """Tensor by tensor, in units of its largest entry."""
    expected = {
        name.removeprefix(key): array for name, array in case.data.items() if name.startswith(key)
    }
    assert set(grads) == set(expected) == set(case.state_dict)
    for name, array in expected.items():
        _assert_close(grads[name], array, slack * (1e-4 * np.abs(array).max() + 1e-6), name)


@pytest.fixture(
    scope="module",
    params=[(name, dtype) for name in "ADF" for dtype in (np.float32, np.float64)],
    ids=lambda param: f"{param[0]}-{param[1].__name__}",
)
def outcome(request):
    """(case, dtype, reference's outputs, (our losses, logits, aux), our gradient)."""
    name, dtype = request.param
    case = golden.load(name)
    with jax.enable_x64(dtype == np.float64):
        outputs, grads = case.run(dtype)
    reference = dict(case.data)
    if dtype == np.float64:
        reference |= {
            key.removeprefix("f64/"): value
            for key, value in case.data.items()
            if key.startswith("f64/")
        }
    return case, dtype, reference, outputs, grads


def test_outputs(outcome) -> None:
    case, dtype, reference, (_, logits, aux), _ = outcome
    assert logits.dtype == aux.ponder_cost.dtype == aux.class_output.dtype == dtype
    exact = dtype == np.float64
    coarse = 3e-5 if case.name == "F" else 1e-5
    _assert_close(logits, reference["logits"], 1e-13 if exact else coarse)
    _assert_close(aux.class_output, reference["acc_cls"], 1e-13 if exact else coarse)
    _assert_close(aux.ponder_cost, reference["rho_token"], 1e-13 if exact else 1e-5)
    np.testing.assert_array_equal(aux.depth, reference["counter_token"])
    np.testing.assert_array_equal(aux.active, reference["mask"])


def test_scores(outcome) -> None:
    _, dtype, reference, (_, _, aux), _ = outcome
    _assert_close(aux.score, reference["h"], 1e-5)
    by_layer = aux.score[:, 1:].mean((1, 2))  # of all rows, of all images but the first
    _assert_close(
        by_layer, reference["halting_score_layer"], 1e-15 if dtype == np.float64 else 1e-6
    )
    _assert_close(
        np.clip(by_layer / by_layer.sum(), 0.01, 0.99), reference["halting_distribution"], 1e-6
    )


def test_losses(outcome) -> None:
    _, dtype, reference, (terms, _, _), _ = outcome
    for loss, key in zip(terms[:3], _LOSSES, strict=True):
        _assert_close(loss, reference[key], 1e-14 if dtype == np.float64 else 5e-6, key)
    _assert_close(sum(terms[:3]), reference["total_loss"], 5e-6)


def test_gradients(outcome) -> None:
    case, dtype, reference, _, grads = outcome
    slack = 0.01 if dtype == np.float64 else 1.0  # the reference's gradients are float32
    if case.name != "F":
        _assert_same_gradient(grads, case, "grads/", slack)
        return
    for name, grad in grads.items():
        largest = 1e-4 * np.abs(grad).max() + 1e-6
        picked = grad.ravel()[reference[f"grads_idx/{name}"]]
        _assert_close(picked, reference[f"grads_val/{name}"], slack * largest, name)
        norm, total = np.linalg.norm(grad), grad.sum(dtype=np.float64)
        np.testing.assert_allclose(
            norm, reference[f"grads_norm/{name}"], rtol=1e-4 * slack, err_msg=name
        )
        _assert_close(total, reference[f"grads_sum/{name}"], largest * grad.size**0.5, name)


@pytest.mark.parametrize(
    ("share", "key"), [((0, 1, 0, 0), "grads_ponder/"), ((0, 0, 1, 0), "grads_kl/")]
)
def test_gradient_of_one_loss(share: tuple[int, ...], key: str) -> None:
    case = golden.load("A")
    _assert_same_gradient(case.run(share=share)[1], case, key)


def test_one_image_alone() -> None:
    # The official prior skips the first image: none is left, theirs is NaN and is not added, ours
    # is 0.
    case = golden.load("A")
    logits, aux = golden.forward(case.model())({"params": case.params()}, case.images[:1])
    _assert_close(logits, case.data["b1/logits"], 1e-5)
    _assert_close(aux.ponder_cost, case.data["b1/rho_token"], 1e-5)
    _assert_close(losses.cross_entropy(logits, case.labels[:1]), case.data["b1/task_loss"], 5e-6)
    _assert_close(
        case.config["ponder_scale"] * losses.ponder_loss(aux), case.data["b1/ponder_loss"], 5e-6
    )
    assert np.isnan(case.data["b1/distr_prior_loss"])
    assert losses.prior_loss(aux, target_depth=case.config["target_depth"], mode="official") == 0.0


def test_other_order_of_images() -> None:
    case = golden.load("A")
    (terms, logits, aux), _ = case.run(pick=case.data["perm/index"])
    _assert_close(logits, case.data["perm/logits"], 1e-5)
    _assert_close(aux.score[:, 1:].mean((1, 2)), case.data["perm/halting_score_layer"], 1e-6)
    for loss, key in zip(terms[:3], _LOSSES, strict=True):
        _assert_close(loss, case.data[f"perm/{key}"], 5e-6, key)
    assert abs(terms[2] - case.data["distr_prior_loss"]) > 1e-3  # the order matters, officially


@pytest.mark.parametrize("name", ["A", "D"])
def test_without_halting_it_is_the_plain_network(name: str) -> None:
    case = golden.load(name)
    logits, _ = golden.forward(case.model(halting=None))({"params": case.params()}, case.images)
    _assert_close(logits, case.data["plain_logits"], 1e-5)


def test_gate_that_halts_nothing_is_the_plain_network() -> None:
    case = golden.load("D")
    (_, logits, aux), _ = case.run()
    assert aux.active.all()
    _assert_close(logits, case.data["plain_logits"], 1e-5)


def test_all_scores_underflow() -> None:
    # A gate so far away that every score is 0: the reference's prior is NaN there, ours and its
    # gradient are finite.
    case = golden.load("D")
    (terms, logits, aux), grads = case.run(share=(1, 1, 1, 1), beta=-200.0)
    _assert_close(aux.score, 0.0, 0.0)
    _assert_close(logits, case.data["center200/logits"], 1e-5)
    _assert_close(aux.ponder_cost, case.data["center200/rho_token"], 1e-5)
    np.testing.assert_array_equal(aux.depth, case.data["center200/counter_token"])
    _assert_close(terms[0], case.data["center200/task_loss"], 5e-6)
    _assert_close(terms[1], case.data["center200/ponder_loss"], 5e-6)
    assert np.isnan(case.data["center200/distr_prior_loss"])
    chex.assert_tree_all_finite((terms, grads))


def test_recipe_gives_the_weights_of_the_reference() -> None:
    for name in "ADF":
        case = golden.load(name)
        assert golden.digest(golden.recipe_params(case.config)) == case.config["params_sha256"]
        images, labels = golden.recipe_images(case.config)
        np.testing.assert_array_equal(images.transpose(0, 2, 3, 1), case.images)
        np.testing.assert_array_equal(labels, case.data["labels"])
    head = golden.load("F").images[:, 0, :8].swapaxes(1, 2)
    np.testing.assert_array_equal(head, golden.load("F").data["images_head"])
