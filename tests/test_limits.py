"""The limits of CONTRIBUTING on files and functions, and on what tests may import."""

import ast
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_PACKAGE = _ROOT / "avit_jax"


@pytest.mark.parametrize("path", sorted(_PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_files_and_functions_are_short(path: pathlib.Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def _imported(path: pathlib.Path) -> set[str]:
    """Names of modules that a file imports, and of all `name` in `from module import name`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    "path", sorted(_ROOT.rglob("tests/**/test_*.py")), ids=lambda path: path.name
)
def test_no_experiment_that_a_test_imports_defines_flags(path: pathlib.Path) -> None:
    """All tests of a worker share one set of flags, and those of the program are in it."""
    for name in _imported(path):
        module = (_ROOT / name.replace(".", "/")).with_suffix(".py")
        if not name.startswith("experiments.") or not module.exists():
            continue
        top = ast.parse(module.read_text()).body
        assert not any(
            "DEFINE_" in ast.unparse(node) for node in top if isinstance(node, ast.Assign)
        ), name
