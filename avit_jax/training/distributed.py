"""Several processes: how they find each other, agree on what to do, and end where one of them has
ended.
"""

import contextlib
import ctypes
import errno
import importlib.util
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import IO, Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from avit_jax.utils import errors, signals

HEARTBEAT_SECONDS = 30  # a process that has not been heard of for so long is taken for dead
START_SECONDS = 300  # so long the processes wait for each other at the start
_DEVICES_FLAG = "xla_force_host_platform_device_count"
_REASONS = {  # by the status that JAX aborts with
    "ALREADY_EXISTS": "another process has the same --process_id",
    "INVALID_ARGUMENT": "--num_processes is not the same on all",
}
_ENDED = (
    "another process of the run has ended or cannot be reached: see what it said, and start "
    "all of them again."
)


_captured: list[IO[bytes]] = []  # while the processes join: what is written to stderr meanwhile


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    """JAX aborts a process when another one is gone, from a thread of its own: no exception tells;
    Python's handlers wait.
    """
    if _captured:
        _cannot_join()
    os.write(2, f"error: {_ENDED}\n".encode())
    os._exit(2)


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, *, stops: bool
) -> None:
    """Makes this process one of several, before JAX is used; without arguments only on Cloud TPU,
    which tells them.

    Args:
      coordinator: `host:port` of the first process.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      stops: whether `Stop` is going to look for SIGTERM, which ends the process otherwise.

    Raises:
      errors.UserError: only some of the three are given, they make no sense, or the others do not
        answer.
    """
    arguments = (coordinator, num_processes, process_id)
    if arguments == (None, None, None):
        # `import jax` sets the variable where it finds no TPU.
        if "TPU_SKIP_MDS_QUERY" in os.environ or importlib.util.find_spec("libtpu") is None:
            return
    elif None in arguments:
        raise errors.UserError(
            "give all of --coordinator, --num_processes and --process_id, or none of them."
        )
    elif not _is_address(coordinator) or not 0 <= process_id < num_processes:
        raise errors.UserError(
            "--coordinator is host:port of the first process, and --process_id lies below "
            "--num_processes."
        )
    deadline = time.monotonic() + START_SECONDS
    if coordinator is not None and process_id == 0:
        _check_port(coordinator)
    elif coordinator is not None:
        _wait_for_first(coordinator, deadline)
    ctypes.CDLL(None).signal(signal.SIGABRT, _on_abort)
    jax.config.update("jax_enable_preemption_service", stops)
    try:
        with _joining(deadline):
            jax.distributed.initialize(  # a timeout of its own would abort the process
                *arguments,
                initialization_timeout=4 * START_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except Exception as error:
        raise errors.UserError(_not_joined(errors.first_line(error))) from error


def _not_joined(reason: str) -> str:
    return (
        f"this process cannot join the others ({reason}): all of them have to be started within "
        f"{START_SECONDS} seconds, each "
        "with a --process_id of its own, and to reach the first one at its --coordinator."
    )


def _check_port(coordinator: str) -> None:
    """Raises errors.UserError if the first process cannot listen on its port; gRPC would share it
    with another program.
    """
    port = int(coordinator.rpartition(":")[2])
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6
        ).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            reason = "another program uses it, or another process has --process_id=0 too"
        else:
            reason = os.strerror(error.errno)
        raise errors.UserError(
            f"port {port} of --coordinator cannot be opened ({reason}): choose another port."
        ) from error


def _wait_for_first(coordinator: str, deadline: float) -> None:
    """Returns once something listens at the address; raises errors.UserError at the deadline."""
    host, _, port = coordinator.rpartition(":")
    while True:
        left = deadline - time.monotonic()
        try:
            return socket.create_connection(
                (host.strip("[]"), int(port)), timeout=max(min(left, 5), 0.1)
            ).close()
        except (OSError, UnicodeError) as error:  # the second: no name of a host
            if left <= 1:
                raise errors.UserError(
                    _not_joined(f"{coordinator}: {errors.first_line(error)}")
                ) from error
        time.sleep(0.5)


@contextlib.contextmanager
def _joining(deadline: float) -> Iterator[None]:
    """Ends the program in a sentence at the deadline; keeps back what C++ writes to stderr
    meanwhile, such as a stack trace.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        signals.stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        _captured.append(file)
        timer = threading.Timer(max(deadline - time.monotonic(), 1), _cannot_join)
        timer.daemon = True
        timer.start()
        try:
            yield
            os.write(signals.stderr, os.pread(file.fileno(), 10**6, 0))
        finally:
            timer.cancel()
            _captured.clear()
            os.dup2(signals.stderr, 2)
            os.close(signals.stderr)
            signals.stderr = 2


def _cannot_join() -> NoReturn:
    """Ends the program while JAX joins the processes, or has aborted that."""
    said = os.pread(_captured[0].fileno(), 10**6, 0).decode(errors="replace")
    status = re.search(r"absl::Status: (\w+)", said)
    reason = _REASONS.get(status[1] if status else "", "they do not answer")
    os.write(signals.stderr, f"error: {_not_joined(reason)}\n".encode())
    os._exit(2)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16


def divide_cpu(cores: int, batch_size: int) -> None:
    """Makes each core of a CPU a device of its own, before JAX is used; fewer if they could not
    share out a batch evenly.

    If the user has chosen their number, by `XLA_FLAGS` or `jax_num_cpu_devices`, it stays, and so
    it does if there are several processes.

    Args:
      cores: that this process may use.
      batch_size: images over all devices.
    """
    chosen = jax.config.jax_num_cpu_devices > 0 or _DEVICES_FLAG in os.environ.get("XLA_FLAGS", "")
    if not chosen and not jax.distributed.is_initialized():
        jax.config.update(
            "jax_num_cpu_devices", max(n for n in range(1, cores + 1) if batch_size % n == 0)
        )


def check_devices() -> None:
    """Starts the devices; raises errors.UserError if JAX cannot use them."""
    try:
        jax.devices()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # the second: of JAX_PLATFORMS=cuda without the plugin
        reason = errors.first_line(error).rstrip(".")
        raise errors.UserError(
            f"JAX cannot use the devices ({reason}): set JAX_PLATFORMS to what JAX is installed "
            "for."
        ) from error


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
    """Raises errors.UserError where what is named has another fingerprint than on the first
    process.
    """
    if from_first_json(fingerprint) != fingerprint:
        raise errors.UserError(
            f"{name} is not the same here as on the first process: bring the same to all hosts."
        )


class Stop:
    """Tells when to stop, once a signal has asked for it; a second signal ends the process at once.
    A context manager.

    SIGTERM is caught, and SIGINT from the first call on: before, there is nothing to save. Of
    several processes, one has to get
    the signal: JAX makes all of them see it at the same call.
    """

    def __init__(self) -> None:
        self.name = ""  # of the signal
        self._calls = 0
        self._several = jax.process_count() > 1
        self._in_handler: list[int] = []  # signals so far
        self._in_thread: list[int] = []
        self._unsaid = ["stopping after the current step; a second signal stops at once"]
        self._elsewhere = False  # another process got the first signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        # SIGTERM is JAX's own to listen to where it has to tell the other processes.
        if not self._several:
            self._catch(signal.SIGTERM)
        # Python's handler waits for the main thread, which may be compiling; this thread does not.
        self._thread = signals.listen(lambda number: self._act(number, self._in_thread))
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._calls:
            self._thread.__exit__(*exception)

    def __call__(self) -> bool:
        """Whether to stop now; all processes have to call this equally often."""
        if not self._calls:
            self._in_thread.extend(self._in_handler)
            self._thread.__enter__()
            self._catch(signal.SIGINT)
        self._calls += 1
        if not self._several:
            return bool(self.name)
        if multihost_utils.reached_preemption_sync_point(self._calls):
            self._elsewhere = not self.name
            self.name = self.name or "SIGTERM"
            self._catch(signal.SIGTERM)
            return True
        return False

    def _catch(self, number: int) -> None:
        before = signal.signal(number, lambda number, _: self._act(number, self._in_handler))
        self._before.setdefault(number, before)

    def _act(self, number: int, heard: list[int]) -> None:
        heard.append(number)
        if self._elsewhere or len(heard) > 1:
            signals.exit_at_once(128 + number)
        self.name = self.name or signal.Signals(number).name
        with contextlib.suppress(
            IndexError, OSError
        ):  # the handler or the thread has said it, or nobody reads it
            text = self._unsaid.pop()
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)
            # Not by `logging`, which may be at work right where the signal came.
            os.write(2, f"{self.name}: {text}\n".encode())


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Ends the process in a sentence where an operation over all processes failed, which is how one
    sees that another ended.

    Or where the memory of the devices is too small.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and "Gloo" not in str(
            error
        ):  # as it fails on CPU where a process has ended
            raise
        if "RESOURCE_EXHAUSTED" in str(error):
            raise errors.UserError(
                f"the devices' memory is too small for the run ({errors.first_line(error)}): "
                "lower config.train.batch_size and "
                "config.eval.batch_size, or set --config.model.remat=True."
            ) from error
        if jax.process_count() == 1:
            raise
        raise errors.UserError(_ENDED) from error
