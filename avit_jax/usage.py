"""Texts of the command line: help, recipes, and the sentence about an unknown key."""

import ast
import pathlib
import re

from avit_jax import config as config_lib
from avit_jax import config_help
from avit_jax.utils import errors

_HELP = """\
avit-jax: vision transformers that stop computing a token once its halting score is high enough.

usage: avit-jax --config=RECIPE [--mode=MODE] [options] [images]
       avit-jax --mode=MODE --checkpoint=RUN [options] [images]

`avit-jax`, `python -m avit_jax` and `python -m avit_jax.main` are the same program. A run writes
its configuration into its folder. So the other modes need only the name of the run.

--mode=train (default)   trains a recipe, or continues its last run
    avit-jax --config=digits --workdir=runs/digits
  --config=RECIPE          a recipe from the list below, or a Python file such as mine.py
  --config.KEY=VALUE       another value of a key, in every mode; --help_config lists all keys
  --workdir=FOLDER         folder of the run; default: runs/<name of the recipe>
  --allow_changed_config   accepts a checkpoint of another configuration, data set or teacher

--mode=eval   evaluates a run or a weight file; writes eval.json and eval.png
    avit-jax --mode=eval --checkpoint=runs/digits --config.eval.checkpoint=best
  --checkpoint=RUN         a run, a weight file, a name of the zoo, or hf-hub:owner/name

--mode=predict   predicts images, and folders of images
    avit-jax --mode=predict --checkpoint=runs/digits --pictures=drawn photo.png photos/
  --checkpoint=RUN         as above
  --jsonl=FILE             writes one JSON line per image
  --pictures=FOLDER        writes a figure of the token depths per image

--mode=export   writes a network to one file
    avit-jax --mode=export --checkpoint=runs/digits --out=digits.avit
  --checkpoint=RUN         as above
  --out=FILE               .avit: a program for avit_jax.serving; .onnx: a program for other
                           runtimes; .safetensors: weights
  --batch=N                images per call of the program; 0 (default): any number

--mode=calibrate   finds the gate bias for a MACs ratio, and writes weights with it
    avit-jax --mode=calibrate --checkpoint=runs/digits --budget=0.4 --out=cheaper.safetensors
  --checkpoint=RUN         as above
  --budget=RATIO           MACs relative to the static network, between 0 and 1
  --out=FILE               the .safetensors file to write

several processes (not needed on Cloud TPU)
    avit-jax --config=digits --coordinator=host0:1234 --num_processes=2 --process_id=0
  --coordinator=HOST:PORT  address of the first process
  --num_processes=N        number of processes
  --process_id=I           number of this process, from 0

information
  --help                   this text
  --help_config            every configuration key with its default and meaning
  --version                the version

recipes
"""


def recipe_folder() -> pathlib.Path:
    """Returns the folder of the recipes: in an installation, or beside the package in a clone."""
    package = pathlib.Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def recipes() -> dict[str, str]:
    """Returns the first line of each recipe's text, by name."""
    found = {}
    for path in sorted(recipe_folder().glob("[!_]*.py")):
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        found[path.stem] = text.partition("\n")[0]
    return found


def find_recipe(name: str) -> str:
    """Returns the file of a recipe that is named by its name, its file, or its path in a clone.

    Raises:
      errors.UserError: there is no such recipe; the message lists those that are there.
    """
    file, _, argument = name.partition(":")
    short = pathlib.Path(file).name.removesuffix(".py")
    is_short = file in (short, f"configs/{short}.py", f"configs/{short}")
    if not file or pathlib.Path(file).is_file():
        return name
    if pathlib.Path(file).is_dir() and short not in recipes():
        raise errors.UserError(f"{file} is a directory: name a recipe, such as --config=digits.")
    if is_short and short in recipes():
        found = str(recipe_folder() / f"{short}.py")
        return f"{found}:{argument}" if argument else found
    raise errors.UserError(
        f"there is no recipe {file}: name a Python file, or one of {', '.join(recipes())}."
    )


def help_text() -> str:
    """Returns the text of --help."""
    return _HELP + "".join(f"  {name:<24} {head}\n" for name, head in recipes().items())


def config_text() -> str:
    """Returns the text of --help_config."""
    head = "Keys of the configuration, with their defaults. A recipe sets some of them.\n\n"
    return head + config_help.text(config_lib.describe())


def explain_unknown_key(message: str, arguments: list[str]) -> str:
    """Adds to a message about an unknown key which keys the user may have meant.

    Args:
      message: from `errors.innermost_message`; other messages are returned as they are.
      arguments: of the command line, which give the whole name of the key.
    """
    pattern = r'Key "(\w+)" does not exist.*?(Did you mean.*)?$'
    locked = re.match(pattern, message, re.DOTALL)
    if locked:  # a recipe sets the key; the rest of the message is the whole configuration
        message = f"unknown configuration key '{locked[1]}'"
        message += f". {locked[2]}" if locked[2] else ""
    found = re.match(r"unknown configuration key '(\w+)'", message)
    if not found:
        return message
    given = [re.match(r"--?config\.([\w.]+)", argument) for argument in arguments]
    names = [match[1] for match in given if match and found[1] in match[1].split(".")]
    names = names or [found[1]]
    known = list(config_lib.flat(config_lib.default()))
    similar = config_help.similar(names[0], known)
    if not similar:
        return f"{message}: --help_config lists all keys."
    last = names[0].rpartition(".")[2]
    if "Did you mean" in message and (found[1] != last or last != similar[0].rpartition(".")[2]):
        return message
    keys = " or ".join(f"--config.{name}" for name in similar)
    return f"unknown configuration key '{names[0]}': did you mean {keys}?"
