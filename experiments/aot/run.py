"""Compiles the training step and adaptive inference for Cloud TPUs, without having one, and tells what memory they need.

pip install '.[tpu]'
JAX_PLATFORMS=cpu python -m experiments.aot.run --out=experiments/aot

Writes result.json and table.md; what is in result.json already is not compiled again. `roofline ms` is an estimate and no
measurement: the static network's MACs (three times, for training; four with rematerialisation) at the published bfloat16 peak.
Nothing is run, so nothing is known of the real speed, nor of the numbers that come out.
"""

import functools
import itertools
import json
import pathlib

import jax
from absl import app, flags
from ml_collections import ConfigDict

from avit_jax import errors
from configs import deit_base, deit_small, deit_tiny
from experiments.aot import compile as aot

_OUT = flags.DEFINE_string("out", None, "folder for result.json and table.md", required=True)
_TOPOLOGIES = flags.DEFINE_list("topologies", ["v5e:2x2", "v6e:2x2"], "names that libtpu knows")
_MODELS = flags.DEFINE_list("models", ["deit_tiny", "deit_small"], "recipes in configs/")
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "float32"], "of the computation")
_PROGRAMS = flags.DEFINE_list("programs", ["training", "inference"], "what is compiled")
_LARGEST = flags.DEFINE_bool("largest", False, "searches the largest batch per device of training, with and without remat")
_RECIPES = {"deit_tiny": deit_tiny, "deit_small": deit_small, "deit_base": deit_base}
_INFERENCE_BATCH = 64
_COLUMNS = ("fits", "compile_seconds", "argument_mib", "temporary_mib", "output_mib", "memory_gib", "roofline_ms")


def recipe(model: str, dtype: str) -> ConfigDict:
    """A recipe, computing in the given dtype."""
    config = _RECIPES[model].get_config()
    config.model.dtype = dtype
    return config


def compile_one(program: str, model: str, dtype: str, topology: str) -> dict[str, object]:
    """One row of the table: the recipe's batch per device for training, 64 images for inference."""
    config = recipe(model, dtype)
    if program == "inference":
        config.eval.batch_size = _INFERENCE_BATCH
        return aot.compile_inference(config, topology) | {"batch": _INFERENCE_BATCH}
    per_device = config.train.batch_size // 8
    config.train.batch_size = per_device * len(aot.devices(topology))
    return aot.compile_training(config, topology) | {"batch": per_device}


def largest(model: str, topology: str, remat: bool) -> dict[str, object]:
    """The largest batch per device, a power of two, whose training step in bfloat16 fits."""
    best, per_device = 0, 32
    while True:
        config = recipe(model, "bfloat16")
        config.model.remat = remat
        config.train.batch_size = per_device * len(aot.devices(topology))
        if not aot.compile_training(config, topology)["fits"]:
            return {"largest_batch": best}
        best, per_device = per_device, 2 * per_device


def table(rows: dict[str, dict[str, object]]) -> str:
    """All rows in Markdown."""
    keys = sorted(key for key, row in rows.items() if "fits" in row)
    lines = [
        "| program, model, dtype, topology | batch per device | "
        + " | ".join(_COLUMNS).replace("_", " ").replace("mib", "MiB").replace("gib", "GiB")
        + " |"
    ]
    lines.append("|---" * (len(_COLUMNS) + 2) + "|")
    for key in keys:
        values = [rows[key].get(name, "") for name in _COLUMNS]
        shown = ["yes" if v is True else "no" if v is False else f"{v:.4g}" if v != "" else "" for v in values]
        lines.append(f"| {key} | {rows[key]['batch']} | " + " | ".join(shown) + " |")
    searched = sorted(key for key, row in rows.items() if "largest_batch" in row)
    if searched:
        lines += ["", "| largest batch per device (a power of two), training in bfloat16 | |", "|---|---|"]
        lines += [f"| {key} | {rows[key]['largest_batch']} |" for key in searched]
    return "\n".join(lines) + "\n"


def main(_: list[str]) -> None:
    """Compiles what is not in result.json yet, and writes after each."""
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "result.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    jobs = {
        f"{program}, {model}, {dtype}, {topology}": functools.partial(compile_one, program, model, dtype, topology)
        for topology, model, program, dtype in itertools.product(
            _TOPOLOGIES.value, _MODELS.value, _PROGRAMS.value, _DTYPES.value
        )
    }
    if _LARGEST.value:
        for topology, model, remat in itertools.product(_TOPOLOGIES.value, _MODELS.value, (False, True)):
            name = f"{model}, {topology}, {'with' if remat else 'without'} remat"
            jobs[name] = functools.partial(largest, model, topology, remat)
    for name, job in jobs.items():
        if name not in rows:
            rows[name] = {"jax": jax.__version__} | job()
            print(name, json.dumps(rows[name]), flush=True)
            file.write_text(json.dumps(rows, indent=1) + "\n")
    (out / "table.md").write_text(table(rows))


if __name__ == "__main__":
    app.run(errors.told(main))
