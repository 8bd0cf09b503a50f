"""The command line: every mistake of a user ends in one line that starts with "error:"."""

import errno
import json
import os
import pathlib
import socket
import subprocess
import sys
from unittest import mock

import jax
import pytest
from command_line import DIGITS as _DIGITS
from command_line import REPOSITORY as _REPOSITORY
from command_line import as_the_program_starts  # noqa: F401
from command_line import one_line as _one_line
from command_line import parse as _parse

from avit_jax import config as config_lib
from avit_jax import main
from avit_jax.training import build, distributed
from avit_jax.utils import errors

# How ml_collections loads a recipe.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"
)


@pytest.mark.parametrize(("text", "grid"), [("(9,16)", (9, 16)), ("()", ())])
def test_the_grid_of_weights_on_the_command_line(text: str, grid: tuple[int, ...]) -> None:
    assert _parse(_DIGITS, f"--config.init_grid={text}").init_grid == grid


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--config=digits"),
        (["--config.train.steps=3"], "config.train.steps"),
        ([_DIGITS, "--config.train.stepps=3"], '"steps" instead of "stepps"'),
        ([_DIGITS, "--config.trian.steps=3"], '"train" instead of "trian"'),
        ([_DIGITS, "--config.completely.different=3"], "unknown configuration key 'completely'"),
        ([_DIGITS, "--config.train.steps=many"], "--config.train.steps=many"),
        ([_DIGITS, "--config.train.steps=3.5"], "--config.train.steps=3.5"),
        ([_DIGITS, "--config.model.remat=maybe"], "--config.model.remat=maybe"),
        ([_DIGITS, "--config.train=3"], "--config.train=3"),
        ([_DIGITS, "--config.train.steps"], "--config.train.steps"),
        (["--config=configs/nowhere.py"], "configs/nowhere.py"),
        (["--config=configs/nowhere.py", "--config.train.steps=3"], "configs/nowhere.py"),
        (["--config=configs"], "directory"),
        (["--config="], "empty"),
        (["--config=digit"], "there is no recipe digit: name a Python file, or one of cifar10, "),
        (["--workdir=nowhere"], "there is no nowhere: name a recipe"),
        (["--mode=predict", "--checkpoint=tests"], "tests holds no configuration: name a recipe"),
        ([_DIGITS + ":argument"], "get_config() takes 0 positional arguments"),
        ([_DIGITS, "stray"], "'stray'"),
        ([_DIGITS, "--no_such_flag=1"], "no_such_flag"),
        ([_DIGITS, "--mode=test"], "<train|eval|predict|export|calibrate>"),
        ([_DIGITS, "--workdir"], "workdir"),
        (
            [_DIGITS, "--budget=0.6"],
            "--mode=train does not read it; for training set --config.budget",
        ),
        (
            [_DIGITS, "--checkpoint=runs/x"],
            "--checkpoint is for --mode=eval or predict or export or calibrate,",
        ),
        (
            [_DIGITS, "--mode=predict", "--allow_changed_config"],
            "--allow_changed_config is for --mode=train,",
        ),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], expected: str) -> None:
    with _one_line(expected):
        _parse(*arguments)


@pytest.mark.parametrize(
    ("cores", "batch_size", "devices"),
    [(2, 120, 2), (6, 512, 4), (4, 15, 3), (4, 7, 1), (1, 64, 1)],
)
def test_each_core_of_a_cpu_is_a_device_if_the_batch_divides(
    monkeypatch: pytest.MonkeyPatch, cores: int, batch_size: int, devices: int
) -> None:
    update = mock.Mock()
    monkeypatch.setattr(jax.config, "update", update)
    distributed.divide_cpu(cores, batch_size)
    assert not update.called  # the tests have XLA_FLAGS
    monkeypatch.delenv("XLA_FLAGS")
    distributed.divide_cpu(cores, batch_size)
    update.assert_called_once_with("jax_num_cpu_devices", devices)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    distributed.divide_cpu(cores, batch_size)
    assert update.call_count == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "variable", "devices"),
    [
        (["--mode=eval", "--config.eval.batch_size=9"], {}, 3),
        (["--mode=eval", "--config.eval.batch_size=8"], {}, 2),
        ([], {}, 1),
        (["--mode=eval", "--config.eval.batch_size=9"], {"JAX_NUM_CPU_DEVICES": "4"}, 4),
        (
            ["--mode=eval", "--config.eval.batch_size=9"],
            {"XLA_FLAGS": "--xla_force_host_platform_device_count=5"},
            5,
        ),
    ],
)
def test_devices_of_a_program(
    tmp_path: pathlib.Path, arguments: list[str], variable: dict[str, str], devices: int
) -> None:
    program = (
        "import jax\nfrom avit_jax import main\nfrom avit_jax.inference import adaptive\n"
        "from avit_jax.training import evaluate, loop\n"
        "adaptive.usable_cores = lambda: 3\n"
        "loop.train = evaluate.evaluate_checkpoint = lambda *_, **__: print('devices:', "
        "jax.device_count())\n"
        "main.start()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu"
    }
    command = [sys.executable, "-c", program, _DIGITS, f"--workdir={tmp_path}", *arguments]
    done = subprocess.run(
        command, env=environment | variable, cwd=_REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout == f"devices: {devices}\n", done.stderr


_HEAD = "from avit_jax import config as config_lib\n"


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("def get_config(:\n  pass\n", "recipe.py, line 1"),
        ("import no_such_module\n", "no_such_module"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n  return no_such_name\n", "no_such_name"),
        ("def get_config():\n  return open('no_such_file')\n", "no_such_file"),
        ("def get_config():\n  return 1\n", "'train'"),
        (
            _HEAD + "def get_config():\n  return config_lib.default().model\n",
            "unknown configuration key 'train'",
        ),
        (
            _HEAD
            + "def get_config():\n  c = config_lib.default()\n  c.train.stepps = 3\n  return c\n",
            '"steps" instead of',
        ),
        (
            _HEAD
            + "def get_config():\n  c = config_lib.default()\n  c.train.steps = 'x'\n  return c\n",
            "'steps'",
        ),
        (
            "from avit_jax.utils import errors\ndef get_config():\n  raise errors.UserError('do this')\n",
            "do this",
        ),
    ],
)
def test_mistakes_in_a_recipe(tmp_path: pathlib.Path, recipe: str, expected: str) -> None:
    path = tmp_path / "recipe.py"
    path.write_text(recipe)
    with _one_line(expected):
        _parse(f"--config={path}")


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (_REPOSITORY / "configs").glob("[!_]*.py"))
)
def test_recipes_parse_and_build(name: str) -> None:
    backbone = ":digits" if name == "finetune.py" else ""
    config = _parse(f"--config=configs/{name}{backbone}", "--config.seed=5")
    assert config.is_locked
    assert config.seed == 5
    build.model(config)
    build.optimizer(config)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([_DIGITS, "--config.train.batch_size=30"], "multiple of the number of devices, 8"),
        ([_DIGITS, "--config.eval.batch_size=0"], "config.eval.batch_size must be between 1"),
        ([_DIGITS, "--config.model.patch_size=5"], "patch_size 5 must divide"),
        ([_DIGITS, "--config.model.patch_size=0"], "patch_size must be at least 1"),
        (
            [_DIGITS, "--config.model.patch_size=0", "--config.train.adaptive=True"],
            "patch_size must be at least 1",
        ),
        ([_DIGITS, "--config.model.image_size=32"], "(height, width)"),
        ([_DIGITS, "--config.model.depth=0"], "depth must be at least 1"),
        ([_DIGITS, "--config.model.num_heads=5"], "divisible by num_heads"),
        ([_DIGITS, "--config.model.dtype=float33"], "float33"),
        ([_DIGITS, "--config.model.num_classes=7"], "--config.model.num_classes=10"),
        ([_DIGITS, "--config.halting.epsilon=1.5"], "epsilon must lie between 0 and 1"),
        ([_DIGITS, "--config.model.channels=4"], "--config.model.channels=1"),
        ([_DIGITS, "--config.train.steps=0"], "config.train.steps must be between 1"),
        ([_DIGITS, "--config.train.log_every=0"], "config.train.log_every"),
        ([_DIGITS, "--config.eval.pictures=0"], "config.eval.pictures"),
        ([_DIGITS, "--config.seed=-1"], "config.seed must be between 0"),
        ([_DIGITS, "--config.augment.magnitude=nan"], "between 0 and 10; got nan"),
        ([_DIGITS, "--config.augment.crop_scale=(0.5,)"], "config.augment.crop_scale"),
        ([_DIGITS, "--config.augment.crop_scale=(0.5,0.3)"], "config.augment.crop_scale"),
        ([_DIGITS, "--config.data.range=(4095,0)"], "config.data.range"),
        ([_DIGITS, "--config.data.range=(0,1,2)"], "config.data.range"),
        ([_DIGITS, "--config.data.std=(0.,)"], "config.data.std"),
        ([_DIGITS, "--config.data.bad_records=ignore"], '"raise" or "skip"'),
        ([_DIGITS, "--config.data.name=folder"], "config.data.dir"),
        ([_DIGITS, "--config.loss.label_smoothing=1.1"], "between 0 and 1; got 1.1"),
        ([_DIGITS, "--config.loss.prior_mode=papers"], '"paper" or "official"'),
        ([_DIGITS, "--config.eval.checkpoint=first", "--mode=eval"], '"last" or "best"'),
        ([_DIGITS, "--config.data.mean=(0.1,0.2)"], "config.data.mean"),
        ([_DIGITS, "--config.data.name=no_such_set"], "no_such_set"),
        ([_DIGITS, "--config.data.train_split=trian"], '"train" and "test"'),
        ([_DIGITS, "--config.loss.target_depth=7"], "network's depth, 6; got 7"),
        (
            [_DIGITS, "--config.budget=0.1", "--config.loss.target_depth=7"],
            "config.budget 0.1 is out of reach: set at least 0.1",
        ),
        (
            [_DIGITS, "--config.budget=0.5", "--config.loss.prior_mode=official"],
            "which has no config.budget",
        ),
        ([_DIGITS, "--config.loss.target_depth=nan"], "network's depth, 6; got nan"),
        (
            [_DIGITS, "--config.loss.ponder_weight=-1"],
            "config.loss.ponder_weight must be at least 0",
        ),
        (
            [_DIGITS, "--config.loss.prior_weight=nan"],
            "config.loss.prior_weight must be at least 0, and finite; got nan",
        ),
        ([_DIGITS, "--config.halting.gamma=0"], "no token can halt before the last layer"),
        (
            [
                _DIGITS,
                "--config.halting.gamma=0",
                "--config.halting.merge=True",
                "--config.halting.redundancy=2",
            ],
            "redundancy=2.0: gamma times its gate",
        ),
        ([_DIGITS, "--config.halting.redundancy=-1"], "redundancy must be finite and at least 0"),
        (
            [_DIGITS, "--config.halting.redundancy=1"],
            "config.halting: redundancy has an effect only with merging: set merge=True",
        ),
        (
            [_DIGITS, "--config.halting.merge=True", "--config.loss.prior_mode=official"],
            "with config.halting.merge these tokens are merged",
        ),
        ([_DIGITS, "--config.halting.beta=-1e6"], "reach 1e+06"),
        ([_DIGITS, "--config.halting.gamma=nan"], "gamma and beta must be finite"),
        ([_DIGITS, "--config.halting.beta=inf"], "config.halting.beta must be at most"),
        ([_DIGITS, "--config.halting.gamma=1e300"], "config.halting.gamma must be at most"),
        ([_DIGITS, "--config.halting.epsilon=1e-300"], "too close to 0 or 1 for float32"),
        ([_DIGITS, "--config.halting.beta=1e30"], "every image is finished after the first layer"),
        ([_DIGITS, "--config.halting.beta=255"], "its gate channel is below -250"),
        (
            [_DIGITS, "--config.halting.gamma=0", "--config.halting.beta=5"],
            "every image is finished after the first layer",
        ),
        (
            [
                _DIGITS,
                "--config.budget=0.5",
                "--config.train.steps=99",
                "--config.halting.beta=-360",
            ],
            "no token can halt before the last layer",
        ),
        (
            [
                _DIGITS,
                "--config.budget=0.5",
                "--config.train.steps=99",
                "--config.halting.beta=360",
            ],
            "after the first layer",
        ),
        ([_DIGITS, "--config.halting.epsilon=0"], "epsilon must lie between 0 and 1"),
        ([_DIGITS, "--config.halting.channel=64"], "channel 64 is not among the 64"),
        ([_DIGITS, "--config.model.drop_path=1"], "drop_path must lie in [0, 1)"),
        ([_DIGITS, "--config.model.mlp_ratio=0"], "config.model.mlp_ratio"),
        ([_DIGITS, "--config.optimizer.warmup=1.5"], "between 0 and 0.999; got 1.5"),
        (
            [_DIGITS, "--config.optimizer.learning_rate=-1"],
            "config.optimizer.learning_rate must be at least 0",
        ),
        (
            [_DIGITS, "--config.optimizer.min_learning_rate=1"],
            "must not be above the learning rate, 0.002",
        ),
        ([_DIGITS, "--config.optimizer.ema_decay=1.1"], "config.optimizer.ema_decay"),
        ([_DIGITS, "--config.affine.translate=2"], "config.affine.translate"),
        ([_DIGITS, "--config.train.save_every=0"], "config.train.save_every must be at least 1"),
        ([_DIGITS, "--config.train.nonfinite=ignore"], '"stop" or "skip"'),
        ([_DIGITS, "--config.init=nowhere.pth"], "there is no nowhere.pth"),
        ([_DIGITS, "--config.init=README.md"], "no weight file by its name"),
        (
            [_DIGITS, "--config.init=tests/data/weights/timm.safetensors"],
            "the weights do not fit the model",
        ),
        (
            [_DIGITS, "--config.init=tests/data/weights/vit/model.safetensors"],
            "--config.model.norm_eps=1e-12",
        ),
        ([_DIGITS, "--config.eval.checkpoint=init", "--mode=eval"], "name it with --config.init"),
        ([_DIGITS, "--mode=predict"], "name images to predict"),
        ([_DIGITS, "--process_id=0"], "give all of --coordinator"),
        ([_DIGITS, "--coordinator=here:x", "--num_processes=1", "--process_id=0"], "host:port"),
        ([_DIGITS, "--coordinator=here:99999", "--num_processes=1", "--process_id=0"], "host:port"),
        ([_DIGITS, "--coordinator=:80", "--num_processes=1", "--process_id=0"], "host:port"),
        ([_DIGITS, "--config.seed=9223372036854775808"], "config.seed must be between 0"),
        ([_DIGITS, "--config.model.image_size=(0,0)"], "(height, width) in pixels"),
        ([_DIGITS, "--config.model.image_size=(-16,-16)"], "(height, width) in pixels"),
        ([_DIGITS, "--config.model.mlp_ratio=inf"], "config.model.mlp_ratio"),
        ([_DIGITS, "--config.model.mlp_ratio=0.01"], "the MLP would have no width: raise it"),
        ([_DIGITS, "--config.model.width=-64"], "width must be at least 1"),
        ([_DIGITS, "--config.model.image_size=32"], "(height, width) in pixels; got (32,)"),
        (
            [_DIGITS, "--config.halting.merge=True", "--config.halting.redundancy=nan"],
            "redundancy must be finite and at least 0",
        ),
        ([_DIGITS, "--config.model.dtype=int32"], "dtype must be float32, bfloat16 or float16"),
        ([_DIGITS, "--config.model.dtype=complex64"], "dtype must be float32, bfloat16 or float16"),
        ([_DIGITS, "--config.model.dtype=float64"], "dtype must be float32, bfloat16 or float16"),
        ([_DIGITS, "--config.optimizer.learning_rate=inf"], "at least 0, and finite; got inf"),
        ([_DIGITS, "--config.train.steps=3000000000"], "config.train.steps must be between 1"),
        ([_DIGITS, "--config.data.num_threads=1000000"], "config.data.num_threads must be between"),
        ([_DIGITS, "--config.data.std=(None,)"], "config.data.std must hold numbers"),
        ([_DIGITS, "--config.data.mean=('a',)"], "config.data.mean must hold numbers"),
        (
            [_DIGITS, "--config.augment.crop_scale=(0.5,None)"],
            "config.augment.crop_scale must hold numbers",
        ),
        (
            [_DIGITS, "--config.train.batch_size=100000000000"],
            "config.train.batch_size must be between",
        ),
        ([_DIGITS, "--config.data.eval_split=validation"], '"train" and "test"'),
        (["--config=configs/deit_tiny.py"], "configs/digits.py"),
        ([_DIGITS, "--mode=eval"], "no checkpoint"),
        ([_DIGITS, "--mode=export"], "name the file to write"),
        (
            [_DIGITS, "--mode=export", "--out=network.avit"],
            "name a weight file, or the workdir of a run",
        ),
        (
            [
                _DIGITS,
                "--mode=calibrate",
                "--out=w.safetensors",
                "--budget=0.5",
                "--config.eval.batch_size=30",
            ],
            "config.eval.batch_size 30 must be a multiple",
        ),
        (
            [_DIGITS, "--config.distill.targets=both"],
            'config.distill.targets must be "hard" or "soft"',
        ),
        ([_DIGITS, "--config.distill.weight=1.5"], "config.distill.weight must be between 0 and 1"),
        ([_DIGITS, "--config.distill.temperature=0"], "config.distill.temperature must be between"),
        ([_DIGITS, "--config.distill.teacher=nowhere.pth"], "there is no nowhere.pth"),
        (
            [_DIGITS, "--config.optimizer.layer_decay=0"],
            "config.optimizer.layer_decay must be between",
        ),
        (
            [_DIGITS, "--config.debug.profile=(5,3)"],
            "config.debug.profile must be (0, 0), or first <= last step",
        ),
        (
            [_DIGITS, "--config.debug.profile=(5,3000)"],
            "config.debug.profile must be (0, 0), or first <= last step",
        ),
    ],
)
def test_mistakes_that_show_later(
    tmp_path: pathlib.Path, arguments: list[str], expected: str
) -> None:
    _parse(*arguments, f"--workdir={tmp_path / 'run'}", f"--config.data.dir={tmp_path}")
    with _one_line(expected):
        main.main(["main"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [_DIGITS, f"--config.model.width={10**20}"],
            f"config.model.width must be at most 65536 in absolute value; got {10**20}",
        ),
        ([_DIGITS, f"--config.data.std=({10**400},)"], "config.data.std must be at most"),
        (
            [_DIGITS, "--config.halting.redundancy=1e400"],
            "config.halting.redundancy must be at most",
        ),
        (
            [_DIGITS, "--mode=export", "--out=network"],
            "name.avit or name.onnx for a program, or name.safetensors for weights",
        ),
        (
            [_DIGITS, "--mode=export", "--out=network.h5"],
            "name.avit or name.onnx for a program, or name.safetensors for weights",
        ),
    ],
)
def test_more_mistakes_that_show_later(
    tmp_path: pathlib.Path, arguments: list[str], expected: str
) -> None:
    test_mistakes_that_show_later(tmp_path, arguments, expected)


@pytest.mark.parametrize("flag", ["--batch", "--num_processes", "--process_id"])
def test_huge_numbers_of_other_flags(flag: str) -> None:
    with _one_line(flag.removeprefix("--")):
        _parse(_DIGITS, f"--mode={'export' if flag == '--batch' else 'train'}", f"{flag}={10**20}")


def test_a_mistake_of_the_program_keeps_its_traceback(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _parse(_DIGITS, f"--workdir={tmp_path}")

    def train(*_: object, **__: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("avit_jax.training.loop.train", train)
    with pytest.raises(TypeError, match="a bug"):
        main.main(["main"])


def test_devices_that_jax_cannot_use(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def devices() -> None:
        raise RuntimeError("Unable to initialize backend 'tpu': no TPU.\nA page of text")

    _parse(_DIGITS, f"--workdir={tmp_path}")
    monkeypatch.setattr(jax, "devices", devices)
    with _one_line("JAX cannot use the devices (Unable to initialize backend 'tpu': no TPU)"):
        main.main(["main"])


def test_a_port_that_may_not_be_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    def create_server(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(socket, "create_server", create_server)
    _parse(
        _DIGITS,
        "--coordinator=localhost:80",
        "--num_processes=2",
        "--process_id=0",
        f"--workdir={tmp_path}",
    )
    with _one_line(
        "port 80 of --coordinator cannot be opened (Permission denied): choose another port."
    ):
        main.main(["main"])


def test_an_interruption_has_a_status_of_its_own(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    _parse(_DIGITS, f"--workdir={tmp_path}")

    def train(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("avit_jax.training.loop.train", train)
    with pytest.raises(SystemExit) as exit_:
        main.main(["main"])
    assert exit_.value.code == 130 and capsys.readouterr().err == "error: interrupted.\n"


def test_a_value_of_none_in_a_recipe() -> None:
    config = config_lib.default()
    config.model.depth = None
    with pytest.raises(
        errors.UserError, match=r"config\.model\.depth must not be None; its default is 12"
    ):
        config_lib.check(config)


def test_too_little_memory_of_the_devices(tmp_path: pathlib.Path) -> None:
    """In a mode that does not train; 2**50 channels cannot be had anywhere."""
    _parse(_DIGITS, "--mode=predict", f"--workdir={tmp_path}")

    def predict(*_: object) -> None:
        jax.block_until_ready(jax.jit(lambda: jax.numpy.zeros(2**50))())

    with pytest.MonkeyPatch.context() as patch, _one_line("memory is too small for the run"):
        patch.setattr("avit_jax.tools.predict.predict", predict)
        main.main(["main"])


def test_compiled_programs_are_kept_in_the_workdir(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    for known, expected in (
        ("elsewhere", {}),
        (None, {"jax_compilation_cache_dir": f"{tmp_path}/compiled"}),
    ):
        monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", known)
        _parse(_DIGITS, "--mode=eval", f"--workdir={tmp_path}")
        with _one_line("no checkpoint"):
            main.main(["main"])
        assert changed.items() >= expected.items() and bool(changed) == bool(expected)


def _run(*arguments: str, folder: pathlib.Path = _REPOSITORY) -> subprocess.CompletedProcess:
    """A run of the program itself."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(_REPOSITORY),
    }
    command = [sys.executable, "-m", "avit_jax.main", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([_DIGITS, "--config.train.stepps=3"], '"steps" instead of "stepps"'),
        ([_DIGITS, "--mode=eval", "--workdir={tmp_path}"], "no checkpoint"),
    ],
)
def test_the_program_says_one_line_and_fails(
    tmp_path: pathlib.Path, arguments: list[str], expected: str
) -> None:
    ended = _run(*(argument.format(tmp_path=tmp_path) for argument in arguments))
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert expected in line


def test_a_run_from_before_a_key_was_known_goes_on_with_its_default() -> None:
    config = config_lib.default()
    before = json.loads(config.to_json_best_effort())
    del before["halting"]["merge"]
    config_lib.check_same(config_lib.to_json(config), before)
    config.halting.merge = True
    with pytest.raises(errors.UserError, match=r"halting\.merge from False to True"):
        config_lib.check_same(config_lib.to_json(config), before)
