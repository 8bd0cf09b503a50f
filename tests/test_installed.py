"""What a user has who installs the package without a clone."""

import configparser
import json
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
    patterns = {
        package: value.replace(",", " ").split()
        for package, value in setup["options.package_data"].items()
    }
    for file in (_REPOSITORY / "avit_jax").rglob("*.*"):
        package = ".".join(file.parent.relative_to(_REPOSITORY).parts)
        if file.suffix not in (".py", ".pyc"):
            assert any(file.match(one) for one in patterns[package]), file
    assert (_REPOSITORY / "avit_jax/py.typed").exists()


@pytest.mark.slow
def test_the_wheel_in_an_empty_folder(tmp_path: pathlib.Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    source = tmp_path / "source"
    for folder in ("avit_jax", "configs"):
        shutil.copytree(_REPOSITORY / folder, source / folder)
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(_REPOSITORY / file, source / file)
    pip = [sys.executable, "-m", "pip"]
    subprocess.run([*pip, "wheel", "-q", "--no-deps", f"-w{tmp_path}", str(source)], check=True)
    (wheel,) = tmp_path.glob("avit_jax-*.whl")
    assert wheel.stat().st_size < 8e6
    subprocess.run([*pip, "install", "-q", "--no-deps", f"--target={site}", wheel], check=True)
    environment = os.environ | {"PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}

    def run(*command: str) -> str:
        done = subprocess.run(command, cwd=empty, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    program = str(site / "bin/avit-jax")
    small = {"depth": 2, "width": 16, "image_size": "(16,16)", "patch_size": 8}
    keys = [f"--config.model.{key}={value}" for key, value in small.items()]
    keys += ["--config.train.steps=4", "--config.train.eval_every=2"]
    run(program, "--config=digits", "--config.loss.target_depth=1.5", *keys)
    assert json.loads((empty / "runs/digits/config.json").read_text())["train"]["steps"] == 4
    module = (sys.executable, "-m", "avit_jax")
    photo = _REPOSITORY / "experiments/zoo/cifar10_avit.png"
    shutil.copy(photo, empty / "photo.png")
    predicted = run(*module, "--mode=predict", "--checkpoint=runs/digits", "photo.png")
    assert "photo.png: " in predicted
    run(*module, "--mode=eval", "--checkpoint=runs/digits")
    run(program, "--mode=export", "--checkpoint=runs/digits", "--out=digits.avit")
    run(
        *module,
        *("--mode=calibrate", "--checkpoint=runs/digits", "--budget=0.8"),
        "--out=cheaper.safetensors",
    )
    code = (
        "import avit_jax; from avit_jax import zoo\n"
        "for name in [*zoo.NETWORKS, 'runs/digits', 'cheaper.safetensors']:\n"
        "  model, params = avit_jax.load(name)\n"
        "  (one,) = avit_jax.predict(model, params, 'photo.png')\n"
        "  assert one.top5[0] in model.label_names\n"
        "print(avit_jax.__file__)"
    )
    assert run(sys.executable, "-c", code).strip() == str(site / "avit_jax/__init__.py")
    names = {path.name for path in (empty / "runs/digits").iterdir()}
    assert names >= {"config.json", "log.txt", "eval.json", "summary.json"}
