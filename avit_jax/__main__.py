"""The program `avit-jax`, and `python -m avit_jax`: both run `main.py` as `__main__`."""

import runpy


def run() -> None:
    """Runs the program.

    As `main.py` is then the main module, it handles Ctrl-C before the other imports, and processes
    that read data find it.
    """
    runpy.run_module("avit_jax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    run()
