"""Describes the keys of the configuration by the comments in config.py, and finds similar keys."""

import ast
import difflib
import io
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# Names of other programs -> our key. Initials, such as `lr`, need no entry.
_SYNONYMS = {
    "epochs": "train.steps",
    "num_layers": "model.depth",
    "dim": "model.width",
    "dataset": "data.name",
    "checkpoint": "eval.checkpoint",
    **dict.fromkeys(
        ("grad_accum", "grad_accum_steps", "accumulation_steps", "gradient_accumulation_steps"),
        "train.accumulate",
    ),
}
_CUTOFF = 0.7  # similarity of names, from 0 to 1


class Key(NamedTuple):
    """A key of the configuration.

    Attributes:
      name: full name, such as `train.steps`.
      default: value of `config.default()`; None for a section.
      comment: what the key means, one or more sentences.
      is_section: whether the key holds other keys.
    """

    name: str
    default: Any
    comment: str
    is_section: bool = False


def keys(source: str, defaults: Mapping[str, Any]) -> list[Key]:
    """Returns the keys and sections of a source file in its order.

    Args:
      source: Python code with dictionaries of defaults and comments beside or above the entries.
      defaults: default values by full name. Other entries of dictionaries are left out.
    """
    lines = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }

    def comment(node: ast.expr, last: int) -> str:
        above, line = [], node.lineno - 1
        while line in comments and lines[line - 1].lstrip().startswith("#"):
            above.insert(0, comments[line])
            line -= 1
        return " ".join([*above, *([comments[last]] if last in comments else [])])

    def walk(node: ast.Dict, prefix: str) -> Iterator[Key]:
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant):
                continue
            name = f"{prefix}{key.value}"
            if isinstance(value, ast.Dict):
                yield Key(name, None, comment(key, value.lineno), is_section=True)
                yield from walk(value, f"{name}.")
            else:
                yield Key(name, defaults.get(name), comment(key, value.end_lineno or 0))

    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    dicts = [
        statement.value
        for function in functions
        for statement in function.body
        if isinstance(statement, ast.Assign | ast.Return) and isinstance(statement.value, ast.Dict)
    ]
    sections = {name.partition(".")[0] for name in defaults if "." in name}
    found = [key for node in dicts for key in walk(node, "")]
    return [key for key in found if key.name in (sections if key.is_section else defaults)]


def text(described: Sequence[Key]) -> str:
    """Returns the keys for a terminal, each as an option with its default and its comment."""
    lines = []
    for key in described:
        if key.is_section:
            lines += ["", f"{key.name}: {key.comment}"]
        else:
            value = "".join(repr(key.default).split(" "))
            lines += [f"  --config.{key.name}={value}", f"      {key.comment}"]
    return "\n".join(lines) + "\n"


def markdown(described: Sequence[Key]) -> str:
    """Returns the keys for the documentation: a table for each section."""
    head = ["| key | default | meaning |", "|---|---|---|"]
    lines = ["## General", "", *head]
    for key in described:
        meaning = key.comment.replace("|", r"\|")
        if key.is_section:
            lines += ["", f"## {key.name}", "", f"{meaning[:1].upper()}{meaning[1:]}", "", *head]
        else:
            lines.append(f"| `{key.name}` | `{key.default!r}` | {meaning} |")
    return "\n".join(lines) + "\n"


def similar(unknown: str, names: Sequence[str]) -> list[str]:
    """Returns the full names of the keys that a user may have meant, the most likely ones first.

    Finds in all sections: the same name, also with `_` for `.`; a name with these initials; a
    synonym; or else names that start with the same words; or else similar names.

    Args:
      unknown: the name that does not exist, such as `lr` or `train.learning_rate`.
      names: full names of all keys.
    """
    last = unknown.rpartition(".")[2]
    exact = [
        name
        for name in names
        if last in (short := name.rpartition(".")[2], name.replace(".", "_"))
        or (len(last) > 1 and last == "".join(word[0] for word in short.split("_")))
    ]
    if exact or last in _SYNONYMS:
        return exact or [_SYNONYMS[last]]
    starts = [
        name
        for name in names
        if f"{name.rpartition('.')[2]}_".startswith(f"{last}_")
        or f"{last}_".startswith(f"{name.rpartition('.')[2]}_")
    ]
    if starts:
        return starts
    by_short: dict[str, list[str]] = {}
    for name in names:
        by_short.setdefault(name.rpartition(".")[2], []).append(name)
    near = difflib.get_close_matches(last, by_short, 3, _CUTOFF)
    near = near or difflib.get_close_matches(unknown, names, 3, _CUTOFF)
    return [name for short in near for name in by_short.get(short, [short])]
