"""What a run tells: its start, compilations, log file and bar; and other writers of metrics."""

import io
import json
import logging
import pathlib
import sys
import time
import types

import fakes
import fixtures
import jax.numpy as jnp
import pytest
from absl import logging as absl_logging
from etils import epath

from avit_jax.training import announce, build, loop, progress
from avit_jax.training import parts as parts_lib
from avit_jax.training.state import LogState
from avit_jax.utils import errors


def _step_values(loss: float = 1.0) -> dict[str, jnp.ndarray]:
    names = ("loss", "task_loss", "grad_norm", "param_norm", "top1", "nonfinite", "skipped")
    return {name: jnp.full((1,), loss * (name[0] not in "ns")) for name in names}


def test_the_start_names_network_data_devices_and_workdir(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = fixtures.small_config(**{"train.steps": 1})
    with caplog.at_level(logging.INFO, logger="avit_jax"):
        announce.start(parts_lib.of_config(config), epath.Path(tmp_path))
    network, data, devices, workdir = caplog.messages
    model = build.model(config)
    macs = announce.flops.static_macs(model) / 1e6
    assert network.endswith(
        f"parameters, {macs:.4g} million MACs per image without halting, 3 layers, 17 tokens"
    )
    params = build.creation(config, model)().params
    count = sum(leaf.size for leaf in announce.jax.tree.leaves(params))
    assert network.startswith(f"network: {count:,} parameters,")
    assert data == "data: 1,437 training and 360 evaluation images of 10 classes"
    assert devices == "devices: 8 x cpu, in 1 process(es)"
    assert workdir == f"workdir: {tmp_path}"


def test_each_compilation_and_its_end(caplog: pytest.LogCaptureFixture) -> None:
    def function(x: int) -> int:
        time.sleep(0.2)
        return 2 * x

    run = announce.first_call(function, "the step")
    with caplog.at_level(logging.INFO, logger="avit_jax"):
        assert [run(1), run(2)] == [2, 4]
    begins, ends = caplog.messages
    assert begins == "compiling the step"
    assert ends.startswith("compiled the step in 0.") and ends.endswith(" s")


def test_programs_of_a_run_are_announced(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = fixtures.small_config(**{"train.steps": 1, "model.depth": 2})
    with caplog.at_level(logging.INFO, logger="avit_jax"):
        loop.train(config, tmp_path)
    programs = ("the initial state", "the training step", "the evaluation", "the figure's program")
    for what in programs:
        assert caplog.messages.count(f"compiling {what}") == 1
        assert sum(text.startswith(f"compiled {what} in ") for text in caplog.messages) == 1


def test_the_speed_leaves_the_first_step_out(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = build.run_options(fakes.config(**{"train.steps": 100, "train.log_every": 3}))
    with (
        caplog.at_level(logging.INFO, logger="avit_jax"),
        progress.Log(options, epath.Path(tmp_path), lambda step: 1e-3, 0, LogState()) as log,
    ):
        time.sleep(2)  # the compilation
        log.add(1, _step_values(), 1.0)
        for step in (2, 3):
            time.sleep(0.05)
            log.add(step, _step_values(), 0.0)
    (row,) = map(json.loads, (tmp_path / "timing.jsonl").read_text().splitlines())
    assert row["images_per_second"] > options.batch_size / 0.5
    assert row["data_wait"] == 0  # the first batch is read while the program compiles
    minutes, seconds = map(int, caplog.messages[-1].split("ETA ")[1].split(":"))
    assert 60 * minutes + seconds < 48


def test_a_log_file_from_python_too(tmp_path: pathlib.Path) -> None:
    logger, shown = logging.getLogger("avit_jax"), io.StringIO()
    handler = logging.StreamHandler(shown)
    logging.getLogger().addHandler(handler)
    try:
        verbosity = absl_logging.get_verbosity()
        fakes.run(fakes.config(), tmp_path)
        fakes.run(fakes.config(), tmp_path)
    finally:
        logging.getLogger().removeHandler(handler)
    text = (tmp_path / "log.txt").read_text()
    assert text.count("workdir: ") == 2  # a second start is appended
    assert text.count("step 4/9  loss") == 1 and text.count("step 6  evaluation of 8 images") == 1
    assert logger.level == logging.NOTSET and absl_logging.get_verbosity() == verbosity
    assert not [one for one in logger.handlers if type(one).__name__ == "_LogFile"]


def test_orbax_is_quiet_during_a_run() -> None:
    with announce.quiet():
        assert not absl_logging.get_absl_logger().isEnabledFor(logging.ERROR)


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_on_a_terminal(
    terminal: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = _Terminal() if terminal else io.StringIO()
    logger = logging.getLogger("avit_jax")
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(logger, "handlers", [])
    for name in ("level", "propagate"):
        monkeypatch.setattr(logger, name, getattr(logger, name))
    progress.to_console(logging.INFO)
    fakes.run(fakes.config(), tmp_path)
    shown = stream.getvalue()
    assert ("training: " in shown) == terminal and ("| 9/9 [" in shown) == terminal
    (line,) = [line for line in shown.splitlines() if "step 4/9  loss" in line]
    assert "training" not in line.split("\r")[-1]  # messages stand on lines of their own


class _Scalars:
    """As a writer of clu."""

    def __init__(self) -> None:
        self.rows, self.closed = [], 0

    def write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        self.rows.append((step, dict(scalars)))

    def close(self) -> None:
        self.closed += 1


def test_other_writers_get_the_metrics(tmp_path: pathlib.Path) -> None:
    writer = _Scalars()
    loop.run(fakes.parts(fakes.config()), tmp_path, others=[writer])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in writer.rows] == [row["step"] for row in rows]
    for (_, scalars), row in zip(writer.rows, rows, strict=True):
        values = {k: v for k, v in row.items() if k not in ("step", "split")}
        assert scalars.items() >= {f"{row['split']}/{k}": v for k, v in values.items()}.items()
    assert any("train/images_per_second" in scalars for _, scalars in writer.rows)
    assert writer.closed == 1


def test_writers_close_after_an_error(tmp_path: pathlib.Path) -> None:
    writer = _Scalars()
    with pytest.raises(errors.UserError, match="became nan"):
        loop.run(fakes.parts(fakes.config(), poisoned=(2,)), tmp_path, others=[writer])
    assert writer.closed == 1


def test_weights_and_biases(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, writers = [], []

    def init(**how: object) -> types.SimpleNamespace:
        writer = _Scalars()
        started.append(how)
        writers.append(writer)
        log = lambda values, step: writer.write_scalars(step, values)  # noqa: E731
        return types.SimpleNamespace(log=log, finish=writer.close)

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    fakes.run(fakes.config(), tmp_path / "off")
    assert not started
    config = fakes.config(**{"train.wandb": "vits"})
    for _ in range(2):
        fakes.run(config, tmp_path / "mine")
    first, second = started
    assert first["project"] == "vits" and first["name"] == "mine" and first["resume"] == "allow"
    assert first["config"]["train"]["steps"] == 9
    assert first["id"] == second["id"] and len(first["id"]) == 16  # continues the same run
    assert [step for step, _ in writers[0].rows] == [4, 6, 6, 8, 9, 9]
    assert [writer.closed for writer in writers] == [1, 1]


def test_weights_and_biases_are_not_installed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(errors.UserError, match=r"run `pip install wandb`, or set --config\.train"):
        fakes.run(fakes.config(**{"train.wandb": "vits"}), tmp_path)


def test_weights_and_biases_without_a_login(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**_: object) -> None:
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    with pytest.raises(errors.UserError, match=r"api_key not configured\): run `wandb login`"):
        fakes.run(fakes.config(**{"train.wandb": "vits"}), tmp_path)
