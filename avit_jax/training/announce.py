"""The log of a run besides its metrics: its start, its compilations and its log file."""

import collections
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from absl import logging as absl_logging
from etils import epath

from avit_jax.models import flops
from avit_jax.training import damage
from avit_jax.utils import errors

if TYPE_CHECKING:
    from avit_jax.training import parts as parts_lib

LOG_FILE = "log.txt"
_logger = logging.getLogger(__name__)


def start(parts: "parts_lib.Parts", workdir: epath.Path) -> None:
    """Logs network, data, devices and workdir of a run."""
    model, evaluation = parts.model, parts.evaluator.source
    state = jax.eval_shape(parts.create)
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(state.params))
    _logger.info(
        "network: %s parameters, %.4g million MACs per image without halting, %d layers, %d tokens",
        *(f"{count:,}", flops.static_macs(model) / 1e6, model.depth, model.num_tokens),
    )
    _logger.info(
        "data: %s training and %s evaluation images of %d classes",
        *(f"{len(parts.source.records):,}", f"{len(evaluation.records):,}"),
        len(parts.source.label_names),
    )
    kinds = collections.Counter(device.device_kind for device in jax.devices())
    devices = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
    _logger.info("devices: %s, in %d process(es)", devices, jax.process_count())
    _logger.info("workdir: %s", workdir)


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """Logs that the code inside compiles, and the time that it took."""
    _logger.info("compiling %s", what)
    started = time.monotonic()
    yield
    _logger.info("compiled %s in %.1f s", what, time.monotonic() - started)


def first_call(function: Callable[..., Any], what: str) -> Callable[..., Any]:
    """Returns a function whose first call logs that it compiles; see `compiling`."""
    is_compiled = False

    def run(*args: Any) -> Any:
        nonlocal is_compiled
        if is_compiled:
            return function(*args)
        is_compiled = True
        with compiling(what):
            return function(*args)

    return run


class _LogFile(logging.Handler):
    """Appends each message to a file, which may be in a bucket."""

    def __init__(self, path: epath.Path) -> None:
        super().__init__()
        self._path = path
        # Files of a bucket can only be replaced.
        is_bucket = damage.is_bucket(path.parent)
        self._content = path.read_text() if is_bucket and path.exists() else ""
        self._is_bucket = is_bucket

    def emit(self, record: logging.LogRecord) -> None:
        line = self.format(record) + "\n"
        with contextlib.suppress(OSError):  # if the disk is full, the next checkpoint reports it
            if self._is_bucket:
                self._content += line
                self._path.write_text(self._content)
            else:
                with self._path.open("a") as file:
                    file.write(line)


@contextlib.contextmanager
def log_file(workdir: epath.Path) -> Iterator[None]:
    """Appends this package's log to `log.txt` in the workdir, even if the console shows none."""
    logger = logging.getLogger("avit_jax")
    handler = _LogFile(workdir / LOG_FILE)
    handler.setFormatter(errors.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    level = logger.level
    logger.addHandler(handler)
    if level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hides the log that Orbax writes through absl. Orbax raises the same errors anyway."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.FATAL)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)
