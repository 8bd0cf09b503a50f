"""The paper's figures, of any trained network and data set: PNG files, and a page that holds them
all.

python -m experiments.figures.run --config=configs/digits.py --checkpoint=runs/digits --out=figures

Looks at the whole evaluation split; writes index.html, which needs no network, the figures and
result.json into --out.
"""

import pathlib
import shlex
import sys
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
_LINKS = flags.DEFINE_multi_string("link", [], "text=address of a page to link to, at the top")
_SHOWN = flags.DEFINE_integer("shown", 8, "images in each figure that shows images", lower_bound=1)


def show(
    images: gather.Images, chosen: np.ndarray, reader: loader.Reader, model: vit.AViT
) -> Figure:
    """The chosen images, by their places in `images`, beside the depth of their tokens."""
    pairs = zip(images.label[chosen], images.guess[chosen], strict=True)
    names = reader.source.label_names
    titles = [
        names[label] if label == guess else f"{names[label]},\npredicted {names[guess]}"
        for label, guess in pairs
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
    spread_text = (
        "Images at equal distances in the data set, and the number of layers that compute each "
        "patch. Yellow patches use all layers. If the prediction is wrong, the title names both "
        "classes."
    )
    yield "maps", "Depth of the tokens", spread_text, show(images, spread, reader, model)
    few = "Those that cost the fewest MACs."
    yield (
        "easiest",
        "The cheapest images",
        few,
        show(images, by_cost[: _SHOWN.value], reader, model),
    )
    many = "Those that cost the most."
    yield (
        "hardest",
        "The most expensive images",
        many,
        show(images, by_cost[::-1][: _SHOWN.value], reader, model),
    )
    where = "Mean over all images."
    yield "position", "Depth by position", where, draw.position(images.depth, model.depth)
    band = (
        "Above: the layer at which patch tokens halt. Below: the mean score of the tokens that a "
        "layer computes. The band is one standard deviation over images."
    )
    yield "layers", "Halting by layer", band, draw.layers(images)
    bars = (
        "Mean MACs ratio of the images of each class. The bar is their standard deviation. If "
        "there are many classes: the cheapest and the most expensive ones."
    )
    yield "classes", "Cost by class", bars, draw.classes(images, reader.source.label_names)
    line = "One network at several gate biases, without further training."
    yield "tradeoff", "Accuracy against work", line, draw.tradeoff(rows, parent)


def main(_: list[str]) -> None:
    """Looks, draws and writes."""
    config, out = _CONFIG.value, pathlib.Path(_OUT.value)
    try:
        shifts = [float(shift) for shift in _SHIFTS.value]
    except ValueError as error:
        raise errors.UserError(f"--shifts must be numbers: {error}.") from error
    if not all("=" in link for link in _LINKS.value):
        raise errors.UserError("--link must be text=address.")
    links = dict(link.split("=", 1) for link in _LINKS.value)
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
    options = [argument for argument in sys.argv[1:] if "data.dir" not in argument]
    command = shlex.join(["python", "-m", "experiments.figures.run", *options])
    facts = {
        "images": f"{len(images.index):,}",
        "top-1": f"{top1:.2%}",
        "MACs ratio": f"{macs_ratio:.3f}",
        "mean depth of patch tokens": f"{images.depth.mean():.2f} of {model.depth}",
    } | ({} if parent is None else {"top-1 of the static parent": f"{parent:.2%}"})
    title = f"Depth of tokens: {config.data.name}"
    (out / "index.html").write_text(page_lib.page(title, facts, drawn, command, links))
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
