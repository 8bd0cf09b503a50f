"""Help, recipes by name, and what the program says about an unknown key."""

import pathlib
import sys

import pytest
from command_line import DIGITS, REPOSITORY, as_the_program_starts, one_line, parse  # noqa: F401

import avit_jax
from avit_jax import cli, config_help, usage
from avit_jax import config as config_lib

# How ml_collections loads a recipe.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"
)


def _printed(argument: str, capsys: pytest.CaptureFixture) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.parse(["main", argument])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("argument", ["--help", "-h", "-help"])
def test_help_has_all_modes_flags_and_recipes(argument: str, capsys: pytest.CaptureFixture) -> None:
    text = _printed(argument, capsys)
    own = cli.flags.FLAGS.flags_by_module_dict()["avit_jax.cli"]
    for flag in own:
        assert f"--{flag.name}" in text, flag.name
    for mode in ("train", "eval", "predict", "export", "calibrate"):
        (section,) = [part for part in text.split("\n\n") if part.startswith(f"--mode={mode}")]
        assert "\n    avit-jax --" in section  # an example
    for path in (REPOSITORY / "configs").glob("[!_]*.py"):
        assert f"\n  {path.stem} " in text


_EXAMPLES = [line for line in usage.help_text().splitlines() if line.startswith("    avit-jax")]


@pytest.mark.parametrize("example", _EXAMPLES)
def test_the_examples_of_the_help_parse(example: str) -> None:
    arguments = example.split()[1:]
    assert len(_EXAMPLES) == 6
    parse(DIGITS, *(one for one in arguments if not one.startswith("--config=")))


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert _printed("--version", capsys) == f"avit_jax {avit_jax.__version__}\n"


def test_help_config_has_every_key_with_default_and_comment(
    capsys: pytest.CaptureFixture,
) -> None:
    described = config_lib.describe()
    keys = {key.name: key for key in described if not key.is_section}
    assert {name: key.default for name, key in keys.items()} == config_lib.flat(
        config_lib.default()
    )
    assert [key.name for key in described if not key.comment] == []
    assert keys["train.steps"].comment == "of the whole run"
    assert keys["init_grid"].comment.startswith("Rows and columns of patches in `init`")
    assert keys["budget"].comment.startswith("Target MACs ratio of training")  # two lines above it
    assert keys["budget"].comment.endswith("loss.target_depth is unused.")
    text, table = _printed("--help_config", capsys), config_help.markdown(described)
    for name, key in keys.items():
        assert f"--config.{name}=" in text and key.comment in text
        assert f"| `{name}` | `{key.default!r}` | " in table
    assert table.count("\n## ") == len([key for key in described if key.is_section])


@pytest.mark.parametrize(
    ("unknown", "expected"),
    [
        ("lr", "optimizer.learning_rate"),
        ("data_dir", "data.dir"),
        ("train.learning_rate", "optimizer.learning_rate"),
        ("wd", "optimizer.weight_decay"),
        ("epochs", "train.steps"),
        ("train.grad_accum_steps", "train.accumulate"),
        ("ema", "optimizer.ema_decay"),
        ("model.dropout_rate", "model.dropout"),
        ("mergee", "halting.merge"),
    ],
)
def test_an_unknown_key_is_searched_in_all_sections(unknown: str, expected: str) -> None:
    with one_line(f"unknown configuration key '{unknown}': did you mean --config.{expected}?"):
        parse(DIGITS, f"--config.{unknown}=1")


def test_an_unknown_key_with_several_meanings_or_none() -> None:
    with one_line("did you mean --config.eval.batch_size or --config.train.batch_size?"):
        parse(DIGITS, "--config.batch_size=1")
    with one_line("unknown configuration key 'qqqq': --help_config lists all keys."):
        parse(DIGITS, "--config.qqqq=1")


def test_an_unknown_key_in_a_recipe(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "recipe.py"
    path.write_text(
        "from avit_jax import config\ndef get_config():\n  c = config.default()\n  c.lr = 1.0\n"
        "  return c\n"
    )
    with one_line("did you mean --config.optimizer.learning_rate?"):
        parse(f"--config={path}")


@pytest.mark.parametrize("form", [["--config=digits"], ["--config", "digits"], [DIGITS]])
def test_a_recipe_by_its_name_in_any_folder(
    form: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse(*form, "--config.train.steps=7")
    assert config.data.mean == (0.3,) and config.train.steps == 7
    assert cli.workdir() == "runs/digits"


def test_a_recipe_of_the_users_own_comes_first(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    own = (REPOSITORY / "configs/digits.py").read_text().replace("(0.3,)", "(0.4,)")
    (tmp_path / "configs/digits.py").write_text(own)
    assert parse(DIGITS).data.mean == (0.4,)


def test_a_key_without_a_recipe() -> None:
    with one_line("--config.train.steps=3 needs a recipe: name one"):
        parse("--config.train.steps=3")


def test_the_program_as_a_module_runs_main_as_main(monkeypatch: pytest.MonkeyPatch) -> None:
    from avit_jax import __main__

    seen = []
    monkeypatch.setattr(__main__.runpy, "run_module", lambda *args, **how: seen.append((args, how)))
    __main__.run()
    assert seen == [(("avit_jax.main",), {"run_name": "__main__", "alter_sys": True})]
    assert "avit_jax.main" not in sys.argv
