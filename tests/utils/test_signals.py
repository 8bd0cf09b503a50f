"""Ctrl-C is heard at any moment: in a callback of a library, in C++, and while it matters what is
kept.
"""

import os
import pathlib
import select
import signal
import subprocess
import sys
import time

import pytest

from avit_jax.utils import signals

_REPOSITORY = pathlib.Path(__file__).parents[2]
_ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(_REPOSITORY),
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "",
}
_SMALL = [
    "--config=configs/digits.py",
    "--config.train.steps=100000",
    "--config.train.save_every=100000",
    "--config.train.log_every=1",
    "--config.model.width=16",
    "--config.model.depth=3",
    "--config.loss.target_depth=2.0",
    "--config.train.batch_size=8",
]
# Exceptions are printed and lost in a callback.
_RECIPE = """
import ctypes, sys, time
@ctypes.CFUNCTYPE(None)
def callback():
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
callback()
"""
# A main thread that runs C, and no bytecode of Python, until it can read.
_BUSY = """
import ctypes, signal, sys
from avit_jax.training import distributed
with distributed.Stop() as stop:
    assert not stop()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # another thread gets the signal
    print("ready", file=sys.stderr, flush=True)
    ctypes.CDLL(None).read(0, ctypes.create_string_buffer(1), 1)
    assert stop()
"""

_TWICE = """
import signal, time
from avit_jax.training import distributed
with distributed.Stop() as stop:
    assert not stop()
    signal.raise_signal(signal.SIGINT)
    assert stop()
    signal.raise_signal(signal.SIGTERM)
    time.sleep(60)
"""


def _start(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=_REPOSITORY,
        env=_ENVIRONMENT,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _after_ready(process: subprocess.Popen) -> None:
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGINT)


def test_an_interruption_is_not_lost_in_a_callback(tmp_path: pathlib.Path) -> None:
    (tmp_path / "recipe.py").write_text(_RECIPE)
    with _start("-m", "avit_jax.main", f"--config={tmp_path / 'recipe.py'}") as process:
        _after_ready(process)
        assert process.communicate(timeout=20)[1] == "error: interrupted.\n"
    assert process.returncode == 130


def test_the_handler_comes_before_slow_imports() -> None:
    code = (
        "import sys, signal, avit_jax.utils.signals\nassert not {'jax', 'numpy', 'absl', "
        "'flax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=_REPOSITORY, check=True)
    lines = (_REPOSITORY / "avit_jax/main.py").read_text().splitlines()
    imports = [
        line
        for line in lines[: lines.index("    signals.end_on_interrupt()")]
        if line.startswith(("import", "from"))
    ]
    assert imports == ["import signal", "from avit_jax.utils import signals"]


def test_a_busy_main_thread() -> None:
    for end in ("it goes on", "a second signal"):
        with _start("-c", _BUSY) as process:
            _after_ready(process)
            assert select.select([process.stderr], [], [], 30)[0], (
                "nothing is said while the main thread is busy"
            )
            assert (
                process.stderr.readline()
                == "SIGINT: stopping after the current step; a second signal stops at once\n"
            )
            if end == "it goes on":
                process.stdin.write("x")
            else:
                process.send_signal(signal.SIGINT)
                process.wait(timeout=30)
            assert process.communicate(timeout=30)[1] == ""
        assert process.returncode == (0 if end == "it goes on" else 130)


def test_a_second_signal_ends_at_once() -> None:
    with _start("-c", _TWICE) as process:
        said = process.communicate(timeout=50)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert said == "SIGINT: stopping after the current step; a second signal stops at once\n"


def test_listeners_nest() -> None:
    heard = []

    def wait_for(expected: list[tuple[str, int]]) -> None:
        deadline = time.monotonic() + 10
        while heard != expected and time.monotonic() < deadline:
            time.sleep(0.01)
        assert heard == expected
        heard.clear()

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        with signals.heard(lambda number: heard.append(("outer", number))):
            with signals.heard(lambda number: heard.append(("inner", number))):
                signal.raise_signal(signal.SIGUSR1)
                wait_for([("inner", signal.SIGUSR1)])
            signal.raise_signal(signal.SIGUSR1)
            wait_for([("outer", signal.SIGUSR1)])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert signal.set_wakeup_fd(-1) == -1


def test_an_interruption_removes_what_is_written_in_part(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys\nfrom etils import epath\nfrom avit_jax import files, signals\n"
        "path = type(epath.Path('x'))\n"
        "path.write_bytes = lambda self, content: (open(self, 'wb').close(), "
        "signals.interrupted())\n"
        f"files.write({str(tmp_path / 'a')!r}, 'text')\n"
    )
    with _start("-c", code) as process:
        assert process.communicate(timeout=60)[1] == "error: interrupted.\n"
    assert process.returncode == 130 and list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_at_many_moments_of_a_start(tmp_path: pathlib.Path, number: signal.Signals) -> None:
    for i, seconds in enumerate((0.2, 0.4, 0.8, 1.3, 1.9, 2.7, 4.0, 6.0, 9.0, 14.0)):
        workdir = tmp_path / str(i)
        with _start("-m", "avit_jax.main", *_SMALL, f"--workdir={workdir}") as process:
            time.sleep(seconds)
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
        assert "Traceback" not in said, (seconds, said)
        if (
            process.returncode == 0
        ):  # SIGTERM is caught somewhat earlier than a step is there to be saved
            saved = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
            assert saved or "stopped by SIGTERM after step 0" in said, (seconds, said)
        elif number == signal.SIGINT:
            assert process.returncode == 130 and said.endswith("error: interrupted.\n"), (
                seconds,
                said,
            )
        else:
            assert process.returncode == -signal.SIGTERM, (seconds, said)
