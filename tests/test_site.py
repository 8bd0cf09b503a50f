"""The site: links of the repository become links of the site, and all keys are in its table."""

import importlib
import pathlib
import sys
import types

import pytest

from avit_jax import config as config_lib

pytest.importorskip("mkdocs", reason="needs the extra docs")
_REPOSITORY = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(_REPOSITORY / "docs"))
hooks = importlib.import_module("hooks")


def _page(path: str, site_path: str) -> types.SimpleNamespace:
    file = types.SimpleNamespace(abs_src_path=str(_REPOSITORY / path), src_uri=site_path)
    return types.SimpleNamespace(file=file)


@pytest.mark.parametrize(
    ("path", "site_path", "link", "expected"),
    [
        ("README.md", "index.md", "docs/data.md#imagenet-1k", "data.md#imagenet-1k"),
        ("README.md", "index.md", "experiments/a.png", "experiments/a.png"),
        ("docs/guide.md", "guide.md", "../README.md#results", "index.md#results"),
        ("docs/guide.md", "guide.md", "../experiments/README.md", "experiments/README.md"),
        ("docs/guide.md", "guide.md", "data.md", "data.md"),
        ("experiments/README.md", "experiments/README.md", "../docs/study.md", "../study.md"),
        ("experiments/README.md", "experiments/README.md", "aot/table.md", "aot/table.md"),
    ],
)
def test_links_of_the_site(path: str, site_path: str, link: str, expected: str) -> None:
    text = f"a [b]({link}) and `[c]({link})`"
    moved = hooks.on_page_markdown(text, _page(path, site_path), None, None)
    assert moved == f"a [b]({expected}) and `[c]({link})`"


def test_other_links_stay() -> None:
    text = "[a](https://b.c/d) [e](#f)"
    assert hooks.on_page_markdown(text, _page("README.md", "index.md"), None, None) == text


def test_the_table_has_every_key() -> None:
    table = hooks.on_page_markdown(
        "<!-- keys -->", _page("docs/config.md", "config.md"), None, None
    )
    section, found = "", set()
    for line in table.splitlines():
        if line.startswith("## "):
            section = f"{line[3:]}." if line != "## General" else ""
        elif line.startswith("| `"):
            name = line.split("`")[1]
            found.add(name if name.startswith(section) else section + name)
    assert found == config_lib.flat(config_lib.default()).keys()
