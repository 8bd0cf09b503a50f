"""Builds the site from the repository: MkDocs calls the functions `on_*`.

The README is the first page. Links in Markdown are those of the repository, so that they also work
without the site. Here they become links of the site, and each linked file becomes a part of it.
"""

import ast
import io
import pathlib
import posixpath
import re
import tokenize
from collections.abc import Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = pathlib.Path(__file__).parents[1]
_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/README.md")
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)")
_FUNCTIONS = ("default", "_input", "_network", "_training")  # of config.py
_CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)


def _site_path(path: str) -> str:
    """The path in the site of a file of the repository."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def _repository_path(file: File) -> str:
    return pathlib.Path(file.abs_src_path).relative_to(_ROOT).as_posix()


def _target(source: str, link: str) -> str:
    """The path in the repository of a link in the file `source`."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages outside of docs/, and the files that pages link to."""
    waiting = [*_PAGES, *map(_repository_path, files.documentation_pages())]
    known = {file.src_uri for file in files}
    while waiting:
        source = waiting.pop()
        path, on_disk = _site_path(source), _ROOT / source
        if path not in known and on_disk.is_file():
            files.append(File.generated(config, path, abs_src_path=str(on_disk)))
            known.add(path)
        if source.endswith(".md") and on_disk.is_file():
            links = _LINK.findall(_CODE.sub("", on_disk.read_text()))
            found = {_target(source, link) for _, link in links}
            waiting += [path for path in found if _site_path(path) not in known]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links of the repository into links of the site; writes the table of keys."""
    source = _repository_path(page.file)
    folder = posixpath.dirname(page.file.src_uri)

    def move(match: re.Match[str]) -> str:
        target = _site_path(_target(source, match[2]))
        return match[1] + posixpath.relpath(target, folder or ".")

    parts = _CODE.split(markdown)
    parts[::2] = [_LINK.sub(move, part) for part in parts[::2]]
    return "".join(parts).replace("<!-- keys -->", keys_table())


def keys_table() -> str:
    """All configuration keys with their defaults and comments, in a table for each section."""
    sections: dict[str, list[str]] = {"": []}
    for name, value, comment in configuration_keys():
        section, _, key = name.rpartition(".")
        if value is None:
            sections[name] = [f"\n## {name}\n\n{comment}\n" if comment else f"\n## {name}\n"]
            sections[name] += ["| key | default | meaning |", "|---|---|---|"]
        else:
            sections[section].append(f"| `{key}` | `{value}` | {comment} |")
    top = ["| key | default | meaning |", "|---|---|---|", *sections.pop("")]
    return "\n".join(top + [line for lines in sections.values() for line in lines])


def configuration_keys() -> Iterator[tuple[str, str | None, str]]:
    """Full name, default and comment of each key in config.py; a section has no default."""
    source = (_ROOT / "avit_jax/config.py").read_text()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t for t in tokens if t.type == tokenize.COMMENT}
    alone = {number for number, t in comments.items() if not t.line[: t.start[1]].strip()}

    def comment(first: int, last: int) -> str:
        numbers = [last] if last in comments else []
        while first - 1 in alone:
            first -= 1
            numbers.insert(0, first)
        return " ".join(comments[number].string.lstrip("# ") for number in numbers)

    def visit(
        node: ast.Dict, prefix: str = "", one_line: bool = False
    ) -> Iterator[tuple[str, str | None, str]]:
        visited.add(node)
        for key, value in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant):
                continue  # **section
            if isinstance(value, ast.Dict):
                yield key.value, None, comment(key.lineno, key.lineno)
                yield from visit(value, f"{key.value}.", value.end_lineno == key.lineno)
            else:
                text = "" if one_line else comment(key.lineno, value.end_lineno)
                yield prefix + key.value, ast.unparse(value).replace("'", '"'), text

    visited: set[ast.Dict] = set()
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and function.name in _FUNCTIONS:
            for node in ast.walk(function):
                if isinstance(node, ast.Dict) and node not in visited:
                    yield from visit(node)
