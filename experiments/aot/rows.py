"""Rows of the table: which recipe is compiled for what, and the largest batch that fits."""

from ml_collections import ConfigDict

from configs import deit_base, deit_small, deit_tiny
from experiments.aot import compile as aot
from experiments.aot import gpu

_RECIPES = {"deit_tiny": deit_tiny, "deit_small": deit_small, "deit_base": deit_base}
_GPU_BATCH = 256  # of training and of inference
_FIRST = 64  # images per device of the first compile of a search
_COLUMNS = (
    "fits",
    "compile_seconds",
    "argument_mib",
    "temporary_mib",
    "output_mib",
    "memory_gib",
    "roofline_ms",
)
_TPU_COLUMNS = ("estimated_megacycles",)
_GPU_COLUMNS = ("layer_mb", "layer_kernels", "layer_casts", "layer_branches", "program_mb")
_GPU_COLUMNS += (*(f"{kind}_mb_at_{x}" for x in gpu.RATIOS for kind in ("layer", "program")),)
_GPU_COLUMNS += ("host_conditionals", "host_loops", "most_registers", "spill_bytes")
_UNITS = {"mib": "MiB", "gib": "GiB", "mb": "MB"}


def _recipe(model: str, dtype: str) -> ConfigDict:
    """A recipe, computing in the given dtype."""
    config = _RECIPES[model].get_config()
    config.model.dtype = dtype
    return config


def compile_one(program: str, model: str, dtype: str, topology: str) -> dict[str, object]:
    """One row of the table: on a GPU 256 images, else 64 for inference and the recipe's batch per
    device for training.
    """
    config, is_gpu = _recipe(model, dtype), topology == gpu.NAME
    if not program.endswith("training"):
        config.eval.batch_size = batch = _GPU_BATCH if is_gpu else 64
        return aot.compile_inference(config, topology, program) | {"batch": batch}
    per_device = _GPU_BATCH if is_gpu else config.train.batch_size // 8
    config.train.batch_size = per_device * len(aot.devices(topology))
    return aot.compile_training(config, topology, static=program == "static training") | {
        "batch": per_device
    }


def largest(model: str, topology: str, remat: bool) -> dict[str, object]:
    """The largest batch per device, a power of two, whose training step in bfloat16 fits.

    The first compile, of 64 images, tells what an image takes; from the batch that this predicts
    on, one after the other is compiled until one fits and its double does not.
    """

    def compile_at(per_device: int) -> dict[str, float]:
        config = _recipe(model, "bfloat16")
        config.model.remat = remat
        config.train.batch_size = per_device * len(aot.devices(topology))
        return aot.compile_training(config, topology)

    first = compile_at(_FIRST)
    free = first["memory_gib"] * 1024 - first.get("argument_mib", 0)
    images = int(free / first["temporary_mib"] * _FIRST) if "temporary_mib" in first else 1
    best = 2 ** max(0, images.bit_length() - 1)
    if not compile_at(best)["fits"]:
        while best > 1:
            best //= 2
            if compile_at(best)["fits"]:
                return {"largest_batch": best}
        return {"largest_batch": 0}
    while compile_at(2 * best)["fits"]:
        best *= 2
    return {"largest_batch": best}


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:.4g}" if value < 1e4 else f"{value:.0f}"


def _columns(rows: dict[str, dict[str, object]], columns: tuple[str, ...], least: str) -> list[str]:
    """One table, of the rows that have a certain column."""
    keys = sorted(key for key, row in rows.items() if least in row)
    if not keys:
        return []
    heads = [" ".join(_UNITS.get(word, word) for word in name.split("_")) for name in columns]
    lines = [f"| program, model, dtype, topology | batch per device | {' | '.join(heads)} |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for key in keys:
        values = [rows[key].get(name, "") for name in columns]
        lines.append(f"| {key} | {rows[key]['batch']} | " + " | ".join(map(_shown, values)) + " |")
    return [*lines, ""]


def table(rows: dict[str, dict[str, object]]) -> str:
    """All rows in Markdown: memory, then what is counted of programs for a GPU, then what is
    estimated for a TPU.
    """
    lines = _columns(rows, _COLUMNS, "fits")
    lines += _columns(rows, _GPU_COLUMNS, "layer_mb")
    lines += _columns(rows, _TPU_COLUMNS, "estimated_megacycles")
    versions = sorted({str(row["jax"]) for row in rows.values() if "jax" in row})
    lines += [f"Compiled with JAX {' and '.join(versions)}."] if versions else []
    searched = sorted(key for key, row in rows.items() if "largest_batch" in row)
    if searched:
        lines += [
            "",
            "| largest batch per device (a power of two), training in bfloat16 | |",
            "|---|---|",
        ]
        lines += [f"| {key} | {rows[key]['largest_batch']} |" for key in searched]
    return "\n".join(lines) + "\n"
