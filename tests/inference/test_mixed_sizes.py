"""Images of several sizes in one call: each as on its own."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax.core import halting
from avit_jax.core.plan import Plan
from avit_jax.inference import adaptive, mixed_sizes
from avit_jax.models import vit
from avit_jax.weights import positions

_SIZES = [(24, 16), (40, 32), (16, 24)]  # the second is the model's
_PLAN = Plan(bucket=2, token_multiple=8)


def _model(**changes: Any) -> vit.AViT:
    sizes = dict(image_size=(40, 32), patch_size=8, width=24, depth=4, num_heads=3, num_classes=7)
    gate = halting.HaltingConfig(gamma=3.0, beta=-1.0)
    return vit.AViT(**(sizes | dict(halting=gate) | changes))


def _images(sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    counts = [3, 2, 4]
    return [
        rng.standard_normal((count, *size, 3)).astype(np.float32)
        for count, size in zip(counts, sizes, strict=True)
    ]


def _variables(model: vit.AViT) -> dict[str, Any]:
    params = jax.jit(model.init)(jax.random.key(1), np.zeros((1, *model.pixels, 3), np.float32))
    return jax.tree.map(lambda x: 4.0 * x if x.ndim == 3 else x, params)  # positions that matter


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"distilled": True},
        {"position_class": False, "num_registers": 2},
        {"halting": halting.HaltingConfig(gamma=1.0, beta=-8.0, merge=True, redundancy=12.0)},
    ],
    ids=["class token", "distilled", "registers", "merging"],
)
def test_each_image_is_as_in_a_call_of_its_own_size(changes: dict[str, Any]) -> None:
    model = _model(**changes)
    variables, groups = _variables(model), _images(_SIZES)

    @jax.jit
    def run(variables: Any, groups: Any) -> Any:
        return mixed_sizes.apply(model, variables, groups, plan=_PLAN)

    ratios = []
    for images, (logits, aux) in zip(groups, run(variables, groups), strict=True):
        network = model.clone(image_size=images.shape[1:3])
        resized = positions.resize_positions(
            np.asarray(variables["params"]["pos_embed"]),
            network.grid,
            model.num_prefix_tokens if model.position_class else 0,
            old_grid=model.grid,
        )
        alone = {"params": variables["params"] | {"pos_embed": resized}}
        expected, other = jax.jit(
            lambda v, x, network=network: adaptive.apply(network, v, x, plan=_PLAN)
        )(alone, images)
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=2e-5)
        np.testing.assert_array_equal(aux.depth, other.depth)
        np.testing.assert_array_equal(aux.active, other.active)
        np.testing.assert_allclose(aux.macs, other.macs, rtol=1e-6)
        np.testing.assert_allclose(aux.class_output, other.class_output, rtol=1e-3, atol=2e-5)
        assert jax.tree.map(np.shape, aux) == jax.tree.map(np.shape, other)
        assert (aux.macs_padded >= aux.macs).all()
        ratios.append(float(aux.depth.mean()))
    assert max(ratios) < 4  # tokens halt


def test_small_images_cost_less_than_their_padding() -> None:
    model = _model(halting=halting.HaltingConfig(gamma=1.0, beta=-20.0))  # no token halts
    (_, small), (_, large), _ = jax.jit(
        lambda v, x: mixed_sizes.apply(model, v, x, plan=Plan(bucket=1, token_multiple=4))
    )(_variables(model), _images(_SIZES))
    assert small.macs_padded.max() < 0.4 * large.macs_padded.min()


def test_what_has_no_class_token_or_no_images_is_refused() -> None:
    model = _model()
    variables = _variables(model)
    with pytest.raises(ValueError, match="no groups"):
        mixed_sizes.apply(model, variables, [])
    with pytest.raises(ValueError, match='pool="token"'):
        mixed_sizes.apply(model.clone(pool="avg"), variables, _images(_SIZES))
    with pytest.raises(ValueError, match="rope_theta=0"):
        mixed_sizes.apply(model.clone(rope_theta=100.0), variables, _images(_SIZES))
    with pytest.raises(ValueError, match="must be a list of arrays"):
        mixed_sizes.apply(model, variables, jnp.zeros((2, 40, 32, 3)))
    with pytest.raises(ValueError, match="patch_size 8 must divide"):
        mixed_sizes.apply(model, variables, [jnp.zeros((1, 20, 16, 3))])
    with pytest.raises(TypeError, match="no gradient"):
        jax.grad(lambda v: mixed_sizes.apply(model, v, _images(_SIZES))[0][0].sum())(variables)
