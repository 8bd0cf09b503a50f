"""Signals that take effect at once, while the main thread imports or compiles for minutes.

Python runs signal handlers in the main thread, between two bytecodes. An exception such as
KeyboardInterrupt does not help: inside a callback of a library it is printed and lost. So a thread
of this module acts on signals.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

# File descriptor for error messages; `distributed` redirects 2 while processes connect.
stderr = 2
partial_files: set[str] = set()  # files that are being written; `exit_at_once` removes them


@contextlib.contextmanager
def listen(act: Callable[[int], None]) -> Iterator[None]:
    """Calls `act` in another thread with the number of each signal that Python handles.

    Works in the main thread only.
    """
    previous, writer = _start_thread(act)
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)  # ends the thread


def end_on_interrupt(status: int = 128 + signal.SIGINT) -> None:
    """Makes SIGINT (Ctrl-C) end the program at once, from now on."""
    signal.signal(signal.SIGINT, lambda *_: None)  # signals without a handler wake no thread
    _start_thread(lambda number: interrupted(status) if number == signal.SIGINT else None)


def interrupted(status: int = 128 + signal.SIGINT) -> NoReturn:
    """Ends the program at once; writes one line if the status is not 0."""
    if status:
        with contextlib.suppress(OSError):
            os.write(stderr, b"error: interrupted.\n")
    exit_at_once(status)


def exit_at_once(status: int) -> NoReturn:
    """Ends the program without waiting for anything; removes partially written files."""
    for path in list(partial_files):
        with contextlib.suppress(OSError):
            os.unlink(path)
    os._exit(status)


def _start_thread(act: Callable[[int], None]) -> tuple[int, int]:
    """Starts a thread that acts on signals.

    Returns:
      The previous wakeup file descriptor, and the new one.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def run() -> None:
        with contextlib.suppress(SystemExit):  # ends this thread only
            while numbers := os.read(reader, 64):
                for number in numbers:
                    act(number)
        os.close(reader)

    threading.Thread(target=run, name="signals", daemon=True).start()
    return signal.set_wakeup_fd(writer, warn_on_full_buffer=False), writer
