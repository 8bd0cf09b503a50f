"""An H100 that programs are compiled for on a machine without one, and what is counted in such a
program.
"""

import importlib.util
import pathlib
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.experimental import topologies

from avit_jax.kernels import packed
from avit_jax.models import flops, vit
from avit_jax.utils import errors
from experiments.aot import dump, hlo

NAME = "h100"
# Only a device can be asked which kernel is fastest; without one XLA takes the library's for
# products.
OPTIONS = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
RATIOS = (0.62, 0.4)  # of the MACs, at which bytes of packed execution are counted
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


def target() -> AbstractContextManager[Any]:
    """Within it, Pallas lowers kernels for the device instead of one of this machine."""
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "cuda")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


def rows_at(model: vit.AViT, batch: int, macs_ratio: float) -> hlo.Rows:
    """Rows that the kernels of packed execution compute in each layer at a MACs ratio.

    All images and layers have equally many tokens here. No other spread of the same MACs has more
    rows, because the MACs of a layer grow faster than its tokens.
    """
    target, tokens = macs_ratio * flops.static_macs(model), float(model.num_tokens)

    def macs(tokens: float) -> float:
        layer = float(flops.layer_macs(tokens, model, True))
        return flops.fixed_macs(model) + model.depth * layer

    low, high = 0.0, tokens
    for _ in range(50):
        tokens = (low + high) / 2
        low, high = (low, tokens) if macs(tokens) > target else (tokens, high)
    return hlo.Rows(
        buffer=packed.num_rows(batch * model.num_tokens),
        computed=packed.num_rows(round(batch * high)),
        layers=model.depth,
    )


def count_packed(compiled: Any, model: vit.AViT, batch: int) -> dict[str, float]:
    """More columns of the table for packed execution: bytes at several MACs ratios.

    Args:
      compiled: the program.
      model: whose layers it computes.
      batch: number of images.
    """
    row = {}
    for ratio in (1.0, *RATIOS):
        program = hlo.Program(compiled.as_text(), rows_at(model, batch, ratio))
        at = "" if ratio == 1.0 else f"_at_{ratio}"
        row[f"layer_mb{at}"] = sum(program.loops(model.depth), hlo.Count()).bytes / 1e6
        row[f"program_mb{at}"] = program.total().bytes / 1e6
    return row


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
