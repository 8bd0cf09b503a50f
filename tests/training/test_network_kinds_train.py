"""Networks of other kinds through training, evaluation, calibration and export, on CIFAR-10."""

import json
import os
import pathlib

import numpy as np
import pytest
import variants

from avit_jax import config as config_lib
from avit_jax.inference import adapt, export, serving
from avit_jax.training import build, evaluate, loop, restore

pytestmark = pytest.mark.slow
_RECIPES = str(pathlib.Path(__file__).parents[2] / "configs" / "cifar10.py")
_SIZES = {"width": 48, "depth": 4, "num_heads": 3, "patch_size": 8}


@pytest.mark.parametrize("kind", ["dinov2_registers", "siglip_average", "dinov3"])
def test_halting_is_trained_removed_calibrated_and_exported(
    kind: str, tmp_path: pathlib.Path
) -> None:
    if "AVIT_DATA_DIR" not in os.environ:
        pytest.skip("set AVIT_DATA_DIR to a folder with cifar10")
    config = config_lib.recipe(_RECIPES, "cifar10")
    config.data.update({"dir": os.environ["AVIT_DATA_DIR"], "eval_split": "test[:400]"})
    config.model.update(_SIZES | variants.KINDS[kind])
    config.halting.update({"gamma": 1.0, "beta": -1.0, "learnable": True})
    config.train.update({"steps": 30, "batch_size": 64, "eval_every": 0})
    loop.train(config, tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert 0.3 < summary["macs_ratio"] < 0.99
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows)
    model = build.model(config).clone(removal=None)
    params, _ = restore.params(config, model, tmp_path)
    removed = evaluate.Evaluator(config, model)
    config.eval.adaptive = False
    masked = evaluate.Evaluator(config, model).measure(params)
    for name, value in removed.measure(params).items():
        assert value == pytest.approx(masked[name], rel=1e-4), name

    def cost(beta: float) -> float:
        return removed.measure(adapt.with_bias(model, params, beta)[1])["macs_ratio"]

    beta = adapt.find_bias(cost, 0.6, start=float(params["gate"]["beta"]))
    # After 30 steps the class tokens of all images are alike, and the cost jumps where they halt.
    assert 0.597 < cost(beta) < 0.66
    calibrated = adapt.with_bias(model, params, beta)[1]
    export.write(
        tmp_path / "network.avit",
        calibrated,
        model,
        mean=config.data.mean,
        std=config.data.std,
        platforms=("cpu",),
    )
    images = np.stack([removed.reader(i)["image"] for i in range(16)])
    logits, depth = serving.load(tmp_path / "network.avit")(images)
    assert logits.shape == (16, 10) and np.isfinite(logits).all()
    assert len(np.unique(depth)) > 1
