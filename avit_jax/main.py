"""Command line: `python -m avit_jax.main --config=configs/digits.py --workdir=runs/digits`."""

import signal

from avit_jax.utils import signals

if __name__ == "__main__":  # before the other imports, which take seconds
    signals.end_on_interrupt()
elif __name__ == "__mp_main__":  # a process that reads data ends with the training process
    signal.signal(signal.SIGINT, signal.SIG_IGN)

import contextlib
import logging
import os
import pathlib
import re
import select
import sys
import threading
from collections.abc import Iterator

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from avit_jax.utils import errors, files

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "recipe, a Python file such as configs/digits.py", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; default: runs/<name of the recipe>"
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "predict", "export", "calibrate"],
    "train, evaluate a checkpoint of the workdir, predict the pictures named, write a network as "
    "one file, or shift its gate",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "--mode=predict, export and calibrate: a workdir or a weight file; default: the workdir",
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "--mode=export, calibrate: file to write; .safetensors: weights in timm's names, of export "
    "else a program, see serving.py",
)
_BUDGET = flags.DEFINE_float(
    "budget",
    None,
    "--mode=calibrate: share of the static network's MACs to shift the gate to",
    lower_bound=0,
    upper_bound=1,
)
_BATCH = flags.DEFINE_integer(
    "batch", 0, "--mode=export: images at once; 0: any number", lower_bound=0, upper_bound=2**24
)
_JSONL = flags.DEFINE_string(
    "jsonl", None, "--mode=predict: writes the predictions there, a JSON line for each picture"
)
_PICTURES = flags.DEFINE_string(
    "pictures", None, "--mode=predict: folder for pictures of the depth of the tokens"
)
_ALLOW = flags.DEFINE_bool(
    "allow_changed_config", False, "goes on from a checkpoint of another configuration too"
)
_ONLY = {  # flags that the other modes do not read
    "checkpoint": ("predict", "export", "calibrate"),
    "out": ("export", "calibrate"),
    "budget": ("calibrate",),
    "batch": ("export",),
    "jsonl": ("predict",),
    "pictures": ("predict",),
    "allow_changed_config": ("train",),
}
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of the first of several processes; not needed on Cloud TPU"
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "number of processes", upper_bound=2**31 - 1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "which process this is, from 0", upper_bound=2**31 - 1
)


_UNREAD = 128 + signal.SIGPIPE  # status of a program that nobody reads the output of
_PATHS = ("workdir", "checkpoint", "out", "jsonl", "pictures")
_CONFIG_PATHS = (("", "init"), ("data", "dir"), ("distill", "teacher"))  # section, key


def _parse(argv: list[str]) -> list[str]:
    """Parses flags; every mistake, of the recipe too, ends in one sentence."""
    try:
        recipe = re.compile(r"(--?config=)(~.*)")
        argv = [
            match[1] + os.path.expanduser(match[2]) if (match := recipe.fullmatch(arg)) else arg
            for arg in argv
        ]
        rest = flags.FLAGS(argv)[1:]
        if rest and _MODE.value != "predict":
            errors.stop(
                f"unexpected argument {rest[0]!r}: all options start with --, and only "
                "--mode=predict takes pictures."
            )
        for name, modes in _ONLY.items():
            if flags.FLAGS[name].present and _MODE.value not in modes:
                instead = "; training lands on --config.budget" if name == "budget" else ""
                errors.stop(
                    f"--{name} is for --mode={' or '.join(modes)}, and --mode={_MODE.value} does "
                    f"not read it{instead}."
                )
        if _CONFIG.value is None:
            errors.stop("name a recipe, for example --config=configs/digits.py.")
        # ml_collections tells that there is no such file only when one looks into the recipe.
        _CONFIG.value.train.steps  # noqa: B018
        rest = _resolve_paths(rest)
    except BrokenPipeError:  # of --help
        raise
    except Exception as error:
        errors.stop(errors.innermost_message(error))
    return [argv[0], *rest]


def _resolve_paths(pictures: list[str]) -> list[str]:
    """Expands `~` in every path of the flags, of the recipe and of the pictures; refuses what is
    none.
    """
    for name in _PATHS:
        flag = flags.FLAGS[name]
        if flag.value is not None:
            flag.value = files.resolve(flag.value, f"--{name}")
    try:
        (_WORKDIR.value or "").encode()
    except UnicodeEncodeError as error:
        raise errors.UserError(
            f"--workdir must be valid UTF-8, as checkpoints need it; got {_WORKDIR.value!r}."
        ) from error
    for section, key in _CONFIG_PATHS:
        values = _CONFIG.value[section] if section else _CONFIG.value
        if values[key]:
            values[key] = files.resolve(
                values[key], f"--config.{section}{'.' if section else ''}{key}"
            )
    return [files.resolve(path, "a picture") for path in pictures]


def _run(argv: list[str], workdir: str) -> None:
    """What the mode asks for."""
    from avit_jax.inference import export
    from avit_jax.tools import calibrate, predict
    from avit_jax.training import distributed, loop

    if _MODE.value == "train":
        loop.train(_CONFIG.value, workdir, allow_changed_config=_ALLOW.value)
    elif _MODE.value == "eval":
        loop.restore_and_evaluate(_CONFIG.value, workdir)
    elif _MODE.value == "export":
        if not _OUT.value:
            errors.stop(
                "name the file to write, for example --out=network.avit or "
                "--out=weights.safetensors."
            )
        export.from_checkpoint(
            _OUT.value, _CONFIG.value, _CHECKPOINT.value or workdir, batch=_BATCH.value
        )
    elif _MODE.value == "calibrate":
        if not (_OUT.value or "").lower().endswith(".safetensors") or not _BUDGET.value:
            errors.stop(
                "name the weight file to write and the budget, for example "
                "--out=weights.safetensors --budget=0.6."
            )
        loop.check(_CONFIG.value, "eval")
        calibrate.from_checkpoint(
            _OUT.value, _CONFIG.value, _CHECKPOINT.value or workdir, _BUDGET.value
        )
    else:
        predictions = predict.predict(_CONFIG.value, _CHECKPOINT.value or workdir, argv[1:])
        if distributed.is_first():
            with _interruptible(predictions) as shown:
                predict.report(
                    shown,
                    num_layers=_CONFIG.value.model.depth,
                    jsonl=_JSONL.value,
                    folder=_PICTURES.value,
                )
        else:
            next(predictions, None)  # takes part in restoring the network


@contextlib.contextmanager
def _interruptible(predictions: Iterator[object]) -> Iterator[Iterator[object]]:
    """The predictions up to SIGINT, so that those made are written; it ends the program at once if
    there are none, or twice.
    """
    count, asked = 0, False

    def act(number: int) -> None:
        nonlocal asked
        if number == signal.SIGINT:
            if asked or not count or not _JSONL.value:
                signals.interrupted()
            asked = True

    def shown() -> Iterator[object]:
        nonlocal count
        for one in predictions:
            count += 1
            yield one
            if asked:
                raise KeyboardInterrupt

    with signals.listen(act):
        yield shown()


def _main(argv: list[str]) -> None:
    import jax

    from avit_jax.inference import adaptive
    from avit_jax.training import distributed, progress

    absl_logging.set_verbosity(
        absl_logging.FATAL
    )  # what Orbax has to tell of errors comes as exceptions too
    name = pathlib.Path(flags.FLAGS["config"].config_filename).stem
    workdir = _WORKDIR.value or f"runs/{name}"
    try:
        several = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        distributed.initialize(*several, stops=_MODE.value == "train")
        if _MODE.value in ("train", "eval") and not jax.config.jax_compilation_cache_dir:
            jax.config.update("jax_compilation_cache_dir", f"{workdir}/compiled")
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        if _MODE.value in (
            "eval",
            "calibrate",
        ):  # training is not faster for it, and would hold its state once a device
            distributed.divide_cpu(adaptive.usable_cores(), _CONFIG.value.eval.batch_size)
        distributed.check_devices()
        with distributed.ended_together():
            logger = progress.to_console(
                logging.INFO if distributed.is_first() else logging.WARNING
            )
            # What writes in the background fails with tracebacks of its own; errors that matter are
            # raised where it is awaited.
            threading.excepthook = lambda args: logger.warning(
                "in the background: %s", errors.first_line(args.exc_value)
            )
            sys.unraisablehook = lambda args: None
            _run(argv, workdir)
    # Where there are several processes, each waits in the end for the others, which may be waiting
    # for this one: at once.
    except (
        errors.UserError,
        OSError,
        ImportError,
        MemoryError,
    ) as error:  # output that cannot be written, gs:// without gcsfs
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            os._exit(_UNREAD)
        errors.stop(error, at_once=jax.distributed.is_initialized())
    except KeyboardInterrupt:
        errors.stop("interrupted.", at_once=jax.distributed.is_initialized(), status=130)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe without a reader, as after `| head`."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _end_output() -> None:
    """Writes what is left for stdout, at the end of the program."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        os._exit(_UNREAD)
    except OSError as error:
        errors.stop(error, at_once=True)


def _start() -> None:
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # not every encoding has every character
    try:
        app.run(_main, flags_parser=_parse)
    except SystemExit as ended:
        if not ended.code:
            signals.end_on_interrupt(status=0)  # all is done but for the end of the process
        raise
    except BrokenPipeError:  # of --help
        os._exit(_UNREAD)
    finally:
        _end_output()


if __name__ == "__main__":
    _start()
