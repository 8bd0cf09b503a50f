"""Several processes: how they meet, agree on values, stop, and end if one of them ends."""

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

HEARTBEAT_SECONDS = 30  # a process without a heartbeat for so long counts as dead
START_SECONDS = 300  # how long the processes wait for each other at the start
_DEVICES_FLAG = "xla_force_host_platform_device_count"
_REASONS = {  # by the status of JAX when it aborts
    "ALREADY_EXISTS": "another process has the same --process_id",
    "INVALID_ARGUMENT": "--num_processes is not the same on all",
}
_ENDED = "another process of the run has ended or cannot be reached"
_RESTART = "read the last messages of all processes, and start all of them again."
_captured: list[IO[bytes]] = []  # stderr while the processes join


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
    """Ends the program with one sentence when JAX aborts it because another process is gone.

    JAX does so from its own thread, without an exception and without Python's signal handlers.
    """
    if _captured:
        _cannot_join()
    os.write(2, f"error: {_ENDED}: {_RESTART}\n".encode())
    os._exit(2)


def initialize(
    coordinator: str | None, num_processes: int | None, process_id: int | None, *, stops: bool
) -> None:
    """Connects this process to the others of a run. Call it before any other use of JAX.

    If the first three arguments are None, there is one process. On Cloud TPU, JAX finds the others.

    Args:
      coordinator: `host:port` of the first process.
      num_processes: number of processes.
      process_id: number of this process, from 0.
      stops: whether `Stop` handles SIGTERM; otherwise SIGTERM ends the process.

    Raises:
      errors.UserError: some arguments are missing or wrong, or the others do not answer.
    """
    arguments = (coordinator, num_processes, process_id)
    if arguments == (None, None, None):
        # `import jax` sets TPU_SKIP_MDS_QUERY if it finds no TPU.
        if "TPU_SKIP_MDS_QUERY" in os.environ or importlib.util.find_spec("libtpu") is None:
            return
    elif None in arguments:
        raise errors.UserError(
            "give all of --coordinator, --num_processes and --process_id, or none of them."
        )
    elif not _is_address(coordinator) or not 0 <= process_id < num_processes:
        raise errors.UserError(
            "--coordinator must be host:port of the first process, and --process_id below "
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
            jax.distributed.initialize(  # a shorter timeout would abort the process
                *arguments,
                initialization_timeout=4 * START_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            )
    except Exception as error:
        raise errors.UserError(_not_joined(errors.first_line(error))) from error


def _not_joined(reason: str) -> str:
    return (
        f"this process cannot join the others ({reason}): start all of them within "
        f"{START_SECONDS} seconds, each with its own --process_id, on hosts that can reach the "
        "--coordinator."
    )


def _check_port(coordinator: str) -> None:
    """Raises errors.UserError if the first process cannot open its port.

    gRPC would share the port with another program without an error.
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
    """Waits until something listens at the address; raises errors.UserError at the deadline."""
    host, _, port = coordinator.rpartition(":")
    while True:
        left = deadline - time.monotonic()
        try:
            return socket.create_connection(
                (host.strip("[]"), int(port)), timeout=max(min(left, 5), 0.1)
            ).close()
        except (OSError, UnicodeError) as error:  # UnicodeError: not a host name
            if left <= 1:
                raise errors.UserError(
                    _not_joined(f"{coordinator}: {errors.first_line(error)}")
                ) from error
        time.sleep(0.5)


@contextlib.contextmanager
def _joining(deadline: float) -> Iterator[None]:
    """Ends the program with one sentence at the deadline.

    Until the processes have joined, it holds back stderr, which may contain traces of C++.
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
    """Ends the program with one sentence if the processes cannot join."""
    said = os.pread(_captured[0].fileno(), 10**6, 0).decode(errors="replace")
    status = re.search(r"absl::Status: (\w+)", said)
    reason = _REASONS.get(status[1] if status else "", "they do not answer")
    os.write(signals.stderr, f"error: {_not_joined(reason)}\n".encode())
    os._exit(2)


def _is_address(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host) and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16


def divide_cpu(cores: int, batch_size: int) -> None:
    """Makes each CPU core a device. Uses fewer if the number of cores does not divide `batch_size`.

    Call it before JAX starts its devices. It changes nothing if there are several processes, or if
    `XLA_FLAGS` or `jax_num_cpu_devices` set the number of devices.

    Args:
      cores: number of cores that this process may use.
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
    except (RuntimeError, AssertionError) as error:  # AssertionError: the CUDA plugin is missing
        reason = errors.first_line(error).rstrip(".")
        raise errors.UserError(
            f"JAX cannot use the devices ({reason}): set JAX_PLATFORMS to a platform that JAX is "
            "installed for."
        ) from error


def is_first() -> bool:
    """Returns whether this is the first process, the only one that writes."""
    return jax.process_index() == 0


def from_first(tree: Any) -> Any:
    """Returns the first process's tree of arrays; the others pass a tree of the same shapes."""
    return multihost_utils.broadcast_one_to_all(tree)


def from_first_json(value: Any) -> Any:
    """Returns the first process's value, which JSON must be able to hold."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(from_first(np.int32(text.size)))
    return json.loads(from_first(np.resize(text, size)).tobytes())


def check_same(fingerprint: str, name: object) -> None:
    """Raises errors.UserError if a fingerprint differs from that on the first process.

    Args:
      fingerprint: digest of a file or a data set.
      name: name of the file or data set, for the message.
    """
    if from_first_json(fingerprint) != fingerprint:
        raise errors.UserError(
            f"{name} differs from that of the first process: copy the same content to all hosts."
        )


class Stop:
    """Decides whether a signal stops the run. A second signal ends the process at once.

    A context manager. It catches SIGTERM from the start, and SIGINT after the first call of the
    object. If one process gets a signal, the calls return True on all processes, from the same call
    on.

    Attributes:
      name: the name of the signal; empty before a signal.
    """

    def __init__(self) -> None:
        self.name = ""
        self._calls = 0
        self._several = jax.process_count() > 1
        self._in_handler: list[int] = []  # signals that Python's handler received
        self._in_thread: list[int] = []  # signals that the thread received
        self._messages = ["stopping after the current step; a second signal stops at once"]
        self._stopped = False
        self._elsewhere = False  # another process got the first signal
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        # With several processes, JAX itself handles SIGTERM and informs the others.
        if not self._several:
            self._catch(signal.SIGTERM)
        # Python's handler waits for the main thread, which may be compiling. This thread does not.
        self._thread = signals.listen(lambda number: self._act(number, self._in_thread))
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._calls:
            self._thread.__exit__(*exception)

    def __call__(self) -> bool:
        """Returns whether to stop now; all processes must make the same number of calls."""
        if not self._calls:
            self._in_thread.extend(self._in_handler)
            self._thread.__enter__()
            self._catch(signal.SIGINT)
        self._calls += 1
        if not self._several:
            self._stopped = bool(self.name)
        elif not self._stopped and multihost_utils.reached_preemption_sync_point(self._calls):
            self._stopped, self._elsewhere = True, not self.name
            self.name = self.name or "SIGTERM"
            self._catch(signal.SIGTERM)
        return self._stopped

    def _catch(self, number: int) -> None:
        before = signal.signal(number, lambda number, _: self._act(number, self._in_handler))
        self._before.setdefault(number, before)

    def _act(self, number: int, received: list[int]) -> None:
        received.append(number)
        if self._elsewhere or len(received) > 1:
            signals.exit_at_once(128 + number)
        self.name = self.name or signal.Signals(number).name
        # IndexError: the handler or the thread has written it already; OSError: stderr is closed.
        with contextlib.suppress(IndexError, OSError):
            text = self._messages.pop()
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)
            # Not with `logging`, whose lock the interrupted code may hold.
            os.write(2, f"{self.name}: {text}\n".encode())


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Turns an error of JAX in its body into one sentence.

    Raises:
      errors.UserError: the devices run out of memory, or an operation fails on several processes.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and "Gloo" not in str(error):  # Gloo: on CPU
            raise
        if "RESOURCE_EXHAUSTED" in str(error):
            raise errors.UserError(
                f"the devices' memory is too small for the run ({errors.first_line(error)}): "
                "lower config.train.batch_size and config.eval.batch_size, or set "
                "--config.model.remat=True."
            ) from error
        if jax.process_count() == 1:
            raise
        raise errors.UserError(
            f"{_ENDED}, or an operation failed ({errors.first_line(error)}): {_RESTART}"
        ) from error
