"""Runs one section in a process of its own.

python -m experiments.accelerators.section --section=static --out=FOLDER
"""

import functools
import pathlib

from absl import app, flags

from avit_jax.utils import errors
from experiments.accelerators import bench, equality, kernels, machine, removal, static, switch

_SECTIONS = {
    "machine": machine.run,
    "static": static.run,
    "removal": removal.run,
    "removal_old_flags": functools.partial(removal.run, options=bench.OLD_FLAGS),
    "equality": equality.run,
    "switch": switch.run,
    "kernels": kernels.run,
}
_SECTION = flags.DEFINE_enum("section", None, list(_SECTIONS), "what to measure", required=True)
_OUT = flags.DEFINE_string("out", None, "folder; <section>.jsonl in it is replaced", required=True)
_TINY = flags.DEFINE_bool("tiny", False, "a rehearsal: a small network, few images")


def main(_: list[str]) -> None:
    """Measures and writes."""
    rows = bench.Rows(pathlib.Path(_OUT.value) / f"{_SECTION.value}.jsonl")
    _SECTIONS[_SECTION.value](rows, bench.TINY if _TINY.value else bench.FULL)


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
