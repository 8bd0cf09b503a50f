"""What a program compiled for a GPU does, counted from its text: kernels, bytes they move, casts of
parameters, branches.

Nothing runs. Every kernel is counted as if it read and wrote each of its arrays once; what caches
save is not known. A Triton kernel on packed tokens is counted by its rows, see `Rows`.
"""

import dataclasses
import functools
import math
import re

_BYTES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "s16": 2,
    "u16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
}
_BYTES |= {"s64": 8, "u64": 8}
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(
    r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\("
)  # shapes in a tuple hold no brackets ()
_CALLED = re.compile(r"(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRITON = 'custom_call_target="__gpu$xla.gpu.triton"'
_RUNS = ("while", "conditional", "call", "async-start")
_FREE = (
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "after-all",
    "partition-id",
    "replica-id",
)
_VIEWS = ("bitcast", "reshape", "copy", "dynamic-slice", "slice", "transpose")


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    line: str
    is_root: bool

    @functools.cached_property
    def bytes(self) -> int:
        """Of the result, without the workspace of a library's call."""
        arrays = [(kind, dims) for kind, dims in _ARRAY.findall(self.shape) if kind in _BYTES]
        if self.op == "custom-call" and len(arrays) > 1 and arrays[-1][0] in ("s8", "u8"):
            arrays.pop()
        return sum(
            _BYTES[kind] * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in arrays
        )

    def called(self) -> list[str]:
        """Names of the computations that it runs."""
        branches = _BRANCHES.search(self.line)
        if branches:
            return [name.strip().lstrip("%") for name in branches[1].split(",")]
        return _CALLED.findall(self.line)


@dataclasses.dataclass(frozen=True)
class Count:
    """What one run of a computation does.

    Attributes:
      bytes: read and written by its kernels.
      kernels: number of them; a call of a library is one.
      casts: kernels that cast a parameter of the program to another dtype, each time a loop runs.
      branches: conditionals in it.
    """

    bytes: int = 0
    kernels: int = 0
    casts: int = 0
    branches: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(
            *(
                a + b
                for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
            )
        )

    def __mul__(self, times: int) -> "Count":
        return Count(*(a * times for a in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Rows:
    """How many rows of their buffer the Triton kernels of a program compute.

    Their programs past the last token return at once. So an array with a row for each row of the
    buffer counts by the rows in blocks that hold a token. A kernel gets the weights of all layers
    and reads those of one: these count once, whatever the number of rows. All other arrays count
    in full.

    Attributes:
      buffer: rows of the buffer.
      computed: rows in blocks that hold a token.
      layers: number of layers.
    """

    buffer: int
    computed: int
    layers: int


class Program:
    """A compiled program.

    Args:
      text: `compiled.as_text()`.
      rows: of its Triton kernels; None counts all of their arrays in full.
    """

    def __init__(self, text: str, rows: Rows | None = None) -> None:
        self._rows = rows
        self._computations: dict[str, dict[str, _Instruction]] = {}
        current: dict[str, _Instruction] = {}
        for line in text.splitlines():
            header, found = _HEADER.match(line), _INSTRUCTION.match(line)
            if header:
                current = self._computations[header[2]] = {}
                if header[1]:
                    self._entry = header[2]
            elif found:
                arguments = line[found.end() : _closing(line, found.end())]
                operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
                current[found[2]] = _Instruction(
                    found[2], found[3], found[4], operands, line, bool(found[1])
                )
        entry = self._computations[self._entry].values()
        self._parameters = {tuple(_ARRAY.findall(x.shape)) for x in entry if x.op == "parameter"}

    def total(self) -> Count:
        """Of one run of the program."""
        return self._count(self._entry)

    def loops(self, trips: int) -> list[Count]:
        """One turn of each loop that the compiler knows to run so many times."""
        whiles = [x for of in self._computations.values() for x in of.values() if x.op == "while"]
        return [self._count(x.called()[0]) for x in whiles if _trips(x) == trips]

    def is_open(self, loop: str) -> bool:
        """Whether the compiler does not know how many turns a loop takes."""
        return not any(
            _TRIPS.search(of[loop].line) for of in self._computations.values() if loop in of
        )

    def estimated_cycles(self, trips: int) -> int:
        """Of one run of a program for a TPU: the sum of what the compiler says of each instruction.

        Of a conditional the longest branch counts. The compiler does not say how many turns a loop
        takes.

        Args:
          trips: turns of each loop.
        """
        return self._cycles(self._entry, trips)

    def _cycles(self, computation: str, trips: int) -> int:
        cycles = 0
        for x in self._computations[computation].values():
            called = [self._cycles(name, trips) for name in x.called()] if x.op in _RUNS else [0]
            found = _CYCLES.search(x.line)
            cycles += int(found[1]) if found else 0
            cycles += (
                max(called)
                if x.op == "conditional"
                else sum(called) * (trips if x.op == "while" else 1)
            )
        return cycles

    def _count(self, computation: str) -> Count:
        instructions = self._computations[computation]
        return sum((self._cost(x, instructions) for x in instructions.values()), Count())

    def _cost(self, x: _Instruction, beside: dict[str, _Instruction]) -> Count:
        if x.op in _FREE or x.op.endswith("-done"):
            return Count()
        if x.op == "while":
            return self._count(x.called()[0]) * _trips(x)
        if x.op == "conditional":
            branches = [self._count(name) for name in x.called()]
            return max(branches, key=lambda count: count.bytes) + Count(branches=1)
        if x.op == "call" or x.op == "async-start":
            return sum((self._count(name) for name in x.called()), Count())
        operands = [beside[name] for name in x.operands if name in beside]
        if self._rows is not None and _TRITON in x.line:
            return Count(sum(_kernel_bytes(y, self._rows) for y in (x, *operands)), 1)
        if x.op != "fusion":
            return Count(_own_bytes(x, operands), 1)
        fused = self._computations[x.called()[0]]
        written = sum(_written(root, fused) for root in _roots(fused))
        read = sum(
            _read(parameter, fused) for parameter in fused.values() if parameter.op == "parameter"
        )
        return Count(written + read, 1, casts=int(self._casts(fused)))

    def _casts(self, fused: dict[str, _Instruction]) -> bool:
        """Whether a fused kernel does little but cast a slice of a parameter of the program."""
        for x in fused.values():
            source = fused.get(x.operands[0]) if x.op == "convert" else None
            while source is not None and source.op in _VIEWS:
                source = fused[source.operands[0]]
            if (
                source is not None
                and source.op == "parameter"
                and tuple(_ARRAY.findall(source.shape)) in self._parameters
            ):
                return len(_ARRAY.findall(source.shape)[0][1].split(",")) > 1
        return False


def _closing(line: str, start: int) -> int:
    depth = 1
    for i in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[i], 0)
        if not depth:
            return i
    return len(line)


def _trips(x: _Instruction) -> int:
    found = _TRIPS.search(x.line)
    return int(found[1]) if found else 1


def _kernel_bytes(x: _Instruction, rows: Rows) -> int:
    """Bytes of an argument or a result of a Triton kernel that computes some rows."""
    total = 0
    for kind, dims in _ARRAY.findall(x.shape):
        shape = [int(n) for n in dims.split(",") if n]
        if shape[0] == rows.buffer:
            shape[0] = rows.computed
        elif shape[0] == rows.layers and len(shape) > 1:
            shape[0] = 1
        total += _BYTES[kind] * math.prod(shape)
    return total


def _own_bytes(x: _Instruction, operands: list[_Instruction]) -> int:
    if x.op in ("dynamic-slice", "slice", "gather"):
        return 2 * x.bytes
    if x.op == "dynamic-update-slice":
        return 2 * operands[1].bytes
    return x.bytes + sum(operand.bytes for operand in operands)


def _read(parameter: _Instruction, fused: dict[str, _Instruction]) -> int:
    """Bytes that a kernel reads of one argument: slices where it takes nothing else, nothing where
    it only writes into it.
    """
    names, users = {parameter.name}, []
    for x in fused.values():  # in order, so that a view comes after its source
        if x.op == "bitcast" and x.operands[0] in names:
            names.add(x.name)
        elif names & set(x.operands):
            users.append(x)
    sliced = {"dynamic-slice", "slice", "gather", "dynamic-update-slice"}
    if not users or any(x.op not in sliced or x.operands[0] not in names for x in users):
        return parameter.bytes
    return min(
        parameter.bytes, sum(0 if x.op == "dynamic-update-slice" else x.bytes for x in users)
    )


def _roots(fused: dict[str, _Instruction]) -> list[_Instruction]:
    root = next(x for x in fused.values() if x.is_root)
    return [fused[name] for name in root.operands] if root.op == "tuple" else [root]


def _written(root: _Instruction, fused: dict[str, _Instruction]) -> int:
    while root.op == "bitcast":
        root = fused[root.operands[0]]
    return fused[root.operands[1]].bytes if root.op == "dynamic-update-slice" else root.bytes
