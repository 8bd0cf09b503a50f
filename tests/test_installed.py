"""What a user has who installs the package without a clone."""

import configparser
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

_REPOSITORY = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["cifar10_merging", "deit_base", "deit_small_distilled", "folder"])
def test_a_recipe_based_on_others_needs_no_clone(name: str, tmp_path: pathlib.Path) -> None:
    site = tmp_path / "site"  # with the package, and without the folder of the clone
    site.mkdir()
    (site / "avit_jax").symlink_to(_REPOSITORY / "avit_jax")
    shutil.copytree(_REPOSITORY / "configs", tmp_path / "recipes")
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['get_config']().to_json())"
    moved, original = (
        subprocess.run(
            [sys.executable, "-c", code, str(folder / f"{name}.py")],
            capture_output=True,
            text=True,
            check=True,
            cwd=folder.parent,
            env=os.environ | {"PYTHONPATH": str(path)},
        )
        for folder, path in ((tmp_path / "recipes", site), (_REPOSITORY / "configs", _REPOSITORY))
    )
    assert moved.stdout == original.stdout


def test_every_folder_of_the_package_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(_REPOSITORY / "setup.cfg")
    listed = setup["options"]["packages"].split()
    folders = [path.parent for path in (_REPOSITORY / "avit_jax").rglob("__init__.py")]
    expected = [".".join(folder.relative_to(_REPOSITORY).parts) for folder in folders]
    assert sorted(listed) == sorted([*expected, "avit_jax.configs"])
    assert setup["options.package_data"]["avit_jax"] == "py.typed"
    assert (_REPOSITORY / "avit_jax/py.typed").exists()
