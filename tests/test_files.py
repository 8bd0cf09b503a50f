"""A file is there whole, or as it was before."""

import pathlib

import pytest
from etils import epath

from avit_jax import files


def test_text_and_bytes(tmp_path: pathlib.Path) -> None:
    files.write(tmp_path / "a", "größer")
    files.write(str(tmp_path / "b"), b"bytes")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "größer" and (tmp_path / "b").read_bytes() == b"bytes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    files.write("/dev/null", "gone")


def test_what_was_there_outlives_a_full_disk(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files.write(tmp_path / "a", "before")

    def full(path: epath.Path, content: bytes) -> None:
        with pathlib.Path(path).open("wb") as file:
            file.write(content[:3])
        raise OSError("no space left on device")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        files.write(tmp_path / "a", "after")
    assert (tmp_path / "a").read_text() == "before"
