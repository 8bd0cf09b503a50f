"""The end of the program: one sentence for a mistake, complete output, and Ctrl-C."""

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator

from avit_jax.utils import errors, signals

_NO_READER = 128 + signal.SIGPIPE  # exit status if nothing reads the output, as after `| head`


@contextlib.contextmanager
def interruptible(predictions: Iterator[object], *, keeps: bool) -> Iterator[Iterator[object]]:
    """Yields the predictions.

    After the first SIGINT, the next request for a prediction raises KeyboardInterrupt, so that the
    caller can write the earlier ones. A second SIGINT, or one before the first prediction, ends the
    program at once.

    Args:
      predictions: the predictions to yield.
      keeps: whether the caller writes them; if not, the first SIGINT ends the program at once.
    """
    count, asked = 0, False

    def act(number: int) -> None:
        nonlocal asked
        if number == signal.SIGINT:
            if asked or not count or not keeps:
                signals.interrupted()
            asked = True

    def shown() -> Iterator[object]:
        nonlocal count
        for prediction in predictions:
            count += 1
            yield prediction
            if asked:
                raise KeyboardInterrupt

    with signals.listen(act):
        yield shown()


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends the program with one sentence after an error that the user can correct.

    Handles UserError, OSError, ImportError, MemoryError, and KeyboardInterrupt (status 130).
    """
    import jax

    try:
        yield
    except (errors.UserError, OSError, ImportError, MemoryError) as error:
        if isinstance(error, BrokenPipeError) and _has_no_reader():
            os._exit(_NO_READER)
        # At exit each process would wait for the others, which may wait for this one.
        errors.stop(error, at_once=jax.distributed.is_initialized())
    except KeyboardInterrupt:
        errors.stop("interrupted.", at_once=jax.distributed.is_initialized(), status=130)


def _has_no_reader() -> bool:
    """Returns whether stdout is a pipe that nothing reads, as after `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextlib.contextmanager
def complete_output() -> Iterator[None]:
    """Writes all output before the program ends.

    If output cannot be written, ends the program with a nonzero exit status.
    """
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has all characters
    try:
        yield
    except BrokenPipeError:  # --help writes to a closed pipe
        os._exit(_NO_READER)
    finally:
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            os._exit(_NO_READER)
        except OSError as error:
            errors.stop(error, at_once=True)
