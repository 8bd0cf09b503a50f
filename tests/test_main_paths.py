"""Paths and numbers on the command line: the home directory, addresses, and what is too large."""

import math
import pathlib
import sys
from collections.abc import Iterator

import pytest
from absl import flags
from command_line import DIGITS as _DIGITS
from command_line import REPOSITORY as _REPOSITORY
from command_line import as_the_program_starts  # noqa: F401
from command_line import one_line as _one_line
from command_line import parse as _parse

from avit_jax import cli
from avit_jax import config as config_lib
from avit_jax.training import build
from avit_jax.utils import errors

# How ml_collections loads a recipe.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"
)

_PATH_FLAGS = [
    ("--workdir", "train"),
    ("--checkpoint", "predict"),
    ("--out", "export"),
    ("--jsonl", "predict"),
    ("--pictures", "predict"),
    ("--config.init", "train"),
    ("--config.data.dir", "train"),
    ("--config.distill.teacher", "train"),
]


@pytest.mark.parametrize(("flag", "mode"), _PATH_FLAGS)
def test_the_home_directory_in_every_path(
    flag: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config = _parse(_DIGITS, f"--mode={mode}", f"{flag}=~/a~b")
    name = flag.removeprefix("--")
    values = (
        config_lib.flat(config) if name.startswith("config.") else flags.FLAGS.flag_values_dict()
    )
    assert values[name.removeprefix("config.")] == "/home/me/a~b"


@pytest.mark.parametrize(("flag", "mode"), _PATH_FLAGS)
def test_the_home_directory_of_nobody(flag: str, mode: str) -> None:
    with _one_line(f"{flag} names the home of an unknown user; got ~nobody_of_this_name/x."):
        _parse(_DIGITS, f"--mode={mode}", f"{flag}=~nobody_of_this_name/x")


@pytest.mark.parametrize(
    "address", ["http://", "https://", "ftp://", "s3://", "file:///", "hdfs://", "GS://"]
)
@pytest.mark.parametrize(("flag", "mode"), _PATH_FLAGS)
def test_addresses_that_are_no_paths(flag: str, mode: str, address: str) -> None:
    with _one_line(f"{flag} must be a local path or gs://..."):
        _parse(_DIGITS, f"--mode={mode}", f"{flag}={address}host/x.safetensors")


def test_paths_that_stay_as_they_are() -> None:
    _parse(_DIGITS, "--workdir=gs://bucket/run")
    assert flags.FLAGS.workdir == "gs://bucket/run"
    assert _parse(_DIGITS, "--config.init=hf-hub:owner/name").init == "hf-hub:owner/name"
    _parse(_DIGITS, "--workdir=a:b//c/./d~")
    assert flags.FLAGS.workdir == "a:b//c/./d~"


@pytest.mark.parametrize(
    ("flag", "mode"), [pair for pair in _PATH_FLAGS if not pair[0].startswith("--config.")]
)
@pytest.mark.parametrize("empty", ["", " "])
def test_empty_paths(flag: str, mode: str, empty: str) -> None:
    with _one_line(f"{flag} is not a path; got '{empty}'"):
        _parse(_DIGITS, f"--mode={mode}", f"{flag}={empty}")


def test_a_workdir_whose_name_is_no_text() -> None:
    with _one_line("--workdir must be valid UTF-8"):
        _parse(_DIGITS, "--workdir=/tmp/\udcff")


def test_paths_of_pictures_and_of_the_recipe(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["main"])
    (tmp_path / "recipe.py").write_text((_REPOSITORY / "configs/digits.py").read_text())
    pictures = cli.parse(["main", "--config=~/recipe.py", "--mode=predict", "a.png", "~/b.png"])[1:]
    assert pictures == ["a.png", f"{tmp_path}/b.png"]
    for picture, told in (
        ("", "an image is not a path"),
        ("https://x/y.png", "an image must be a local path"),
    ):
        with _one_line(told):
            cli.parse(["main", _DIGITS, "--mode=predict", "a.png", picture])


def _huge_values() -> Iterator[tuple[str, object]]:
    for key, value in config_lib.flat(config_lib.default()).items():
        value = (0, 0) if value == () else value  # of init_grid
        one = value[0] if isinstance(value, tuple) else value
        if isinstance(one, int | float) and not isinstance(one, bool):
            integers = (
                (10**20, -(10**20), 10**400, 2**63)
                if isinstance(one, int) or value is not one
                else ()
            )
            numbers = (
                (math.inf, -math.inf, math.nan, 1e300, -1e300) if isinstance(one, float) else ()
            )
            for number in (*integers, *numbers):
                yield key, (number,) * len(value) if isinstance(value, tuple) else number


def test_no_number_is_too_large_to_be_refused() -> None:
    tried = set()
    for key, value in _huge_values():
        config = config_lib.default()
        config.update_from_flattened_dict({key: value})
        tried.add(key)
        with pytest.raises(errors.UserError) as error:
            config_lib.check(config)
            build.model(config)
            build.optimizer(config)
        assert key.rpartition(".")[2] in str(error.value), (key, value)
    assert len(tried) > 50
