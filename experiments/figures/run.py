"""The paper's figures, of any trained network and data set: PNG files, and a page that holds them
all.

python -m experiments.figures.run --config=configs/digits.py --checkpoint=runs/digits --out=figures

Looks at the whole evaluation split; writes index.html, which needs no network, the figures and
result.json into --out.
"""

import pathlib
from collections.abc import Iterator

import jax
import numpy as np
from absl import app, flags
from etils import epath
from matplotlib.figure import Figure
from ml_collections import config_flags

from avit_jax import config as config_lib
from avit_jax.data import loader
from avit_jax.models import vit
from avit_jax.training import build, evaluate, restore
from avit_jax.utils import errors
from avit_jax.weights import weight_files
from experiments import results
from experiments.figures import draw, gather
from experiments.figures import page as page_lib

_CONFIG = config_flags.DEFINE_config_file("config", None, "recipe", lock_config=True)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "workdir of a run, or a weight file", required=True
)
_OUT = flags.DEFINE_string("out", None, "folder for the page and the figures", required=True)
_SHIFTS = flags.DEFINE_list(
    "shifts", ["-1", "-0.5", "-0.25", "0", "0.25", "0.5", "1"], "of beta, in units of gamma"
)
_SHOWN = flags.DEFINE_integer("shown", 8, "images in each figure that shows images", lower_bound=1)


def show(
    images: gather.Images, chosen: np.ndarray, reader: loader.Reader, model: vit.AViT
) -> Figure:
    """The chosen images, by their places in `images`, beside the depth of their tokens."""
    names = reader.source.label_names
    titles = [
        names[label][:14] if label == guess else f"{names[label][:9]}? {names[guess][:9]}"
        for label, guess in zip(images.label[chosen], images.guess[chosen], strict=True)
    ]
    pixels = [reader(int(i))["image"] for i in images.index[chosen]]
    return draw.maps(pixels, images.depth[chosen], titles, model.depth)


def figures(
    images: gather.Images,
    rows: list[dict[str, float]],
    reader: loader.Reader,
    model: vit.AViT,
    parent: float | None,
) -> Iterator[tuple[str, str, str, Figure]]:
    """Name, heading, explanation and figure, one after the other."""
    by_cost = np.argsort(images.macs_ratio, kind="stable")
    spread = np.linspace(0, len(images.index) - 1, min(_SHOWN.value, len(images.index))).astype(int)
    title = "a class with a question mark was taken for the one behind it"
    yield (
        "maps",
        "Depth of the tokens",
        f"Images from all over the data set; {title}.",
        show(images, spread, reader, model),
    )
    few = "Those that cost the fewest MACs."
    yield "easiest", "The easiest images", few, show(images, by_cost[: _SHOWN.value], reader, model)
    many = "Those that cost the most."
    yield (
        "hardest",
        "The hardest images",
        many,
        show(images, by_cost[::-1][: _SHOWN.value], reader, model),
    )
    where = "Mean over all images."
    yield "position", "Depth by position", where, draw.position(images.depth, model.depth)
    band = (
        "Above, where patch tokens halt; below, the mean score of the tokens that compute, the "
        "band one standard deviation."
    )
    yield "layers", "Halting by layer", band, draw.layers(images)
    bars = (
        "Mean cost of a class's images, and their standard deviation; of many classes the "
        "cheapest and the dearest."
    )
    yield "classes", "Cost by class", bars, draw.classes(images, reader.source.label_names)
    line = "One network whose gate is shifted, without training it anew."
    yield "tradeoff", "Accuracy against work", line, draw.tradeoff(rows, parent)


def main(_: list[str]) -> None:
    """Looks, draws and writes."""
    config, out = _CONFIG.value, pathlib.Path(_OUT.value)
    try:
        shifts = [float(shift) for shift in _SHIFTS.value]
    except ValueError as error:
        raise errors.UserError(f"--shifts must be numbers: {error}.") from error
    config_lib.check(config)
    model = build.model(config).clone(removal=None)
    if model.halting is None:
        raise errors.UserError(
            "figures are of a network that halts: --config.halting.enabled=True."
        )
    if epath.Path(_CHECKPOINT.value).is_dir():
        params, metadata = restore.params(config, model, _CHECKPOINT.value)
    else:
        params, metadata = weight_files.load(_CHECKPOINT.value, model), None
    parent = metadata.parent.get("parent_top1") if metadata else None
    reader = evaluate.Evaluator(config, model).reader
    images = gather.gather(config, model, jax.device_put(params), reader)
    rows = gather.sweep(config, params, shifts)
    out.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, heading, text, figure in figures(images, rows, reader, model, parent):
        figure.savefig(out / f"{name}.png", dpi=150)
        drawn.append((heading, text, out / f"{name}.png"))
    top1, macs_ratio = float((images.guess == images.label).mean()), float(images.macs_ratio.mean())
    command = (
        "python -m experiments.figures.run "
        f"--config={flags.FLAGS['config'].config_filename} --checkpoint=... --out=..."
    )
    facts = {
        "images": f"{len(images.index):,}",
        "top-1": f"{top1:.2%}",
        "share of the static network's MACs": f"{macs_ratio:.3f}",
        "mean depth of patch tokens": f"{images.depth.mean():.2f} of {model.depth}",
    } | ({} if parent is None else {"top-1 of the static parent": f"{parent:.2%}"})
    (out / "index.html").write_text(
        page_lib.page(f"Where the network thinks: {config.data.name}", facts, drawn, command)
    )
    result = {
        "images": len(images.index),
        "top1": top1,
        "macs_ratio": macs_ratio,
        "parent_top1": parent,
        "tradeoff": rows,
    }
    results.save(out / "result.json", result)
    print(f"wrote {out / 'index.html'}")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(errors.exit_on_user_error(main))
