"""The table and the figure of the study, from result.json, and what its rows are.

python -m experiments.pareto.report [folder of result.json]
"""

import pathlib
from typing import Any

import numpy as np
from absl import app
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avit_jax.utils import errors
from experiments import results as results_lib
from experiments.pareto import arms

_BUDGETS = ("_0.4", "_0.5", "_0.6", "_0.8")
_LEGEND = (
    "Speed-up: images/s over those of the static network; of the ideal: that times the MACs "
    "ratio; training step: its time",
    "over the static one's. ±: standard deviation over seeds; for differences the standard error "
    "over seeds, each of runs with",
    "the same seed. The choice of test images adds an error of at least 0.20 points to a "
    "difference near 0.6 and 0.8 of the",
    "MACs, and 0.33 near 0.4 and 0.5 (untrained.json, docs/study.md#errors). `avit` has the "
    "paper's gate and losses with a",
    "budget, a teacher and removal in training. `avit_merging` and `merging` are threshold "
    "merging: one cosine threshold,",
    "ToMe's merge and the budget; no halting is learned.",
    "`layer_act` is naive ACT, which ran away and misses its budgets: a failure, no rival. A knob "
    "is beta of the gate, the",
    "merges of a layer, or the confidence to stop at.",
    "",
)
# Names of the README. The first ones are drawn in colour, and layer_act is only in the table.
_LABELS = {
    "avit_merging": "threshold merging",
    "tome": "ToMe, trained",
    "avit": "A-ViT, the paper's gate",
    "evit": "EViT",
    "uniform": "a fixed grid",
    "random": "random dropping",
    "dynamic_vit": "DynamicViT",
    "narrow": "a narrower static network",
}
_COLORS = {"avit_merging": "tab:orange", "tome": "tab:green", "avit": "tab:blue", "narrow": "black"}
# One checkpoint at several budgets: its row, and the method whose colour it has.
_CURVES = {
    "avit_merging_0.6": "avit_merging",
    "static": "tome",
    "avit_0.6": "avit",
    "early_exit": "",
}
_LOWEST = 63.0  # %; what is below is in the table
_GAP = 0.28  # between labels, in points
Rows = dict[str, list[dict[str, Any]]]  # by arm, one entry a seed, seed first


def gather(results: dict[str, dict[str, Any]]) -> Rows:
    """The runs of each row of the table, in the order of their seeds."""
    rows: Rows = {}
    for key in sorted(results, key=lambda key: (key.split("/")[0], int(key.split("/")[1]))):
        name, seed = key.split("/")
        rows.setdefault(name, []).append({"seed": int(seed)} | results[key])
    return rows


def _spread(values: list[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def against(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> list[float]:
    """Differences of top-1 in points to the runs of another row with the same seeds."""
    top1 = {run["seed"]: run["top1"] for run in base}
    return [100 * (run["top1"] - top1[run["seed"]]) for run in runs if run["seed"] in top1]


def _difference(gains: list[float]) -> str:
    """Mean of paired differences, with its standard error."""
    error = f" ± {np.std(gains, ddof=1) / np.sqrt(len(gains)):.2f}" if len(gains) > 1 else ""
    return f"{np.mean(gains):+.2f}{error}" if gains else ""


def _accuracy(runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> list[str]:
    """Cells of both tables: seeds, top-1, its difference to another row's, MACs."""
    return [
        str(len(runs)),
        _spread([100 * run["top1"] for run in runs], 2),
        _difference(against(runs, base)) if runs is not base else "",
        _spread([run["macs_ratio"] for run in runs], 3),
    ]


def _speed(runs: list[dict[str, Any]]) -> list[str]:
    """Cells of the first table: speed-up, its share of the ideal, time of a training step."""
    speeds = [run["speed"] for run in runs if "speed" in run]
    values = [
        [speed[key] for speed in speeds if key in speed]
        for key in ("speed_up", "efficiency", "training_step")
    ]
    return [f"{np.mean(each):.2f}" if each else "" for each in values]


def _is_ablation(name: str) -> bool:
    return not name.endswith(_BUDGETS) and name not in ("static", "early_exit", *arms.PARENTS)


def table(rows: Rows) -> str:
    """Markdown; spreads are standard deviations over the seeds, that of a difference its standard
    error.

    Costs are shares of the static network's: MACs, and time of a training step.
    """
    lines = [
        *_LEGEND,
        "| row | seeds | top-1 % | minus static | MACs of static | speed-up | of the ideal | "
        "training step |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(filter(lambda name: not _is_ablation(name), rows)):
        runs = rows[name]
        base = runs if name in arms.PARENTS else rows.get("static", [])
        lines.append(f"| {' | '.join([name, *_accuracy(runs, base), *_speed(runs)])} |")
    saved = [run["early_end"] for runs in rows.values() for run in runs if "early_end" in run]
    if saved:
        lines += [
            "",
            f"Ending an image once its class token has halted saves at most {max(saved):.4f} of "
            "the static MACs.",
        ]
    unknown = ("static", "")  # a row that the study has no longer
    changes = {
        name: arms.changes(name) if name in arms.ARMS else unknown
        for name in rows
        if _is_ablation(name)
    }
    ablations = sorted((*changes[name], name) for name in changes)
    if ablations:
        lines += [
            "",
            "| ablation | of the row | changes | seeds | top-1 % | minus that row | MACs of "
            "static |",
        ]
        lines += ["|---|---|---|---|---|---|---|"]
    for twin, options, name in ablations:
        lines.append(
            f"| {' | '.join([name, twin, options, *_accuracy(rows[name], rows.get(twin, []))])} |"
        )
    return "\n".join(lines + _curves(rows)) + "\n"


def _curves(rows: Rows) -> list[str]:
    """The third table: what single checkpoints do at other budgets."""
    curves = [(name, run) for name, runs in rows.items() for run in runs if "curve" in run]
    if not curves:
        return []
    return [
        "",
        "| one checkpoint | seed | knob | MACs of static | top-1 % |",
        "|---|---|---|---|---|",
    ] + [
        f"| {name} | {run['seed']} | {point['knob']:.4g} | {point['macs_ratio']:.3f} | "
        f"{100 * point['top1']:.2f} |"
        for name, run in curves
        for point in run["curve"]
    ]


def draw(rows: Rows, path: pathlib.Path) -> None:
    """Top-1 over MACs: a line for each method trained at several budgets, dots for its seeds,
    dashes for one checkpoint.
    """
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axis = figure.subplots()
    ends = []
    for method, label in _LABELS.items():
        names = [method + budget for budget in _BUDGETS if method + budget in rows]
        if not names:
            continue
        points = [np.array([_point(run) for run in rows[name]]) for name in names]
        means = np.array([each.mean(axis=0) for each in points])
        color, main = _COLORS.get(method, "0.6"), method in _COLORS
        style = {"linewidth": 2.4, "zorder": 3} if main else {"linewidth": 1.2}
        axis.plot(*means.T, color=color, marker="o", markersize=4, label=label, **style)
        if main:
            axis.plot(*np.concatenate(points).T, ".", color=color, alpha=0.4, markersize=5)
        ends.append((*means[0], label, color if main else "0.35"))
    for name, method in _CURVES.items():
        points = [_point(point) for point in rows.get(name, [{}])[0].get("curve", [])]
        if points:
            color = _COLORS.get(method, "0.6")
            axis.plot(*np.array(sorted(points)).T, linestyle="--", color=color, linewidth=1)
    if "early_exit" in rows:
        x, y = max(_point(point) for point in rows["early_exit"][0]["curve"])
        axis.annotate(
            "early exit", (x, y), (0, -12), textcoords="offset points", color="0.35", ha="right"
        )
    _name_lines(axis, ends)
    if "static" in rows:
        static = 100 * np.mean([run["top1"] for run in rows["static"]])
        axis.axhline(static, color="black", linewidth=0.8, label="static network")
        axis.text(102, static + 0.08, "static network, trained as long", ha="right")
        axis.set_ylim(min(_LOWEST, static), max(static, *(y for _, y, *_ in ends)) + 0.5)
    axis.set(xlim=(18, 103), xticks=range(40, 101, 10))
    axis.set(xlabel="MACs, % of the static network's", ylabel="top-1 on the 10,000 test images, %")
    title = "CIFAR-10. Dots are seeds. Dashed: one checkpoint at several budgets."
    axis.set_title(title, fontsize=11, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _point(run: dict[str, float]) -> tuple[float, float]:
    """MACs ratio and top-1 in per cent."""
    return 100 * run["macs_ratio"], 100 * run["top1"]


def _name_lines(axis: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Writes the names of lines to the left of their ends, in order and without overlap.

    Args:
      axis: of the lines.
      ends: x, y, name and colour of each line.
    """
    place = np.inf
    for x, y, label, color in sorted(ends, key=lambda end: -end[1]):
        place = min(y, place - _GAP)
        axis.text(x - 1, place, label, color=color, ha="right", va="center")


def main(argv: list[str]) -> None:
    """Writes table.md and pareto.png beside result.json."""
    out = pathlib.Path(*(argv[1:] or ["experiments/pareto"]))
    rows = gather(results_lib.load(out / "result.json"))
    if not rows:
        raise errors.UserError(
            f"there is no {out / 'result.json'}, or nothing in it: run experiments.pareto.run "
            "first."
        )
    (out / "table.md").write_text(table(rows))
    draw(rows, out / "pareto.png")


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
