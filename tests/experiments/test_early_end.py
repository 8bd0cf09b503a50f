"""Early ends of images on top of ToMe: who ends where, what it costs, what it is compared with."""

import pathlib
import sys

import fixtures
import jax
import numpy as np
import pytest

from avit_jax.training import build

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from experiments import results
from experiments.pareto import arms, early_end, paired
from experiments.rivals import tome, unrolled

_LABEL = np.array([0, 1, 1])
# Three images, two probes, two classes: the first is sure at once, the second later, the third never.
_PROBABILITY = np.array([[[0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.1, 0.9]], [[0.5, 0.5]] * 2])


def test_what_is_kept_of_each_layer_is_that_of_the_network() -> None:
    config = fixtures.small_config(**{"halting.enabled": False})
    model = build.model(config)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 1), np.float32))["params"]
    found = early_end.run(config, params, 3, "test")
    rival = tome.ToMe(**unrolled.attributes(model), merges=3)
    right, ratio = paired.outcomes(config, rival, params)
    np.testing.assert_array_equal(found.right, right)
    assert found.cost[-1] == pytest.approx(ratio[0], rel=1e-5)
    assert (np.diff(found.cost) > 0).all() and len(found.cost) == model.depth
    logits = model.apply({"params": params}, found.class_token[:, -1:], method="classify")
    np.testing.assert_allclose(logits, found.logits, atol=1e-5)


def test_an_image_ends_at_the_first_probe_that_is_sure() -> None:
    right, cost = np.array([0.0, 0.0, 1.0]), np.array([0.3, 0.4, 0.5])
    place, outcome, spent = early_end.end(_PROBABILITY, _LABEL, right, cost, 0.8)
    np.testing.assert_array_equal(place, [0, 1, 2])
    np.testing.assert_array_equal(outcome, [1, 1, 1])
    np.testing.assert_allclose(spent, [0.3, 0.4, 0.5])
    place, outcome, spent = early_end.end(_PROBABILITY, _LABEL, right, cost, 0.95)
    np.testing.assert_array_equal(place, [2, 2, 2])
    np.testing.assert_array_equal(outcome, right)


def test_a_mixture_costs_what_is_asked_for() -> None:
    costs = [0.2, 0.4, 0.8]
    rights = [np.full(4, cost) for cost in costs]  # so that a mixture's value is its cost
    for cost in (0.2, 0.3, 0.4, 0.7, 0.8):
        np.testing.assert_allclose(early_end.mixture(costs, rights, cost), cost)


def test_paired_differences_of_expected_values() -> None:
    right, other = np.array([1.0, 0.0, 1.0, 0.0]), np.array([0.5, 0.25, 0.5, 0.25])
    found = paired.paired(right, other)
    assert found["mean"] == pytest.approx(12.5) and found["changed"] == 1.0
    low, high = found["bootstrap"]
    assert low < 12.5 < high and found["error"] == pytest.approx(21.65, abs=0.01)


def test_the_study_quotes_the_file() -> None:
    folder = pathlib.Path(arms.__file__).parent
    found = results.load(folder / "early_end.json")
    study = (folder.parents[1] / "docs/study.md").read_text()
    assert found["fixed"]["0"]["top1"] == pytest.approx(68.8, abs=0.05)
    for row in found["rows"]:
        assert row["top1"] - row["tome_top1"] == pytest.approx(row["minus_tome"]["mean"], abs=1e-6)
        assert sum(row["ends_after_layer"].values()) == pytest.approx(1.0)
        for name in ("minus_tome", "minus_twin"):
            assert "{mean:+.2f} ± {error:.2f}".format(**row[name]) in study
