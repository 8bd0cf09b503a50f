"""What XLA writes of a program while it compiles it for a GPU: thunks, which the host launches, and
PTX of kernels.

The host waits for the GPU at a conditional outside a command buffer, and at each turn of a loop
outside one whose number of turns the compiler does not know. In a command buffer it never waits.
"""

import dataclasses
import importlib.util
import pathlib
import re
import shutil
import subprocess

from avit_jax.utils import errors

_THUNK = re.compile(r"^( *)(\d+): (k\w+)")
_NAMED = re.compile(r'profile_annotation: "([^"]+)"\s+thunk_id: (\d+)\s+\}\s+thunk_kind: "kWhile"')
_KERNEL = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


@dataclasses.dataclass(frozen=True)
class Thunk:
    """One entry of the list of thunks.

    Attributes:
      kind: such as kConditional.
      name: of a loop, the name of its instruction; else empty.
      is_buffered: whether it is part of a command buffer.
    """

    kind: str
    name: str
    is_buffered: bool


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What a kernel needs of a multiprocessor.

    Attributes:
      registers: of each thread.
      spills: bytes of each thread that are stored to memory or loaded from it for want of
        registers.
    """

    registers: int
    spills: int


def options(folder: str) -> dict[str, str]:
    """Options of the compiler that make it write to a folder."""
    return {"xla_dump_to": folder}


def thunks(folder: str) -> list[Thunk]:
    """Thunks of the only program that was compiled into a folder."""
    names = {
        int(number): name for name, number in _NAMED.findall(_only(folder, "*.thunk_metadata.txt"))
    }
    # Without the first file the compiler found nothing that is worth a command buffer.
    text = _only(folder, "*.thunk_sequence_after_thunk_passes.txt") or _only(
        folder, "*.thunk_sequence.txt"
    )
    if not text:
        raise ValueError(
            f"{folder} has no list of thunks"
        )  # else no conditional would be found in it
    found, buffer = [], None  # how far the command buffer that holds the line is indented
    for line in text.splitlines():
        match = _THUNK.match(line)
        if not match:
            continue
        indent, kind = len(match[1]), match[3]
        if buffer is not None and indent <= buffer:
            buffer = None
        found.append(
            Thunk(
                kind, names.get(int(match[2]), "") if kind == "kWhile" else "", buffer is not None
            )
        )
        if buffer is None and kind == "kCommandBuffer":
            buffer = indent
    return found


def ptxas() -> str | None:
    """The assembler of CUDA: of the wheel nvidia-cuda-nvcc, or on the path; None where there is
    none.
    """
    spec = importlib.util.find_spec("nvidia")
    wheels = (
        []
        if spec is None
        else [pathlib.Path(place) for place in spec.submodule_search_locations or []]
    )
    found = [path for wheel in wheels for path in wheel.glob("*/bin/ptxas")]
    return str(found[0]) if found else shutil.which("ptxas")


def kernels(folder: str, architecture: str) -> dict[str, Kernel]:
    """Kernels that XLA made, without those of libraries, by name; {} without `ptxas`.

    Args:
      folder: see `thunks`.
      architecture: such as sm_90a.
    """
    assembler, found = ptxas(), {}
    for path in sorted(pathlib.Path(folder).glob("*.ptx")) if assembler else []:
        if ".entry" not in path.read_text():  # constants alone
            continue
        command = [assembler, "-v", f"-arch={architecture}", str(path), "-o", "/dev/null"]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise errors.UserError(f"{assembler} cannot read {path.name}: {result.stderr.strip()}")
        found |= parse(result.stdout + result.stderr)
    return found


def parse(log: str) -> dict[str, Kernel]:
    """What `ptxas -v` says of kernels."""
    found = {}
    for part in log.split("ptxas info    : Compiling")[1:]:
        name, spills, registers = (
            x.search("Compiling" + part) for x in (_KERNEL, _SPILLS, _REGISTERS)
        )
        if name and spills and registers:
            found[name[1]] = Kernel(int(registers[1]), int(spills[1]) + int(spills[2]))
    return found


def _only(folder: str, pattern: str) -> str:
    paths = list(pathlib.Path(folder).glob(pattern))
    if len(paths) > 1:
        raise ValueError(f"{folder} has several {pattern}")
    return paths[0].read_text() if paths else ""
