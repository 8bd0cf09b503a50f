"""A damaged, copied, linked or swapped checkpoint is named and moved aside, and the one before it
comes back.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable

import fixtures
import pytest
from test_checkpoint import _equal, _saved, _state, _steps

from avit_jax.training import build, checkpoint, damage
from avit_jax.utils import errors


def test_what_others_have_written_with_its_digests(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path, (1, 0.1))
    step = tmp_path / "checkpoints/1"
    (step / "extra/metadata").write_bytes(b"\xff{")
    (step / "sha256.json").write_text(json.dumps(damage.digests(checkpoint.epath.Path(step))))
    with pytest.raises(errors.UserError, match=r"is damaged .*start again"):
        checkpoint.Checkpoints(tmp_path)


_DEEP = "[" * 100_000 + "]" * 100_000


def _rewrite(folder: pathlib.Path, name: str, text: str) -> None:
    """Changes a file of a checkpoint, and its digest with it."""
    (folder / name).write_text(text)
    if name not in ("sha256.json", "_CHECKPOINT_METADATA"):
        digests = json.loads((folder / "sha256.json").read_text())
        digests[name] = hashlib.sha256(text.encode()).hexdigest()
        (folder / "sha256.json").write_text(json.dumps(digests))


_ODD = [
    (name, text)
    for name in ("sha256.json", "_CHECKPOINT_METADATA", "extra/metadata", "metrics/metrics")
    for text in ("", "[]", "5", "null", '"x"', _DEEP)
]


_ODD += [("sha256.json", "{}"), ("metrics/metrics", "{}"), ("metrics/metrics", '{"top1": "a"}')]
_ODD += [("extra/metadata", '{"step": 2.0}')]


@pytest.mark.parametrize(("name", "text"), _ODD)
def test_odd_json_is_damage(tmp_path: pathlib.Path, name: str, text: str) -> None:
    _saved(tmp_path, (1, 0.1), (2, 0.2))
    _rewrite(tmp_path / "checkpoints/2", name, text)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        _equal(checkpoints.restore(_state())[0], _state(1))
    assert (tmp_path / "checkpoints/damaged_checkpoint_2").is_dir()


@pytest.mark.parametrize("text", ["{}", "[]", "5", "", '{"tree_metadata": 5}'])
def test_odd_metadata_of_the_state_end_in_a_sentence(tmp_path: pathlib.Path, text: str) -> None:
    _saved(tmp_path, (1, 0.1))
    _rewrite(tmp_path / "checkpoints/1", "state/_METADATA", text)
    with (
        checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(
            errors.UserError,
            match=rf"step 1 .* cannot be read .*: move {tmp_path}/checkpoints/1 away",
        ),
    ):
        checkpoints.restore(_state())


def test_metrics_of_a_damaged_checkpoint_that_stays(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path, (1, 0.1), (2, 0.2))
    (tmp_path / "checkpoints/2/metrics/metrics").write_text("{}")
    with (
        checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(
            errors.UserError, match=r"best checkpoint .*use --config.eval.checkpoint=last"
        ),
    ):
        checkpoints.restore(_state(), "best")


@pytest.mark.parametrize("name", ["sha256.json", "extra/metadata", "_CHECKPOINT_METADATA"])
def test_a_pipe_in_place_of_a_file_is_damage(tmp_path: pathlib.Path, name: str) -> None:
    _saved(tmp_path, (1, 0.1), (2, 0.2))
    (tmp_path / "checkpoints/2" / name).unlink()
    os.mkfifo(tmp_path / "checkpoints/2" / name)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.step() == 1


@pytest.mark.parametrize("read_only", [True, False])
@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to itself"])
def test_a_folder_of_checkpoints_that_is_none(
    tmp_path: pathlib.Path, kind: str, read_only: bool
) -> None:
    there = tmp_path / "checkpoints"
    if kind == "file":
        there.write_text("")
    else:
        there.symlink_to("nowhere" if kind == "link to nothing" else there)
    with pytest.raises(errors.UserError, match="checkpoints is no folder that can be read"):
        checkpoint.Checkpoints(tmp_path, read_only=read_only)


def test_what_only_looks_like_a_replaced_checkpoint_stays(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path, (1, 0.1))
    there = tmp_path / "checkpoints"
    names = [f"replaced_checkpoint_{end}" for end in ("", "abc", "..", "07")]
    for name in names:
        (there / name).mkdir()
    (there / "replaced_checkpoint_9").symlink_to(there / "1")
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        _equal(checkpoints.restore(_state())[0], _state(1))
    assert {path.name for path in there.iterdir()} == {"1", "replaced_checkpoint_9", *names}


@pytest.mark.parametrize(
    "key",
    ["item_handlers", "metrics", "performance_metrics", "init_timestamp_nsecs", "custom_metadata"],
)
def test_odd_types_in_orbax_metadata_are_damage(tmp_path: pathlib.Path, key: str) -> None:
    _saved(tmp_path, (1, 0.1), (2, 0.2))
    values = json.loads((tmp_path / "checkpoints/2/_CHECKPOINT_METADATA").read_text())
    _rewrite(tmp_path / "checkpoints/2", "_CHECKPOINT_METADATA", json.dumps(values | {key: ["x"]}))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        _equal(checkpoints.restore(_state())[0], _state(1))


def test_every_file_needs_its_digest(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path, (1, 0.1), (2, 0.2))
    digests = json.loads((tmp_path / "checkpoints/2/sha256.json").read_text())
    del digests["state/manifest.ocdbt"]
    _rewrite(tmp_path / "checkpoints/2", "sha256.json", json.dumps(digests))
    (tmp_path / "checkpoints/1/state/.DS_Store").write_text("of an operating system")
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        _equal(checkpoints.restore(_state())[0], _state(1))


def _copy(there: pathlib.Path) -> None:
    shutil.copytree(there / "2", there / "9")


def _link(there: pathlib.Path) -> None:
    (there / "9").symlink_to(there / "2")


def _dangling_link(there: pathlib.Path) -> None:
    (there / "9").symlink_to(there / "nowhere")


def _file(there: pathlib.Path) -> None:
    (there / "9").write_text("no folder")


@pytest.mark.parametrize("add", [_copy, _link, _dangling_link, _file])
def test_a_folder_under_another_step_is_moved_aside(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, add: Callable[[pathlib.Path], None]
) -> None:
    _saved(tmp_path, (1, 0.1), (2, 0.2))
    add(tmp_path / "checkpoints")
    with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.step() == 2
    for _ in range(2):  # the second time another one lies where it is moved to
        with (
            caplog.at_level("WARNING", logger="avit_jax"),
            checkpoint.Checkpoints(tmp_path) as checkpoints,
        ):
            _equal(checkpoints.restore(_state())[0], _state(2))
        assert "step 9" in caplog.text and os.path.lexists(
            tmp_path / "checkpoints/damaged_checkpoint_9"
        )
        add(tmp_path / "checkpoints")
    _saved(tmp_path, (3, 0.3), (4, 0.4))
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        _equal(checkpoints.restore(_state())[0], _state(4))


def test_swapped_folders(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path, (1, 0.9), (2, 0.2), (3, 0.3))
    there = tmp_path / "checkpoints"
    for before, after in (("2", "x"), ("3", "2"), ("x", "3")):
        (there / before).rename(there / after)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        _equal(checkpoints.restore(_state())[0], _state(1))
    assert {path.name for path in there.iterdir()} == {
        "1",
        "damaged_checkpoint_2",
        "damaged_checkpoint_3",
    }


def test_a_state_of_another_step(tmp_path: pathlib.Path) -> None:
    config = fixtures.small_config()
    state = build.new_state(build.model(config), build.optimizer(config)[0], seed=0, ema=True)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, top1=None, extra={})
        with pytest.raises(errors.UserError, match=r"step 5 .* holds the state of step 0: move"):
            checkpoints.restore(state)


def test_a_save_that_does_nothing_is_an_error(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path, (1, 0.1), (7, 0.2))
    with (
        pytest.raises(
            errors.UserError, match=r"step 3 cannot be written into .*later one, of step 7"
        ),
        checkpoint.Checkpoints(tmp_path) as checkpoints,
    ):
        checkpoints.save(3, _state(3), top1=None, extra={})


# A file of a checkpoint, and the share of it that is left; None: the file is gone.
_DAMAGES = [
    ("state/manifest.ocdbt", 0.5),
    ("state/manifest.ocdbt", None),
    ("state/d/*", 0.0),
    ("state/d/*", 0.9),
    ("state/ocdbt.process_0/d/*", 0.1),
    ("state/ocdbt.process_0/manifest.ocdbt", 0.99),
    ("state/_METADATA", 0.7),
    ("extra/metadata", 0.5),
    ("metrics/metrics", 0.0),
    ("_CHECKPOINT_METADATA", 0.3),
    ("_CHECKPOINT_METADATA", None),
    ("sha256.json", 0.5),
    ("sha256.json", None),
]


@pytest.mark.parametrize(("name", "left"), _DAMAGES)
def test_where_the_newest_is_damaged_the_one_before_comes_back(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture, name: str, left: float | None
) -> None:
    _saved(tmp_path, (1, 0.1), (2, 0.2), (3, 0.3))
    file = sorted((tmp_path / "checkpoints/3").glob(name))[0]
    file.unlink() if left is None else file.write_bytes(
        file.read_bytes()[: int(left * file.stat().st_size)]
    )
    if name != "metrics/metrics":  # Orbax reads it beforehand
        with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
            _equal(checkpoints.restore(_state())[0], _state(2))
    assert _steps(tmp_path) == {2, 3}
    with (
        caplog.at_level("WARNING", logger="avit_jax"),
        checkpoint.Checkpoints(tmp_path) as checkpoints,
    ):
        restored, extra = checkpoints.restore(_state())
        assert checkpoints.step() == 2
        checkpoints.save(3, _state(3), top1=0.3, extra={})
        _equal(checkpoints.restore(_state())[0], _state(3))  # the new one, which is not damaged
    _equal(restored, _state(2))
    assert extra == {"step": 2}
    assert f"the checkpoint of step 3 in {tmp_path}/checkpoints is damaged" in caplog.text
    assert (tmp_path / "checkpoints/damaged_checkpoint_3").is_dir()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        _equal(checkpoints.restore(_state())[0], _state(3))


def test_one_changed_byte_is_noticed(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path, (1, 0.1), (2, 0.2))
    (file,) = (tmp_path / "checkpoints/2/state/d").iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(_state())[1] == {"step": 1}


def test_no_whole_checkpoint(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path, (1, 0.1), (2, 0.2), (3, 0.0), (4, 0.0))
    (tmp_path / "checkpoints/2/state/manifest.ocdbt").unlink()
    with (
        checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints,
        pytest.raises(errors.UserError, match=r"best .* step 2, is damaged.*checkpoint=last"),
    ):
        checkpoints.restore(_state(), "best")
    for step in (3, 4):
        (tmp_path / f"checkpoints/{step}/state/manifest.ocdbt").unlink()
    with pytest.raises(errors.UserError, match=r"last .* damaged .*manifest\.ocdbt.*start again"):
        checkpoint.Checkpoints(tmp_path)
    assert _steps(tmp_path) == {2, 3, 4}


def test_metrics_that_orbax_cannot_read(tmp_path: pathlib.Path) -> None:
    _saved(tmp_path, (1, 0.1), (2, 0.2))
    (tmp_path / "checkpoints/2/metrics/metrics").write_text("{")
    with pytest.raises(errors.UserError, match=rf"{tmp_path}/checkpoints cannot be read"):
        checkpoint.Checkpoints(tmp_path, read_only=True)


@pytest.mark.parametrize(
    "gone", ["metrics/metrics", "_CHECKPOINT_METADATA", "extra/metadata", "state/manifest.ocdbt"]
)
def test_one_that_was_being_deleted(tmp_path: pathlib.Path, gone: str) -> None:
    _saved(tmp_path, (1, 0.1), (2, 0.2))
    (tmp_path / "checkpoints/1" / gone).unlink()
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        _equal(checkpoints.restore(_state())[0], _state(2))
        checkpoints.save(3, _state(3), top1=0.3, extra={})
    assert _steps(tmp_path) == {2, 3}
