"""Links, anchors, keys, recipes and modules that the documentation names exist."""

import configparser
import json
import pathlib
import re

import pytest
import yaml

from avit_jax import config as config_lib
from avit_jax import zoo

_REPOSITORY = pathlib.Path(__file__).parents[1]
_FOLDERS = (".", "docs", "experiments", "experiments/*", "experiments/*/*", "notebooks")
_PAGES = sorted(
    page
    for folder in _FOLDERS
    for kind in ("*.md", "*.ipynb")
    for page in _REPOSITORY.glob(f"{folder}/{kind}")
)
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def _text(page: pathlib.Path) -> str:
    if page.suffix == ".md":
        return page.read_text()
    cells = json.loads(page.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells)


def _anchors(page: pathlib.Path) -> set[str]:
    """Returns the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", page.read_text()), re.M)
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading) for heading in headings]
    found: set[str] = set()
    for heading in plain:
        slug = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        assert slug not in found, f"two headings {heading!r} in {page.name}: links need one"
        found.add(slug)
    return found


def _broken(page: pathlib.Path, text: str) -> list[str]:
    """Returns the links of a page that lead nowhere in this repository."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", _CODE.sub("", text)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        inside = target.is_file() and _REPOSITORY in target.parents
        if not inside or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: str(page.relative_to(_REPOSITORY)))
def test_every_link_and_anchor_exists(page: pathlib.Path) -> None:
    assert _broken(page, _text(page)) == []


def test_a_broken_link_or_anchor_is_found() -> None:
    page = _REPOSITORY / "docs/guide.md"
    text = (
        "[a](data.md) [b](data.md#imagenet-1k) [c](gone.md) [d](data.md#gone) [e](#gone) `[f](g)`"
    )
    assert _broken(page, text) == ["gone.md", "data.md#gone", "#gone"]


def test_every_page_is_linked_from_the_readme_and_on_the_site() -> None:
    readme, site = (_REPOSITORY / "README.md").read_text(), (_REPOSITORY / "mkdocs.yml").read_text()
    for page in (_REPOSITORY / "docs").glob("*.md"):
        assert f": {page.name}\n" in site
        if page.name != "figures.md":
            assert f"(docs/{page.name})" in readme


def test_every_key_recipe_and_module_exists() -> None:
    keys = config_lib.flat(config_lib.default())
    sections = {name.split(".")[0] for name in keys}
    for page in _PAGES:
        text = _text(page)
        for name in re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)?)", text):
            assert name in keys or name in sections, f"{page.name}: {name}"
        for name in re.findall(r"--config=(?:configs/)?([a-z0-9_]+)\b", text):
            assert (_REPOSITORY / f"configs/{name}.py").exists(), f"{page.name}: {name}"
        for name in re.findall(r"python -m ((?:experiments|avit_jax)[a-z0-9_.]*[a-z0-9_])", text):
            path = _REPOSITORY / name.replace(".", "/")
            assert path.with_suffix(".py").exists() or path.is_dir(), f"{page.name}: {name}"


def _tree() -> set[str]:
    """Returns the paths in CONTRIBUTING's picture of the tree; folders end with "/"."""
    (tree,) = re.findall(r"(?ms)^```\n(avit_jax/.*?)^```", _text(_REPOSITORY / "CONTRIBUTING.md"))
    paths: set[str] = set()
    parents = [""]
    for indent, name in re.findall(r"^((?:  ){0,2})(\S+) ?", tree, re.MULTILINE):
        parents = [*parents[: len(indent) // 2 + 1], name]
        paths.add("".join(parents))
    return paths


def test_the_tree_in_contributing_is_that_of_the_repository() -> None:
    named = _tree()
    assert [path for path in named if not (_REPOSITORY / path).exists()] == []
    public = {
        f"avit_jax/{name}.py" for name in ("halting", "halting_linen", "halting_nnx", "serving")
    }
    for path in (_REPOSITORY / "avit_jax").rglob("*.py"):
        name = str(path.relative_to(_REPOSITORY))
        is_left_out = path.name == "__init__.py" or path.parent.name == "zoo" or name in public
        assert is_left_out or name in named, name
    helpers = {f"tests/{path.name}" for path in (_REPOSITORY / "tests").glob("[!t]*.py")}
    assert helpers <= named


def test_every_file_and_name_in_contributing_exists() -> None:
    """A word in backticks is a path, a module, a name in a module or a class, or a key."""
    folders = ("avit_jax", "configs", "docs", "experiments", "notebooks", "tests", ".ci", ".github")
    files = [path for folder in folders for path in (_REPOSITORY / folder).rglob("*")]
    files += _REPOSITORY.glob("*")
    text = {path: path.read_text() for path in files if path.suffix in (".py", ".cfg", ".toml")}
    text[_REPOSITORY / ".ci/run"] = (_REPOSITORY / ".ci/run").read_text()
    names = {path: {path.stem, *re.findall(r"\w+", words)} for path, words in text.items()}
    known = set().union(*names.values(), (path.name for path in files))
    keys = config_lib.flat(config_lib.default())
    prose = re.sub(r"(?ms)^```.*?^```", "", _text(_REPOSITORY / "CONTRIBUTING.md"))
    for name in re.findall(r"`([A-Za-z_][\w./]*)`", prose):
        outer, _, inner = name.rpartition(".")
        if re.search(r"/|\.(py|md|json|yml|cfg|tsv|cff|toml)$", name):
            assert any(str(path).endswith(f"/{name.rstrip('/')}") for path in files), name
        elif outer and name not in keys and outer in known:
            where = [path for path in text if outer in (path.stem, path.parent.name)]
            where += [path for path in text if f"\nclass {outer}(" in text[path]]
            where += [path for path in text if f"\nclass {outer}:" in text[path]]
            assert any(inner in names[path] for path in where), name
        else:
            assert name in known or name in keys, name


def test_the_free_keys_and_the_zoo_are_complete() -> None:
    runs, weights = (_text(_REPOSITORY / f"docs/{name}.md") for name in ("runs", "weights"))
    (free,) = re.findall(r"^You may change these keys.*?\n\n", runs, re.DOTALL | re.MULTILINE)
    assert set(re.findall(r"`([\w.]+)`", free)) == config_lib._FREE
    table = weights.partition("## The zoo\n")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == zoo.NETWORKS.keys()


def test_no_sentence_is_too_long() -> None:
    """The limit is 36 words; most sentences have fewer than 25."""
    for page in _PAGES:
        if page.parent.name in ("aot", "pareto", "wide"):
            continue  # tables that programs write
        prose = re.sub(r"(?ms)^```.*?^```|^ *\|.*?$|^<!--.*?-->", "", _text(page))
        prose = re.sub(r"\]\([^)]*\)", "]", prose)
        for sentence in re.split(r"[.:;!?]\**\s|\n\n|\n[-#\d]", prose):
            assert len(sentence.split()) <= 36, f"{page.name}: {sentence}"


def test_the_metadata_can_be_read() -> None:
    read = lambda path: yaml.safe_load((_REPOSITORY / path).read_text())  # noqa: E731
    (job,) = read(".github/workflows/ci.yml")["jobs"].values()
    assert {"run": ".ci/run"} in job["steps"]
    for path in (_REPOSITORY / ".github").rglob("*.yml"):
        assert read(path)
    changelog = (_REPOSITORY / "CHANGELOG.md").read_text()
    newest, date = re.search(r"^## (\S+) - (\S+)$", changelog, re.M).groups()
    citation = read("CITATION.cff")
    assert (citation["version"], str(citation["date-released"])) == (newest, date)
    setup = configparser.ConfigParser()
    setup.read(_REPOSITORY / "setup.cfg")
    assert setup["metadata"]["license"] == citation["license"]
    assert setup["metadata"]["project_urls"].split() == [
        "Paper",
        "=",
        citation["references"][0]["url"],
    ]
