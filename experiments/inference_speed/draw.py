"""The figures of inference speed, from the results in this folder.

python -m experiments.inference_speed.draw

Draws one figure beside each result, and devices.png, which compares devices.
"""

import pathlib
from typing import Any

import numpy as np
from absl import app
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from avit_jax.utils import visualize
from experiments import results

_FOLDER = pathlib.Path(__file__).parent
_RATIOS = ("0.8", "0.62", "0.4")
_COLORS = {"0.8": "#9ecae1", "0.62": "#3182bd", "0.4": "#08306b", "1.0": "#bdbdbd"}
# Rows of devices.png, of DeiT-T: label, result, batch size.
_DEVICES = (
    ("CPU, one device per core,\nbatch 64", "deit_tiny_two_devices_avx512", 64),
    ("CPU, one device,\nbatch 64", "deit_tiny", 64),
    ("GPU (H200, bfloat16),\nbatch 1,024", "h200_deit_tiny", 1024),
    ("GPU (H200, bfloat16),\nbatch 256", "h200_deit_tiny", 256),
)


def _bars(axis: Axes, groups: list[str], values: dict[str, list[tuple[float, float]]]) -> None:
    """Horizontal bars: for each MACs ratio, speed-up and ideal of each group; the first on top."""
    thickness = 0.8 / len(values)
    for i, (ratio, pairs) in enumerate(values.items()):
        speeds, ideals = np.array(pairs).T
        y = np.arange(len(groups)) + thickness * (i - (len(values) - 1) / 2)
        label = "nothing halts" if ratio == "1.0" else f"MACs ratio {ratio}"
        axis.barh(y, speeds, 0.9 * thickness, color=_COLORS.get(ratio, f"C{i}"), label=label)
        ink = "black" if ratio in ("0.8", "1.0") else "white"
        for place, speed in zip(y, speeds, strict=True):
            axis.text(0.03, place, f"{speed:.2f}", fontsize=9, color=ink, va="center")
        ideal = "ideal: what the MACs alone would give" if not i else None
        axis.scatter(ideals, y, marker="|", color="black", s=900 * thickness**2, label=ideal)
    axis.axvline(1.0, color="grey", linewidth=0.8)
    axis.set_yticks(range(len(groups)), groups)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlim(0, 1.15 * max(max(pair) for pairs in values.values() for pair in pairs))
    axis.set_xlabel("images/s, relative to the fastest static network in JAX")


def one(result: dict[str, Any]) -> Figure:
    """Speed-up over the static network beside its ideal, by batch size."""
    batches = sorted(result["batches"], key=lambda batch: batch["batch"])
    names = [name for name in batches[0]["rows"] if name.startswith("adaptive")]
    values = {
        name.split()[1]: [
            (batch["rows"][name]["speed_up"], batch["rows"][name]["ideal_speed_up"])
            for batch in batches
        ]
        for name in names
    }
    figure = Figure(figsize=(7, 1.6 + 0.26 * len(batches) * (len(names) + 1)), layout="constrained")
    axis = figure.subplots()
    _bars(axis, [f"batch {batch['batch']:,}" for batch in batches], values)
    model = result["model"] + ", merging" * (result["redundancy"] > 0)
    processor = result.get("processor", "processor not recorded" * ("cpu" in result["device"]))
    where = ", ".join(filter(None, [result["device"], processor, result["dtype"]]))
    axis.set_title(f"{model}, {result['images']}\n{where}", fontsize=10)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure


def devices(rows: list[tuple[str, dict[str, Any]]]) -> Figure:
    """Speed-up of each device; a row is a label and the result of one batch size."""
    values = {
        ratio: [
            (row[f"adaptive {ratio}"]["speed_up"], row[f"adaptive {ratio}"]["ideal_speed_up"])
            for _, row in rows
        ]
        for ratio in _RATIOS
    }
    figure = Figure(figsize=(7, 1.4 + 0.95 * len(rows)), layout="constrained")
    _bars(figure.subplots(), [label for label, _ in rows], values)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    return figure


def main(_: list[str]) -> None:
    """Draws all figures again."""
    for path in sorted(_FOLDER.glob("*.json")):
        visualize.write(one(results.load(path)), path.with_suffix(".png"))
    rows = []
    for label, name, size in _DEVICES:
        batches = results.load(_FOLDER / f"{name}.json")["batches"]
        rows += [(label, batch["rows"]) for batch in batches if batch["batch"] == size]
    visualize.write(devices(rows), _FOLDER / "devices.png")


if __name__ == "__main__":
    app.run(main)
