"""The study's bookkeeping: rows, table and curves from results, and that every row can be built."""

import pathlib
import sys
import types
from concurrent import futures

import fixtures
import jax
import numpy as np
import pytest

from avit_jax import config as config_lib
from avit_jax.models import flops
from avit_jax.tools import calibrate
from avit_jax.training import build, evaluate

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from configs import (
    cifar10_merging,
    deit_base,
    deit_small,
    deit_small_distilled,
    deit_tiny,
    deit_tiny_distilled,
    folder,
)
from experiments import results, timing, workload
from experiments.pareto import arms, measure, paired, report
from experiments.rivals import tome, unrolled

_OWN_PARENT = [name for name, arm in arms.ARMS.items() if arm.starts == "own"]


@pytest.mark.parametrize(
    "name", ["parent", *filter(lambda name: name not in _OWN_PARENT, arms.ARMS)]
)
def test_every_row_fits_the_parent(name: str) -> None:
    config = arms.config(name, 0, data_dir="", parent="parent.safetensors")
    model = arms.network(name, config)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    )["params"]
    static = arms.network("static", arms.config("static", 0, data_dir="", parent=""))
    expected = jax.eval_shape(
        static.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    )["params"]
    assert {
        key: jax.tree.map(np.shape, value) for key, value in shapes.items() if key in expected
    } == jax.tree.map(np.shape, expected)
    started = config.init == "parent.safetensors"
    assert (
        started == (name != "parent" and not name.endswith("from_scratch"))
        and config.data.train_split == "train[:48000]"
    )


@pytest.mark.parametrize("name", _OWN_PARENT)
def test_a_smaller_static_network_costs_slightly_more_and_trains_as_the_others_do(
    name: str,
) -> None:
    config, static = (arms.config(row, 0, data_dir="", parent="p") for row in (name, "static"))
    macs = flops.static_macs(build.model(config)) / flops.static_macs(build.model(static))
    budget = float(name.split("_")[-1])
    assert budget + 0.02 < macs < budget + 0.04
    shape = set(arms.ARMS[name].overrides)
    for own, other in (
        (config, static),
        (
            arms.config(f"{name}_parent", 0, data_dir="", parent="p"),
            arms.config("parent", 0, data_dir="", parent="p"),
        ),
    ):
        own, other = config_lib.flat(own), config_lib.flat(other)
        differing = {key for key in own if own[key] != other[key]}
        assert differing - {"init"} and differing - {"init"} <= shape
    assert config.init == f"{name}_parent.safetensors"


def test_the_wide_study_is_the_study_of_a_wider_network() -> None:
    for name in ("parent", "static", "avit_merging_0.6"):
        narrow, wide = (
            config_lib.flat(arms.config(name, 0, data_dir="", parent="p", wide=wide))
            for wide in (False, True)
        )
        differing = {key: wide[key] / narrow[key] for key in narrow if wide[key] != narrow[key]}
        assert differing == {"model.width": 4, "model.num_heads": 4, "optimizer.learning_rate": 0.5}


@pytest.mark.parametrize("method", ["dynamic_vit", "evit", "random", "uniform", "tome"])
@pytest.mark.parametrize("budget", [0.4, 0.6, 0.8])
def test_rivals_cost_what_their_names_say(method: str, budget: float) -> None:
    name = f"{method}_{budget}"
    model = arms.network(name, arms.config(name, 0, data_dir="", parent=""))
    images = np.zeros((1, 32, 32, 3), np.float32)
    zeros = jax.tree.map(
        lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(model.init, jax.random.key(0), images)
    )
    macs = jax.jit(lambda variables: model.apply(variables, images)[1].macs)(
        zeros
    )  # compiles nothing but that
    assert float(macs[0]) / flops.static_macs(model) == pytest.approx(budget, abs=0.025)


def test_the_fastest_is_chosen_within_rounds() -> None:
    seconds = {
        "one": [1.0, 4.0, 1.1],
        "two": [0.9, 3.6, 2.0],
    }  # of the plain medians that of "one" is less
    assert timing.fastest(seconds | {"other": [0.1] * 3}, ["one", "two"]) == "two"
    assert timing.fastest(seconds, ["two", "one"]) == "two"


def _run(top1: float, **more: object) -> dict[str, object]:
    return {"top1": top1, "macs_ratio": 0.6} | more


def test_the_table_pairs_runs_by_their_seed() -> None:
    point = {"knob": -3.0, "top1": 0.7, "macs_ratio": 0.4}
    results = {
        "static/0": _run(0.80),
        "static/1": _run(0.82),
        "avit_0.6/1": _run(0.81),
        "avit_0.6/0": _run(
            0.80,
            speed={"speed_up": 1.5, "efficiency": 0.9, "training_step": 0.7},
            early_end=0.01,
            curve=[point],
        ),
        "no_prior/0": _run(0.78),
        "static_not_distilled/1": _run(0.83),
        "of_another_study/0": _run(0.5),
    }
    rows = report.gather(results)
    assert report.against(rows["avit_0.6"], rows["static"]) == pytest.approx([0.0, -1.0])
    lines = report.table(rows).split("\n\n", 1)[1].splitlines()  # below the legend
    assert (
        lines[2]
        == "| avit_0.6 | 2 | 80.50 ± 0.71 | -0.50 ± 0.50 | 0.600 ± 0.000 | 1.50 | 0.90 | 0.70 |"
    )
    assert lines[3] == "| static | 2 | 81.00 ± 1.41 |  | 0.600 ± 0.000 |  |  |  |"
    assert "saves at most 0.0100 of" in lines[5]
    assert lines[9] == "| no_prior | avit_0.6 | loss.prior_weight=0.0 | 1 | 78.00 | -2.00 | 0.600 |"
    assert lines[10] == "| of_another_study | static |  | 1 | 50.00 | -30.00 | 0.600 |"
    assert lines[11] == "| static_not_distilled | static | no teacher | 1 | 83.00 | +1.00 | 0.600 |"
    assert lines[-1] == "| avit_0.6 | 0 | -3 | 0.400 | 70.00 |"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("merging_from_scratch", ("avit_merging_0.6", "random weights")),
        ("merging_by_the_papers_gate", ("avit_0.6", "halting.merge=True")),
        ("paper_recipe", ("avit_0.6", "budget=0.0, train.adaptive=False, no teacher")),
        ("tome_after_mlp", ("static", "ToMe, merges=19, after_mlp=True")),
    ],
)
def test_what_an_ablation_changes(name: str, expected: tuple[str, str]) -> None:
    assert arms.changes(name) == expected


def test_the_figure_is_drawn(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = report.Figure(layout="constrained")
    monkeypatch.setattr(report, "Figure", lambda **_: figure)
    runs = {
        "avit_0.6/0": _run(0.8),
        "avit_0.6/1": _run(0.7),
        "avit_0.4/0": {"top1": 0.7, "macs_ratio": 0.4},
        "evit_0.4/0": {"top1": 0.699, "macs_ratio": 0.4},
    }
    report.draw(report.gather(runs | {"static/0": _run(0.81)}), tmp_path / "x.png")
    axis = figure.axes[0]
    lines = {line.get_label(): line.get_xydata() for line in axis.lines}
    np.testing.assert_allclose(lines["A-ViT, the paper's gate"], [(40, 70), (60, 75)])
    assert any(len(line.get_xydata()) == 3 for line in axis.lines)  # a dot for each run
    np.testing.assert_allclose(lines["EViT"], [(40, 69.9)])
    np.testing.assert_allclose(lines["static network"][:, 1], 81)
    places = {text.get_text(): text.get_position()[1] for text in axis.texts}
    assert places["A-ViT, the paper's gate"] == 70 and places["EViT"] < 69.8  # no overlap
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_what_the_early_end_saves() -> None:
    model = arms.network("avit_0.6", arms.config("avit_0.6", 0, data_dir="", parent=""))
    images = np.random.default_rng(0).normal(size=(4, 32, 32, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    _, never = calibrate.with_bias(model, params, -1e3)
    assert measure.early_end(model, never, images) == pytest.approx(0.0, abs=1e-6)
    _, some = calibrate.with_bias(model, params, -2.0)
    active = model.apply({"params": some}, images)[1].active
    beyond = (active & ~flops.is_computed(active, 1)).sum(
        axis=-1
    )  # tokens of images that have ended
    least = float((beyond * flops.layer_macs(1, model)).sum(axis=0).mean()) / flops.static_macs(
        model
    )
    assert 0.0 < least <= measure.early_end(model, some, images) < 1.0


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A halting network and its static parent, of random weights, to be measured on 16 pictures;
    arguments by name.
    """
    for name, value in {
        "_BATCH": 8,
        "_BATCHES": 2,
        "_CHUNKS": (8,),
        "_GROUPS": (4,),
        "_ROUNDS": 2,
    }.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(arms, "HELD_OUT", "train")
    config = fixtures.small_config(**{"halting.learnable": True})
    model = build.model(config)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, 16, 16, 1), np.float32))["params"]
    parent_params = {key: value for key, value in params.items() if key != "gate"}
    return {
        "model": model,
        "params": params,
        "parent": model.clone(halting=None),
        "parent_params": parent_params,
    }


def test_speed_is_told_against_the_static_network_and_the_macs(small: dict[str, object]) -> None:
    images = measure.images(fixtures.small_config())
    assert images.shape == (16, 16, 16, 1)
    static = small | {"model": small["parent"], "params": small["parent_params"]}
    assert measure.speed(**static, images=images)["ideal"] == pytest.approx(1.0)
    speed = measure.speed(**small, images=images)
    active = small["model"].apply({"params": small["params"]}, images)[1].active
    macs = float(flops.image_macs(small["model"], active).mean())
    assert (
        speed["ideal"] == pytest.approx(flops.static_macs(small["model"]) / macs)
        and speed["ideal"] > 1.05
    )
    assert (
        speed["efficiency"] == pytest.approx(speed["speed_up"] / speed["ideal"])
        and speed["batch"] == 8
    )
    assert 0.1 < measure.training_step(fixtures.small_config(), **small) < 10.0


def test_a_batch_is_shared_out_over_as_many_devices_as_divide_it() -> None:
    devices, images = workload.Devices(12), np.arange(24.0, dtype=np.float32).reshape(12, 2)
    assert len(devices) == 4 and len(workload.Devices(1)) == 1
    variables, shared = devices.replicate(np.float32(3.0)), devices.split(images)
    assert {shard.data.shape for shard in shared.addressable_shards} == {(1, 3, 2)}
    tripled = devices.compile(lambda variables, images: variables * images, variables, shared)(
        variables, shared
    )
    np.testing.assert_array_equal(tripled.reshape(images.shape), 3.0 * images)


def test_one_checkpoint_s_curve_has_the_budgets_that_it_can_come_to(
    small: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        measure, "BUDGETS", (0.01, 0.6, 0.8)
    )  # the first layer alone costs more than the first of them
    config = fixtures.small_config(**{"halting.learnable": True})
    (low, high) = measure.curves("avit_0.6", config, small["model"], small["params"])["curve"]
    assert (low["budget"], high["budget"]) == (0.6, 0.8) and low["knob"] > high["knob"]
    assert low["macs_ratio"] == pytest.approx(0.6, abs=0.03) and high[
        "macs_ratio"
    ] == pytest.approx(0.8, abs=0.03)


def test_rows_that_are_added_at_once_are_all_kept(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "result.json"
    with futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: results.add(file, f"row/{i % 20}", {str(i): i}), range(40)))
    assert results.load(file) == {f"row/{i}": {str(i): i, str(i + 20): i + 20} for i in range(20)}
    assert list(tmp_path.iterdir()) == [file]


def test_the_recipe_that_merges_is_the_study_s() -> None:
    row = config_lib.flat(arms.config("merging_not_distilled", 0, data_dir="", parent="parent"))
    recipe = config_lib.flat(cifar10_merging.get_config())
    differing = {key for key in row.keys() | recipe.keys() if row[key] != recipe[key]}
    assert differing == {"init", "data.train_split", "distill.targets", "distill.temperature"}
    assert (
        not row["distill.teacher"] and not recipe["distill.teacher"]
    )  # so that its targets do not matter


def test_errors_are_of_the_paired_differences() -> None:
    right, other = np.array([1.0, 1.0, 1.0, 0.0] * 25), np.array([1.0, 1.0, 0.0, 0.0] * 25)
    found = paired.paired(right, other)
    assert found["mean"] == 25.0 and found["changed"] == 0.25
    assert found["error"] == pytest.approx(
        100 * np.sqrt(0.25 * 0.75 / 99)
    )  # not the larger one of independent images
    low, high = found["bootstrap"]
    assert (low, high) == pytest.approx(
        (25 - 1.96 * found["error"], 25 + 1.96 * found["error"]), abs=1.0
    )
    opposite = paired.paired(other, right)
    assert (opposite["mean"], opposite["error"]) == (-25.0, found["error"])


def test_the_cheapest_images_come_first() -> None:
    cost, right = np.array([0.9, 0.1, 0.5, 0.3, 0.7] * 2), np.array([0.0, 1.0, 0.0, 1.0, 1.0] * 2)
    parts = paired.by_cost(cost, own=right, static=np.ones(10))
    assert [part["macs_ratio"] for part in parts] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert [part["own"] for part in parts] == [100.0, 100.0, 0.0, 100.0, 0.0] and parts[0][
        "static"
    ] == 100.0


@pytest.mark.parametrize("rival", [False, True])
def test_what_is_compared_image_by_image_is_what_evaluation_means(
    small: dict[str, object], rival: bool
) -> None:
    config, model, params = (
        fixtures.small_config(**{"eval.batch_size": 112}),
        small["model"],
        small["params"],
    )  # the last part-full
    if rival:
        model, params = (
            tome.ToMe(**unrolled.attributes(small["parent"]), merges=3),
            small["parent_params"],
        )
    right, ratio = paired.outcomes(config, model, params)
    values = evaluate.Evaluator(config, model).measure(params)
    assert len(right) == len(ratio) == values["images"] == 360
    assert right.mean() == pytest.approx(values["top1"]) and ratio.mean() == pytest.approx(
        values["macs_ratio"], rel=1e-5
    )
    assert (ratio.std() > 1e-3) != rival


def test_the_untrained_figures_agree_with_the_study() -> None:
    folder = pathlib.Path(arms.__file__).parent
    found, study = results.load(folder / "untrained.json"), results.load(folder / "result.json")
    assert found["static_top1"] == study["parent/0"]["top1"] and found["images"] == 10_000
    for row in found["rows"]:
        ratios = [row[name]["macs_ratio"] for name in ("tome", "threshold")]
        assert ratios == pytest.approx(
            [ratios[0]] * 2, abs=0.003
        )  # or one of the two would have more to spend
        for name in ("tome", "threshold"):
            assert 100 * row[name]["top1"] == pytest.approx(
                np.mean([part[name] for part in row["fifths"]])
            )
        difference = "{mean:+.2f} ± {error:.2f}".format(**row["threshold_minus_tome"])
        study = (folder.parents[1] / "docs/study.md").read_text()
        assert difference in study, "docs/study.md has another figure than untrained.json"


@pytest.mark.parametrize(
    "recipe", [deit_tiny, deit_tiny_distilled, deit_small, deit_small_distilled, deit_base, folder]
)
def test_the_imagenet_recipes_have_losses_that_were_tried_together(
    recipe: types.ModuleType,
) -> None:
    loss = recipe.get_config().loss
    assert {f"loss.{key}": loss[key] for key in ("prior_mode", "prior_weight")} == arms.RECIPES[
        "paper"
    ]


def test_the_candidates_of_the_recipes_differ_by_their_losses_alone() -> None:
    found = results.load(pathlib.Path(arms.__file__).with_name("recipes.json"))
    assert found.keys() == arms.RECIPES.keys()
    for name, row in found.items():
        assert {key: row[key] for key in arms.RECIPES[name]} == arms.RECIPES[name]
        assert row["train.steps"] == 250 and row["images"] == 2000 and row["halting.gamma"] == 10.0
        figures = f"| {100 * row['top1']:.1f} | {row['macs_ratio']:.3f} |"
        assert figures in (pathlib.Path(arms.__file__).parents[2] / "docs/study.md").read_text()


def test_the_study_quotes_the_early_ends() -> None:
    rows = report.gather(results.load(pathlib.Path(arms.__file__).with_name("result.json")))
    study = (pathlib.Path(arms.__file__).parents[2] / "docs/study.md").read_text()
    for points in zip(*(run["curve"] for run in rows["ends"]), strict=True):
        twin = [point["minus_twin"]["mean"] for point in points]
        error = np.std(twin, ddof=1) / np.sqrt(len(twin))
        top1, macs = (np.mean([point[key] for point in points]) for key in ("top1", "macs_ratio"))
        ends = np.mean([point["ends"] for point in points], axis=0)
        shares = ", ".join(f"{100 * share:.0f}%" for share in ends[:-1])
        row = f"| {macs:.3f} | {shares} | {100 * top1:.2f}% | {np.mean(twin):+.2f} ± {error:.2f} |"
        assert row in study
