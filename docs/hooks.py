"""Builds the site from the repository: MkDocs calls the functions `on_*`.

The README is the first page. Links in Markdown are those of the repository, so that they also work
without the site. Here they become links of the site, and each linked file becomes a part of it.
"""

import pathlib
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from avit_jax import config as config_lib
from avit_jax import config_help

_ROOT = pathlib.Path(__file__).parents[1]
_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/README.md")
_LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)")
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
    return "".join(parts).replace("<!-- keys -->", config_help.markdown(config_lib.describe()))
