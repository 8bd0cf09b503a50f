"""Accuracy against compute on CIFAR-10: A-ViT, its rivals and its ablations, from one parent and in equally many steps.

python -m experiments.pareto.run --data_dir=...

Runs what is not in result.json yet, one run after the other, and writes after each; a run that was stopped goes on where it
was. The parent comes first, and its weights stay as parent.safetensors. `--arm=evit_0.6 --seed=0` runs one row alone, and
`--out=...` writes somewhere else, to compare. `--speed` trains nothing, and measures how fast the rows are whose runs are
there: for a moment when the machine does nothing else.
"""

import json
import logging
import pathlib
import shutil
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from avit_jax import build, errors, progress, restore, train, weight_files
from experiments import results, timing
from experiments.pareto import arms, measure

_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder of the prepared data set", required=True)
_RUNS = flags.DEFINE_string("runs", "runs/pareto", "folder of the runs")
_OUT = flags.DEFINE_string("out", "experiments/pareto", "folder of result.json")
_ARM = flags.DEFINE_multi_string("arm", [], "rows to run; default: all")
_SEED = flags.DEFINE_multi_integer("seed", [], "seeds to run; default: those of the row")
_SPEED = flags.DEFINE_boolean("speed", False, "measure the speed of what is trained, and train nothing")
_PARENT = flags.DEFINE_string("parent", "experiments/pareto/parent.safetensors", "weights of the parent")
_DRAWN = ("avit_0.6/0", "avit_merging_0.6/0")  # whose depth maps stay beside the results


def run(name: str, seed: int) -> dict[str, Any] | None:
    """Trains and measures one row; None where a signal has stopped it."""
    config = arms.config(name, seed, data_dir=_DATA_DIR.value, parent=_PARENT.value)
    model = arms.network(name, config)
    workdir = pathlib.Path(_RUNS.value) / f"{name}_{seed}"
    train.train(config, workdir, model=model)  # of a run that is complete it writes the summary
    if not (workdir / "summary.json").exists():
        return None
    row = json.loads((workdir / "summary.json").read_text())
    params, _ = restore.params(config, model, workdir)
    if name == "parent":
        weight_files.write(_PARENT.value, params, model)
        return timing.environment() | row
    if name.startswith("avit_"):
        row["early_end"] = measure.early_end(model, params, measure.images(config))
    if f"{name}/{seed}" in _DRAWN:
        shutil.copy(workdir / "depth.png", pathlib.Path(_OUT.value) / f"{name}.png")
    row |= measure.curves(name, config, model, params)
    return timing.environment() | row


def speed(name: str, seed: int) -> dict[str, Any]:
    """Measures the speed of a row whose run is there."""
    static, config = (arms.config(row, seed, data_dir=_DATA_DIR.value, parent=_PARENT.value) for row in ("static", name))
    model, parent = arms.network(name, config), build.model(static)
    params, _ = restore.params(config, model, pathlib.Path(_RUNS.value) / f"{name}_{seed}")
    parent_params = weight_files.load(_PARENT.value, parent)
    step = measure.training_step(config, model, params, parent, parent_params)
    return measure.speed(model, params, parent, parent_params, measure.images(config)) | {"training_step": step}


def wanted() -> list[tuple[str, int]]:
    """Rows and seeds that are asked for; the first seed of every row comes before the second of any."""
    names = _ARM.value or list(arms.ARMS)
    return [
        (name, seed)
        for seed in _SEED.value or range(max(arms.ARMS[name].seeds for name in names))
        for name in names
        if _SEED.value or seed < arms.ARMS[name].seeds
    ]


def main(_: list[str]) -> None:
    """Runs what is missing."""
    absl_logging.set_verbosity(absl_logging.FATAL)  # what Orbax has to tell
    progress.to_console(logging.INFO)
    file = pathlib.Path(_OUT.value) / "result.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    unknown = sorted(set(_ARM.value) - set(arms.ARMS))
    if unknown:
        raise errors.UserError(f"there is no row {', '.join(unknown)}; there are {', '.join(arms.ARMS)}.")
    rows, runs = set(results.load(file)), pathlib.Path(_RUNS.value)
    if _SPEED.value:
        jobs = [(name, seed) for name, seed in wanted() if f"{name}/{seed}" in rows and (runs / f"{name}_{seed}").exists()]
    else:
        jobs = [("parent", 0)] if not pathlib.Path(_PARENT.value).exists() else []
        jobs += [(name, seed) for name, seed in wanted() if f"{name}/{seed}" not in rows]
    for i, (name, seed) in enumerate(jobs):
        print(f"== {i + 1} of {len(jobs)}: {name}, seed {seed}", flush=True)
        row = {"speed": speed(name, seed)} if _SPEED.value else run(name, seed)
        if row is None:
            return
        results.add(file, f"{name}/{seed}", row)
        print(json.dumps({key: value for key, value in row.items() if not isinstance(value, list)}), flush=True)


if __name__ == "__main__":
    app.run(errors.told(main))
