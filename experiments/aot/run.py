"""Compiles the training step and inference for Cloud TPUs and an NVIDIA H100, without having one.

pip install '.[tpu,gpu_compiler]'
JAX_PLATFORMS=cpu python -m experiments.aot.run --out=runs/aot
JAX_PLATFORMS=cpu python -m experiments.aot.run --out=runs/aot --topologies=h100 \
  --dtypes=bfloat16 --programs="static,static tanh,masked,inference,packed,training,static training"

Writes result.json and table.md. It does not compile again what result.json already has. Nothing is
run, so nothing is known of the real speed, nor of the numbers that come out.

`roofline ms` is an estimate: the static network's MACs (three times, for training; four with
rematerialisation) at the published bfloat16 peak.
Columns for the H100; a layer is one turn of the loop over layers, in training forward and backward:
  layer MB, program MB: bytes that kernels read and write, in a layer and in the whole program.
  layer MB at 0.62, program MB at 0.62, the same at 0.4: of packed execution at this MACs ratio. Its
    kernels count by the rows that they compute; see `hlo.Rows` and `gpu.rows_at`.
  layer kernels: their number.
  layer casts: those that cast a parameter.
  layer branches: conditionals.
  host conditionals, host loops: those of the whole program at which the host waits for the GPU.
  most registers: of XLA's own kernels, the most that a thread of one needs. Needs ptxas.
  spill bytes: what a thread stores to memory or loads from it for want of registers, the sum over
    these kernels. Needs ptxas.
Column for TPUs: `estimated megacycles` is the sum of the compiler's own estimates. It was never
compared with a TPU, and is there to compare programs. A conditional counts as its longest branch.
"""

import functools
import itertools
import json
import pathlib

import jax
from absl import app, flags

from avit_jax.utils import errors
from experiments import results
from experiments.aot import rows as rows_lib

_OUT = flags.DEFINE_string("out", None, "folder for result.json and table.md", required=True)
_TOPOLOGIES = flags.DEFINE_list(
    "topologies", ["v5e:2x2", "v6e:2x2"], "names that libtpu knows, and h100"
)
_MODELS = flags.DEFINE_list("models", ["deit_tiny", "deit_small"], "recipes in configs/")
_DTYPES = flags.DEFINE_list("dtypes", ["bfloat16", "float32"], "of the computation")
_PROGRAMS = flags.DEFINE_list(
    "programs",
    ["training", "inference"],
    "of training, static training, inference, packed, masked, static, static tanh",
)
_LARGEST = flags.DEFINE_bool(
    "largest", False, "searches the largest batch per device of training, with and without remat"
)


def main(_: list[str]) -> None:
    """Compiles what is not in result.json yet, and writes after each."""
    out = pathlib.Path(_OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "result.json"
    rows = results.load(file)
    jobs = {
        f"{program}, {model}, {dtype}, {topology}": functools.partial(
            rows_lib.compile_one, program, model, dtype, topology
        )
        for topology, model, program, dtype in itertools.product(
            _TOPOLOGIES.value, _MODELS.value, _PROGRAMS.value, _DTYPES.value
        )
    }
    if _LARGEST.value:
        for topology, model, remat in itertools.product(
            _TOPOLOGIES.value, _MODELS.value, (False, True)
        ):
            name = f"{model}, {topology}, {'with' if remat else 'without'} remat"
            jobs[name] = functools.partial(rows_lib.largest, model, topology, remat)
    for name, job in jobs.items():
        if name not in rows:
            rows[name] = {"jax": jax.__version__} | job()
            print(name, json.dumps(rows[name]), flush=True)
            results.add(file, name, rows[name])
    (out / "table.md").write_text(rows_lib.table(rows))


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
