"""An H100 that programs are compiled for on a machine without one, and what is counted in such a
program.
"""

import importlib.util
import pathlib
from typing import Any

from jax.experimental import topologies

from avit_jax.models import vit
from avit_jax.utils import errors
from experiments.aot import dump, hlo

NAME = "h100"
# Only a device can be asked which kernel is fastest; without one XLA takes the library's for
# products.
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
_TARGET = pathlib.Path(__file__).with_name("h100.txtpb")
_ARCHITECTURE = "sm_90a"
_CUDNN = 91500


def devices() -> list[Any]:
    """The device; raises errors.UserError where the compiler is not installed."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise errors.UserError(
            "the compiler for NVIDIA GPUs is missing: pip install '.[gpu_compiler]'."
        )
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=_TARGET.read_text(), topology="1x1x1"
    )
    _tell_jax_what_the_target_is()
    return list(topology.devices)


def _tell_jax_what_the_target_is() -> None:
    """JAX asks the cuDNN and the GPU of this machine whether attention is possible, and there is
    neither.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    cudnn.check_cudnn_version = lambda: _CUDNN
    cudnn.check_compute_capability = lambda wanted: float(wanted) <= 9.0
    cudnn.is_cuda_compute_capability_equal = lambda wanted: wanted == "9.0"


def count(compiled: Any, model: vit.AViT, folder: str) -> dict[str, float]:
    """Columns of the table: of one layer, forward and if there is one backward, and of the whole
    program.

    Args:
      compiled: the program.
      model: whose layers it computes.
      folder: where the compiler wrote, see `dump`.
    """
    program = hlo.Program(compiled.as_text())
    layer, total = sum(program.loops(model.depth), hlo.Count()), program.total()
    host = [thunk for thunk in dump.thunks(folder) if not thunk.is_buffered]
    kernels = dump.kernels(folder, _ARCHITECTURE).values()
    row = {
        "layer_mb": layer.bytes / 1e6,
        "layer_kernels": layer.kernels,
        "layer_casts": layer.casts,
        "layer_branches": layer.branches,
        "program_mb": total.bytes / 1e6,
        "host_conditionals": sum(thunk.kind == "kConditional" for thunk in host),
        "host_loops": sum(thunk.kind == "kWhile" and program.is_open(thunk.name) for thunk in host),
    }
    if kernels:
        row["most_registers"] = max(kernel.registers for kernel in kernels)
        row["spill_bytes"] = sum(kernel.spills for kernel in kernels)
    return row
