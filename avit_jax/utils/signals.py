"""Signals that are heard at once: Python's handlers wait for the main thread, which may be
importing or compiling for minutes.

An exception such as KeyboardInterrupt is no way out either: inside a callback of a library it is
printed and lost.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import NoReturn

# file that a sentence goes to; 2 is something else while processes join, see distributed.py
stderr = 2
unfinished: set[str] = set()  # files that are being written, which an interruption removes


@contextlib.contextmanager
def heard(act: Callable[[int], None]) -> Iterator[None]:
    """Calls `act` with the number of each signal that Python handles, from another thread. Only in
    the main thread.
    """
    before, writer = _listen(act)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)  # ends the thread


def end_on_interrupt(status: int = 128 + signal.SIGINT) -> None:
    """Makes SIGINT (Ctrl-C) end the program at once, from now on."""
    signal.signal(signal.SIGINT, lambda *_: None)  # a handler in Python makes it heard
    _listen(lambda number: interrupted(status) if number == signal.SIGINT else None)


def interrupted(status: int = 128 + signal.SIGINT) -> NoReturn:
    """Ends the program at once, in one line if the status is not 0."""
    if status:
        with contextlib.suppress(OSError):
            os.write(stderr, b"error: interrupted.\n")
    exit_at_once(status)


def exit_at_once(status: int) -> NoReturn:
    """Ends the program; nothing is waited for, and files that are written in part go."""
    for path in list(unfinished):
        with contextlib.suppress(OSError):
            os.unlink(path)
    os._exit(status)


def _listen(act: Callable[[int], None]) -> tuple[int, int]:
    """Starts a thread that acts; returns the file that signals were written to before, and the one
    they are written to now.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def run() -> None:
        with contextlib.suppress(SystemExit):  # ends the thread alone
            while numbers := os.read(reader, 64):
                for number in numbers:
                    act(number)
        os.close(reader)

    threading.Thread(target=run, name="signals", daemon=True).start()
    return signal.set_wakeup_fd(writer, warn_on_full_buffer=False), writer
