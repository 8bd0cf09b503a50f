"""The figures of inference speed show the values of their results."""

import json
import pathlib
import sys

import pytest
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from experiments import timing
from experiments.inference_speed import draw

_FOLDER = pathlib.Path(draw.__file__).parent


def _lengths(figure: Figure) -> list[float]:
    return [bar.get_width() for bar in figure.axes[0].patches]


def _numbers(figure: Figure) -> list[float]:
    return [float(text.get_text()) for text in figure.axes[0].texts]


@pytest.mark.parametrize("name", ["deit_tiny_avx2", "deit_small_merging", "h200_deit_tiny"])
def test_a_figure_shows_its_result(name: str) -> None:
    result = json.loads((_FOLDER / f"{name}.json").read_text())
    figure = draw.one(result)
    batches = sorted(result["batches"], key=lambda batch: batch["batch"])
    names = [row for row in batches[0]["rows"] if row.startswith("adaptive")]
    expected = [batch["rows"][row]["speed_up"] for row in names for batch in batches]
    assert _lengths(figure) == pytest.approx(expected)
    assert _numbers(figure) == pytest.approx(expected, abs=0.0051)
    title = figure.axes[0].get_title()
    assert result.get("processor", "") in title and result["device"] in title
    assert ("processor not recorded" in title) == (name == "deit_small_merging")
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == [
        f"batch {batch['batch']:,}" for batch in batches
    ]


def test_devices_are_compared() -> None:
    row = lambda speed: {  # noqa: E731
        f"adaptive {ratio}": {"speed_up": speed / float(ratio), "ideal_speed_up": 1 / float(ratio)}
        for ratio in ("0.8", "0.62", "0.4")
    }
    figure = draw.devices([("CPU", row(0.9)), ("GPU", row(0.5))])
    expected = [speed / ratio for ratio in (0.8, 0.62, 0.4) for speed in (0.9, 0.5)]
    assert _lengths(figure) == pytest.approx(expected)
    assert figure.axes[0].get_ylim()[0] > figure.axes[0].get_ylim()[1]  # the first row on top


@pytest.mark.parametrize(
    ("seconds", "kept", "tried"),
    [
        ({1: 4, 2: 2, 4: 1, 8: 2, 16: 3, 32: 0}, [2, 4, 8], 5),
        ({1: 1, 2: 2, 4: 3, 8: 0}, [1, 2], 3),
        ({1: 3, 2: 2, 4: 1}, [2, 4], 3),
        ({1: 1, 2: 4, 4: 0, 8: 3}, [2, 4, 8], 4),
    ],
)
def test_sizes_are_tried_until_the_fastest_is_not_the_last(
    seconds: dict[int, int], kept: list[int], tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(size: int) -> str:
        made.append(size)
        return size

    monkeypatch.setattr(timing, "interleave", lambda named, rounds: {"": [seconds[named[""]]]})
    assert list(timing.around_the_fastest(make, seconds)) == kept and len(made) == tried
