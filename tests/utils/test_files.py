"""A write completes, or leaves the previous file."""

import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
from etils import epath

from avit_jax.utils import files


def test_text_and_bytes(tmp_path: pathlib.Path) -> None:
    files.write(tmp_path / "a", "größer")
    files.write(str(tmp_path / "b"), b"bytes")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "größer" and (
        tmp_path / "b"
    ).read_bytes() == b"bytes"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_missing_folders_are_created(tmp_path: pathlib.Path) -> None:
    files.write(tmp_path / "new/folder/a", "text")
    assert (tmp_path / "new/folder/a").read_text() == "text"


def test_links_and_devices_stay_what_they_are(tmp_path: pathlib.Path) -> None:
    (tmp_path / "link").symlink_to("folder/file")
    files.write(tmp_path / "link", "through it")  # into a folder that was missing
    assert (tmp_path / "link").is_symlink() and (
        tmp_path / "folder/file"
    ).read_text() == "through it"
    command = (
        "from avit_jax.utils import files; print('table', flush=True); files.write('/dev/stdout', "
        "'lines')"
    )
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", command], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "table\nlines" and pathlib.Path(
        "/dev/stdout"
    ).is_symlink()


def test_a_pipe_is_written_into_and_not_replaced(tmp_path: pathlib.Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    files.write(tmp_path / "pipe", "line")
    assert os.read(reader, 100) == b"line" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="there is no /dev/shm")
def test_a_file_in_a_folder_under_dev_is_replaced() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        for _ in range(2):
            files.write(f"{folder}/a", "whole")
        assert pathlib.Path(folder, "a").read_text() == "whole"


def test_what_was_there_outlives_a_full_disk(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files.write(tmp_path / "a", "before")

    def full(path: epath.Path, content: bytes) -> None:
        with pathlib.Path(path).open("wb") as file:
            file.write(content[:3])
        raise OSError("no space left on device")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        files.write(tmp_path / "a", "after")
    assert (tmp_path / "a").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
