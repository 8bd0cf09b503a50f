"""The TPU kernel in interpret mode, against `model.apply`: decisions equal, floats to rounding.

In interpret mode memory starts as NaN, so an uninitialized number that counts is seen.
"""

import functools
from typing import Any

import golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from avit_jax.core import halting
from avit_jax.kernels import vit_tpu
from avit_jax.models import executors, flops, one_kernel, vit


def _model(*, gate: dict[str, Any] | None = None, **changes: Any) -> vit.AViT:
    """37 tokens in four layers; the compiled numbers are 16, 32 and 48."""
    sizes: Any = dict(image_size=48, patch_size=8, width=48, depth=4, num_heads=3, num_classes=7)
    config = halting.HaltingConfig(**({"learnable": True} | (gate or {})))
    return vit.AViT(**(sizes | {"halting": config} | changes))


def _images(model: vit.AViT, count: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (count, *model.pixels, model.channels))


def _variables(model: vit.AViT, gamma: float = 2.0, beta: float = -1.0) -> dict[str, Any]:
    params = jax.jit(model.init)(jax.random.key(1), _images(model, 1))["params"]
    return {"params": params | {"gate": {"gamma": jnp.float32(gamma), "beta": jnp.float32(beta)}}}


@functools.cache
def _program(model: vit.AViT, multiple: int) -> Any:
    run: Any = model.apply
    executor = one_kernel.executor(model, multiple)
    return jax.jit(functools.partial(run, executor=executor, method="from_tokens"))


def _interpret(
    model: vit.AViT, variables: Any, images: Any, multiple: int = 16, exists: Any = None
) -> tuple[jax.Array, vit.Aux]:
    x = jax.jit(functools.partial(model.apply, method="embed"))(variables, images)
    assert one_kernel.supports(model, x.dtype, multiple)
    exists = jnp.ones(len(x), bool) if exists is None else exists
    with pltpu.force_tpu_interpret_mode():
        return jax.device_get(_program(model, multiple)(variables, x, exists=exists))


def _check(model: vit.AViT, variables: Any, images: Any, multiple: int = 16) -> vit.Aux:
    expected, aux = jax.device_get(golden.forward(model)(variables, images))
    logits, got = _interpret(model, variables, images, multiple)
    assert logits.dtype == expected.dtype and got.score.dtype == aux.score.dtype
    computed = np.asarray(flops.is_computed(jnp.asarray(aux.active), model.num_prefix_tokens))
    np.testing.assert_array_equal(got.active, computed)
    np.testing.assert_array_equal(got.depth, computed.sum(axis=0))
    close = functools.partial(np.testing.assert_allclose, rtol=0)
    close(logits, expected, atol=1e-5 * np.abs(expected).max())
    for name in ("class_output", "distillation_output"):
        if (output := getattr(aux, name)) is not None:
            close(getattr(got, name), output, atol=1e-5 * np.abs(output).max(), err_msg=name)
    close(np.where(computed, got.score - aux.score, 0), 0, atol=1e-5)
    assert not got.score[~computed].any()  # finished images do not run
    # An image that is finished early keeps the remainder of its other tokens as it was.
    same = computed.sum(axis=0) == aux.depth
    close(np.where(same, got.ponder_cost - aux.ponder_cost, 0), 0, atol=1e-5)
    close(got.macs, flops.image_macs(model, aux.active), atol=0, rtol=1e-6)
    return got


@pytest.mark.parametrize("name", ["A", "D", pytest.param("F", marks=pytest.mark.slow)])
def test_golden_cases(name: str) -> None:
    case, multiple = golden.load(name), 32 if name == "F" else 16
    variables = {"params": case.params()}
    _check(case.model(), variables, case.images, multiple)
    logits, _ = _interpret(case.model(), variables, case.images, multiple)
    np.testing.assert_allclose(logits, case.data["logits"], rtol=0, atol=3e-5)


_SEVERAL = {
    "distilled, nine heads": dict(distilled=True, width=144, num_heads=9, gate={"channel": -1}),
    "one head": dict(width=64, num_heads=1, mlp_ratio=1.5, norm_eps=1e-3),
    "a wide head": dict(width=128, num_heads=1, gate={"channel": 5, "epsilon": 0.2}),
}


@pytest.mark.parametrize(
    "name",
    [
        name if i == 0 else pytest.param(name, marks=pytest.mark.slow)
        for i, name in enumerate(_SEVERAL)
    ],
)
def test_the_kernel_computes_what_masking_does(name: str) -> None:
    model = _model(**_SEVERAL[name])
    beta = -2.0 if name == "a wide head" else -1.0
    aux = _check(model, _variables(model, beta=beta), _images(model, 3))
    counts = aux.active.sum(axis=-1)
    # Images move to fewer tokens, and then still run.
    assert (counts[1:] <= 32).any() and (counts[-1] > 0).any()
    assert (counts[2:] < counts[1:-1]).any()


def _with_gate_channel(model: vit.AViT, channel: jax.Array) -> dict[str, Any]:
    """Variables with which the gate channel of the tokens stays about as given, `(N,)`."""
    variables = _variables(model)
    params = variables["params"]
    for name in ("proj", "fc2"):
        params["layers"][name] = jax.tree.map(
            lambda x: x.at[..., 0].set(0.0), params["layers"][name]
        )
    params["pos_embed"] = params["pos_embed"].at[0, :, 0].set(channel)
    return variables


def test_a_distillation_token_outlives_the_class_token() -> None:
    model = _model(distilled=True)
    channel = jnp.linspace(0.0, 3.0, model.num_tokens).at[:2].set(jnp.array([1.2, -0.5]))
    aux = _check(model, _with_gate_channel(model, channel), 0.1 * _images(model, 2))
    assert (aux.depth[:, 0] < aux.depth[:, 1]).all()
    assert (aux.active[2].sum(axis=-1) < 16).all() and aux.active[2:, :, 1].all()


def test_a_finished_image_stops_before_its_patches_halt() -> None:
    model = _model()
    channel = jnp.full(model.num_tokens, -1.0).at[0].set(1.2)
    aux = _check(model, _with_gate_channel(model, channel), 0.1 * _images(model, 2))
    np.testing.assert_array_equal(aux.depth, 2)


@pytest.mark.slow
def test_many_tokens() -> None:
    """As with 384 pixels there are more than 256 tokens, so that the step is twice as large."""
    model = _model(image_size=136, width=32, num_heads=2, depth=3)
    assert one_kernel.sizes(model, 32).token_counts() == (64, 128, 192, 256, 304)
    aux = _check(model, _variables(model, gamma=3.0), _images(model, 2), multiple=32)
    assert (aux.active.sum(axis=-1)[1:] < 256).any()


def test_bfloat16_is_close() -> None:
    model = _model(dtype=jnp.bfloat16)
    variables, images = _variables(model), _images(model, 3)
    exact, _ = golden.forward(model.clone(dtype=None))(variables, images)
    logits, aux = _interpret(model, variables, images)
    assert logits.dtype == jnp.bfloat16 and aux.class_output.dtype == jnp.float32
    scale = np.abs(exact).max()
    np.testing.assert_allclose(logits.astype(np.float32), exact, rtol=0, atol=0.05 * scale)
    assert np.abs(logits.astype(np.float32) - exact).max() > 1e-4 * scale


def test_padding_images_do_not_run() -> None:
    """Their tokens may be NaN; the other images do not change."""
    model = _model()
    variables, images = _variables(model), _images(model, 3)
    logits, aux = _interpret(model, variables, images.at[1].set(jnp.nan), exists=jnp.arange(3) != 1)
    expected, all_images = _interpret(model, variables, images)
    np.testing.assert_array_equal(logits[[0, 2]], expected[[0, 2]])
    np.testing.assert_array_equal(aux.active[:, [0, 2]], all_images.active[:, [0, 2]])
    assert not aux.active[:, 1].any() and not aux.score[:, 1].any()
    assert not aux.class_output[1].any() and aux.macs[1] == flops.fixed_macs(model)


def test_numbers_move_without_rounding() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.standard_normal((5, 40)) * 10.0 ** rng.integers(-9, 9, (5, 40))).astype(np.float32)
    rows[0], rows[1, :3] = rng.integers(0, 2**24, 40), (1.0, 1.0 + 2**-23, 1.0 - 2**-24)
    order = rng.permutation(40)
    to = jnp.asarray(np.eye(40)[np.argsort(order)], jnp.bfloat16)
    moved = jax.jit(vit_tpu._move_exactly)(rows, to.T)
    np.testing.assert_array_equal(moved, rows[:, np.argsort(np.argsort(order))])


def test_what_the_kernel_supports() -> None:
    def supports(model: vit.AViT, dtype: Any = jnp.float32, multiple: int = 32) -> bool:
        return one_kernel.supports(model, dtype, multiple)

    for model in (vit.deit_tiny(), vit.deit_small(distilled=True), vit.deit_tiny(image_size=384)):
        assert supports(model) and supports(model, jnp.bfloat16)
    assert supports(vit.deit_small(image_size=384), jnp.bfloat16)
    assert not supports(vit.deit_small(image_size=384))  # in float32
    assert not supports(vit.deit_base(), jnp.bfloat16)
    assert not supports(vit.deit_tiny(halting=None))
    assert not supports(vit.deit_tiny(halting=halting.HaltingConfig(merge=True)))
    assert not supports(vit.deit_tiny(num_heads=4))  # 48 channels a head
    assert not supports(vit.deit_tiny(), jnp.float16)
    assert not supports(vit.deit_tiny(), multiple=8)


def test_only_plain_networks_are_supported() -> None:
    assert one_kernel.supports(vit.AViT(), jnp.float32, 32)
    assert not one_kernel.supports(vit.AViT(layer_scale=True), jnp.float32, 32)
    assert not one_kernel.supports(vit.AViT(num_registers=4), jnp.float32, 32)
    assert not one_kernel.supports(vit.AViT(rope_theta=100.0), jnp.float32, 32)


def test_padded_macs() -> None:
    model = _model(distilled=True)  # 38 tokens
    active = np.zeros((4, 3, 38), bool)
    active[0] = True
    active[1, 0, 1:33] = True  # 31 patches, and both prefix tokens stay
    active[2, 0, 1:16] = True
    active[3, 0, 1:17] = True
    active[1, 1, :2] = True
    by_hand = [
        sum(flops.layer_macs(n, model) for n in counts)
        for counts in ((48, 48, 16, 32), (48, 16), (48,))
    ]
    macs = one_kernel.padded_macs(model, jnp.asarray(active), 16)
    np.testing.assert_allclose(macs, by_hand, rtol=1e-6)


def test_an_executor_of_all_layers_gives_the_same_aux() -> None:
    """The state of halting is derived from scores; those of halted tokens may be anything."""
    model = _model()
    variables, images = _variables(model), _images(model, 3)
    logits, aux = golden.forward(model)(variables, images)

    def layers(gate: Any, carry: Any, params: Any) -> tuple[jax.Array, jax.Array]:
        return jnp.where(aux.active, aux.score, jnp.nan), aux.class_output[:, None]

    x = model.apply(variables, images, method="embed")
    got = model.apply(
        variables, x, executors.AtOnce(layers), exists=jnp.ones(3, bool), method="from_tokens"
    )
    np.testing.assert_allclose(got[0], logits, rtol=0, atol=1e-6)
    computed = flops.is_computed(jnp.asarray(aux.active), 1)
    np.testing.assert_array_equal(got[1].active, computed)
    whole = np.asarray(computed.sum(axis=0) == aux.depth)
    np.testing.assert_array_equal(got[1].ponder_cost[whole], aux.ponder_cost[whole])
