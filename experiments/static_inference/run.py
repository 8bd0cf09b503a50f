"""Images per second of static DeiT-T inference, whole batch and in chunks, and of plain PyTorch
where torch is installed.

python -m experiments.static_inference.run --out=experiments/static_inference/result.json

float32, compiled and warmed up beforehand, each call waited for, calls interleaved. Random pixels
will do: nothing halts.
"""

import json
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags

import avit_jax
from avit_jax.utils import errors
from experiments import results, timing

_BATCH = flags.DEFINE_integer("batch", 16, "images a call")
_CHUNKS = flags.DEFINE_multi_integer(
    "chunk", [16, 8, 4], "images that run through all layers at a time; divide the batch"
)
_ROUNDS = flags.DEFINE_integer("rounds", 15, "interleaved repeats")
_OUT = flags.DEFINE_string("out", None, "JSON file to write")


def jax_functions(
    model: avit_jax.AViT, params: dict, images: np.ndarray
) -> dict[str, Callable[[], np.ndarray]]:
    """One function a chunk size; each returns logits."""

    def build(chunk: int) -> Callable[[], np.ndarray]:
        chunks = jax.device_put(images.reshape(-1, chunk, *images.shape[1:]))
        run = jax.jit(
            lambda params, chunks: jax.lax.map(
                lambda x: model.apply({"params": params}, x)[0], chunks
            )
        )
        return lambda: np.asarray(run(params, chunks)).reshape(len(images), -1)

    return {f"jax, chunks of {chunk}": build(chunk) for chunk in _CHUNKS.value}


def torch_functions(params: dict, images: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    """Plain PyTorch with the same weights; none where torch is not installed."""
    try:
        from experiments.static_inference import torch_vit
    except ImportError:
        print("torch is not installed: no comparison with PyTorch")
        return {}
    return {"torch": torch_vit.function(params, images, width=192, num_heads=3)}


def main(_: list[str]) -> None:
    """Checks that all compute the same, measures, prints and writes."""
    images = (
        np.random.default_rng(0).standard_normal((_BATCH.value, 224, 224, 3)).astype(np.float32)
    )
    model = avit_jax.deit_tiny(halting=None)
    params = jax.jit(model.init)(jax.random.key(0), images[:1])["params"]
    functions = jax_functions(model, params, images) | torch_functions(params, images)
    first, *others = [function() for function in functions.values()]
    for other in others:
        np.testing.assert_allclose(other, first, atol=1e-4)
    seconds = timing.interleave(functions, _ROUNDS.value)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    best = min((name for name in medians if name != "torch"), key=medians.get)
    result = {
        **timing.environment(),
        "batch": _BATCH.value,
        "rounds": _ROUNDS.value,
        "images_per_second": {name: _BATCH.value / median for name, median in medians.items()},
        "best": best,
    }
    if "torch" in seconds:
        result["speed_up_over_torch"] = timing.median_ratio(seconds["torch"], seconds[best])
    print(json.dumps(result, indent=2))
    if _OUT.value:
        results.save(_OUT.value, result)


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
