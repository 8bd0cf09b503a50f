"""A run and a weight file know their configuration: --checkpoint alone suffices."""

import json
import pathlib
import struct

import fakes
import fixtures
import numpy as np
import pytest
from command_line import DIGITS, as_the_program_starts, one_line, parse  # noqa: F401
from ml_collections import ConfigDict

from avit_jax import cli, main, run_config
from avit_jax import config as config_lib
from avit_jax.inference import export
from avit_jax.training import restore
from avit_jax.utils import errors

# How ml_collections loads a recipe.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"
)


@pytest.fixture(scope="module")
def config() -> ConfigDict:
    return fixtures.small_config(**{"train.steps": 2, "train.log_every": 1, "budget": 0.9})


@pytest.fixture(scope="module")
def run(config: ConfigDict, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("runs") / "mine"
    fakes.real_run(config, workdir)
    return workdir


def test_a_run_writes_its_configuration(run: pathlib.Path, config: ConfigDict) -> None:
    text = (run / "config.json").read_text()
    assert json.loads(text) == config_lib.to_json(config)
    assert text.count("\n") > 50  # a key per line


def test_a_finished_run_of_an_older_version_gets_it(
    run: pathlib.Path, config: ConfigDict, tmp_path: pathlib.Path
) -> None:
    content = (run / "config.json").read_text()
    (run / "config.json").unlink()
    with one_line(f"{run} holds no configuration: name a recipe"):
        parse("--mode=export", f"--checkpoint={run}", "--out=x.avit")
    fakes.real_run(config, run)
    assert (run / "config.json").read_text() == content


@pytest.mark.parametrize("mode", ["eval", "predict", "export", "calibrate"])
def test_the_checkpoint_alone_and_overrides(
    mode: str, run: pathlib.Path, config: ConfigDict
) -> None:
    parsed = parse(f"--mode={mode}", "--checkpoint", str(run), "--config.eval.checkpoint=best")
    expected = config.copy_and_resolve_references()
    expected.eval.checkpoint = "best"
    assert config_lib.to_json(parsed) == config_lib.to_json(expected)
    assert parsed.model.image_size == (16, 16) and parsed.is_locked
    assert cli.workdir() == str(run)


def test_a_run_continues_without_its_recipe(run: pathlib.Path) -> None:
    assert parse(f"--workdir={run}").train.steps == 2


def test_a_recipe_wins_over_the_runs_configuration(run: pathlib.Path) -> None:
    assert parse(DIGITS, "--mode=predict", f"--checkpoint={run}").train.steps == 1500


def test_eval_of_two_runs_at_once(run: pathlib.Path, tmp_path: pathlib.Path) -> None:
    parse("--mode=eval", f"--checkpoint={run}", f"--workdir={tmp_path}")
    with one_line("name the run by --checkpoint or by --workdir, not by both."):
        main.main(["main"])


def test_a_weight_file_knows_its_configuration_too(
    run: pathlib.Path, config: ConfigDict, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "weights.safetensors"
    config = config.copy_and_resolve_references()
    config.data.dir, config.distill.teacher = "/secret", "/secret"
    config.init_ema, config.init_grid = True, (1, 1)  # of the file that the run started from
    export.from_checkpoint(file, config, run)
    assert b"secret" not in file.read_bytes()
    parsed = parse("--mode=predict", f"--checkpoint={file}")
    assert not parsed.init_ema and not parsed.init_grid
    assert parsed.model == config.model and parsed.data.mean == (0.3,)
    # The budget moved a learned gate; the file has a fixed one.
    assert parsed.budget == 0 and config.budget == 0.9 and not parsed.halting.learnable
    params, names = restore.trained(parsed, fakes.build.model(parsed), file)
    trained, _ = restore.params(config, fakes.build.model(config), run)
    np.testing.assert_array_equal(params["head"]["bias"], trained["head"]["bias"])
    assert names == list("0123456789")
    assert cli.workdir() == "runs/eval-weights"


def test_eval_of_a_weight_file(
    run: pathlib.Path, config: ConfigDict, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, seen = tmp_path / "weights.safetensors", []
    export.from_checkpoint(file, config, run)
    monkeypatch.setattr(
        "avit_jax.training.evaluate.evaluate_checkpoint", lambda *given: seen.append(given)
    )
    parse("--mode=eval", f"--checkpoint={file}", f"--workdir={tmp_path / 'out'}")
    main.main(["main"])
    ((given, workdir),) = seen
    assert (given.init, given.eval.checkpoint) == (str(file), "init")
    assert workdir == str(tmp_path / "out")


@pytest.mark.parametrize(
    "content",
    ["{", '{"halting": 1}', '{"halting": {"no_such_key": 1}}', '{"halting": {"beta": ""}}'],
)
def test_a_damaged_configuration(content: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(content)
    with one_line("name its recipe with --config" if content == "{" else "error"):
        parse("--mode=predict", f"--checkpoint={tmp_path}")


@pytest.mark.parametrize(
    "metadata", ["", "{}", "[1]", '{"config": {}, "label_names": [1]}', '{"config": 3}']
)
def test_damaged_metadata_of_a_weight_file(metadata: str, tmp_path: pathlib.Path) -> None:
    header = json.dumps({"__metadata__": {"avit_jax": metadata}}).encode()
    file = tmp_path / "w.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(errors.UserError, match=r"name its recipe|cannot be used"):
        run_config.read(file)


def test_weight_files_without_a_configuration(tmp_path: pathlib.Path) -> None:
    assert run_config.read("tests/data/weights/timm.safetensors") is None
    assert run_config.read("tests/data/weights/legacy.pth") is None
    assert run_config.read(tmp_path) is None
    with pytest.raises(errors.UserError, match="holds no configuration"):
        run_config.get_config(str(tmp_path))
