"""The network: halting inside it, shapes, dropout, precision and sizes. Its numbers are in
`test_golden.py`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import avit_jax
from avit_jax.core import halting
from avit_jax.models import block, executors, flops, forward, vit
from avit_jax.training import losses

# A gate at which the tokens of a random network halt at all layers.
_GATE = halting.HaltingConfig(gamma=1.5, beta=-1.5)
_SIZES = dict(
    image_size=(8, 12),
    patch_size=4,
    channels=1,
    width=8,
    depth=4,
    num_heads=2,
    mlp_ratio=2.0,
    num_classes=5,
)
_IMAGES = np.random.default_rng(0).normal(size=(4, 8, 12, 1)).astype(np.float32)
_LABELS = np.arange(4)
# These programs are compiled once and run once: compiling fast is what counts.
_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def _model(**changes: Any) -> vit.AViT:
    return vit.AViT(**(_SIZES | dict(halting=_GATE) | changes))


@functools.cache
def _params(model: vit.AViT) -> dict[str, Any]:
    """Parameters larger than those of a fresh network, so that everything has an effect; the gate's
    are its own.
    """
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jnp.zeros((1, *model.pixels, model.channels))
    )["params"]
    shapes.pop("gate", None)
    params = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape, scale=0.4).astype(leaf.dtype), shapes
    )
    if model.halting is not None and model.halting.learnable:
        params["gate"] = {
            "gamma": np.float32(model.halting.gamma),
            "beta": np.float32(model.halting.beta),
        }
    return params


@functools.cache
def _forward(model: vit.AViT) -> Callable[..., Any]:
    return _jit(model.apply, static_argnames="train")


def _run(
    images: np.ndarray = _IMAGES, model: vit.AViT | None = None, params: Any = None, **kwargs: Any
) -> Any:
    """Logits and aux."""
    model = model or _model()
    return jax.device_get(_forward(model)({"params": params or _params(model)}, images, **kwargs))


@functools.cache
def _gradient(model: vit.AViT) -> tuple[Any, vit.Aux]:
    """Gradient of the sum of all losses with respect to the parameters, and aux."""

    def loss(params):
        logits, aux = model.apply({"params": params}, _IMAGES)
        prior = losses.prior_loss(aux, target_depth=2)
        return losses.cross_entropy(logits, _LABELS) + losses.ponder_loss(aux) + prior, aux

    return jax.device_get(_jit(jax.grad(loss, has_aux=True))(_params(model)))


def _block(model: vit.AViT) -> block.Block:
    fields = {field.name for field in dataclasses.fields(block.Block)} - {"parent", "name"}
    return block.Block(**{field: getattr(model, field) for field in fields})


def _layer_params(model: vit.AViT, layer: int) -> dict[str, Any]:
    return {"params": jax.tree.map(lambda leaf: leaf[layer], _params(model)["layers"])}


def _unrolled(model: vit.AViT, tap_LxBxNxD: jax.Array) -> tuple[jax.Array, vit.Aux]:
    """The network layer by layer, with a tap added to the tokens before each."""
    network = functools.partial(model.apply, {"params": _params(model)})
    x = network(_IMAGES, method="embed")
    carry, scores, actives = forward.start(_block(model), x, 1), [], []
    for i in range(model.depth):
        carry = dataclasses.replace(carry, x=carry.x + tap_LxBxNxD[i])
        carry, (score, active) = forward.step(
            _block(model),
            executors.masked,
            (model.halting.gamma, model.halting.beta),
            carry,
            _layer_params(model, i)["params"],
            is_last=i == model.depth - 1,
        )
        scores, actives = [*scores, score], [*actives, active]
    by_layer = dict(score=jnp.stack(scores), active=jnp.stack(actives))
    aux = vit.Aux(
        **by_layer,
        depth=carry.state.depth,
        ponder_cost=halting.ponder_cost(carry.state),
        class_output=carry.readout[:, 0],
        macs=flops.image_macs(model, by_layer["active"]),
    )
    return network(carry.readout, method="classify"), aux


@pytest.fixture(scope="module")
def unrolled():
    """(logits, aux, {prior's mode: gradient of the sum of losses with respect to the tokens before
    each layer}).
    """
    model, modes = _model(), ("paper", "official")

    def loss(tap, share):
        logits, aux = _unrolled(model, tap)
        priors = jnp.stack([losses.prior_loss(aux, target_depth=2, mode=mode) for mode in modes])
        return losses.cross_entropy(logits, _LABELS) + losses.ponder_loss(aux) + share @ priors, (
            logits,
            aux,
        )

    tap = np.zeros((model.depth, len(_IMAGES), model.num_tokens, model.width), np.float32)
    run = _jit(jax.grad(loss, has_aux=True))
    results = [jax.device_get(run(tap, share)) for share in np.eye(2, dtype=np.float32)]
    return *results[0][1], {
        mode: gradient for mode, (gradient, _) in zip(modes, results, strict=True)
    }


def test_a_halted_token_gets_no_gradient_from_later_layers(unrolled) -> None:
    _, aux, gradients = unrolled
    halted = ~aux.active
    assert halted[1:].any(axis=(1, 2)).all()
    assert not halted.all(axis=(1, 2)).any()
    per_token = {mode: np.abs(gradient).max(-1) for mode, gradient in gradients.items()}
    np.testing.assert_array_equal(per_token["paper"][halted], 0.0)
    assert (per_token["paper"][:2][aux.active[:2]] > 0).all()
    # The released code's prior sees halted rows, and its gradient goes through them.
    assert per_token["official"][halted].max() > 1e-4


def test_scan_over_layers_equals_a_loop(unrolled) -> None:
    got = _run()
    chex.assert_trees_all_close(got, unrolled[:2], atol=1e-5)
    assert len(np.unique(got[1].depth)) > 2


def test_block_keeps_halted_tokens_from_the_others() -> None:
    model = _model()
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(2, 6, 8)), jnp.float32)
    active = jnp.array([[1, 1, 0, 1, 0, 1], [0, 1, 1, 1, 1, 0]], bool)

    @_jit
    @functools.partial(jax.grad, has_aux=True)
    def seen(x):
        """Gradient of whatever the active tokens give."""
        y = _block(model).apply(_layer_params(model, 0), x, active, method="transform")
        return jnp.sum(jnp.sin(y), where=active[..., None]), y

    gradient, y = seen(x)
    np.testing.assert_array_equal(gradient[~active], 0.0)
    assert (np.abs(gradient[active]).max(-1) > 1e-3).all()
    # The same as attention over the active tokens alone.
    transform = _jit(functools.partial(_block(model).apply, method="transform"))
    alone = transform(_layer_params(model, 0), x[:1, active[0]])
    np.testing.assert_allclose(y[:1, active[0]], alone, atol=1e-5)


def test_layers_after_the_last_halt_get_no_gradient() -> None:
    # Scores of about 0.6: every token halts at layer 2 of 4.
    model = _model(halting=halting.HaltingConfig(gamma=0.01, beta=0.5))

    grads, aux = _gradient(model)
    np.testing.assert_array_equal(aux.depth, 2)
    for leaf in jax.tree.leaves(grads["layers"]):
        np.testing.assert_array_equal(leaf[2:], 0.0)
        assert (np.abs(leaf[:2]).reshape(2, -1).max(1) > 0).all()


def test_a_network_without_halting_reports_full_depth() -> None:
    logits, aux = _run(model=_model(halting=None))
    assert logits.shape == (4, 5)
    chex.assert_shape([aux.score, aux.active], (4, 4, 7))
    np.testing.assert_array_equal(aux.score, 0.0)
    assert aux.active.dtype == bool
    assert aux.active.all()
    np.testing.assert_array_equal(aux.depth, np.full((4, 7), 4))
    np.testing.assert_array_equal(aux.ponder_cost, 5.0)
    never_halts, _ = _run(model=_model(halting=halting.HaltingConfig(gamma=0.0, beta=-100.0)))
    np.testing.assert_allclose(logits, never_halts, atol=1e-5)


def test_shapes_of_oblong_grey_images() -> None:
    logits, aux = _run()
    assert logits.shape == (4, 5)
    chex.assert_shape([aux.score, aux.active], (4, 4, 7))
    chex.assert_shape([aux.depth, aux.ponder_cost], (4, 7))
    chex.assert_shape(aux.class_output, (4, 8))
    assert aux.depth.dtype == jnp.int32
    assert aux.distillation_output is None


def test_patches_run_row_by_row() -> None:
    params = _params(_model())
    tokens = _jit(functools.partial(_model().apply, method="embed"))({"params": params}, _IMAGES)
    patches = [
        _IMAGES[:, row : row + 4, column : column + 4] for row in (0, 4) for column in (0, 4, 8)
    ]
    expected = (
        np.stack([patch.reshape(4, -1) for patch in patches], 1) @ params["patch_embed"]["kernel"]
    )
    expected = expected + params["patch_embed"]["bias"] + params["pos_embed"][:, 1:]
    np.testing.assert_allclose(tokens[:, 1:], expected, atol=1e-5)
    class_token = params["cls_token"][0, 0] + params["pos_embed"][0, 0]
    np.testing.assert_allclose(tokens[:, 0], np.tile(class_token, (4, 1)), atol=1e-6)


@pytest.mark.parametrize("gate", [_GATE, None])
def test_distilled_has_two_heads_in_training_and_their_mean_in_evaluation(
    gate: halting.HaltingConfig | None,
) -> None:
    model = _model(distilled=True, halting=gate)
    params = _params(model)
    mean, aux = _run(model=model)
    (class_logits, distillation_logits), _ = _run(model=model, train=True)
    np.testing.assert_allclose(mean, (class_logits + distillation_logits) / 2, atol=1e-6)
    assert aux.depth.shape == (4, 8)
    for output, logits, head in (
        (aux.class_output, class_logits, params["head"]),
        (aux.distillation_output, distillation_logits, params["head_dist"]),
    ):
        normed = (output - output.mean(-1, keepdims=True)) / np.sqrt(
            output.var(-1, keepdims=True) + 1e-6
        )
        expected = (normed * params["norm"]["scale"] + params["norm"]["bias"]) @ head[
            "kernel"
        ] + head["bias"]
        np.testing.assert_allclose(logits, expected, atol=1e-4)
    tokens = _jit(functools.partial(model.apply, method="embed"))({"params": params}, _IMAGES)
    second = params["dist_token"][0, 0] + params["pos_embed"][0, 1]
    np.testing.assert_allclose(tokens[:, 1], np.tile(second, (4, 1)), atol=1e-6)


@pytest.mark.parametrize("noise", ["dropout", "drop_path"])
def test_noise_follows_key_and_image(noise: str) -> None:
    model = _model(halting=None, depth=2, **{noise: 0.5})
    images = np.repeat(_IMAGES[:1], 8, axis=0)
    noisy = functools.partial(_run, model=model, train=True)
    logits, _ = noisy(images, rngs={"dropout": jax.random.key(0)})
    again, _ = noisy(images, rngs={"dropout": jax.random.key(0)})
    other, _ = noisy(images, rngs={"dropout": jax.random.key(1)})
    np.testing.assert_array_equal(logits, again)
    assert np.abs(logits - other).max() > 1e-2
    assert np.abs(logits - logits[0]).max() > 1e-2  # one image, eight draws
    # The draw goes with the place in the global batch, however the batch is split.
    for start in (0, 4):
        index = jnp.arange(start, start + 4)
        half, _ = noisy(images[index], rngs={"dropout": jax.random.key(0)}, image_index=index)
        np.testing.assert_allclose(half, logits[start : start + 4], atol=1e-5)
    calm, _ = _run(images[:4], model)
    np.testing.assert_allclose(calm, _run(images[:4], _model(halting=None, depth=2))[0], atol=1e-6)


def test_drop_path_keeps_the_first_layer_and_drops_the_last_at_its_rate() -> None:
    # At a rate next to 1 the second of two layers is always left out: what remains is the first one
    # alone.
    model, shallow = (
        _model(halting=None, depth=2, drop_path=1 - 1e-6),
        _model(halting=None, depth=1),
    )
    params = _params(model)
    first = params | {"layers": jax.tree.map(lambda leaf: leaf[:1], params["layers"])}
    logits, _ = _run(model=model, train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(logits, _run(model=shallow, params=first)[0], atol=1e-5)


def test_drop_path_scales_what_it_keeps() -> None:
    # Attention adds 10 and the MLP 1 to every channel; in the second layer times 0 or 1 / (1 -
    # 0.75), each for itself.
    model = _model(halting=None, depth=2, drop_path=0.75)
    params = jax.tree.map(np.zeros_like, _params(model))
    params["layers"]["proj"]["bias"] += 10.0
    params["layers"]["fc2"]["bias"] += 1.0
    images = np.repeat(_IMAGES, 16, axis=0)
    _, aux = _run(images, model, params, train=True, rngs={"dropout": jax.random.key(0)})
    sums, counts = np.unique(aux.class_output, return_counts=True)
    np.testing.assert_allclose(sums, [11.0, 15.0, 51.0, 55.0], rtol=1e-6)
    expected = 8 * 64 * np.array([9, 3, 3, 1]) / 16
    assert (np.abs(counts / expected - 1) < 0.75).all()


def test_every_layer_draws_a_dropout_of_its_own() -> None:
    # Each of two layers adds 1 to every channel, times 0 or 1 / (1 - 0.5).
    model = _model(halting=None, depth=2, dropout=0.5)
    params = jax.tree.map(np.zeros_like, _params(model))
    params["layers"]["fc2"]["bias"] += 1.0
    _, aux = _run(model=model, params=params, train=True, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(aux.class_output)) == {0.0, 2.0, 4.0}


def test_remat_gives_the_same_gradient_from_another_program() -> None:
    plain, remat = _model(), _model(remat=True)
    chex.assert_trees_all_close(_gradient(remat), _gradient(plain), rtol=1e-4, atol=1e-6)
    programs = [
        str(jax.make_jaxpr(model.apply)({"params": _params(plain)}, _IMAGES))
        for model in (plain, remat)
    ]
    assert ["checkpoint" in program or "remat" in program for program in programs] == [False, True]


def test_bfloat16_keeps_parameters_and_halting_in_float32() -> None:
    model = _model(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(model.init, jax.random.key(0), _IMAGES)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    logits, aux = _run(model=model)
    assert logits.dtype == jnp.bfloat16
    assert aux.score.dtype == aux.ponder_cost.dtype == aux.class_output.dtype == jnp.float32
    # Scores close to 1/2 tell bfloat16 sums (8 bits) from float32 ones.
    remainder = aux.ponder_cost - aux.depth
    before = np.where(aux.active[1:], aux.score[:-1], 0.0).sum(0)
    np.testing.assert_allclose(remainder, 1.0 - before, atol=1e-6)
    expected, _ = _run(model=_model(halting=None))
    got, _ = _run(model=_model(halting=None, dtype=jnp.bfloat16))
    assert 1e-4 < np.abs(got.astype(np.float32) - expected).max() < 0.2


def test_learnable_gate_starts_as_the_fixed_one_and_gets_gradients() -> None:
    learnable = _model(
        halting=halting.HaltingConfig(gamma=_GATE.gamma, beta=_GATE.beta, learnable=True)
    )
    initial = _jit(lambda key: learnable.init(key, _IMAGES)["params"]["gate"])(jax.random.key(0))
    assert initial == {"gamma": _GATE.gamma, "beta": _GATE.beta}
    gradient, aux = _gradient(learnable)
    expected_gradient, expected_aux = _gradient(_model())
    assert set(gradient) - set(expected_gradient) == {"gate"}
    assert all(abs(gradient["gate"][name]) > 1e-3 for name in ("gamma", "beta"))
    got = {name: gradient[name] for name in expected_gradient}
    chex.assert_trees_all_close((got, aux), (expected_gradient, expected_aux), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("channel", [3, -1])
def test_any_channel_can_be_the_gate(channel: int) -> None:
    # The network does not know one channel of the tokens from another, but for the gate: rolled
    # parameters undo the choice.
    def rolled(path, leaf):
        names = [key.key for key in path]
        if not {"qkv", "fc1", "head"} & set(names):  # these read the tokens, all else writes them
            return np.roll(leaf, channel, axis=-1)
        return np.roll(leaf, channel, axis=-2) if names[-1] == "kernel" else leaf

    model = _model(
        halting=halting.HaltingConfig(gamma=_GATE.gamma, beta=_GATE.beta, channel=channel)
    )
    params = jax.tree_util.tree_map_with_path(rolled, _params(_model()))
    logits, aux = _run(model=model, params=params)
    expected_logits, expected = _run()
    expected = expected.replace(class_output=np.roll(expected.class_output, channel, axis=-1))
    chex.assert_trees_all_close((logits, aux), (expected_logits, expected), atol=1e-5)
    assert np.abs(_run(model=model)[1].score - expected.score).max() > 0.1


def test_compiles_once() -> None:
    chex.clear_trace_counter()
    model = _model()
    run = _jit(
        chex.assert_max_traces(
            lambda params, images: model.apply({"params": params}, images)[0], n=1
        )
    )
    results = [run(_params(model), images) for images in (_IMAGES, 2 * _IMAGES, 0 * _IMAGES)]
    assert np.abs(results[0] - results[1]).max() > 1e-3


@pytest.mark.parametrize(
    ("preset", "distilled", "count"),
    [
        (avit_jax.deit_tiny, False, 5_717_416),
        (avit_jax.deit_small, False, 22_050_664),
        (avit_jax.deit_base, False, 86_567_656),
        (avit_jax.deit_tiny, True, 5_910_800),
        (avit_jax.deit_small, True, 22_436_432),
    ],
)
def test_presets_have_the_published_number_of_parameters(
    preset: Callable, distilled: bool, count: int
) -> None:
    for gate, gate_count in (
        (None, 0),
        (halting.HaltingConfig(), 0),
        (halting.HaltingConfig(learnable=True), 2),
    ):
        model = preset(distilled=distilled, halting=gate)
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))[
            "params"
        ]
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count + gate_count
    assert model.width // model.num_heads == 64
    assert (model.depth, model.patch_size, model.num_tokens) == (12, 16, 198 if distilled else 197)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(patch_size=5), r"patch_size 5 must divide the image size \(8, 12\)"),
        (dict(image_size=(8, 10)), r"patch_size 4 must divide the image size \(8, 10\)"),
        (dict(image_size=[8, 10]), r"patch_size 4 must divide the image size \(8, 10\)"),
        (dict(mlp_ratio=0.01), r"mlp_ratio 0\.01 gives the MLP no hidden channel"),
        (
            dict(image_size=(8, 12, 1)),
            r"image_size must be one number or \(height, width\); got \(8, 12, 1\)",
        ),
        (dict(depth=0), "depth must be at least 1; got 0"),
        (dict(num_heads=3), "width 8 must be divisible by num_heads 3"),
        (dict(drop_path=1.0), r"drop_path must lie in \[0, 1\); got 1.0"),
        (dict(dropout=-0.1), r"dropout must lie in \[0, 1\); got -0.1"),
        (
            dict(halting=halting.HaltingConfig(channel=8)),
            "halting channel 8 is not among the 8 channels",
        ),
        (
            dict(halting=halting.HaltingConfig(channel=-9)),
            "halting channel -9 is not among the 8 channels",
        ),
        (dict(image_size=8), r"images must be \(B, 8, 8, 1\); got \(4, 8, 12, 1\)"),
        (dict(channels=3), r"images must be \(B, 8, 12, 3\); got \(4, 8, 12, 1\)"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(_model(**changes).init, jax.random.key(0), _IMAGES)
    with pytest.raises(ValueError, match="there are no images"):
        jax.eval_shape(_model().init, jax.random.key(0), _IMAGES[:0])


@pytest.mark.parametrize(
    "images",
    [
        np.zeros(_IMAGES.shape, dtype) for dtype in (np.uint8, np.int32, bool, np.complex64, object, "U1", ">f4")
    ] + [_IMAGES.tolist(), [*_IMAGES], None, 0.5],
    ids=lambda images: str(getattr(images, "dtype", type(images).__name__)),
)  # fmt: skip
def test_what_is_no_normalised_float_image_is_refused(images: Any) -> None:
    model = _model()
    with pytest.raises(ValueError, match="images must be"):
        model.apply({"params": _params(model)}, images)
    with pytest.raises(ValueError, match="images must be"):
        avit_jax.adaptive.apply(model, {"params": _params(model)}, images)
    with pytest.raises(ValueError, match="images must be"):
        model.init(jax.random.key(0), images)
    with pytest.raises(ValueError, match="images must be"):
        avit_jax.autotune.autotune(model, {"params": _params(model)}, images, cache="/dev/null")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, np.float64])
def test_images_of_every_float_dtype(dtype: Any) -> None:
    model = _model()
    images = _IMAGES.astype(dtype)
    expected = _run(images.astype(np.float32))[0]
    with jax.numpy_dtype_promotion("standard"):  # of float16 with the parameters
        np.testing.assert_allclose(
            model.apply({"params": _params(model)}, images)[0], expected, atol=0.02
        )
    mapped = jax.vmap(lambda image: model.apply({"params": _params(model)}, image[None])[0])(
        jnp.asarray(images, jnp.float32)
    )
    np.testing.assert_allclose(mapped[:, 0], expected, atol=0.02)
