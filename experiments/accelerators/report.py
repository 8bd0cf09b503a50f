"""Prints the rows of a folder as tables: python -m experiments.accelerators.report FOLDER."""

import json
import pathlib
import sys
from typing import Any

_ORDER = ("machine", "static", "removal", "removal_old_flags", "equality", "switch", "kernels")


def cell(value: Any) -> str:
    """A value as text: numbers to four digits."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None else str(value)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in columns, as wide as their widest cell."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([cell(row.get(name)) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
        for line in lines
    )


def report(folder: pathlib.Path) -> str:
    """All sections of a folder, and what failed in them."""
    parts = []
    for section in _ORDER:
        path = folder / f"{section}.jsonl"
        if not path.exists():
            continue
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{name: value for name, value in row.items() if name != "section"} for row in rows]
        told = [row for row in rows if "error" not in row and row.get("name") != "versions"]
        parts.append(f"== {section}")
        parts += [
            f"{name}: {value}"
            for row in rows
            if row.get("name") == "versions"
            for name, value in row.items()
        ]
        if told:
            parts.append(table(told))
        for row in rows:
            if "error" in row:
                what = " ".join(str(value) for name, value in row.items() if name != "error")
                parts.append(f"failed: {what}: {row['error']}")
    return "\n".join(parts)


def main() -> None:
    """Prints; ends in a sentence if there are no rows."""
    if len(sys.argv) != 2 or not (text := report(pathlib.Path(sys.argv[1]))):
        sys.exit(
            "error: name a folder that holds rows: python -m experiments.accelerators.report FOLDER"
        )
    print(text)


if __name__ == "__main__":
    main()
