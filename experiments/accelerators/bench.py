"""What the sections share: sizes, networks, images, compiled programs, and the rows that they
write.
"""

import dataclasses
import functools
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import avit_jax
from avit_jax.data import augment, sources
from avit_jax.utils import errors
from experiments import timing

SHIFTS = pathlib.Path(__file__).parent / "shifts.json"
NOTHING_HALTS = -1e3  # a gate shift
# The flags under which the rows of docs/speed.md were measured: no search for the fastest kernels.
OLD_FLAGS = {
    "xla_gpu_enable_triton_gemm": False,
    "xla_gpu_autotune_level": 0,
    "xla_gpu_experimental_enable_fusion_autotuner": False,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How large everything is.

    Attributes:
      static: network and images a call of each configuration of the static section, in the order in
        which they run.
      removal: the same of the removal sections.
      equality: the same of the equality section.
      kernels: the same of the section of packed kernels.
      dtype: of networks and images.
      copied: elements that the copy moves.
      product: side of the square matrices that are multiplied.
      repeats: copies, products or switches in a call.
      rounds: calls of each program that are timed, at least.
      seconds: of timing, at least.
    """

    static: tuple[tuple[str, int], ...]
    removal: tuple[tuple[str, int], ...]
    equality: tuple[tuple[str, int], ...]
    kernels: tuple[tuple[str, int], ...]
    dtype: str
    copied: int
    product: int
    repeats: int
    rounds: int
    seconds: float


FULL = Sizes(
    static=(("deit_tiny", 256), ("deit_small", 256), ("deit_tiny", 1024), ("deit_small", 1024)),
    removal=(
        ("deit_tiny", 256),
        ("deit_tiny", 1024),
        ("deit_small", 1024),
        ("deit_small", 256),
        ("deit_tiny", 64),
        ("deit_small", 64),
    ),
    equality=(("deit_tiny", 64), ("deit_tiny", 512), ("deit_small", 64)),
    kernels=(("deit_tiny", 256), ("deit_small", 256)),
    dtype="bfloat16",
    copied=2**29,
    product=8192,
    repeats=20,
    rounds=5,
    seconds=1.5,
)
TINY = Sizes(
    static=(("tiny", 2),),
    removal=(("tiny", 3),),
    equality=(("tiny", 2),),
    kernels=(("tiny", 1),),
    dtype="bfloat16",
    copied=2**12,
    product=16,
    repeats=2,
    rounds=2,
    seconds=0.0,
)


def network(name: str, dtype: str) -> avit_jax.AViT:
    """A network with a gate whose shift is a parameter: "deit_tiny", "deit_small", or "tiny", for a
    rehearsal.
    """
    halting = avit_jax.HaltingConfig(learnable=True)
    if name == "tiny":
        return avit_jax.AViT(
            width=64, num_heads=4, depth=6, halting=halting, dtype=jnp.dtype(dtype)
        )
    return getattr(avit_jax, name)(halting=halting, dtype=jnp.dtype(dtype))


@functools.cache
def parameters(name: str) -> Any:
    """Random parameters, the same each time; float32."""
    model = network(name, "float32")
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *model.pixels, model.channels)))[
        "params"
    ]


def gated(params: Any, shift: jax.typing.ArrayLike) -> Any:
    """Variables of a network whose gate has the given shift."""
    return {"params": {**params, "gate": {"gamma": jnp.float32(1.0), "beta": jnp.float32(shift)}}}


@functools.cache
def images(count: int) -> tuple[np.ndarray, str]:
    """Normalised images `(count, 224, 224, 3)` float32, and where they are from.

    They are the first ones of ImageNet's validation and training split if `AVIT_DATA_DIR` is set,
    else of the digits, for which no more packages are needed than for the network. If there are
    fewer, images come again.
    """
    if os.environ.get("AVIT_DATA_DIR"):
        from experiments import workload

        return workload.load_images(count)
    records = sources.load("digits", split="train", data_dir="", image_size=(224, 224)).records
    pixels = np.stack([records[i % len(records)]["image"] for i in range(count)])
    pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
    return np.asarray(
        augment.normalize(pixels, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    ), "digits"


def shifts(name: str) -> dict[float, float]:
    """Gate shift by MACs ratio, as `calibrate` stored them for these images; with 1, at which
    nothing halts.
    """
    known = json.loads(SHIFTS.read_text())[images(1)[1]][name]
    return {1.0: NOTHING_HALTS} | {float(ratio): shift for ratio, shift in known.items()}


class Program:
    """A compiled function with its arguments; a call runs it and waits for the result.

    Attributes:
      result: of the last call.
      facts: seconds of compilation, memory in MB by XLA's account, and whether a fused attention
        kernel is called.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._arguments = jax.device_put(arguments)
        started = time.perf_counter()
        self._run = jax.jit(function).lower(*self._arguments).compile(compiler_options=options)
        self.facts = {"compile_seconds": time.perf_counter() - started}
        memory = self._run.memory_analysis()
        used = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        )
        self.facts |= {
            "memory_mb": used / 1e6,
            "fused_attention": "__cudnn$fmha" in self._run.as_text(),
        }
        self.result: Any = None

    def __call__(self) -> None:
        self.result = jax.block_until_ready(self._run(*self._arguments))

    def at(self, *arguments: Any) -> "Program":
        """The same program with other arguments."""
        other = object.__new__(Program)
        other._run, other.facts, other.result = self._run, self.facts, None
        other._arguments = jax.device_put(arguments)
        return other


class Rows:
    """Rows of one section: printed, and appended as JSON lines to a file, so that no later failure
    loses them.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def __call__(self, **row: Any) -> None:
        line = json.dumps({"section": self._path.stem} | row)
        with self._path.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)

    def build(
        self, makers: Mapping[str, Callable[[], Callable[[], Any]]], **what: Any
    ) -> dict[str, Callable[[], Any]]:
        """Makes each function and calls it once; one that fails becomes a row that says why, and is
        left out.
        """
        made = {}
        for name, make in makers.items():
            try:
                function = make()
                function()
                made[name] = function
            except Exception as error:
                self(**what, name=name, error=f"{type(error).__name__}: {errors.first_line(error)}")
        return made


def time_all(functions: Mapping[str, Callable[[], Any]], sizes: Sizes) -> dict[str, list[float]]:
    """Seconds of each call, interleaved; {} if there are no functions."""
    return timing.interleave(functions, sizes.rounds, sizes.seconds) if functions else {}
