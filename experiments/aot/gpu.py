"""An H100 that programs are compiled for on a machine without one, and what is counted in such a
program.
"""

import importlib.util
import pathlib
from typing import Any

from jax.experimental import topologies

from avit_jax.models import vit
from avit_jax.utils import errors
from experiments.aot import hlo

NAME = "h100"
# Only a device can be asked which kernel is fastest; without one XLA takes the library's for
# products.
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
_TARGET = pathlib.Path(__file__).with_name("h100.txtpb")
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


def count(compiled: Any, model: vit.AViT) -> dict[str, float]:
    """Columns of the table: of one layer, forward and if there is one backward, and of the whole
    program.
    """
    program = hlo.Program(compiled.as_text())
    layer, total = sum(program.loops(model.depth), hlo.Count()), program.total()
    return {
        "layer_mb": layer.bytes / 1e6,
        "layer_kernels": layer.kernels,
        "layer_casts": layer.casts,
        "layer_branches": layer.branches,
        "program_mb": total.bytes / 1e6,
    }
