"""Losses against NumPy, and over several devices against one. The official prior's numbers are in
`test_golden.py`.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax.core import halting
from avit_jax.models import vit
from avit_jax.training import losses

_LAYERS, _IMAGES, _TOKENS = 6, 16, 5


@jax.jit
def _aux(score: jax.typing.ArrayLike) -> vit.Aux:
    """What a network with the raw scores `(L, B, N)` reports."""
    state, actives = halting.init(score.shape[1:], score.dtype), []
    for i, score_i in enumerate(score):
        actives.append(state.active)
        state, _ = halting.accumulate(state, score_i, epsilon=0.01, is_last=i == len(score) - 1)
    aux = dict(
        score=score,
        active=jnp.stack(actives),
        depth=state.depth,
        ponder_cost=halting.ponder_cost(state),
    )
    return vit.Aux(**aux, class_output=jnp.zeros((score.shape[1], 1)))


@functools.partial(jax.jit, static_argnames=("mode", "reverse"))
def _prior(score: jax.typing.ArrayLike, target_depth: float = 3, **kwargs: Any) -> jax.Array:
    return losses.prior_loss(_aux(score), target_depth=target_depth, **kwargs)


@pytest.fixture(scope="module")
def score() -> np.ndarray:
    return np.random.default_rng(0).beta(0.5, 1.5, (_LAYERS, _IMAGES, _TOKENS)).astype(np.float32)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("sigmoid", [False, True])
def test_class_weights_and_sigmoid(sigmoid: bool) -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(4, 3)), np.array([0, 2, 2, 1])
    several = np.array([[1.0, 0, 1], [0, 0, 0], [1, 1, 1], [0, 1, 0]])
    weights = (1.0, 0.5, 3.0)
    for targets in (labels, several):
        dense = np.eye(3)[targets] if targets.ndim == 1 else targets
        if sigmoid:
            p = 1 / (1 + np.exp(-logits))
            terms = -(dense * np.log(p) + (1 - dense) * np.log(1 - p)) / 3
        else:
            terms = -dense * _log_softmax(logits)
        for given in ((), weights):
            loss = losses.cross_entropy(
                jnp.asarray(logits, jnp.float32),
                jnp.asarray(targets, None if targets.ndim == 1 else jnp.float32),
                class_weights=given,
                sigmoid=sigmoid,
            )
            expected = (terms * (given or 1.0)).sum(axis=1).mean()
            assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy(smoothing: float) -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(4, 7)).astype(np.float32), np.array([0, 6, 2, 2])
    soft = rng.dirichlet(np.ones(7), 4).astype(np.float32)
    for targets, dense in ((labels, np.eye(7)[labels]), (soft, soft)):
        dense = (1 - smoothing) * dense + smoothing / 7
        expected = -(dense * _log_softmax(logits)).sum(-1).mean()
        loss = losses.cross_entropy(
            jnp.asarray(logits), jnp.asarray(targets), label_smoothing=smoothing
        )
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_cross_entropy_of_bfloat16_logits_is_float32() -> None:
    logits = jnp.asarray(np.random.default_rng(2).normal(size=(5, 9)), jnp.bfloat16)
    labels = jnp.arange(5)
    loss = losses.cross_entropy(logits, labels)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(
        loss, losses.cross_entropy(logits.astype(jnp.float32), labels), rtol=1e-6
    )


def _ponder_cost(score: np.ndarray) -> float:
    """Layers of one token with the scores `(L,)`, and what is left of 1 when it halts."""
    before = np.cumsum(score) - score
    last = next(i for i in range(len(score)) if before[i] + score[i] >= 0.99 or i == len(score) - 1)
    return last + 1 + 1 - before[last]


def test_ponder_loss_is_the_mean_over_tokens_and_images(score: np.ndarray) -> None:
    aux = _aux(score)
    expected = [
        _ponder_cost(score[:, b, k]) for b in range(score.shape[1]) for k in range(score.shape[2])
    ]
    np.testing.assert_allclose(losses.ponder_loss(aux), np.mean(expected), rtol=1e-5)
    assert losses.ponder_loss(aux).shape == ()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("center", "width"), [(3.0, 1.0), (4.5, 2.0)])
def test_paper_prior(score: np.ndarray, center: float, width: float, reverse: bool) -> None:
    h = np.zeros(_LAYERS)
    for layer, image, token in np.ndindex(score.shape):
        before = score[:layer, image, token].sum()
        if before < 0.99:  # still active in this layer
            h[layer] += 1.0 if layer == _LAYERS - 1 else score[layer, image, token]
    h /= h.sum()
    prior = np.exp(-((np.arange(1, _LAYERS + 1) - center) ** 2) / (2 * width**2))
    prior /= prior.sum()
    p, q = (prior, h) if reverse else (h, prior)
    got = _prior(score, center, width=width, reverse=reverse)
    np.testing.assert_allclose(got, np.sum(p * np.log(p / q)), rtol=1e-4)


def test_order_of_images_matters_to_the_official_prior_alone(score: np.ndarray) -> None:
    rolled = np.roll(score, 5, axis=1)
    paper, official = (
        [_prior(s, mode=mode) for s in (score, rolled)] for mode in ("paper", "official")
    )
    np.testing.assert_allclose(*paper, rtol=1e-5)
    assert abs(official[0] - official[1]) > 1e-4


@pytest.mark.parametrize("mode", ["paper", "official"])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("value", [0.0, 1e-30, 1.0])
def test_prior_and_its_gradient_are_finite(mode: str, images: int, value: float) -> None:
    def loss(logit):
        return _prior(value * jnp.exp(logit), mode=mode)

    with jax.debug_nans(True):
        chex.assert_tree_all_finite(jax.value_and_grad(loss)(jnp.zeros((_LAYERS, images, _TOKENS))))


def test_gradient_of_the_paper_prior_lowers_scores_that_come_too_early() -> None:
    score = jnp.full((_LAYERS, 2, _TOKENS), 0.3)  # halts at layer 4: H is even over the first four
    gradient = jax.grad(_prior)(score)
    assert (gradient[0] > 0).all()
    assert (gradient[2] < 0).all()


def _scores_of(theta: jax.Array, noise: jax.Array) -> jax.Array:
    """Scores that depend on parameters `(L,)`, as those of a network do."""
    return jax.nn.sigmoid(theta[:, None, None] + 3.0 * noise - 1.5)


@pytest.mark.parametrize("mode", ["paper", "official"])
@pytest.mark.parametrize("images", [8, 16])  # one or two a device
def test_over_devices_equals_the_whole_batch(images: int, mode: str) -> None:
    noise = np.random.default_rng(3).normal(size=(_LAYERS, images, _TOKENS)).astype(np.float32)
    theta = np.linspace(-0.5, 0.5, _LAYERS, dtype=np.float32)

    def loss(theta: jax.Array, noise: jax.Array, axis_name: str | None = None) -> jax.Array:
        aux = _aux(_scores_of(theta, noise))
        return losses.prior_loss(
            aux, target_depth=3.5 if mode == "paper" else 3, mode=mode, axis_name=axis_name
        )

    def on_device(theta: jax.Array, noise: jax.Array) -> Any:
        value, gradient = jax.value_and_grad(functools.partial(loss, axis_name="batch"))(
            theta, noise
        )
        return value, jax.lax.pmean(gradient, "batch")

    devices = jax.device_count()
    assert devices == 8
    shards = np.moveaxis(noise.reshape(_LAYERS, devices, -1, _TOKENS), 1, 0)
    values, gradients = jax.pmap(on_device, axis_name="batch", in_axes=(None, 0))(theta, shards)
    value, gradient = jax.value_and_grad(loss)(theta, noise)
    assert jnp.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(values, np.full(devices, value), rtol=1e-5)
    np.testing.assert_allclose(gradients, np.tile(gradient, (devices, 1)), rtol=1e-4, atol=1e-6)


def test_unknown_mode_is_refused(score: np.ndarray) -> None:
    with pytest.raises(ValueError, match='"paper" or "official"; got "Paper"'):
        losses.prior_loss(_aux(score), target_depth=3, mode="Paper")
