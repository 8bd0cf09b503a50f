"""The output of the program: that nobody reads, that does not fit, and in every encoding; and its
end by Ctrl-C.
"""

import contextlib
import io
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from command_line import DIGITS as _DIGITS
from command_line import REPOSITORY as _REPOSITORY
from command_line import as_the_program_starts  # noqa: F401
from command_line import parse as _parse

from avit_jax import main, output

# How ml_collections loads a recipe.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"
)


def _output(command: list[str], code: str = "", **environment: str) -> tuple[int, bytes, bytes]:
    """Status, output and errors of a program; without code, one that nobody reads the output of."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(_REPOSITORY),
        **environment,
    }
    with subprocess.Popen(
        [sys.executable, *command, *([code] if code else [])],
        cwd=_REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        if not code:
            process.stdout.close()
            process.stdout = None
        out, said = process.communicate(timeout=120)
    return process.returncode, out, said


# The program with another main function.
_PRINTING = """
import sys
from avit_jax import main
main.cli.parse = lambda argv: main.flags.FLAGS(argv[:1])
main.main = {}
main.start()
"""


def test_nobody_reads_the_output() -> None:
    assert _output(["-m", "avit_jax.main", "--help"]) == (141, None, b"")
    printing = _PRINTING.format("lambda argv: print('lost')")
    assert _output(["-c", printing]) == (141, None, b"")


def test_no_room_for_the_output() -> None:
    command = f"{sys.executable} -m avit_jax.main --help > /dev/full"
    ended = subprocess.run(
        command, shell=True, cwd=_REPOSITORY, stderr=subprocess.PIPE, text=True, check=False
    )
    assert ended.returncode == 2 and ended.stderr == "error: [Errno 28] No space left on device\n"


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [("ascii", rb"\xe9 \U0001f600"), ("cp1252", b"\xe9 \\U0001f600"), ("utf-8", "é 😀".encode())],
)
def test_characters_that_an_encoding_does_not_have(encoding: str, expected: bytes) -> None:
    printing = _PRINTING.format(r"lambda argv: print('\xe9 \U0001f600')")
    assert _output(["-c"], printing, PYTHONIOENCODING=encoding) == (0, expected + b"\n", b"")


def test_predictions_that_nobody_reads(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exit_(status: int) -> None:
        raise SystemExit(status)

    def predict(*_: object) -> Iterator[None]:
        print("row", flush=True)
        yield

    reader, writer = os.pipe()
    os.close(reader)
    _parse(_DIGITS, "--mode=predict", f"--workdir={tmp_path}")
    monkeypatch.setattr(os, "_exit", exit_)
    monkeypatch.setattr("avit_jax.tools.predict.predict", predict)
    stdout = os.fdopen(writer, "w")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as stderr:
        patch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as ended:
            main.main(["main"])
    with contextlib.suppress(BrokenPipeError):
        stdout.close()
    assert ended.value.code == 141 and stderr.getvalue() == ""


def test_an_interruption_of_predictions_keeps_those_made() -> None:
    before, seen = signal.signal(signal.SIGINT, lambda *_: None), []
    try:
        with (
            pytest.raises(KeyboardInterrupt),
            output.interruptible(iter("abcdef"), keeps=True) as shown,
        ):
            for one in shown:
                seen.append(one)
                if one == "b":
                    signal.raise_signal(signal.SIGINT)
                    time.sleep(1)  # another thread hears it
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == ["a", "b"]


def test_the_compiler_is_quiet_in_python_too() -> None:
    """XLA reports what it cannot dump as it reports slow compilation: as an error of its log."""
    compile_one = "import jax\nprint(jax.jit(lambda x: x + 1)(1))"
    flags = {"XLA_FLAGS": "--xla_dump_to=/proc/nowhere"}
    noisy = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", noisy)
        assert b"/proc/nowhere" in _output(["-c"], compile_one, **flags)[2]
        quiet = _output(["-c"], f"import avit_jax\n{compile_one}", **flags)
    assert quiet == (0, b"2\n", b"")
