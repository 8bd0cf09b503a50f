"""The rivals of experiments/: each for what defines it, and all against the network they come from."""

import functools
import json
import pathlib
import sys
from typing import Any

import chex
import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avit_jax.core import halting
from avit_jax.models import flops, vit
from avit_jax.training import build, loop
from avit_jax.weights import weight_files

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from experiments.pareto import ends as pareto_ends
from experiments.rivals import (
    dropping,
    dynamic_vit,
    early_exit,
    ends,
    evit,
    layer_act,
    tome,
    unrolled,
)

_SIZES = {
    "image_size": (16, 16),
    "patch_size": 4,
    "width": 16,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
    "mlp_ratio": 2.0,
}
_STATIC = vit.AViT(**_SIZES, halting=None)
_IMAGES = np.random.default_rng(0).normal(size=(5, 16, 16, 3)).astype(np.float32)
_RIVALS = {
    "evit": evit.EViT,
    "tome": tome.ToMe,
    "dynamic_vit": dynamic_vit.DynamicViT,
    "random": functools.partial(dropping.Dropping, choice="random"),
    "uniform": functools.partial(dropping.Dropping, choice="uniform"),
    "early_exit": early_exit.EarlyExit,
    "ends": functools.partial(ends.Ends, exits=(1, 2)),
}
_HARMLESS = {"tome": {"merges": 0}, "early_exit": {"confidence": 1.1}, "ends": {"merges": 0}}
_OWN = ("predictors", "exit_maps")  # parameters that the static network does not have


@pytest.fixture(scope="module")
def params() -> Any:
    """Of the static network; livelier than at the start, so that tokens differ."""
    params = jax.jit(_STATIC.init)(jax.random.key(0), _IMAGES)["params"]
    params["layers"] = jax.tree.map(lambda x: 2 * x if x.ndim > 2 else x, params["layers"])
    return params


def _params_of(model: vit.AViT, params: Any) -> Any:
    """The static network's parameters, and the rival's own as they are created."""
    has_own = isinstance(model, dynamic_vit.DynamicViT | ends.Ends)
    return {**_created(model.clone()), **params} if has_own else params


@functools.cache
def _created(model: vit.AViT) -> Any:
    return jax.jit(model.init)(jax.random.key(1), _IMAGES)["params"]


def _run(model: vit.AViT, params: Any, **arguments: Any) -> tuple[Any, vit.Aux]:
    return _apply(model, _params_of(model, params), _IMAGES, **arguments)


def _apply(
    model: vit.AViT, params: Any, images: Any, rngs: Any = None, **arguments: Any
) -> tuple[Any, vit.Aux]:
    run = jax.jit(
        lambda params, images, rngs: model.apply({"params": params}, images, rngs=rngs, **arguments)
    )
    return run(params, images, rngs)


@pytest.mark.parametrize("name", _RIVALS)
def test_a_rival_that_leaves_nothing_out_is_the_static_network(name: str, params: Any) -> None:
    model = _RIVALS[name](**_SIZES, **_HARMLESS.get(name, {"keep_rate": 1.0}))
    logits, aux = _run(model, params)
    np.testing.assert_allclose(logits, _apply(_STATIC, params, _IMAGES)[0], atol=2e-5)
    # Predictors, comparing, heads.
    own = {
        "dynamic_vit": 3 * 16 * (16**2 + 16 * 8 + 8 * 4 + 2 * 4),
        "tome": 4 * 9 * 8 * 8,
        "early_exit": 3 * 16 * 5,
        "ends": 4 * 9 * 8 * 8 + 2 * (16**2 + 16 * 5),
    }
    np.testing.assert_allclose(aux.macs, flops.static_macs(_STATIC) + own.get(name, 0), rtol=1e-6)


@pytest.mark.parametrize("name", _RIVALS)
def test_parameters_are_those_of_the_static_network(name: str, params: Any) -> None:
    own = jax.eval_shape(_RIVALS[name](**_SIZES).init, jax.random.key(0), _IMAGES)["params"]
    shared = {key: value for key, value in own.items() if not key.startswith(_OWN)}
    chex.assert_trees_all_equal_shapes(shared, params)
    assert (len(own) > len(shared)) == (name in ("dynamic_vit", "ends"))


def _layer_macs(attends: int, computes: int) -> int:
    return attends * (4 * 16**2 + 2 * 16 * attends) + computes * 2 * 16 * 32


def test_evit_fuses_what_the_class_token_looks_at_least(params: Any) -> None:
    attention = jnp.array([[0.1, 0.4, 0.2, 0.05], [0.3, 0.1, 0.1, 0.4]])
    x = jax.random.normal(jax.random.key(0), (2, 5, 3))
    out = evit.reorganise(x, attention, 2)
    np.testing.assert_allclose(
        out[0, :3], x[0, [0, 2, 3]]
    )  # class token, then the kept in their order
    np.testing.assert_allclose(out[0, 3], 0.1 * x[0, 1] + 0.05 * x[0, 4], rtol=1e-5)
    np.testing.assert_allclose(out[1, :3], x[1, [0, 1, 4]])
    _, aux = _run(evit.EViT(**_SIZES, keep_rate=0.5), params)
    # 17 tokens; half of the 16 patches and the fused one: 10 tokens; 5 of 9 and one: 7; 3 of 6 and
    # one: 5.
    assert aux.active.sum(axis=2)[:, 0].tolist() == [17, 17, 10, 7]
    layers = [_layer_macs(17, 17), _layer_macs(17, 10), _layer_macs(10, 7), _layer_macs(7, 5)]
    np.testing.assert_allclose(aux.macs, sum(layers) + flops.fixed_macs(_STATIC))


def test_the_class_token_s_attention_is_that_of_the_layer() -> None:
    query, key = jax.random.normal(jax.random.key(0), (2, 3, 2, 5, 4))
    full = jax.nn.softmax(query @ key.swapaxes(-1, -2) / 2.0, axis=-1)  # heads of 4 channels
    np.testing.assert_allclose(
        evit.class_attention(query, key), full.mean(axis=1)[:, 0, 1:], atol=1e-6
    )


def test_tome_merges_the_most_similar_pairs() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 9, 8)).astype(np.float32)
    x[0, 4] = 1.01 * x[0, 7]  # an even and an odd place: a pair
    x[0, 0] = x[0, 3]  # the class token never leaves, however alike
    size = np.arange(1.0, 10.0, dtype=np.float32)[None]
    pairs = tome.match(jnp.asarray(x), 1)
    assert [place.tolist() for place in pairs] == [[[2]], [[0, 1, 3, 4]], [[3]]]
    merged, sizes = tome.merge(jnp.asarray(x), jnp.asarray(size), pairs)
    np.testing.assert_allclose(merged[0, :4], x[0, [0, 2, 6, 8]], rtol=1e-5)
    np.testing.assert_allclose(merged[0, 7], (5 * x[0, 4] + 8 * x[0, 7]) / 13, rtol=1e-5)
    assert sizes[0].tolist() == [1, 3, 7, 9, 2, 4, 6, 13]


@pytest.mark.parametrize("after_mlp", [False, True])
def test_tome_gives_equal_tokens_the_attention_of_all_of_them(after_mlp: bool, params: Any) -> None:
    # All patches alike: whatever is merged, class token and patches see the same.
    plain = jax.tree.map(lambda x: x, params) | {"pos_embed": jnp.zeros_like(params["pos_embed"])}
    images = np.ones_like(_IMAGES)
    expected = _apply(_STATIC, plain, images)[0]
    logits, aux = _apply(tome.ToMe(**_SIZES, merges=5, after_mlp=after_mlp), plain, images)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    counts = [17, 12, 7, 4]  # of 7 tokens three pairs at most
    assert aux.active.sum(axis=2)[:, 0].tolist() == counts
    computes = counts if after_mlp else [12, 7, 4, 3]
    macs = [
        _layer_macs(*each) + each[0] // 2 * ((each[0] + 1) // 2) * 8
        for each in zip(counts, computes, strict=True)
    ]
    np.testing.assert_allclose(aux.macs, sum(macs) + flops.fixed_macs(_STATIC))


def test_dynamic_vit_learns_in_training_who_leaves_afterwards(params: Any) -> None:
    model = dynamic_vit.DynamicViT(**_SIZES, keep_rate=0.5)
    full = _params_of(model, params)
    rngs = {"dropout": jax.random.key(3)}

    def first_logits(full: Any) -> tuple[jax.Array, vit.Aux]:
        logits, aux = model.apply({"params": full}, _IMAGES, train=True, rngs=rngs)
        return logits[:, 0].sum(), aux

    grads, aux = jax.jit(jax.grad(first_logits, has_aux=True))(full)
    np.testing.assert_allclose(aux.macs, flops.static_macs(_STATIC))  # all tokens compute
    assert 0 < float(aux.loss) < 2
    assert _run(model, params)[1].active.sum(axis=2)[:, 0].tolist() == [17, 9, 5, 3]
    for stage in (
        "predictors_0",
        "predictors_1",
        "predictors_2",
    ):  # the class learns who should stay
        assert (
            max(jax.tree.leaves(jax.tree.map(lambda x: float(jnp.abs(x).max()), grads[stage])))
            > 1e-6
        )


def test_the_ratio_loss_is_the_squared_distance_of_each_stage(
    monkeypatch: pytest.MonkeyPatch, params: Any
) -> None:
    stays = jnp.arange(16) < 8  # half of the patches; the same half in each stage
    monkeypatch.setattr(
        dynamic_vit,
        "straight_through",
        lambda keys, x: jnp.broadcast_to(stays, x.shape[:2]).astype(x.dtype),
    )
    model = dynamic_vit.DynamicViT(**_SIZES, keep_rate=0.7)
    (logits, aux) = _run(model, params, train=True, rngs={"dropout": jax.random.key(0)})
    expected = 2.0 * np.mean([(0.5 - 0.7**stage) ** 2 for stage in (1, 2, 3)])
    assert float(aux.loss) == pytest.approx(expected, rel=1e-5)
    # What has left is seen by no other token: the first layer sees all, the class token of the
    # others the half that stays.
    active = jnp.broadcast_to(jnp.pad(stays, (1, 0), constant_values=True), (5, 17))
    x = _STATIC.apply({"params": params}, _IMAGES, method="embed")
    layers = unrolled.Layers(
        unrolled.block.Block(**_STATIC.block_kwargs, parent=None),
        params["layers"],
        None,
        jnp.arange(5),
        False,
    )
    for i in range(4):
        x = (
            layers(i, x)
            if i == 0
            else layers(i, x * active[..., None].astype(x.dtype), active=active)
        )
    np.testing.assert_allclose(
        logits, _STATIC.apply({"params": params}, x[:, :1], method="classify"), atol=2e-5
    )


def test_straight_through_draws_with_the_given_probability() -> None:
    log_probability = jnp.broadcast_to(jnp.log(jnp.array([0.3, 0.7])), (4, 5000, 2))
    keys = jax.random.split(jax.random.key(0), 4)
    drawn = dynamic_vit.straight_through(keys, log_probability)
    assert set(np.unique(np.round(drawn, 6))) == {0.0, 1.0}
    assert float(drawn.mean()) == pytest.approx(0.3, abs=0.01)
    slope = jax.grad(lambda x: dynamic_vit.straight_through(keys, x).sum())(log_probability)
    assert float(slope[..., 0].min()) > 0 > float(slope[..., 1].max())


def test_dynamic_vit_bears_an_image_whose_draws_are_all_to_leave() -> None:
    x = _IMAGES[:, 0]
    log_probability = dynamic_vit.Predictor().init_with_output(
        jax.random.key(0), jnp.tile(x, (1, 1, 4)), jnp.zeros((5, 16))
    )[0]
    chex.assert_tree_all_finite(log_probability)


def test_random_dropping_follows_the_place_in_the_global_batch(params: Any) -> None:
    model = dropping.Dropping(**_SIZES, keep_rate=0.5)
    arguments = {"train": True, "rngs": {"dropout": jax.random.key(0)}}
    whole = _apply(model, params, _IMAGES, **arguments)[0]
    part = _apply(model, params, _IMAGES[2:], image_index=jnp.arange(2, 5), **arguments)[0]
    np.testing.assert_allclose(whole[2:], part, atol=1e-5)
    other = _apply(model, params, _IMAGES, train=True, rngs={"dropout": jax.random.key(1)})[0]
    assert np.abs(whole - other).max() > 1e-3
    evaluated = _apply(model, params, _IMAGES)[0]  # without a key; by the place as well
    np.testing.assert_allclose(
        evaluated[2:],
        _apply(model, params, _IMAGES[2:], image_index=jnp.arange(2, 5))[0],
        atol=1e-5,
    )


def test_uniform_dropping_keeps_an_even_grid(params: Any) -> None:
    seen = []
    model = dropping.Dropping(**_SIZES, keep_rate=0.5, choice="uniform")
    original = unrolled.class_and_best
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            unrolled, "class_and_best", lambda *a: seen.append(original(*a)[1]) or original(*a)
        )
        seen = jax.jit(lambda params: (model.apply({"params": params}, _IMAGES), list(seen))[1])(
            params
        )
    assert seen[0][0].tolist() == [0, 2, 4, 6, 9, 11, 13, 15] and [
        len(kept[0]) for kept in seen
    ] == [8, 4, 2]


def test_early_exit_takes_the_first_layer_that_is_sure(params: Any) -> None:
    exits = _run(early_exit.EarlyExit(**_SIZES), params, train=True)[0]
    assert len(exits) == 4
    confidence = np.stack(
        [jax.nn.softmax(logits).max(axis=-1) for logits in exits[::-1]]
    )  # layer, image
    threshold = float(np.sort(confidence[:3].max(axis=0))[2]) - 1e-6  # some exit early, some do not
    logits, aux = _run(early_exit.EarlyExit(**_SIZES, confidence=threshold), params)
    sure = confidence >= threshold
    layer = np.where(sure[:3].any(axis=0), sure[:3].argmax(axis=0), 3)
    assert len(set(layer)) > 1
    assert (aux.active.sum(axis=0)[:, 0] == layer + 1).all()
    np.testing.assert_allclose(logits, [exits[3 - n][i] for i, n in enumerate(layer)], atol=2e-5)
    expected = (
        flops.fixed_macs(_STATIC) + (layer + 1) * flops.layer_macs(17, _STATIC) + layer * 16 * 5
    )
    np.testing.assert_allclose(aux.macs, expected, rtol=1e-6)


def test_layer_act_halts_an_image_as_a_whole(params: Any) -> None:
    gate = halting.HaltingConfig(gamma=3.0, beta=-0.5)
    model = layer_act.LayerACT(**_SIZES, halting=gate)
    logits, aux = _run(model, params)
    masked, masked_aux = _run(model, params, train=True)
    np.testing.assert_allclose(logits, masked, atol=2e-5)
    chex.assert_trees_all_equal(aux.active, masked_aux.active)
    assert (aux.active == aux.active[:, :, :1]).all() and len(set(aux.depth[:, 0].tolist())) > 1
    # Graves' rule, written out for each image.
    x = _STATIC.apply({"params": params}, _IMAGES, method="embed")
    block = unrolled.block.Block(**_STATIC.block_kwargs, parent=None)
    layers = unrolled.Layers(block, params["layers"], None, jnp.arange(5), False)
    output, spent, depth = np.zeros((5, 1, 16)), np.zeros(5), np.zeros(5, int)
    for i in range(4):
        x = layers(i, x)
        h = 1 / (1 + np.exp(-(3.0 * np.asarray(x).mean(axis=1)[:, 0] - 0.5)))
        for image in range(5):
            if depth[image] == 0:
                ends = i == 3 or spent[image] + h[image] >= 0.99
                weight = 1 - spent[image] if ends else h[image]
                output[image] += weight * np.asarray(x)[image, :1]
                spent[image] += weight
                depth[image] = ends * (i + 1)
    assert aux.depth[:, 0].tolist() == depth.tolist()
    expected = _STATIC.apply({"params": params}, output.astype(np.float32), method="classify")
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_a_rival_trains_in_the_same_trainer(tmp_path: pathlib.Path) -> None:
    config = fixtures.small_config(
        **{"halting.enabled": False, "train.steps": 2, "train.log_every": 1, "model.drop_path": 0.0}
    )
    parent = build.model(config)
    weights = jax.jit(parent.init)(jax.random.key(5), jnp.zeros((1, 16, 16, 1)))["params"]
    weight_files.write(tmp_path / "parent.safetensors", weights, parent)
    config.init = str(tmp_path / "parent.safetensors")
    model = dynamic_vit.DynamicViT(**unrolled.attributes(parent), keep_rate=0.5)
    loop.train(config, tmp_path / "run", model=model)
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert row["own_loss"] > 0 and row["loss"] == pytest.approx(row["task_loss"] + row["own_loss"])
    images = np.zeros((1, 16, 16, 1), np.float32)
    zeros = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(model.init, jax.random.key(0), images)
    )
    macs = jax.jit(lambda variables: model.apply(variables, images)[1].macs)(zeros)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["macs_ratio"] == pytest.approx(float(macs[0]) / flops.static_macs(parent))


@pytest.mark.parametrize("rival", [layer_act.LayerACT, evit.EViT])
def test_rivals_do_not_leave_out_a_dropout_silently(rival: type[vit.AViT]) -> None:
    model = rival(
        **unrolled.attributes(build.model(fixtures.small_config(**{"model.dropout": 0.1})))
    )
    with pytest.raises(ValueError, match="no dropout"):
        model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 1)), train=True)


def test_an_image_ends_at_the_first_exit_that_is_sure(params: Any) -> None:
    model = ends.Ends(**_SIZES, merges=2, exits=(1, 2), confidence=0.35)
    run = jax.jit(functools.partial(model.apply, mutable=["intermediates"]))
    params = _params_of(model, params)
    (logits, aux), kept = run({"params": params}, _IMAGES)
    (each,), (cost,) = (kept["intermediates"][name] for name in ("logits", "cost"))
    likely = jax.nn.softmax(each).max(axis=-1)
    place = [next((k for k in (0, 1) if row[k] >= 0.35), 2) for row in likely]
    assert len(set(place)) > 1  # images differ
    np.testing.assert_array_equal(logits, each[np.arange(len(place)), np.array(place)])
    np.testing.assert_allclose(aux.macs, cost[np.array(place)])
    # An exit begins as norm and head of the network, so a shallower network gives its logits.
    layers = jax.tree.map(lambda x: x[:2], params["layers"])
    shallow = tome.ToMe(**_SIZES | {"depth": 2}, merges=2)
    shared = {key: params[key] for key in params if not key.startswith(_OWN)} | {"layers": layers}
    expected, shallow_aux = _apply(shallow, shared, _IMAGES)
    np.testing.assert_allclose(each[:, 0], expected, atol=1e-5)
    np.testing.assert_allclose(cost[0], shallow_aux.macs[0] + 16**2, rtol=1e-6)


@pytest.mark.parametrize("detached", [False, True])
def test_exits_learn_from_the_last_layer(detached: bool, params: Any) -> None:
    model = ends.Ends(**_SIZES, merges=2, exits=(1, 2), detached=detached)
    loss = lambda params: model.apply({"params": params}, _IMAGES, train=True)[1].loss  # noqa: E731
    grads = jax.jit(jax.grad(loss))(_params_of(model, params))
    norms = {name: float(optax.tree.norm(grad)) for name, grad in grads.items()}
    assert norms["exit_maps_0"] > 1e-4 and norms["exit_maps_1"] > 1e-4
    assert (norms["patch_embed"] > 1e-4) != detached  # the loss of an exit reaches the layers


def test_the_confidence_meets_a_budget_and_the_twin_has_equally_many_ends() -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(400, 3, 5))
    found = pareto_ends.Outcomes(logits, np.ones((400, 3)), np.array([0.2, 0.3, 0.5]))
    for budget in (0.25, 0.3, 0.4):
        cost = found.cost[found.end(found.confidence(budget))].mean()
        assert budget - 0.005 < cost <= budget
