"""Multiply-accumulates against XLA's own count, against published numbers, and against a count
token by token.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax.models import flops, vit


def _xla_macs(model: vit.AViT) -> float:
    """Half the floating-point operations that XLA counts in the compiled network, for one image."""
    images = jax.ShapeDtypeStruct((1, *model.pixels, model.channels), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    costs = jax.jit(model.apply).lower(variables, images).compile().cost_analysis()
    return (costs if isinstance(costs, dict) else costs[0])["flops"] / 2


# One layer: XLA counts the body of a loop once, however often it runs.
@pytest.mark.parametrize(
    "create", [vit.deit_tiny, vit.deit_small, functools.partial(vit.deit_tiny, distilled=True)]
)
def test_one_layer_as_xla_counts_it(create: functools.partial) -> None:
    model = create(depth=1)
    np.testing.assert_allclose(flops.static_macs(model), _xla_macs(model), rtol=0.02)


def test_patch_embedding_and_head_as_xla_counts_them() -> None:
    # Long patches and many classes, next to which the one narrow layer is small.
    model = vit.AViT(
        image_size=(64, 96),
        patch_size=32,
        width=64,
        num_heads=1,
        depth=1,
        num_classes=20_000,
        distilled=True,
    )
    assert flops.fixed_macs(model) > 0.8 * flops.static_macs(model)
    np.testing.assert_allclose(flops.static_macs(model), _xla_macs(model), rtol=0.02)


def test_macs_grow_by_the_same_with_each_layer() -> None:
    first, second, third = (flops.static_macs(vit.deit_tiny(depth=depth)) for depth in (1, 2, 3))
    assert second - first == third - second == first - flops.fixed_macs(vit.deit_tiny()) > 0


def test_macs_of_a_large_network_fit_into_a_program() -> None:
    macs = flops.static_macs(vit.deit_base())
    assert macs > 2**31 and float(jax.jit(lambda x: x / macs)(macs / 2)) == pytest.approx(0.5)
    large = vit.deit_base(image_size=1024, depth=2)
    macs = jax.jit(lambda active: flops.image_macs(large, active))(
        np.zeros((2, 1, large.num_tokens), bool)
    )
    assert float(macs[0]) > 2**31


@pytest.mark.parametrize(
    ("create", "published"),
    [(vit.deit_tiny, 1.26e9), (vit.deit_small, 4.6e9), (vit.deit_base, 17.6e9)],
)
def test_published_sizes(create: functools.partial, published: float) -> None:
    np.testing.assert_allclose(flops.static_macs(create()), published, rtol=0.01)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "distilled"])
def model(request: pytest.FixtureRequest) -> vit.AViT:
    return vit.AViT(
        image_size=(12, 8),
        patch_size=4,
        width=16,
        num_heads=2,
        depth=5,
        mlp_ratio=3.0,
        num_classes=7,
        distilled=request.param,
    )


def _active(model: vit.AViT, depth: np.ndarray) -> jax.Array:
    """`(L, B, N)` of tokens that are active in their first `depth` `(B, N)` layers."""
    return jnp.asarray(np.arange(model.depth)[:, None, None] < depth)


def test_all_active_costs_what_the_static_network_costs(model: vit.AViT) -> None:
    active = _active(model, np.full((3, model.num_tokens), model.depth))
    np.testing.assert_allclose(flops.image_macs(model, active), flops.static_macs(model), rtol=1e-6)


def test_finished_image_costs_nothing_more(model: vit.AViT) -> None:
    depth = np.full((3, model.num_tokens), model.depth)
    depth[:, : model.num_prefix_tokens] = 2
    depth[2, model.num_prefix_tokens - 1] = (
        4  # the distillation token of a distilled model; the image goes on with it
    )
    macs = flops.image_macs(model, _active(model, depth))
    np.testing.assert_allclose(macs[:2], flops.static_macs(model.clone(depth=2)), rtol=1e-6)
    assert macs[2] > macs[1]


def test_against_a_count_token_by_token(model: vit.AViT) -> None:
    depth = np.random.default_rng(0).integers(1, model.depth + 1, (20, model.num_tokens))
    width, patch_values = model.width, model.patch_size**2 * model.channels
    expected = []
    for image in depth:
        total = (
            len(image) - model.num_prefix_tokens
        ) * patch_values * width + model.num_prefix_tokens * width * model.num_classes
        for layer in range(model.depth):
            if layer >= image[: model.num_prefix_tokens].max():
                continue
            tokens = [d for d in image if layer < d]
            for _ in tokens:
                total += width * 3 * width  # qkv
                total += sum(
                    2 * width for _ in tokens
                )  # its products with every key, and their sum over every value
                total += width * width  # projection
                total += 2 * width * 3 * width  # MLP, 3 times as wide
        expected.append(total)
    np.testing.assert_allclose(flops.image_macs(model, _active(model, depth)), expected, rtol=1e-6)


def test_computing_is_active_until_the_last_readout_token_halts(model: vit.AViT) -> None:
    depth = np.array(
        [
            [1] * model.num_prefix_tokens
            + [model.depth] * (model.num_tokens - model.num_prefix_tokens)
        ]
    )
    needed = flops.is_computed(_active(model, depth), model.num_prefix_tokens)
    assert needed[0].all()
    assert not needed[1:].any()
