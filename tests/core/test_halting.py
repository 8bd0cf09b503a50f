"""The halting rule: pure functions against a loop over tokens, their gradients and transformations,
and both Flax modules.
"""

import functools
from collections.abc import Callable
from typing import Any

import chex
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from avit_jax.core import halting
from avit_jax.models import halting_linen, halting_nnx


def _run(score: jax.Array, epsilon: float = 0.01) -> dict[str, jax.Array]:
    """All layers of scores `(L, ..., N)`; what the paper defines, by its name; `active` of every
    layer.
    """
    state, weights, actives = halting.init(score.shape[1:], score.dtype), [], []
    for i, score_i in enumerate(score):
        actives.append(state.active)
        state, weight = halting.accumulate(
            state, score_i, epsilon=epsilon, is_last=i == len(score) - 1
        )
        weights.append(weight)
    cost = halting.ponder_cost(state)
    return vars(state) | dict(
        weight=jnp.stack(weights), active=jnp.stack(actives), ponder_cost=cost
    )


def _run_scanned(score: jax.Array) -> dict[str, jax.Array]:
    """The same as `_run`, by `lax.scan`."""

    def layer(state, x):
        new_state, weight = halting.accumulate(state, x[0], epsilon=0.01, is_last=x[1])
        return new_state, (weight, state.active)

    is_last = jnp.arange(len(score)) == len(score) - 1
    state, (weight, active) = jax.lax.scan(
        layer, halting.init(score.shape[1:], score.dtype), (score, is_last)
    )
    return vars(state) | dict(weight=weight, active=active, ponder_cost=halting.ponder_cost(state))


# Compiles fast, for programs that run once.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _oracle(score: np.ndarray, epsilon: float) -> dict[str, np.ndarray]:
    """Section 3 of the paper for scores `(L, N)`, token by token in plain numbers."""
    num_layers, num_tokens = score.shape
    out = {key: np.zeros(num_tokens) for key in ("depth", "remainder", "cumulative", "ponder_cost")}
    out |= {"weight": np.zeros(score.shape), "active": np.zeros(score.shape, bool)}
    for k in range(num_tokens):
        h = [float(x) for x in score[:, k]]
        h[-1] = 1.0
        halts_at = next(n for n in range(1, num_layers + 1) if sum(h[:n]) >= 1 - epsilon)
        r = 1 - sum(h[: halts_at - 1])
        out["depth"][k], out["remainder"][k], out["ponder_cost"][k] = halts_at, r, halts_at + r
        out["cumulative"][k] = sum(h[:halts_at])
        out["active"][:halts_at, k] = True
        out["weight"][: halts_at - 1, k] = h[: halts_at - 1]
        out["weight"][halts_at - 1, k] = r
    return out


def _random_scores(seed: int, *shape: int) -> np.ndarray:
    """Scores whose sums reach 1 at many different layers."""
    return np.random.default_rng(seed).beta(0.5, 1.5, shape).astype(np.float32)


_run_compiled = jax.jit(_run)


@pytest.mark.parametrize("epsilon", [1e-4, 0.01, 0.3, 0.9])
@pytest.mark.parametrize("shape", [(1, 3), (2, 50), (12, 200)])
def test_against_a_loop_over_tokens(shape: tuple[int, int], epsilon: float) -> None:
    score = _random_scores(0, *shape)
    got, expected = _run_compiled(score, epsilon), _oracle(score, epsilon)
    for key in expected:
        np.testing.assert_allclose(got[key], expected[key], atol=1e-6, rtol=1e-6, err_msg=key)


@hypothesis.settings(deadline=None, database=None, derandomize=True, max_examples=100)
@hypothesis.given(
    score=st.sampled_from([1, 2, 7]).flatmap(
        lambda layers: hnp.arrays(
            np.float32, (layers, 5), elements=st.floats(0, 1, width=32, allow_subnormal=False)
        )
    ),
    epsilon=st.floats(1e-3, 0.999),
)
def test_properties(score: np.ndarray, epsilon: float) -> None:
    got = jax.device_get(_run_compiled(score, epsilon))
    weight, active, remainder = got["weight"], got["active"], got["remainder"]
    np.testing.assert_allclose(weight.sum(0), 1.0, atol=1e-6)
    assert (weight >= 0).all()
    assert active[0].all()
    assert (active[1:] <= active[:-1]).all()
    assert ((remainder >= epsilon - 1e-6) & (remainder <= 1.0)).all()
    np.testing.assert_array_equal(got["depth"], active.sum(0))
    np.testing.assert_allclose(got["ponder_cost"], active.sum(0) + remainder, rtol=1e-6)
    assert (weight[~active] == 0).all()


def test_a_sum_of_exactly_the_threshold_halts_and_keeps_its_share() -> None:
    # All numbers are dyadic: 0.25 + 0.5 is exactly 1 - 0.25.
    got = _run(jnp.array([[0.25], [0.5], [0.125], [0.5]]), epsilon=0.25)
    np.testing.assert_array_equal(got["weight"][:, 0], [0.25, 0.75, 0.0, 0.0])
    np.testing.assert_array_equal(got["depth"], [2])
    np.testing.assert_array_equal(got["cumulative"], [0.75])
    np.testing.assert_array_equal(got["remainder"], [0.75])


def test_gradients_flow_through_the_remainder_to_earlier_scores_alone() -> None:
    score = _random_scores(1, 8, 40)
    outputs = np.random.default_rng(2).normal(size=score.shape).astype(np.float32)

    def mixture(score):
        return jnp.sum(_run(score)["weight"] * outputs)

    halts_at = _oracle(score, 0.01)["depth"].astype(int) - 1
    before = np.arange(8)[:, None] < halts_at
    assert len(set(halts_at)) > 3
    at_halt = np.take_along_axis(outputs, halts_at[None], axis=0)
    np.testing.assert_allclose(
        jax.jit(jax.grad(mixture))(score), before * (outputs - at_halt), atol=1e-6
    )
    ponder_gradient = jax.jit(jax.grad(lambda s: _run(s)["ponder_cost"].sum()))(score)
    np.testing.assert_allclose(ponder_gradient, -1.0 * before, atol=1e-6)


def test_bfloat16_tokens_keep_float32_sums() -> None:
    tokens = jnp.full((3, 2), 0.3, jnp.bfloat16)
    score = halting.score(tokens, gamma=0.7, beta=-5.3)
    expected = 1 / (1 + np.exp(5.3 - 0.7 * float(tokens[0, 0])))
    np.testing.assert_allclose(score, expected, rtol=1e-6)
    state = halting.init(tokens.shape[:-1], tokens.dtype)
    assert state.cumulative.dtype == state.remainder.dtype == jnp.float32
    for _ in range(40):
        state, weight = halting.accumulate(state, score, epsilon=0.01)
    assert (
        score.dtype
        == weight.dtype
        == state.cumulative.dtype
        == state.remainder.dtype
        == jnp.float32
    )
    np.testing.assert_allclose(state.cumulative, 40 * expected, rtol=1e-5)
    np.testing.assert_allclose(state.remainder, 1 - 40 * expected, rtol=1e-5)


def _batch_second(run: Callable) -> Callable:
    """Moves the mapped axis from the front to where `_run` has it."""
    return lambda score: {key: jnp.moveaxis(x, 0, 1 - score.ndim) for key, x in run(score).items()}


_TRANSFORMS = {
    "jit": _run_compiled,
    "vmap": _batch_second(jax.jit(jax.vmap(_run, in_axes=1))),
    "pmap": _batch_second(jax.pmap(_run, in_axes=1)),
    "scan": _run_scanned,
}


@pytest.mark.parametrize("shape", [(8,), (8, 5), (8, 2, 5)])
@pytest.mark.parametrize("transform", _TRANSFORMS)
def test_transformations_and_leading_shapes(transform: str, shape: tuple[int, ...]) -> None:
    score = _random_scores(3, 6, *shape)
    got, expected = _TRANSFORMS[transform](score), _oracle(score.reshape(6, -1), 0.01)
    for key in expected:
        np.testing.assert_allclose(
            got[key].reshape(expected[key].shape), expected[key], rtol=1e-6, atol=1e-6, err_msg=key
        )


def test_compiles_once() -> None:
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(state, score, epsilon, is_last):
        return halting.accumulate(state, score, epsilon=epsilon, is_last=is_last)

    state = halting.init((2, 3))
    for i in range(5):
        state, _ = step(state, np.full((2, 3), 0.1 * i, np.float32), 0.01 + 0.1 * i, i == 4)
    assert not state.active.any()


@pytest.mark.parametrize("channel", [0, 3, -2])
def test_score_reads_one_channel(channel: int) -> None:
    tokens = np.random.default_rng(4).normal(size=(2, 3, 6)).astype(np.float32)
    expected = 1 / (1 + np.exp(-(2.0 * tokens[:, :, channel] - 0.5)))
    np.testing.assert_allclose(
        halting.score(tokens, gamma=2.0, beta=-0.5, channel=channel), expected, rtol=1e-5
    )


@pytest.mark.parametrize("channel", [6, -7])
def test_a_channel_that_tokens_do_not_have_is_refused(channel: int) -> None:
    with pytest.raises(ValueError, match=f"halting channel {channel} is not among the 6 channels"):
        halting.score(jnp.zeros((2, 3, 6)), gamma=1.0, beta=0.0, channel=channel)


def test_score_by_layer_counts_halted_tokens_as_zero() -> None:
    score = jnp.array([[[0.5, 0.9]], [[0.25, 0.7]]])
    active = jnp.array([[[True, True]], [[True, False]]])
    np.testing.assert_allclose(halting.score_by_layer(score, active), [0.7, 0.125])


@pytest.mark.parametrize(("center", "width"), [(3.0, 1.0), (2.5, 2.0), (7.0, 0.5)])
def test_depth_prior_is_a_gaussian_over_layers_from_one(center: float, width: float) -> None:
    layer = np.arange(1, 8)
    expected = np.exp(-((layer - center) ** 2) / (2 * width**2))
    prior = np.exp(halting.depth_prior(7, center=center, width=width))
    np.testing.assert_allclose(prior, expected / expected.sum(), rtol=1e-4, atol=1e-12)
    np.testing.assert_allclose(prior.sum(), 1.0, rtol=1e-5)
    assert layer[prior.argmax()] in (int(center), round(center))


def test_depth_prior_stays_finite_far_from_its_center() -> None:
    log_prior = halting.depth_prior(12, center=500.0, width=0.5)
    assert np.isfinite(log_prior).all()
    assert log_prior.argmax() == 11


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(epsilon=0.0), "epsilon must lie between 0 and 1"),
        (dict(epsilon=1.0), "epsilon must lie between 0 and 1"),
        (dict(epsilon=float("nan")), "epsilon must lie between 0 and 1"),
        (dict(gamma=float("inf")), "gamma and beta must be finite"),
        (dict(beta=float("nan")), "gamma and beta must be finite"),
    ],
)
def test_config_refuses_what_cannot_halt(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        halting.HaltingConfig(**changes)


# Each wrapper: config, first tokens -> (parameters {gamma, beta} or {}, function of parameters,
# tokens, state, is_last).


def _pure(config: halting.HaltingConfig, tokens: jax.Array) -> tuple[Any, Callable]:
    def step(params, tokens, state, is_last):
        state = halting.init(tokens.shape[:-1], tokens.dtype) if state is None else state
        gate = {"gamma": config.gamma, "beta": config.beta} | params
        score = halting.score(tokens, **gate, channel=config.channel)
        return *halting.accumulate(state, score, epsilon=config.epsilon, is_last=is_last), score

    gate = {"gamma": jnp.float32(config.gamma), "beta": jnp.float32(config.beta)}
    return gate if config.learnable else {}, step


def _linen_module(module: Any, tokens: jax.Array) -> tuple[Any, Callable]:
    params = module.init(jax.random.key(0), tokens).get("params", {})
    return params, lambda params, *args: module.apply({"params": params}, *args)


def _nnx_module(module: nnx.Module) -> tuple[Any, Callable]:
    definition, params, rest = nnx.split(module, nnx.Param, ...)
    return params, lambda params, *args: nnx.merge(definition, params, rest, copy=True)(*args)


_WRAPPERS = {
    "linen": lambda config, tokens: _linen_module(halting_linen.Halting(config), tokens),
    "nnx": lambda config, _: _nnx_module(halting_nnx.Halting(config)),
    "nnx-to-linen": lambda config, tokens: _linen_module(
        nnx.bridge.ToLinen(halting_nnx.Halting, args=(config,)), tokens
    ),
    "linen-to-nnx": lambda config, tokens: _nnx_module(
        nnx.bridge.ToNNX(halting_linen.Halting(config), rngs=nnx.Rngs(0)).lazy_init(tokens)
    ),
}


def _three_layers(params: Any, tokens: jax.Array, step: Callable) -> tuple[jax.Array, Any]:
    """A scalar that depends on everything, and all outputs."""
    state, outputs = None, []
    for i, tokens_i in enumerate(tokens):
        state, weight, score = step(params, tokens_i, state, i == len(tokens) - 1)
        outputs.append((state, weight, score))
    total = sum(jnp.sum((i + 1) * jnp.sin(weight)) for i, (_, weight, _) in enumerate(outputs))
    return total + halting.ponder_cost(state).mean() + outputs[0][2].mean(), outputs


@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("wrapper", _WRAPPERS)
def test_flax_modules_equal_the_pure_functions(wrapper: str, learnable: bool) -> None:
    config = halting.HaltingConfig(
        gamma=1.5, beta=-1.0, epsilon=0.2, channel=2, learnable=learnable
    )
    tokens = jnp.asarray(np.random.default_rng(5).normal(size=(3, 2, 5, 4)), jnp.float32)
    results = []
    for build in (_pure, _WRAPPERS[wrapper]):
        params, step = build(config, tokens[0])
        differentiate = jax.value_and_grad(
            functools.partial(_three_layers, step=step), (0, 1), has_aux=True
        )
        results.append((params, _jit(differentiate)(params, tokens)))
    expected, got = map(
        jax.tree.leaves, results
    )  # a module's gamma and beta may sit in a container of their own
    chex.assert_trees_all_close(got, expected, rtol=1e-6)
    params_gradient, tokens_gradient = results[0][1][1]
    assert set(params_gradient) == ({"gamma", "beta"} if learnable else set())
    assert all(abs(gradient) > 1e-3 for gradient in params_gradient.values())
    assert jnp.abs(tokens_gradient[..., 2]).max() > 1e-3


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (dict(beta=1e300), "must be finite in float32"),
        (dict(gamma=-1e38), "must be finite in float32"),
        (dict(merge=True, redundancy=1e39), "must be finite in float32"),
        (dict(beta=float("inf")), "gamma and beta must be finite"),
        (dict(epsilon=1e-300), "too close to 0 or 1 for float32"),
        (dict(epsilon=1 - 1e-12), "too close to 0 or 1 for float32"),
    ],
)
def test_a_gate_that_float32_cannot_hold(gate: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        halting.HaltingConfig(**gate)


@pytest.mark.parametrize(
    ("gate", "expected"),
    [
        (dict(beta=-1e3), "no token can halt before the last layer"),
        (dict(beta=1e3), "every image is finished after the first layer"),
        (dict(gamma=-1.0, beta=55.0), "every image is finished after the first layer"),
        (dict(gamma=0.0, beta=2.0, epsilon=0.5), "every image is finished after the first layer"),
        (
            dict(beta=1e3, merge=True, redundancy=1e4),
            "every image is finished after the first layer",
        ),
        (dict(beta=-1e3, merge=True, redundancy=1e3), ""),
        (dict(gamma=0.0, beta=2.0), ""),
        (dict(gamma=1.0, beta=50.0), ""),
        ({}, ""),
    ],
)
def test_a_useless_gate_is_warned_about(
    gate: dict, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    halting.HaltingConfig(**gate)
    assert len(caplog.messages) == (1 if expected else 0)
    assert expected in caplog.text


def test_what_is_useless_by_the_paper_rule() -> None:
    """The bounds are those of the halting rule itself, run on the farthest gate channel."""
    tokens = jnp.array([[[-50.0], [50.0]]])
    for beta in (-57.0, -56.0, -55.0, -20.0, 54.0, 55.0):
        state = halting.init((1, 2))
        for i in range(3):
            score = halting.score(tokens, gamma=1.0, beta=beta)
            state, _ = halting.accumulate(state, score, epsilon=0.01, is_last=i == 2)
        useless = halting.explain_useless_gate(
            gamma=1.0, beta=beta, epsilon=0.01, redundancy=0.0, num_layers=3
        )
        assert bool(useless) == (int(state.depth[0, 1]) == 3 or int(state.depth[0, 0]) == 1), (
            beta,
            useless,
        )
