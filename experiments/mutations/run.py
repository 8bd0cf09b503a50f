"""Breaks single lines of the package, one at a time, and tells which breaks the tests see.

python -m experiments.mutations.run --count=60 --seed=0 --out=runs/mutations.json

Modules take turns. Each turn draws a line and a break of it. Run it in a clone, because it changes
files and restores them. First measure which tests run a line, and how long each test takes:

pip install pytest-cov
python -m pytest --cov=avit_jax --cov-context=test --junitxml=tests.xml

For each break, it runs the tests that run the line and passed before; if there are more than 25,
only the 25 fastest. So a missed break may be caught by a slower test. A line that only
subprocesses run counts as missed, with 0 tests. Breaks in the result file are not tried again.
"""

import argparse
import ast
import json
import pathlib
import random
import re
import sqlite3
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

_MOST_TESTS = 25
_SWAPPED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def breaks(tree: ast.Module) -> list[tuple[ast.AST, ast.AST]]:
    """Nodes inside functions, each with what can stand in its place."""
    found = []
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        for node in (inner for statement in function.body for inner in ast.walk(statement)):
            if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPPED:
                ops = [_SWAPPED[type(node.ops[0])](), *node.ops[1:]]
                found.append((node, ast.Compare(node.left, ops, node.comparators)))
            elif (
                isinstance(node, ast.BinOp)
                and type(node.op) in _SWAPPED
                and not isinstance(node.left, ast.Constant)
            ):
                found.append((node, ast.BinOp(node.left, _SWAPPED[type(node.op)](), node.right)))
            elif isinstance(node, ast.BoolOp):
                found.append((node, ast.BoolOp(_SWAPPED[type(node.op)](), node.values)))
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
                found.append((node, node.operand))
            elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
                found.append((node, ast.Constant(not node.value)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
                found.append((node, ast.Constant(node.value + 1)))
            elif (
                isinstance(node, ast.Return)
                and node.value is not None
                and not isinstance(node.value, ast.Constant)
            ):
                found.append((node, ast.Return(ast.Constant(None))))
    return [(old, new) for old, new in found if old.lineno == old.end_lineno]


def changed(source: str, old: ast.AST, new: ast.AST) -> str:
    """The source with one node replaced."""
    lines = source.splitlines(keepends=True)
    line = lines[old.lineno - 1].encode()
    text = ast.unparse(ast.fix_missing_locations(new))
    if not isinstance(new, ast.Return):
        text = f"({text})"
    lines[old.lineno - 1] = (
        line[: old.col_offset] + text.encode() + line[old.end_col_offset :]
    ).decode()
    return "".join(lines)


def draw(count: int, seed: int) -> list[tuple[pathlib.Path, int, str, str]]:
    """File, line, what the line was and the broken source of each break."""
    rng, drawn = random.Random(seed), []
    files = sorted(pathlib.Path("avit_jax").rglob("*.py"))
    choices = {file: breaks(ast.parse(file.read_text())) for file in files}
    files = [file for file in files if choices[file]]
    while len(drawn) < count:
        for file in rng.sample(files, len(files)):
            if len(drawn) < count and choices[file]:
                source = file.read_text()
                old, new = choices[file].pop(rng.randrange(len(choices[file])))
                drawn.append(
                    (
                        file,
                        old.lineno,
                        source.splitlines()[old.lineno - 1].strip(),
                        changed(source, old, new),
                    )
                )
    return drawn


def covering(database: pathlib.Path, file: pathlib.Path, line: int) -> list[str]:
    """The tests that run a line."""
    query = """select context.context, line_bits.numbits from line_bits
      join context on context.id = line_bits.context_id
      join file on file.id = line_bits.file_id where file.path like ?"""
    with sqlite3.connect(database) as connection:
        rows = connection.execute(query, (f"%/{file}",)).fetchall()
    hit = [
        context
        for context, bits in rows
        if len(bits) > line // 8 and bits[line // 8] >> line % 8 & 1
    ]
    return sorted({context.rpartition("|")[0] for context in hit if context})


def seconds(report: pathlib.Path) -> dict[str, float]:
    """Time of each test that passed, by its identifier, from a JUnit file of pytest."""
    return {
        f"{case.attrib['classname'].replace('.', '/')}.py::{case.attrib['name']}": float(
            case.attrib["time"]
        )
        for case in ET.parse(report).iter("testcase")
        if len(case) == 0
    }


def run_tests(tests: list[str]) -> tuple[bool, str]:
    """Whether one of these tests fails, and the first line that says so."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-o", "addopts=--strict-markers"]
    try:
        done = subprocess.run(command + tests, capture_output=True, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        return True, "more than 900 seconds"
    if done.returncode == 0:
        return False, ""
    if done.returncode in (4, 5):  # wrong arguments; no tests
        raise RuntimeError(done.stdout + done.stderr)
    found = re.search(r"^(FAILED|ERROR) .*", done.stdout, re.M)
    return True, found.group() if found else f"status {done.returncode}"


def main() -> None:
    """Tries the breaks and writes which ones the tests caught."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--coverage", type=pathlib.Path, default=".coverage")
    parser.add_argument("--report", type=pathlib.Path, default="tests.xml")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    options = parser.parse_args()
    rows = json.loads(options.out.read_text()) if options.out.exists() else {}
    took = seconds(options.report)
    for file, line, before, source in draw(options.count, options.seed):
        whole = file.read_text()
        after = source.splitlines()[line - 1].strip()
        name = f"{file}:{line}: {after}"
        if name in rows:
            continue
        tests = [test for test in covering(options.coverage, file, line) if test in took]
        tests.sort(key=lambda test: took[test])
        started = time.monotonic()
        try:
            file.write_text(source)
            caught, by = run_tests(tests[:_MOST_TESTS]) if tests else (False, "")
        finally:
            file.write_text(whole)
        rows[name] = {
            "was": before,
            "tests": len(tests),
            "caught": caught,
            "by": by,
            "seconds": round(time.monotonic() - started, 1),
        }
        options.out.write_text(json.dumps(rows, indent=2) + "\n")
        print(f"{len(rows)}/{options.count} {'caught' if caught else 'MISSED'} {name}", flush=True)


if __name__ == "__main__":
    main()
