"""Accuracy against compute on CIFAR-10: A-ViT, its rivals and its ablations, from one parent and in
equally many steps.

python -m experiments.pareto.run --data_dir=...

Runs what is not in result.json yet, one run after the other, and writes after each; a run that was
stopped goes on where it was. The parent is trained first, and its weights are kept in
parent.safetensors. A smaller static network starts from a parent of its own shape, which is kept
too.
`--arm=evit_0.6 --seed=0` runs one row alone, and `--out=...` writes somewhere else, to compare.
`--wide` does the same to a network four times as wide, with results of its own. `--speed` trains
nothing, and measures how fast the rows are whose runs are there: for a moment when the machine does
nothing else.
"""

import json
import logging
import pathlib
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from avit_jax.models import flops
from avit_jax.training import build, loop, progress, restore
from avit_jax.utils import errors
from avit_jax.weights import weight_files
from experiments import results, timing
from experiments.pareto import arms, measure

_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder of the prepared data set", required=True)
_RUNS = flags.DEFINE_string(
    "runs", None, "folder of the runs; default: runs/pareto, with --wide runs/pareto_wide"
)
_OUT = flags.DEFINE_string(
    "out", None, "folder of result.json; default: experiments/pareto, with --wide its folder wide"
)
_ARM = flags.DEFINE_multi_string("arm", [], "rows to run; default: all")
_SEED = flags.DEFINE_multi_integer("seed", [], "seeds to run; default: those of the row")
_SPEED = flags.DEFINE_boolean(
    "speed", False, "measure the speed of what is trained, and train nothing"
)
_WIDE = flags.DEFINE_boolean("wide", False, "the network of 384 channels, in place of 96")
_PARENT = flags.DEFINE_string(
    "parent", None, "weights of the parent; default: the study's, with --wide those in --runs"
)


def _out() -> pathlib.Path:
    return pathlib.Path(
        _OUT.value or ("experiments/pareto/wide" if _WIDE.value else "experiments/pareto")
    )


def _runs() -> pathlib.Path:
    return pathlib.Path(_RUNS.value or ("runs/pareto_wide" if _WIDE.value else "runs/pareto"))


def _parent() -> pathlib.Path:
    """Weights of the parent; those of the wide one, 28 MB, are not kept with the study."""
    default = _runs() if _WIDE.value else pathlib.Path("experiments/pareto")
    return pathlib.Path(_PARENT.value or default / "parent.safetensors")


def _weights(name: str) -> pathlib.Path:
    """Weights of one of arms.PARENTS."""
    return _parent() if name == "parent" else _parent().with_name(f"{name}.safetensors")


def _config(name: str, seed: int) -> ConfigDict:
    return arms.config(
        name, seed, data_dir=_DATA_DIR.value, parent=str(_parent()), wide=_WIDE.value
    )


def run(name: str, seed: int) -> dict[str, Any] | None:
    """Trains and measures one row; None where a signal has stopped it."""
    config = _config(name, seed)
    model = arms.network(name, config)
    workdir = _runs() / f"{name}_{seed}"
    loop.train(config, workdir, model=model)  # of a run that is complete it writes the summary
    if not (workdir / "summary.json").exists():
        return None
    row = json.loads((workdir / "summary.json").read_text())
    static = build.model(_config("static", seed))  # smaller networks cost less than this one
    row["macs_ratio"] *= flops.static_macs(model) / flops.static_macs(static)
    params, _ = restore.params(config, model, workdir)
    if name in arms.PARENTS:
        weight_files.write(str(_weights(name)), params, model)
        return timing.environment() | row
    if name.startswith("avit_"):
        row["early_end"] = measure.early_end(model, params, measure.images(config))
    row |= measure.curves(name, config, model, params)
    return timing.environment() | row


def speed(name: str, seed: int) -> dict[str, Any]:
    """Measures the speed of a row whose run is there."""
    static, config = _config("static", seed), _config(name, seed)
    model, parent = arms.network(name, config), build.model(static)
    params, _ = restore.params(config, model, _runs() / f"{name}_{seed}")
    parent_params = weight_files.load(str(_parent()), parent)
    step = measure.training_step(config, model, params, parent, parent_params)
    return measure.speed(model, params, parent, parent_params, measure.images(config)) | {
        "training_step": step
    }


def wanted() -> list[tuple[str, int]]:
    """Rows and seeds that are asked for; the first seed of every row comes before the second of
    any.
    """
    own_shape = [name for name, arm in arms.ARMS.items() if arm.starts == "own"]
    names = _ARM.value or [name for name in arms.ARMS if not (_WIDE.value and name in own_shape)]
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
    file = _out() / "result.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    unknown = sorted(set(_ARM.value) - set(arms.ARMS))
    if unknown:
        raise errors.UserError(
            f"there is no row {', '.join(unknown)}; there are {', '.join(arms.ARMS)}."
        )
    rows, runs = set(results.load(file)), _runs()
    if _SPEED.value:
        jobs = [
            (name, seed)
            for name, seed in wanted()
            if f"{name}/{seed}" in rows and (runs / f"{name}_{seed}").exists()
        ]
    else:
        jobs = [(name, seed) for name, seed in wanted() if f"{name}/{seed}" not in rows]
        needed = {"parent", *(f"{name}_parent" for name, _ in jobs)}.intersection(arms.PARENTS)
        jobs = [(name, 0) for name in sorted(needed) if not _weights(name).exists()] + jobs
    for i, (name, seed) in enumerate(jobs):
        print(f"== {i + 1} of {len(jobs)}: {name}, seed {seed}", flush=True)
        row = {"speed": speed(name, seed)} if _SPEED.value else run(name, seed)
        if row is None:
            return
        results.add(file, f"{name}/{seed}", row)
        print(
            json.dumps({key: value for key, value in row.items() if not isinstance(value, list)}),
            flush=True,
        )


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
