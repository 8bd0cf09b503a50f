"""Metadata of a checkpoint: to JSON and back, of older versions, and damaged."""

import json

import pytest

from avit_jax.training.state import LogState, RunMetadata
from avit_jax.utils import errors

_METADATA = RunMetadata(
    config={"seed": 0, "train": {"steps": 9}},
    label_names=["a", "b"],
    data={"training": "x", "evaluation": "y"},
    teacher="z",
    parent={"parent_top1": 0.5},
    evaluated=True,
    log=LogState(train_seconds=1.5, rows=((3, {"loss": 2.0}),), skipped=1, steps=2, sizes={"m": 7}),
)
# What a checkpoint of the version before RunMetadata holds.
_BEFORE = {
    "train_seconds": 1.5,
    "rows": [[3, {"loss": 2.0}]],
    "skipped": 1,
    "steps": 2,
    "sizes": {"m": 7},
    "config": {"seed": 0, "train": {"steps": 9}},
    "label_names": ["a", "b"],
    "data": {"training": "x", "evaluation": "y"},
    "teacher": "z",
    "parent": {"parent_top1": 0.5},
    "evaluated": True,
    "step": 3,
}


def test_metadata_come_back_from_json() -> None:
    values = json.loads(json.dumps(_METADATA.to_json()))
    assert RunMetadata.from_json(values) == RunMetadata.from_json(_METADATA.to_json()) == _METADATA
    assert values == {key: value for key, value in _BEFORE.items() if key != "step"}
    assert RunMetadata.from_json(_BEFORE) == _METADATA


def test_json_is_a_copy() -> None:
    values = _METADATA.to_json()
    values["config"]["train"]["steps"] = 10
    values["sizes"].clear()
    values["rows"][0][1]["loss"] = 0.0
    assert RunMetadata.from_json(_BEFORE) == _METADATA


def test_older_runs_saved_no_data_and_no_teacher() -> None:
    older = {key: value for key, value in _BEFORE.items() if key not in ("data", "teacher")}
    metadata = RunMetadata.from_json(older)
    assert metadata.data == {} and metadata.teacher is None
    assert metadata.log == _METADATA.log


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"teacher": 5}, "teacher"),
        ({"parent": {"x": []}, "label_names": [1]}, "parent, label_names"),
        ({"rows": [[1]], "sizes": {"m": -5}, "data": {"training": 1}}, "rows, sizes, data"),
        ({"steps": True, "skipped": 1.0}, "skipped, steps"),
        ({"evaluated": 1}, "evaluated"),
    ],
)
def test_wrong_types_are_named(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(errors.UserError, match=rf"another version .*\({expected}\): set another"):
        RunMetadata.from_json(_BEFORE | changes)


@pytest.mark.parametrize("values", [None, [], 5])
def test_other_json_than_an_object(values: object) -> None:
    with pytest.raises(errors.UserError, match="metadata is damaged"):
        RunMetadata.from_json(values)
