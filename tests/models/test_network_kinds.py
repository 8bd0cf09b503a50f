"""Networks that differ from DeiT: against plain NumPy, and removal against masking."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import plain_numpy
import pytest
import variants

from avit_jax import config as config_lib
from avit_jax.core.plan import Plan
from avit_jax.inference import adaptive
from avit_jax.models import flops, vit
from avit_jax.models.layer_spec import LayerSpec
from avit_jax.training import build
from avit_jax.utils import errors

_PLAN = Plan(bucket=2, token_multiple=3, chunk=4)


@functools.cache
def _masked(model: vit.AViT):
    run = jax.jit(lambda params, images: model.apply({"params": params}, images))
    return jax.device_get(run(variants.params(model), variants.images(model, 5)))


def _compare_with_numpy(model: vit.AViT) -> None:
    logits, aux = _masked(model)
    params = variants.float64(variants.params(model))
    for i, image in enumerate(variants.float64(variants.images(model, 5))):
        expected, output, depth, _ = plain_numpy.run(model, params, image)
        np.testing.assert_allclose(logits[i], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
        np.testing.assert_array_equal(aux.depth[i], depth)
        if model.pool == "map":
            continue
        patches = output[model.num_prefix_tokens :]
        pooled = {"token": output[0], "avg": patches.mean(0), "max": patches.max(0)}[model.pool]
        np.testing.assert_allclose(aux.class_output[i], pooled, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", variants.KINDS)
def test_halting_as_in_numpy(kind: str) -> None:
    model = variants.network(kind)
    depth = _masked(model)[1].depth
    assert depth.min() < model.depth  # some tokens halt early, others do not
    assert depth.max() == model.depth
    _compare_with_numpy(model)


@pytest.mark.parametrize("kind", ["dinov2_registers", "siglip_average", "clip", "dinov3"])
def test_without_halting_as_in_numpy(kind: str) -> None:
    _compare_with_numpy(variants.network(kind, halting=None))


def _check_removal(model: vit.AViT) -> None:
    expected, masked = _masked(model)
    run = jax.jit(functools.partial(adaptive.apply, model, plan=_PLAN))
    logits, aux = run({"params": variants.params(model)}, variants.images(model, 5))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(aux.class_output, masked.class_output, rtol=0, atol=1e-4)
    computed = flops.is_computed(masked.active, model.readout)
    np.testing.assert_array_equal(aux.active, computed)
    assert not computed.all()
    np.testing.assert_allclose(aux.macs, masked.macs, rtol=1e-6)


@pytest.mark.parametrize("kind", variants.KINDS)
def test_removal_equals_masking(kind: str) -> None:
    _check_removal(variants.network(kind))


@pytest.mark.parametrize("kind", ["dinov2_registers", "siglip_average", "maximum", "dinov3"])
def test_removal_equals_masking_with_merging(kind: str) -> None:
    _check_removal(variants.network(kind, halting=variants.MERGING))


@pytest.mark.parametrize("kind", ["dinov2_registers", "siglip_average", "dinov3"])
def test_training_with_removal_has_the_gradients_of_masking(kind: str) -> None:
    model = variants.network(kind)
    images = variants.images(model, 5)

    def gradient(model: vit.AViT):
        def loss(params):
            logits, aux = model.apply({"params": params}, images, train=True)
            return (logits**2).sum() + aux.ponder_cost.mean()

        return jax.jit(jax.grad(loss))(variants.params(model))

    masked, removed = gradient(model), gradient(model.clone(removal=_PLAN))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(masked), jax.tree.leaves(removed), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(b, a, rtol=0, atol=2e-5 * np.abs(a).max(), err_msg=name)
        assert np.abs(a).max() > 0, name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_near_single_precision(dtype) -> None:
    for kind in ("dinov2_giant", "maximum", "qk_norm", "dinov3"):
        model = variants.network(kind, halting=None)
        expected, _ = _masked(model)
        logits, _ = jax.jit(model.clone(dtype=dtype).apply)(
            {"params": variants.params(model)}, variants.images(model, 5)
        )
        assert logits.dtype == dtype
        error = np.abs(np.asarray(logits, np.float32) - expected).max()
        assert 0 < error < 0.05 * np.abs(expected).max()


def test_an_image_is_finished_once_nothing_that_is_read_out_can_change() -> None:
    pooled = variants.network("average_after_class_token")
    registers = variants.network("dinov2_registers")
    for model, last in ((pooled, -1), (registers, 0)):
        active = np.zeros((3, 2, model.num_tokens), bool)
        active[:2] = True
        active[2, :, last] = True  # one token that is read out
        np.testing.assert_array_equal(flops.is_computed(active, model.readout), active)
        active[2] = True
        active[2, :, model.readout] = False  # all others
        assert not flops.is_computed(active, model.readout)[2].any()


def test_without_classes_the_logits_are_the_features_of_the_head() -> None:
    model = variants.network("siglip_average")
    params = variants.params(model)
    features, _ = model.clone(num_classes=0).apply(
        {"params": {name: x for name, x in params.items() if name != "head"}},
        variants.images(model, 5),
    )
    head = params["head"]
    logits, _ = _masked(model)
    expected = features @ head["kernel"] + head["bias"][None]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_only_the_layer_of_deit_is_plain() -> None:
    assert vit.deit_tiny(distilled=True).is_plain
    assert vit.deit_tiny(patch_size=14, pre_norm=True, fc_norm=True, position_class=False).is_plain
    changes = {"mlp": "swiglu", "qkv_bias": False, "qk_norm": True, "layer_scale": True}
    names = {field.name for field in dataclasses.fields(LayerSpec)}
    assert changes.keys() | {"rotation"} == names
    changes |= {"rope_theta": 100.0, "num_registers": 1, "pool": "avg"}
    for name, value in changes.items():
        assert not vit.deit_tiny(**{name: value}).is_plain, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_token": False}, 'pool "token" reads the class token'),
        ({"pool": "mean"}, 'pool must be "token" or "avg" or "max" or "map"; got "mean"'),
        ({"pool": "map", "fc_norm": True}, 'pool "map" reads the patches after the norm'),
        ({"mlp": "relu"}, 'mlp must be "gelu" or .*; got "relu"'),
        ({"num_registers": -1}, "num_registers must be at least 0"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"rope_theta": -1.0}, "rope_theta must be at least 0 and finite"),
        ({"rope_theta": math.inf}, "rope_theta must be at least 0 and finite"),
        ({"rope_theta": 1.0, "num_heads": 32}, "needs heads whose width is a multiple of 4; got 6"),
        ({"distilled": True, "pool": "avg"}, "a distilled model needs pool"),
        ({"distilled": True, "num_classes": 0}, "a distilled model needs pool"),
    ],
)
def test_attributes_that_do_not_fit_together(changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vit.deit_tiny(**changes).check()


@pytest.mark.parametrize("kind", variants.KINDS)
def test_a_configuration_gives_the_network(kind: str) -> None:
    wanted = variants.network(kind, dtype=jnp.dtype("float32"))
    config = config_lib.default()
    attributes = variants.SIZES | variants.KINDS[kind]
    config.model.update(attributes | {"image_size": wanted.pixels})
    config.halting.update({"gamma": variants.GATE.gamma, "beta": variants.GATE.beta})
    assert build.model(config) == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": "mean"}, 'config.model .*pool must be "token" or .*; got "mean"'),
        ({"num_classes": -1}, "config.model.num_classes must be between 0 and"),
        ({"num_registers": 10**6}, "config.model.num_registers must be at most 1000"),
    ],
)
def test_mistakes_in_the_configuration_are_named(changes, message: str) -> None:
    config = config_lib.default()
    config.model.update(changes)
    with pytest.raises(errors.UserError, match=message):
        config_lib.check(config)
        build.model(config)


@pytest.mark.parametrize(
    "changes",
    [
        {"mlp": "swiglu", "pool": "avg", "class_token": False, "num_registers": 4},
        {"pool": "map", "class_token": False, "image_size": 32, "num_classes": 10},
        {"qk_norm": True, "layer_scale": True, "mlp": "gelu_tanh", "pool": "max", "fc_norm": True},
    ],
    ids=["swiglu", "map", "qk_norm"],
)
def test_macs_as_xla_counts_them(changes) -> None:
    sizes = {"depth": 1, "image_size": 112, "num_classes": 5000}
    model = vit.deit_tiny(**(sizes | changes))
    images = jax.ShapeDtypeStruct((1, *model.pixels, model.channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    cost = jax.jit(model.apply).lower(variables, images).compile().cost_analysis()
    np.testing.assert_allclose(flops.static_macs(model), cost["flops"] / 2, rtol=0.03)
