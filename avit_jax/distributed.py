"""Several processes: how they find each other, agree on what to do, and end where one of them has ended."""

import contextlib
import ctypes
import importlib.util
import json
import os
import signal
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from avit_jax import errors

HEARTBEAT_SECONDS = 30  # a process that has not been heard of for so long is taken for dead
START_SECONDS = 300  # so long the processes wait for each other at the start
_ENDED = "another process of the run has ended or cannot be reached: see what it said, and start all of them again."


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    """JAX aborts a process when another one is gone, from a thread of its own: no exception tells; Python's handlers wait."""
    os.write(2, f"error: {_ENDED}\n".encode())
    os._exit(2)


def initialize(coordinator: str | None, num_processes: int | None, process_id: int | None, *, stops: bool) -> None:
    """Makes this process one of several, before JAX is used; without arguments only on Cloud TPU, which tells them.

    Args:
      coordinator: `host:port` of the first process.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      stops: whether `Stop` is going to look for SIGTERM, which ends the process otherwise.

    Raises:
      errors.UserError: only some of the three are given, they make no sense, or the others do not answer.
    """
    arguments = (coordinator, num_processes, process_id)
    if arguments == (None, None, None):
        # `import jax` sets the variable where it finds no TPU.
        if "TPU_SKIP_MDS_QUERY" in os.environ or importlib.util.find_spec("libtpu") is None:
            return
    elif None in arguments:
        raise errors.UserError("give all of --coordinator, --num_processes and --process_id, or none of them.")
    elif not _is_address(coordinator) or not 0 <= process_id < num_processes:
        raise errors.UserError("--coordinator is host:port of the first process, and --process_id lies below --num_processes.")
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
    jax.config.update("jax_enable_preemption_service", stops)
    try:
        jax.distributed.initialize(
            *arguments, initialization_timeout=START_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except Exception as error:
        raise errors.UserError(
            f"this process cannot join the others ({errors.first_line(error)}): all of them have to be started within "
            f"{START_SECONDS} seconds, and to reach the first one at its --coordinator."
        ) from error


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def from_first(tree: Any) -> Any:
    """The first process's tree of arrays, on all; the others pass one of the same shapes."""
    return multihost_utils.broadcast_one_to_all(tree)


def from_first_json(value: Any) -> Any:
    """The first process's value, on all; something that JSON can hold."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(from_first(np.int32(text.size)))
    return json.loads(from_first(np.resize(text, size)).tobytes())


def check_same(fingerprint: str, name: object) -> None:
    """Raises errors.UserError where what is named has another fingerprint than on the first process."""
    if from_first_json(fingerprint) != fingerprint:
        raise errors.UserError(f"{name} is not the same here as on the first process: bring the same to all hosts.")


class Stop:
    """Tells when to stop, once a signal has asked for it; a second signal ends the process at once. A context manager.

    SIGTERM and SIGINT are caught. Where there are several processes, it is enough that one of them gets the signal: JAX makes
    all of them see it at the same call.
    """

    def __init__(self) -> None:
        self.name = ""  # of the signal
        self._calls = 0
        self._several = jax.process_count() > 1

    def __enter__(self) -> "Stop":
        # SIGTERM is JAX's own to listen to where it has to tell the other processes.
        numbers = [signal.SIGINT] if self._several else [signal.SIGINT, signal.SIGTERM]
        self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether to stop now; all processes have to call this equally often."""
        if not self._several:
            return bool(self.name)
        self._calls += 1
        if multihost_utils.reached_preemption_sync_point(self._calls):
            self.name = self.name or "SIGTERM"
            signal.signal(signal.SIGTERM, self._handle)
            return True
        return False

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.name:
            os._exit(128 + number)
        self.name = signal.Signals(number).name
        # Not by `logging`, which may be at work right where the signal came.
        os.write(2, f"{self.name}: stopping after the step in hand; once more stops at once\n".encode())
        if self._several:
            os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Ends the process in a sentence where an operation over all processes failed, which is how one sees that another ended.

    Or where the memory of the devices is too small.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and "Gloo" not in str(error):  # as it fails on CPU where a process has ended
            raise
        if "RESOURCE_EXHAUSTED" in str(error):
            raise errors.UserError(
                f"the devices' memory is too small for the run ({errors.first_line(error)}): lower config.train.batch_size and "
                "config.eval.batch_size, or set --config.model.remat=True."
            ) from error
        if jax.process_count() == 1:
            raise
        raise errors.UserError(_ENDED) from error
