"""Flags of the command line, their checks, the modes they choose, and the program's output."""

import logging
import os
import pathlib
import re
import sys
import threading

from absl import flags
from absl import logging as absl_logging
from ml_collections import config_flags

import avit_jax
from avit_jax import output, run_config, usage
from avit_jax.utils import errors, files
from avit_jax.weights import locate, tensor_files

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "recipe: its name, such as digits, or a Python file", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder of the run; default: runs/<name of the recipe>"
)
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "predict", "export", "calibrate"],
    "train; evaluate a checkpoint of the workdir; predict the images that follow; export a network "
    "to one file; or calibrate the gate bias for a MACs ratio",
)
_CHECKPOINT = flags.DEFINE_string(
    "checkpoint",
    None,
    "all modes but train: a workdir, a weight file, a name of the zoo or hf-hub:owner/name; "
    "default: the workdir",
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "--mode=export, calibrate: file to write; .safetensors: weights with timm's names; export "
    "only: .avit, a program for avit_jax.serving; .onnx, a program for other runtimes",
)
_BUDGET = flags.DEFINE_float(
    "budget",
    None,
    "--mode=calibrate: MACs ratio to reach, relative to the static network",
    lower_bound=0,
    upper_bound=1,
)
_BATCH = flags.DEFINE_integer(
    "batch", 0, "--mode=export: images per call; 0: any number", lower_bound=0, upper_bound=2**24
)
_JSONL = flags.DEFINE_string(
    "jsonl", None, "--mode=predict: file to write, with one JSON line per image"
)
_PICTURES = flags.DEFINE_string(
    "pictures", None, "--mode=predict: folder to write figures of the token depths to"
)
_ALLOW = flags.DEFINE_bool(
    "allow_changed_config",
    False,
    "--mode=train: accept a checkpoint of another configuration, data set or teacher",
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of the first of several processes; not needed on Cloud TPU"
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "number of processes", upper_bound=2**31 - 1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "number of this process, from 0", upper_bound=2**31 - 1
)

_ONLY = {  # modes that read a flag; flags that are not here belong to all modes
    "checkpoint": ("eval", "predict", "export", "calibrate"),
    "out": ("export", "calibrate"),
    "budget": ("calibrate",),
    "batch": ("export",),
    "jsonl": ("predict",),
    "pictures": ("predict",),
    "allow_changed_config": ("train",),
}
_NAMES = re.compile(r"--?(config|workdir|checkpoint)(?:=(.*))?", re.DOTALL)
_PATHS = ("workdir", "checkpoint", "out", "jsonl", "pictures")
_CONFIG_PATHS = (("", "init"), ("data", "dir"), ("distill", "teacher"))  # section, key


def parse(argv: list[str]) -> list[str]:
    """Parses the flags and returns the program's name and the images to predict.

    Any mistake, also one in the recipe, ends the program with one sentence. `--help`,
    `--help_config` and `--version` print a text and end the program with status 0.
    """
    try:
        _print_information(argv[1:])
        argv = _with_recipe(argv)
        images = flags.FLAGS(argv)[1:]
        _check_flags(images)
        # ml_collections reports a missing recipe only if a value is read.
        CONFIG.value.train.steps  # noqa: B018
        images = _resolve_paths(images)
    except BrokenPipeError:  # --help writes to a closed pipe
        raise
    except Exception as error:
        errors.stop(usage.explain_unknown_key(errors.innermost_message(error), argv[1:]))
    return [argv[0], *images]


def _print_information(arguments: list[str]) -> None:
    """Prints what --help, --help_config or --version asks for, and ends the program."""
    texts = {
        "help": usage.help_text,
        "h": usage.help_text,
        "help_config": usage.config_text,
        "version": lambda: f"avit_jax {avit_jax.__version__}\n",
    }
    for argument in arguments:
        if argument.startswith("-") and argument.lstrip("-") in texts:
            print(texts[argument.lstrip("-")](), end="")
            sys.exit(0)


def _with_recipe(argv: list[str]) -> list[str]:
    """Returns the arguments with the file of the recipe, or of the configuration of a run."""
    result: list[str] = []
    given: dict[str, str] = {}
    rest = iter(argv)
    for argument in rest:
        if argument == "--":
            result += [argument, *rest]
            break
        match = _NAMES.fullmatch(argument)
        value = match and (match[2] if match[2] is not None else next(rest, None))
        if match and value is not None:
            name, value = match[1], os.path.expanduser(value)
            if name == "config":
                value = usage.find_recipe(value)
            elif name == "checkpoint":
                value = str(locate.locate(value))
            given[name] = value
            argument = f"--{name}={value}"
        result.append(argument)
    run = given.get("checkpoint") or given.get("workdir")
    if "config" in given:
        return result
    if run and run_config.read(run):
        return [result[0], f"--config={run_config.__file__}:{run}", *result[1:]]
    key = next((argument for argument in result if re.match(r"--?config\.", argument)), None)
    if key:
        raise errors.UserError(f"{key} needs a recipe: name one, for example --config=digits.")
    return result


def _check_flags(images: list[str]) -> None:
    """Raises errors.UserError if flags or arguments do not fit the mode."""
    if images and _MODE.value != "predict":
        raise errors.UserError(
            f"unexpected argument {images[0]!r}: all options start with --, and only "
            "--mode=predict takes images."
        )
    for name, modes in _ONLY.items():
        if flags.FLAGS[name].present and _MODE.value not in modes:
            instead = "; for training set --config.budget" if name == "budget" else ""
            raise errors.UserError(
                f"--{name} is for --mode={' or '.join(modes)}, and --mode={_MODE.value} does not "
                f"read it{instead}."
            )
    if CONFIG.value is None:
        run, reason = _CHECKPOINT.value or _WORKDIR.value, ""
        if run:
            exists = "://" in run or run.startswith(tensor_files.HUB) or os.path.exists(run)
            reason = f"{run} holds no configuration: " if exists else f"there is no {run}: "
        raise errors.UserError(f"{reason}name a recipe, for example --config=digits.")


def _resolve_paths(images: list[str]) -> list[str]:
    """Expands `~` in all paths; raises errors.UserError if one is not usable."""
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
        values = CONFIG.value[section] if section else CONFIG.value
        if values[key]:
            name = f"{section}.{key}" if section else key
            values[key] = files.resolve(values[key], f"--config.{name}")
    return [files.resolve(path, "an image") for path in images]


def workdir() -> str:
    """Returns the folder of the run."""
    checkpoint = _CHECKPOINT.value
    if _WORKDIR.value or (checkpoint and not tensor_files.is_weights(checkpoint)):
        return _WORKDIR.value or checkpoint
    recipe = pathlib.Path(flags.FLAGS["config"].config_filename.partition(":")[0])
    if checkpoint and recipe.samefile(run_config.__file__):
        return f"runs/eval-{pathlib.Path(checkpoint).stem}"
    return f"runs/{recipe.stem}"


def start_devices() -> None:
    """Joins the other processes, if any, and starts the devices; sets JAX up for the mode."""
    import jax

    from avit_jax.inference import adaptive
    from avit_jax.training import distributed

    absl_logging.set_verbosity(absl_logging.FATAL)  # Orbax also raises what it logs
    distributed.initialize(
        _COORDINATOR.value,
        _NUM_PROCESSES.value,
        _PROCESS_ID.value,
        stops=_MODE.value == "train",
    )
    if _MODE.value in ("train", "eval") and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", f"{workdir()}/compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    # Do not divide the CPU in training: no speed-up, and one copy of the state per core.
    if _MODE.value in ("eval", "calibrate"):
        distributed.divide_cpu(adaptive.usable_cores(), CONFIG.value.eval.batch_size)
    distributed.check_devices()


def start_log() -> None:
    """Shows this package's log, and one line for errors of background threads."""
    from avit_jax.training import distributed, progress

    logger = progress.to_console(logging.INFO if distributed.is_first() else logging.WARNING)
    # Background writers print tracebacks; errors that matter are raised when one waits for them.
    threading.excepthook = lambda args: logger.warning(
        "a background thread failed: %s", errors.first_line(args.exc_value)
    )
    sys.unraisablehook = lambda args: None


def run_mode(images: list[str]) -> None:
    """Does what the mode asks for; raises errors.UserError if a flag that it needs is missing."""
    from avit_jax.inference import export
    from avit_jax.tools import calibrate
    from avit_jax.training import build, evaluate, loop

    config, checkpoint, out = CONFIG.value, _CHECKPOINT.value or workdir(), _OUT.value or ""
    if _MODE.value == "train":
        loop.train(config, workdir(), allow_changed_config=_ALLOW.value)
    elif _MODE.value == "eval":
        if _CHECKPOINT.value and tensor_files.is_weights(checkpoint):
            config.init, config.eval.checkpoint = checkpoint, "init"
        elif checkpoint != workdir():
            raise errors.UserError("name the run by --checkpoint or by --workdir, not by both.")
        evaluate.evaluate_checkpoint(config, workdir())
    elif _MODE.value == "export":
        if not out:
            raise errors.UserError(
                "name the file to write, for example --out=network.avit, --out=network.onnx or "
                "--out=weights.safetensors."
            )
        export.from_checkpoint(out, config, checkpoint, batch=_BATCH.value)
    elif _MODE.value == "calibrate":
        if not out.lower().endswith(".safetensors") or not _BUDGET.value:
            raise errors.UserError(
                "name the weight file to write and the budget, for example "
                "--out=weights.safetensors --budget=0.6."
            )
        build.check(config, "eval")
        calibrate.from_checkpoint(out, config, checkpoint, _BUDGET.value)
    else:
        _predict(images, checkpoint)


def _predict(images: list[str], checkpoint: str) -> None:
    from avit_jax.tools import predict
    from avit_jax.training import distributed

    predictions = predict.predict(CONFIG.value, checkpoint, images)
    if not distributed.is_first():
        next(predictions, None)  # takes part in restoring the network
        return
    with output.interruptible(predictions, keeps=bool(_JSONL.value)) as shown:
        predict.report(
            shown,
            num_layers=CONFIG.value.model.depth,
            jsonl=_JSONL.value,
            folder=_PICTURES.value,
        )
