"""The notebook runs from top to bottom, and its network is trained and halts."""

import json
import pathlib

import matplotlib
import pytest

_NOTEBOOK = pathlib.Path(__file__).parents[1] / "notebooks/digits.ipynb"


def test_the_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    matplotlib.use("agg")
    cells = json.loads(_NOTEBOOK.read_text())["cells"]
    scope: dict = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), scope)
    scope["plt"].close("all")
    (more, _), (ratio, accuracy), (fewer, _) = scope["trade"]
    assert more > ratio > fewer and accuracy > 0.9
    assert scope["state"].depth.tolist() == [4, 2, 1]
    output = capsys.readouterr().out
    assert "top-1 of 360 images" in output and "after layer 4" in output
