"""ToMe with a number of merges for each image: what it merges, and how thresholds are set."""

import pathlib
import sys
from typing import Any

import fixtures
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avit_jax.models import vit
from avit_jax.training import build

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from experiments import results
from experiments.pareto import arms, counts
from experiments.rivals import counted_tome, tome, unrolled

_IMAGES = np.random.default_rng(0).normal(size=(6, 16, 16, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def network() -> tuple[vit.AViT, Any]:
    """A static network whose tokens differ, and its parameters."""
    model = build.model(fixtures.small_config(**{"halting.enabled": False}))
    params = jax.jit(model.init)(jax.random.key(0), _IMAGES)["params"]
    layers = jax.tree.map(lambda x: 2 * x if x.ndim > 2 else x, params["layers"])
    return model, params | {"layers": layers}


def _apply(model: vit.AViT, params: Any) -> tuple[jax.Array, vit.Aux]:
    return jax.jit(model.apply)({"params": params}, _IMAGES)


def _counted(model: vit.AViT, **arguments: Any) -> counted_tome.CountedToMe:
    return counted_tome.CountedToMe(**unrolled.attributes(model), **arguments)


@pytest.mark.parametrize("merges", [1, 3, 20])
def test_without_adapting_it_is_tome(merges: int, network: tuple[vit.AViT, Any]) -> None:
    model, params = network
    expected, aux = _apply(tome.ToMe(**unrolled.attributes(model), merges=merges), params)
    counted = _counted(model, merges=merges, blend=0.0, thresholds=(0.5,) * model.depth)
    logits, own = _apply(counted, params)
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    np.testing.assert_array_equal(own.active.sum(axis=2), aux.active.sum(axis=2))
    np.testing.assert_allclose(own.macs, aux.macs, rtol=1e-6)


def test_tokens_above_the_threshold_merge() -> None:
    similarity = jnp.array([[-np.inf, 0.1, 0.9, 0.8, -np.inf], [-np.inf, 0.3, 0.2, 0.1, 0.0]])
    model = counted_tome.CountedToMe(
        image_size=(8, 8), patch_size=4, width=8, depth=1, num_heads=1, num_classes=2, merges=1
    )
    most = jnp.array([3, 4])
    own = model.merged(similarity, most, 0.5)
    assert own.tolist() == [[False, False, True, True, False], [False] * 5]
    # Half of the way from one merge: of the first image to two, of the second to none.
    half = model.clone(merges=3, blend=0.5).merged(similarity, most, 0.5)
    assert half.sum(axis=1).tolist() == [2, 2]
    assert model.merged(similarity, most, -1.0).sum(axis=1).tolist() == [3, 4]


def test_images_merge_as_many_tokens_as_in_tome_on_average(network: tuple[vit.AViT, Any]) -> None:
    model, params = network
    counted = _counted(model, merges=3)
    found = counts.thresholds(counted, params, jnp.asarray(_IMAGES))
    _, aux = _apply(counted.clone(thresholds=tuple(found)), params)
    left = np.asarray(aux.active.sum(axis=2))
    assert left.std(axis=1)[1:].max() > 0
    _, fixed = _apply(tome.ToMe(**unrolled.attributes(model), merges=3), params)
    np.testing.assert_array_equal(left[:2].mean(axis=1), fixed.active.sum(axis=2)[:2].mean(axis=1))
    assert fixed.macs.mean() == pytest.approx(float(aux.macs.mean()), rel=0.03)


def test_the_study_quotes_the_file() -> None:
    folder = pathlib.Path(arms.__file__).parent
    study = (folder.parents[1] / "docs/study.md").read_text()
    for row in results.load(folder / "counts.json")["rows"]:
        assert row["top1"] - row["tome_top1"] == pytest.approx(row["minus_tome"]["mean"], abs=1e-6)
        assert "{mean:+.2f} ± {error:.2f}".format(**row["minus_tome"]) in study
