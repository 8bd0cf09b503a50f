"""Runs as programs of their own: killed, of several processes, on other numbers of devices; slow,
as each has to start.
"""

import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import chex
import fixtures
import numpy as np
import pytest

pytestmark = pytest.mark.slow
_REPOSITORY = pathlib.Path(__file__).parents[2]
_OVERRIDES = {
    "train.steps": 24,
    "train.log_every": 6,
    "train.save_every": 6,
    "train.eval_every": 12,
}


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Iterator[object]:
    """Starts a process of a run in the given workdir; whatever still runs in the end is killed."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        "import pathlib, sys\n"
        f"sys.path.insert(0, {str(_REPOSITORY / 'tests')!r})\n"
        "import fixtures\n"
        f"def get_config():\n  return fixtures.small_config(**{_OVERRIDES})\n"
    )
    running = []

    def start_one(
        workdir: str, devices: int, *options: str, stdout: int | None = None
    ) -> subprocess.Popen:
        environment = os.environ | {
            "PYTHONPATH": str(_REPOSITORY),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        }
        command = [
            sys.executable,
            "-m",
            "avit_jax.main",
            f"--config={recipe}",
            f"--workdir={tmp_path / workdir}",
            *options,
        ]
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield start_one
    for process in running:
        process.kill()
        process.communicate()


def _wait_for(process: subprocess.Popen, text: str) -> None:
    """Reads what a process says up to a line with the text."""
    said = []
    for line in process.stderr:
        said.append(line)
        if text in line:
            return
    pytest.fail("it ended before: " + "".join(said))


def _end(process: subprocess.Popen, status: int = 0) -> str:
    """Waits for the end; what it said that has not been read yet."""
    _, said = process.communicate(timeout=400)
    assert process.returncode == status, said
    return said


def _pair(start, workdir: str, *options: str, each: Sequence[str] = ()) -> list[subprocess.Popen]:
    """Two processes with four devices each; options of both, and one for each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = [f"--coordinator=localhost:{port}", "--num_processes=2", *options]
    return [start(workdir, 4, *shared, *each[i : i + 1], f"--process_id={i}") for i in range(2)]


def _stop_at(process: subprocess.Popen, text: str, others: Sequence[subprocess.Popen] = ()) -> int:
    """Asks the last process to stop when the first one has said the text; the step after which all
    have stopped.
    """
    _wait_for(process, text)
    [process, *others][-1].terminate()
    said = [_end(one) for one in (process, *others)]
    assert not any("stopped" in text for text in said[1:])  # one process speaks for all
    return int(re.search(r"stopped by SIGTERM after step (\d+)", said[0])[1])


def test_devices_and_processes_may_change(start, tmp_path: pathlib.Path) -> None:
    _end(start("whole", 8))
    one, other = _pair(start, "parts")
    steps = [_stop_at(one, "step 12/24", [other]), _stop_at(start("parts", 4), "step 18/24")]
    _end(start("parts", 8))
    assert 12 <= steps[0] <= steps[1] < 24
    whole, parts = (
        fixtures.restored_state(fixtures.small_config(), tmp_path / name)
        for name in ("whole", "parts")
    )
    assert whole.step == parts.step == 24
    chex.assert_trees_all_close(parts.params, whole.params, atol=1e-6)
    chex.assert_trees_all_close(parts.ema_params, whole.ema_params, atol=1e-6)
    for name in ("whole", "parts"):
        assert len((tmp_path / name / "metrics.jsonl").read_text().splitlines()) == 6
        assert (tmp_path / name / "depth.png").exists()


@pytest.mark.parametrize("victim", [0, 1])
def test_a_dead_process_ends_the_other(start, victim: int) -> None:
    pair = _pair(start, "run", "--config.train.steps=100000")
    _wait_for(pair[0], "step 6/")
    pair[victim].kill()
    killed = time.monotonic()
    *_, last = _end(pair[1 - victim], status=2).splitlines()
    assert time.monotonic() - killed < 60
    assert last.startswith("error: another process of the run has ended")


def test_other_modes_than_training_in_two_processes(start, tmp_path: pathlib.Path) -> None:
    _end(start("run", 4))
    for out, mode in (("network.avit", "export"), ("weights.safetensors", "calibrate")):
        options = [
            f"--mode={mode}",
            f"--out={tmp_path / out}",
            *["--budget=0.7"] * (mode == "calibrate"),
        ]
        pair = _pair(
            start,
            "run",
            *options,
            each=(f"--checkpoint={tmp_path / 'run'}", f"--checkpoint={tmp_path / 'elsewhere'}"),
        )
        said = [_end(one) for one in pair]
        assert f"wrote {tmp_path / out}" in said[0] and not said[1], said
        assert (tmp_path / out).exists()


def test_mean_average_precision_of_two_processes(start, tmp_path: pathlib.Path) -> None:
    fixtures.multi_label_folder(tmp_path / "data")
    options = [f"--config.data.dir={tmp_path / 'data'}", "--config.data.name=folder"]
    options += ["--config.data.eval_split=val", "--config.model.num_classes=4"]
    options += ["--config.loss.sigmoid=True", "--config.eval.batch_size=8"]
    _end(start("run", 1, "--config.train.steps=2", *options))
    for one in _pair(start, "run", "--mode=eval", *options):
        _end(one)
    summary, found = (
        json.loads((tmp_path / "run" / name).read_text()) for name in ("summary.json", "eval.json")
    )
    assert found["class_average_precision"] == pytest.approx(summary["class_average_precision"])
    assert 0 < found["mean_average_precision"] < 1


def test_processes_of_another_configuration(start) -> None:
    rates = [f"--config.optimizer.learning_rate={rate}" for rate in (1e-3, 2e-3)]
    first, second = (_end(one, status=2) for one in _pair(start, "run", each=rates))
    assert (
        "differs from that of the first process: optimizer.learning_rate from 0.001 to 0.002"
        in second
    )
    assert "another process of the run has ended" in first and "Traceback" not in first


def test_sigterm_ends_what_is_no_training(start, tmp_path: pathlib.Path) -> None:
    _end(start("run", 4))
    image = tmp_path / "image.png"
    image.write_bytes(fixtures.png(np.zeros((16, 16), np.uint8)))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    one = [f"--coordinator={address}", "--num_processes=1", "--process_id=0"]
    images = [str(image)] * 10_000  # more than it reads before the signal comes
    process = start("run", 4, "--mode=predict", *one, *images, stdout=subprocess.PIPE)
    assert process.stdout.readline()
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM


def test_a_dead_worker_costs_nothing(start, tmp_path: pathlib.Path) -> None:
    run = start(
        "run",
        1,
        "--config.data.num_workers=2",
        "--config.train.steps=100000",
        "--config.train.save_every=100000",
    )
    _wait_for(run, "step 6/")
    children = [
        child
        for path in pathlib.Path(f"/proc/{run.pid}/task").glob("*/children")
        for child in path.read_text().split()
    ]
    workers = [
        child
        for child in children
        if b"spawn_main" in pathlib.Path(f"/proc/{child}/cmdline").read_bytes()
    ]
    os.kill(int(workers[-1]), signal.SIGKILL)
    said = _end(run, status=2)
    assert (
        "\nerror: a process that reads the training data has died" in said
        and "Traceback" not in said
    ), said
    assert fixtures.restored_state(fixtures.small_config(), tmp_path / "run").step >= 6


def test_workers_end_with_the_process_they_read_for(start) -> None:
    run = start("run", 1, "--config.data.num_workers=2", "--config.train.steps=100000")
    _wait_for(run, "step 6/")
    run.kill()
    run.communicate(timeout=30)  # their end of the pipe is closed too


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_workers_too(
    start, tmp_path: pathlib.Path, number: signal.Signals
) -> None:
    run = start("run", 1, "--config.data.num_workers=2")
    _wait_for(run, "step 6/24")
    os.killpg(run.pid, number)
    said = _end(run)
    assert f"stopped by {number.name} after step" in said
    assert "Traceback" not in said
    assert fixtures.restored_state(fixtures.small_config(), tmp_path / "run").step >= 6


_QUICKLY = (
    "import sys\nfrom avit_jax import main\nfrom avit_jax.training import distributed\n"
    "distributed.START_SECONDS = 6\nmain.start()"
)


def _join(*processes: tuple[str, int, int]) -> list[tuple[float, str]]:
    """Processes of (address, number of processes, id) that cannot meet within six seconds: when
    they end, and what they say.
    """
    environment = os.environ | {
        "PYTHONPATH": str(_REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    started, running = time.monotonic(), []
    for address, number, one in processes:
        options = [
            f"--coordinator={address}",
            f"--num_processes={number}",
            f"--process_id={one}",
            "--workdir=/nowhere",
        ]
        command = [sys.executable, "-c", _QUICKLY, "--config=configs/digits.py", *options]
        running.append(
            subprocess.Popen(
                command, cwd=_REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
            )
        )
    ended = []
    for process in running:
        said = _end(process, status=2)
        assert said.startswith("error: ") and said.count("\n") == 1, said  # no stack trace of C++
        ended.append((time.monotonic() - started, said))
    return ended


def _port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def test_a_coordinator_that_is_not_there() -> None:
    for address, told in (
        (f"localhost:{_port()}", "refused"),
        ("no.such.host.invalid:1234", "no.such.host.invalid:1234: "),
    ):
        ((seconds, said),) = _join((address, 2, 1))
        assert (
            "this process cannot join the others" in said
            and told in said
            and "within 6 seconds" in said
        )
        assert 5 < seconds < 60


def test_a_coordinator_that_says_nothing_and_a_port_in_use() -> None:
    with socket.create_server(("localhost", 0)) as silent:
        address = f"localhost:{silent.getsockname()[1]}"
        ((seconds, second),) = _join((address, 2, 1))
        assert (
            5 < seconds < 60
            and "this process cannot join the others (they do not answer)" in second
        )
        ((_, first),) = _join((address, 2, 0))
        assert (
            f"port {silent.getsockname()[1]} of --coordinator cannot be opened (another program "
            "uses it" in first
        )


def test_processes_that_do_not_come_or_come_twice() -> None:
    address = f"localhost:{_port()}"
    ((_, alone),) = _join((address, 2, 0))
    assert "this process cannot join the others (they do not answer)" in alone
    said = [one for _, one in _join((address, 3, 0), (address, 3, 1), (address, 3, 1))]
    assert all("this process cannot join the others" in one for one in said)
    assert any("another process has the same --process_id" in one for one in said[1:])
    said = [one for _, one in _join((address, 2, 0), (address, 2, 0))]
    assert any("another process has --process_id=0 too" in one for one in said)
    first, other = (one for _, one in _join((address, 2, 0), (address, 3, 2)))
    assert "cannot join" in first and "--num_processes is not the same on all" in other


def test_an_interruption_while_the_others_are_waited_for() -> None:
    command = [
        sys.executable,
        "-m",
        "avit_jax.main",
        "--config=configs/digits.py",
        f"--coordinator=localhost:{_port()}",
    ]
    environment = os.environ | {
        "PYTHONPATH": str(_REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    for one in (0, 1):
        each = [*command, "--num_processes=2", f"--process_id={one}"]
        process = subprocess.Popen(
            each, cwd=_REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True
        )
        time.sleep(15)
        process.send_signal(signal.SIGINT)
        assert _end(process, status=130) == "error: interrupted.\n"


def test_wrong_flags_of_processes(start) -> None:
    for options, told in (
        (["--num_processes=2"], "give all of --coordinator"),
        (["--coordinator=here:1", "--num_processes=2", "--process_id=2"], "below --num_processes"),
        (["--coordinator=here", "--num_processes=2", "--process_id=0"], "host:port"),
    ):
        said = _end(start("run", 1, *options), status=2)
        assert said.startswith("error: ") and told in said and said.count("\n") == 1
