"""Estimates how much faster the TPU kernel gets when tokens halt, from its compiled program.

pip install '.[tpu]'
JAX_PLATFORMS=cpu python -m experiments.tpu_kernel.run --out=experiments/tpu_kernel/result.json

Nothing is run. The kernel and its static twin (`static.py`) are compiled in bfloat16, and their
instruction bundles counted. The token counts are those of `counts.py`. The ideal speed-up is that
of the MACs of the layers alone. Bundles that the file already has are not compiled again.

In the file, `layer` and `move` are bundles of a layer and of moving the tokens that stay, by number
of tokens; `outside` and `static_image` are bundles of an image.
"""

import glob
import itertools
import json
import os
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

import avit_jax
from avit_jax.models import one_kernel
from avit_jax.utils import errors
from experiments import results
from experiments.tpu_kernel import bundles
from experiments.tpu_kernel import counts as counts_lib
from experiments.tpu_kernel import estimate as estimate_lib

_OUT = flags.DEFINE_string("out", None, "JSON file, to which rows are added", required=True)
_CHIPS = flags.DEFINE_list("chips", ["v5e", "v6e"], "that libtpu knows")
_MODELS = flags.DEFINE_list("models", ["deit_tiny", "deit_small"], "networks")
_TOKEN_MULTIPLE = 32  # of `adaptive.default_plan`


def _compile(chip: str, model: avit_jax.AViT, folder: str) -> dict[str, Any]:
    """Returns the bundles of the kernel and of its static twin."""
    sizes = one_kernel.sizes(model, _TOKEN_MULTIPLE)
    texts, seconds = [], 0.0
    for is_static in (True, False):
        before = set(glob.glob(f"{folder}/*"))
        seconds = estimate_lib.compile_kernel(chip, model, sizes, is_static=is_static)
        new = set(glob.glob(f"{folder}/*vit_tpu*final_bundles.txt")) - before
        (file,) = (path for path in new if "analysis" not in path)
        with open(file) as dump:
            texts.append(dump.read())
    (loop,), outside = bundles.read(texts[0])
    kernel = bundles.kernel(texts[1], sizes)
    return {
        "jax": jax.__version__,
        "compile_seconds": seconds,
        "static_image": outside + model.depth * loop.layer,
        "outside": kernel.outside,
        "layer": {n: loop.layer for n, loop in kernel.loops.items()},
        "move": {n: loop.move for n, loop in kernel.loops.items()},
    }


def _row(row: dict[str, Any], name: str, model: avit_jax.AViT) -> dict[str, Any]:
    """Adds the estimates to the bundles."""
    loops = {
        int(n): bundles.Loop(layer=layer, move=row["move"][n]) for n, layer in row["layer"].items()
    }
    kernel = bundles.Kernel(loops=loops, outside=row["outside"])
    counts = json.loads(counts_lib.FILE.read_text())[name]
    by_ratio = {
        ratio: estimate_lib.estimate(kernel, row["static_image"], images, model)
        for ratio, images in counts.items()
    }
    return row | {"by_macs_ratio": by_ratio}


def main(_: list[str]) -> None:
    """Adds a row for each chip and network."""
    with tempfile.TemporaryDirectory() as folder:
        # Read when libtpu starts.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=final_bundles"
        )
        for chip, name in itertools.product(_CHIPS.value, _MODELS.value):
            model = getattr(avit_jax, name)(dtype=jnp.dtype("bfloat16"))
            key = f"{name}, {chip}"
            row = results.load(_OUT.value).get(key) or _compile(chip, model, folder)
            row = _row(row, name, model)
            print(key, json.dumps(row["by_macs_ratio"]), flush=True)
            results.add(_OUT.value, key, row)


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
