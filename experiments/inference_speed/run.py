"""Images per second with halted tokens removed, against the static network, masking, and plain
PyTorch.

AVIT_DATA_DIR=... python -m experiments.inference_speed.run --out=runs/deit_tiny

Batch sizes that the file has already stay in it; it has to be of the same kind of machine, versions
and model.

Protocol. Real pictures, the first ones of ImageNet's validation and training split in
AVIT_DATA_DIR, of the digits where it is unset; random weights. The gate shift is calibrated on
these very pictures so that the network costs the named share of the static network's
multiply-accumulates (MACs); where the batch is larger than the data set, pictures come again.
Programs are compiled and warmed up beforehand, compile time is told apart (one program serves every
gate); input is on the device before a call, and every call is waited for. A batch is shared out
over the devices there are, of which a CPU may have several. Calls
are interleaved: each round runs every row once, over at least 16 pictures, and ratios are taken
within a round. The static network runs in chunks of the fastest size, which a trial finds, and of
the sizes below and above; speed-ups are against the fastest of the three. Memory is XLA's own
account of arguments, results and temporaries.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import avit_jax
from avit_jax.inference import adaptive
from avit_jax.models import flops
from avit_jax.utils import errors, visualize
from experiments import results, timing, workload
from experiments.inference_speed import draw

_MODEL = flags.DEFINE_enum(
    "model", "deit_tiny", ["deit_tiny", "deit_small"], "shape of the network"
)
_BATCH = flags.DEFINE_multi_integer("batch", [1, 8, 64, 256], "images a call", lower_bound=1)
_BUDGET = flags.DEFINE_multi_float("budget", [0.8, 0.62, 0.4], "share of the static network's MACs")
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "of the network; pictures are float32"
)
_REDUNDANCY = flags.DEFINE_float(
    "redundancy", 0.0, "above 0: halted tokens merge, and the gate looks at redundancy so much"
)
_SECONDS = flags.DEFINE_float(
    "seconds", 120, "measures each batch size for so long, and for three rounds at least"
)
_OUT = flags.DEFINE_string("out", None, "writes <out>.json and <out>.png")

_PER_ROUND = 16  # pictures a round, at least


class Program:
    """A function of variables and a batch of images, compiled."""

    def __init__(
        self,
        function: Callable[..., Any],
        variables: Any,
        batch: jax.Array,
        devices: workload.Devices,
    ) -> None:
        self.devices = devices
        started = time.monotonic()
        self.run = devices.compile(function, devices.replicate(variables), batch)
        self.compile_seconds = time.monotonic() - started
        memory = self.run.memory_analysis()  # of one device
        each = (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        )
        self.memory = len(devices) * each


class Row:
    """A program on batches of images; a call runs over all of them, each waited for."""

    def __init__(self, program: Program, variables: Any, batches: list[jax.Array]) -> None:
        self.program, self._variables, self._batches = (
            program,
            program.devices.replicate(variables),
            batches,
        )
        self.latencies: list[float] = []

    def __call__(self) -> None:
        for batch in self._batches:
            started = time.perf_counter()
            jax.block_until_ready(self.program.run(self._variables, batch))
            self.latencies.append(time.perf_counter() - started)

    def summary(self, calls: int) -> dict[str, float]:
        """Latency of the last calls, compile time and memory."""
        p50, p95 = (1e3 * float(np.percentile(self.latencies[-calls:], q)) for q in (50, 95))
        return {
            "p50_ms": p50,
            "p95_ms": p95,
            "compile_seconds": self.program.compile_seconds,
            "memory_mb": self.program.memory / 1e6,
        }

    def macs(self) -> tuple[float, float]:
        """Mean MACs of an image, without and with padding; of an adaptive row."""
        aux = [self.program.run(self._variables, batch)[1] for batch in self._batches]
        return tuple(
            float(np.mean([getattr(a, name) for a in aux])) for name in ("macs", "macs_padded")
        )


def chunks(batch: int) -> list[int]:
    """Sizes of the chunks that a batch of one device is tried in: powers of two that divide it, and
    the whole batch; on a GPU from 64, as smaller ones leave it idle.
    """
    least = 1 if jax.default_backend() == "cpu" else min(64, batch)
    sizes = [2**i for i in range(batch.bit_length()) if 2**i >= least and batch % 2**i == 0]
    return sorted({*sizes, batch})


def in_a_round(batch: int) -> int:
    """Pictures of a round: whole batches."""
    return -(-max(batch, _PER_ROUND) // batch) * batch


def torch_rows(
    params: Any, batches: list[np.ndarray], model: avit_jax.AViT
) -> dict[str, Callable[[], Any]]:
    """Plain PyTorch with the same weights, in each way to chunk a batch; none where torch is not
    installed.
    """
    try:
        from experiments.static_inference import torch_vit
    except ImportError:
        print("torch is not installed: no comparison with PyTorch")
        return {}

    def row(chunk: int) -> Callable[[], Any]:
        images = np.concatenate(batches).reshape(-1, chunk, *batches[0].shape[1:])
        options = {
            "width": model.width,
            "num_heads": model.num_heads,
            "dtype": _DTYPE.value,
            "device": device,
        }
        each = [torch_vit.function(params, part, **options) for part in images]
        return lambda: [function() for function in each]

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    size = len(batches[0])
    sizes = {8, 16, size} if device == "cpu" else set(chunks(size))
    return {f"torch, chunks of {chunk}": row(chunk) for chunk in sorted(sizes) if size % chunk == 0}


def measure(model: avit_jax.AViT, params: Any, images: np.ndarray, batch: int) -> dict[str, Any]:
    """All rows at one batch size."""
    count, devices = in_a_round(batch), workload.Devices(batch)
    whole = [images[i : i + batch] for i in range(0, count, batch)]
    batches = [devices.split(images) for images in whole]
    compiled = lambda function, variables: Program(function, variables, batches[0], devices)  # noqa: E731
    remove = compiled(functools.partial(adaptive.apply, model), workload.gated(params, 0.0))
    at = lambda shift: Row(remove, workload.gated(params, shift), batches)  # noqa: E731
    shifts = workload.calibrate(model, lambda shift: at(shift).macs()[0], _BUDGET.value)
    removed = {f"adaptive {budget}": at(shift) for budget, shift in shifts.items()} | {
        "adaptive 1.0": at(-1e3)
    }

    def chunked(model: avit_jax.AViT, variables: Any, chunk: int) -> Row:
        return Row(compiled(workload.chunked(model.apply, chunk), variables), variables, batches)

    sizes = chunks(batch // len(devices))
    plain = functools.partial(chunked, model.clone(halting=None), {"params": params})
    near = timing.around_the_fastest(plain, sizes)
    static = {f"static, chunks of {chunk}": row for chunk, row in near.items()}
    chunk = max(chunk for chunk in sizes if chunk <= 8 or jax.default_backend() != "cpu")
    last, variables = _BUDGET.value[-1], workload.gated(params, shifts[_BUDGET.value[-1]])
    masked = chunked(model, variables, chunk)
    rows = static | {f"masked {last}": masked} | removed
    functions = rows | torch_rows(params, whole, model)
    seconds = timing.interleave(functions, rounds=3, seconds=_SECONDS.value)
    best = timing.fastest(seconds, static)
    static_macs = flops.static_macs(model)
    result = {}
    for name, taken in seconds.items():
        speed_up = timing.median_ratio(seconds[best], taken)
        result[name] = {"images_per_second": count / float(np.median(taken)), "speed_up": speed_up}
        if name in rows:
            result[name] |= rows[name].summary(len(taken) * len(batches))
        if name in removed:
            macs, padded = removed[name].macs()
            ideal = static_macs / macs
            result[name] |= {
                "macs_ratio": macs / static_macs,
                "ideal_speed_up": ideal,
                "efficiency": speed_up / ideal,
            }
            result[name] |= {"unpadded_share": macs / padded}
    torch = [name for name in seconds if name.startswith("torch")]
    if torch:
        fastest = timing.fastest(seconds, torch)
        for name in removed:
            result[name]["speed_up_over_torch"] = timing.median_ratio(
                seconds[fastest], seconds[name]
            )
    what = {
        "batch": batch,
        "devices": len(devices),
        "rounds": len(seconds[best]),
        "images_a_round": count,
    }
    return what | {"best_static": best, "rows": result}


def show(result: dict[str, Any]) -> None:
    """Prints one batch size as a table."""
    print(f"batch {result['batch']}, {result['rounds']} rounds, against {result['best_static']}")
    for name, row in result["rows"].items():
        text = (
            f"  {name:22} {row['images_per_second']:7.1f} images/s  speed-up {row['speed_up']:5.3f}"
        )
        if "efficiency" in row:
            text += f"  ideal {row['ideal_speed_up']:5.3f}  efficiency {row['efficiency']:5.3f}"
            text += f"  unpadded {row['unpadded_share']:5.3f}"
        if "memory_mb" in row:
            text += (
                f"  {row['memory_mb']:6.0f} MB  compile {row['compile_seconds']:4.1f} s  p95 "
                f"{row['p95_ms']:.0f} ms"
            )
        print(text, flush=True)


def main(_: list[str]) -> None:
    """Measures every batch size, prints and writes."""
    images, where = workload.load_images(max(map(in_a_round, _BATCH.value)))
    halting = avit_jax.HaltingConfig(
        learnable=True, merge=_REDUNDANCY.value > 0, redundancy=_REDUNDANCY.value
    )
    model = getattr(avit_jax, _MODEL.value)(halting=halting, dtype=jnp.dtype(_DTYPE.value))
    params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
    what = {
        "model": _MODEL.value,
        "redundancy": _REDUNDANCY.value,
        "images": where,
        "dtype": _DTYPE.value,
    }
    what = timing.environment() | what
    before = results.load(f"{_OUT.value}.json") if _OUT.value else {}
    if before and before | what != before:
        raise errors.UserError(
            f"{_OUT.value}.json is of another device, model or version: name another --out."
        )
    batches = {batch["batch"]: batch for batch in before.get("batches", [])}  # other sizes stay
    names = {f"adaptive {budget}" for budget in (*_BUDGET.value, 1.0)}
    if any(
        names != {name for name in batch["rows"] if name.startswith("adaptive")}
        for batch in batches.values()
    ):
        raise errors.UserError(
            f"{_OUT.value}.json is of other budgets: give the same --budget, or name another --out."
        )
    for batch in _BATCH.value:
        batches[batch] = measure(model, params, images, batch)
        show(batches[batch])
        if _OUT.value:
            result = what | {"batches": [batches[size] for size in sorted(batches)]}
            results.save(f"{_OUT.value}.json", result)
            visualize.write(draw.one(result), f"{_OUT.value}.png")


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
