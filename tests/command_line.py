"""The command line in a test: as the program starts, and as it ends."""

import contextlib
import io
import logging
import pathlib
import re
import sys
import threading
from collections.abc import Iterator

import pytest
from absl import flags
from ml_collections import ConfigDict

from avit_jax import cli

REPOSITORY = pathlib.Path(__file__).parents[1]
DIGITS = "--config=configs/digits.py"


@pytest.fixture(autouse=True)
def as_the_program_starts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs a test in the repository's folder; afterwards flags and logger are as before."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.syspath_prepend(REPOSITORY)  # as `python -m` does
    monkeypatch.delitem(
        sys.modules, "config_config", raising=False
    )  # the recipe of the test before
    logger = logging.getLogger("avit_jax")
    for name in ("handlers", "level", "propagate"):
        monkeypatch.setattr(
            logger, name, getattr(logger, name) if name != "handlers" else [*logger.handlers]
        )
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    names = set(flags.FLAGS)
    yield
    for name in set(flags.FLAGS) - names:  # an override is a flag of its own
        delattr(flags.FLAGS, name)
    for name in (
        "config",
        "workdir",
        "mode",
        "process_id",
        "num_processes",
        "coordinator",
        "out",
        "checkpoint",
        "jsonl",
        "pictures",
    ):
        flags.FLAGS[name].value = flags.FLAGS[name].default
    flags.FLAGS.unparse_flags()


def parse(*arguments: str) -> ConfigDict:
    """Parses a command line as the program does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main", *arguments])  # where ml_collections looks for overrides
        cli.parse(sys.argv)
    return cli.CONFIG.value


@contextlib.contextmanager
def one_line(expected: str) -> Iterator[None]:
    """Expects the program to end with status 2, in one line that contains `expected`.

    Lines of the log, which start with the time, may come before it.
    """
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as exit_:
        yield
    assert exit_.value.code == 2
    message = re.sub(r"(?m)^\d\d:\d\d:\d\d .*\n", "", stderr.getvalue())
    assert message.startswith("error: ")
    assert expected in message
    assert message.index("\n") == len(message) - 1
    assert "Traceback" not in message
