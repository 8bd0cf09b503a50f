"""Budgets: the controller meets them in training, and the gate bias afterwards."""

import json
import math
import pathlib
import re
import subprocess
import sys

import fixtures
import jax
import numpy as np
import pytest

from avit_jax import config as config_lib
from avit_jax.tools import calibrate
from avit_jax.training import build, evaluate, loop, restore, train_step
from avit_jax.utils import errors
from avit_jax.weights import weight_files


@pytest.mark.parametrize("start", [-40.0, -3.0, 7.0, 500.0])
@pytest.mark.parametrize("budget", [0.31, 0.6, 0.95])
def test_the_shift_is_found_from_anywhere(start: float, budget: float) -> None:
    asked = []

    def cost(beta: float) -> float:
        asked.append(beta)
        return 0.2 + 0.8 / (1 + math.exp(min(beta + 5, 500)))

    assert cost(calibrate.find_bias(cost, budget, start=start)) == pytest.approx(budget, abs=0.002)
    assert len(asked) < 40


def test_where_the_cost_jumps_the_shift_is_just_before_the_jump() -> None:
    beta = calibrate.find_bias(lambda beta: 0.9 if beta < 1.2345 else 0.3, 0.6, start=0.0)
    assert 1.2345 - 2e-4 < beta < 1.2345


@pytest.mark.parametrize("budget", [0.2, 0.99])
def test_a_budget_out_of_reach_is_reported(budget: float) -> None:
    with pytest.raises(ValueError, match=rf"the MACs ratio to {budget}, as it stays at 0\.\d"):
        calibrate.find_bias(lambda beta: 0.9 if beta < 0 else 0.3, budget, start=0.1)


def test_the_controller_moves_the_shift_and_nothing_else() -> None:
    before = {"gamma": np.float32(2.0), "beta": np.float32(-3.0)}
    after = {"gamma": np.float32(2.5), "beta": np.float32(-9.0)}  # as the optimizer would have it
    gate = train_step.update_budget_bias(after, before, 0.8, budget=0.6)
    assert gate == {"gamma": 2.5, "beta": pytest.approx(-3.0 + 0.2)}  # too dear: halts more
    gate = train_step.update_budget_bias(after, before, 0.5, budget=0.6)
    assert gate == {"gamma": 2.5, "beta": pytest.approx(-3.0 - 0.1)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("budget")
    loop.train(_config(), workdir)
    return workdir


def _config(**overrides: object):
    return fixtures.small_config(
        **{
            "budget": 0.6,
            "train.steps": 250,
            "train.batch_size": 64,
            "train.log_every": 100,
            "optimizer.ema_decay": 0.9,
        }
        | overrides
    )


@pytest.mark.slow
def test_training_lands_on_a_budget_by_merging(tmp_path: pathlib.Path) -> None:
    merging = {
        "halting.merge": True,
        "halting.redundancy": 20.0,
        "halting.gamma": 1.0,
        "halting.beta": -17.0,
    }
    loop.train(
        _config(**merging, **{"loss.prior_weight": 0.0, "loss.ponder_weight": 0.0}), tmp_path
    )
    assert json.loads((tmp_path / "summary.json").read_text())["macs_ratio"] == pytest.approx(
        0.6, abs=0.02
    )


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.4, 0.8])
def test_training_lands_on_a_budget_far_from_the_target_depth(
    budget: float, tmp_path: pathlib.Path
) -> None:
    loop.train(
        _config(**{"budget": budget, "loss.prior_weight": 0.5}), tmp_path
    )  # a prior that no shift holds out against
    assert json.loads((tmp_path / "summary.json").read_text())["macs_ratio"] == pytest.approx(
        budget, abs=0.02
    )


def test_training_lands_on_the_budget(run: pathlib.Path) -> None:
    config = _config()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["macs_ratio"] == pytest.approx(0.6, abs=0.02)
    state = fixtures.restored_state(config, run)
    assert (
        state.params["gate"]["gamma"] == config.halting.gamma
        and state.params["gate"]["beta"] != config.halting.beta
    )


def test_one_run_serves_another_budget(
    run: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="avit_jax")
    out = tmp_path / "cheaper.safetensors"
    calibrate.from_checkpoint(out, _config(), run, 0.5)
    gate = weight_files.read(out).gate
    gamma, beta = map(
        float, re.search(r"gamma=(\S+) --config.halting.beta=(\S+)$", caplog.messages[-1]).groups()
    )
    assert (gamma, beta) == (gate["gamma"], gate["beta"]) and not gate["learnable"]
    for config in (
        _config(),
        _config(**{"budget": 0.0, "halting.gamma": gamma, "halting.beta": beta}),
    ):
        evaluator = evaluate.Evaluator(config, build.model(config))
        caplog.clear()
        params = restore.trained(config, build.model(config), out)[0]
        assert not caplog.messages  # the gate is the file's
        assert evaluator.measure(params)["macs_ratio"] == pytest.approx(0.5, abs=0.003)
        assert ("gate" in params) == (config.budget > 0)


def test_a_network_that_merges_is_reported_with_what_it_merges_by(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="avit_jax")
    config = _config(
        **{"budget": 0.0, "halting.merge": True, "halting.redundancy": 30.0, "halting.gamma": 1.0}
    )
    model = build.model(config)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, *model.pixels, model.channels)))[
        "params"
    ]
    weight_files.write(tmp_path / "dear.safetensors", params, model)
    calibrate.from_checkpoint(
        tmp_path / "cheap.safetensors", config, tmp_path / "dear.safetensors", 0.6
    )
    beta = weight_files.read(tmp_path / "cheap.safetensors").gate["beta"]
    message = (
        f"gamma=1.0 --config.halting.beta={beta} --config.halting.merge=True "
        "--config.halting.redundancy=30"
    )
    assert caplog.messages[-1].endswith(message)


def test_a_budget_that_is_jumped_over_is_reported(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(**{"budget": 0.0})
    model = build.model(config)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, *model.pixels, model.channels)))[
        "params"
    ]
    weight_files.write(tmp_path / "dear.safetensors", params, model)
    ratios = []

    def first(cost, budget: float, *, start: float) -> float:
        ratios.append(cost(start))
        return start

    monkeypatch.setattr(calibrate, "find_bias", first)
    for budget in (0.2, 0.0):
        budget = budget or ratios[0]  # first one that it misses, then the very one
        caplog.clear()
        calibrate.from_checkpoint(
            tmp_path / "out.safetensors", config, tmp_path / "dear.safetensors", budget
        )
        message = (
            f"no gate bias meets the MACs ratio {budget:g}: the cost jumps over it; the ratio is "
            f"{ratios[0]:.3f}"
        )
        assert (message in caplog.text) == (abs(ratios[0] - budget) > 0.005)


def test_what_cannot_be_calibrated_is_a_sentence(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(errors.UserError, match=r"no gate bias brings the MACs ratio to 0\.01"):
        calibrate.from_checkpoint(tmp_path / "x.safetensors", _config(), run, 0.01)
    with pytest.raises(errors.UserError, match="the cost of a network without halting is fixed"):
        calibrate.from_checkpoint(
            tmp_path / "x.safetensors", _config(**{"halting.enabled": False}), run, 0.5
        )


def test_the_command_asks_for_what_is_missing(tmp_path: pathlib.Path) -> None:
    command = [
        sys.executable,
        "-m",
        "avit_jax.main",
        "--config=configs/digits.py",
        f"--workdir={tmp_path}",
        "--mode=calibrate",
    ]
    for options in ([], ["--budget=0.5", "--out=program.avit"]):
        done = subprocess.run(
            command + options, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2]
        )
        assert done.returncode == 2 and "--out=weights.safetensors --budget=0.6" in done.stderr


def test_a_static_network_has_no_budget_to_hold() -> None:
    with pytest.raises(errors.UserError, match=r"without halting is fixed: set config\.budget=0"):
        config_lib.check(_config(**{"halting.enabled": False}))
    config = _config(**{"halting.enabled": False, "budget": 0.0})
    assert "gate" not in jax.eval_shape(
        lambda: (
            build.new_state(
                build.model(config), build.optimizer(config)[0], seed=0, ema=False
            ).params
        )
    )
