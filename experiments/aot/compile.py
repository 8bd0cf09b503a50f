"""Ahead-of-time compilation for TPUs and an NVIDIA GPU, and what the compiler says of memory."""

import contextlib
import dataclasses
import functools
import os
import tempfile
import time
from typing import Any

os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # processes that compile side by side

import jax
import numpy as np
from jax.experimental import topologies
from ml_collections import ConfigDict

from avit_jax.inference import adaptive
from avit_jax.models import flops, vit
from avit_jax.training import build, train_step
from avit_jax.training import devices as devices_lib
from avit_jax.utils import errors
from experiments.aot import dump, gpu, hlo


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip, by its maker's published figures.

    Attributes:
      memory: GiB of HBM.
      peak: bfloat16 TFLOP/s, dense.
    """

    memory: float
    peak: float


# Source: cloud.google.com/tpu/docs, pages of each version; nvidia.com/h100, and the memory that its
# driver reports.
CHIPS = {
    "v4": Chip(32, 275),
    "v5e": Chip(16, 197),
    "v5p": Chip(95, 459),
    "v6e": Chip(32, 918),
    "tpu7x": Chip(192, 2307),
    gpu.NAME: Chip(79.1, 989),
}


def devices(topology: str) -> list[Any]:
    """Devices of a topology such as `v5e:2x2`, or of `h100`; raises errors.UserError where a
    compiler does not know it.
    """
    if topology == gpu.NAME:
        return gpu.devices()
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    except Exception as error:
        raise errors.UserError(
            f"there is no topology {topology} ({errors.first_line(error)}): is libtpu installed?"
        ) from error


def _model(config: ConfigDict, topology: str) -> vit.AViT:
    model = build.model(config)
    return model.clone(fused_attention=True) if topology == gpu.NAME else model


def compile_training(config: ConfigDict, topology: str, *, static: bool = False) -> dict[str, Any]:
    """Compiles the `pmap` training step of a recipe for all devices of a topology; the batch is
    spread over them.

    Args:
      config: the recipe.
      topology: see `devices`.
      static: of the network without halting.
    """
    on = devices(topology)
    model, (tx, _) = _model(config, topology), build.optimizer(config)
    if static:
        model = model.clone(halting=None)
    new_state = functools.partial(
        build.new_state, model, tx, seed=0, ema=config.optimizer.ema_decay > 0
    )
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((len(on), *x.shape), x.dtype), jax.eval_shape(new_state)
    )
    shape = (len(on), config.train.batch_size // len(on))
    batch = {name: jax.ShapeDtypeStruct(shape, np.int32) for name in ("label", "index", "skipped")}
    batch["image"] = jax.ShapeDtypeStruct((*shape, *model.pixels, model.channels), np.uint8)
    step = train_step.make_train_step(model, tx, build.step_options(config))
    step = devices_lib.parallel(step, devices=on, donate=True)
    # Forward once and backward twice; once more where layers are computed again.
    passes = 4 if config.model.remat else 3
    return _compile(
        step, (state, batch), topology, on, passes * flops.static_macs(model) * shape[1], model
    )


def compile_inference(
    config: ConfigDict, topology: str, program: str = "inference"
) -> dict[str, Any]:
    """Compiles inference on `config.eval.batch_size` images for one device of a topology.

    Args:
      config: the recipe.
      topology: see `devices`.
      program: "inference" removes halted tokens, "packed" removes them by packed execution on a
        GPU, "masked" masks them, "static" is the network without halting, "static tanh" the same
        with the tanh approximation of GELU.
    """
    on, batch = devices(topology), config.eval.batch_size
    model = _model(config, topology).clone(removal=None)
    if program.startswith("static"):
        mlp = "gelu_tanh" if program == "static tanh" else model.mlp
        model = model.clone(halting=None, mlp=mlp)
    here = jax.sharding.SingleDeviceSharding(on[0])
    images = jax.ShapeDtypeStruct((batch, *model.pixels, model.channels), np.float32, sharding=here)
    shapes = jax.eval_shape(
        model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *images.shape[1:]), np.float32)
    )
    variables = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes
    )
    plan = adaptive.default_plan(batch, "gpu") if topology == gpu.NAME else None
    if program == "packed":
        if topology != gpu.NAME:
            raise errors.UserError(f"packed execution has kernels for {gpu.NAME} only.")
        plan = dataclasses.replace(plan, packed=True)
    run = jax.jit(
        functools.partial(adaptive.apply, model, plan=plan)
        if program in ("inference", "packed")
        else model.apply
    )
    macs = flops.static_macs(model) * batch
    with gpu.target() if program == "packed" else contextlib.nullcontext():
        return _compile(
            run, (variables, images), topology, on, macs, model, batch * (program == "packed")
        )


def share_of_chip(on: list[Any]) -> float:
    """1 where a JAX device is a chip, 1/2 where it is one of the two cores of a chip: of tpu7x, and
    here of v4.

    JAX on a real v4 joins both cores to one device, which the topology does not tell.
    """
    return len({tuple(device.coords) for device in on}) / len(on)


def _compile(
    function: Any,
    arguments: tuple[Any, ...],
    topology: str,
    on: list[Any],
    macs: float,
    model: vit.AViT,
    packed: int = 0,
) -> dict[str, Any]:
    """Compiles a program; `packed` is its number of images if it packs their tokens."""
    chip, share = CHIPS[topology.split(":")[0]], share_of_chip(on)
    lowered = function.lower(*arguments)
    started = time.perf_counter()
    row: dict[str, Any] = {
        "topology": topology,
        "memory_gib": chip.memory * share,
        "devices": len(on),
    }
    with tempfile.TemporaryDirectory() as folder:
        options = gpu.OPTIONS | dump.options(folder) if topology == gpu.NAME else None
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            return row | {
                "fits": False,
                "error": errors.first_line(error),
                "compile_seconds": time.perf_counter() - started,
            }
        row["compile_seconds"] = time.perf_counter() - started
        if topology == gpu.NAME:
            counted = gpu.count(compiled, model, folder)
            counted |= gpu.count_packed(compiled, model, packed) if packed else {}
        else:
            cycles = hlo.Program(compiled.as_text()).estimated_cycles(model.depth)
            counted = {"estimated_megacycles": cycles / 1e6}
    memory = compiled.memory_analysis()
    used = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
    )
    return (
        row
        | counted
        | {
            "fits": used <= chip.memory * share * 2**30,
            "argument_mib": memory.argument_size_in_bytes / 2**20,
            "temporary_mib": memory.temp_size_in_bytes / 2**20,
            "output_mib": memory.output_size_in_bytes / 2**20,
            "shared_mib": memory.alias_size_in_bytes / 2**20,  # of arguments and outputs: donated
            "roofline_ms": 2 * macs / (chip.peak * share * 1e12) * 1e3,
        }
    )
