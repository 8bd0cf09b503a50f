"""Command line: `python -m avit_jax.main --config=digits --workdir=runs/digits`."""

import signal

from avit_jax.utils import signals

if __name__ == "__main__":  # before the other imports, which take seconds
    signals.end_on_interrupt()
elif __name__ == "__mp_main__":  # a reading process, which ends with the training process
    signal.signal(signal.SIGINT, signal.SIG_IGN)

from absl import app, flags

from avit_jax import cli, output

flags.adopt_module_key_flags(cli)  # --helpshort shows them


def main(argv: list[str]) -> None:
    """Runs the mode that the flags choose."""
    with output.exit_on_error():
        from avit_jax.training import distributed

        cli.start_devices()
        with distributed.ended_together():
            cli.start_log()
            cli.run_mode(argv[1:])


def start() -> None:
    """Parses the flags and runs the program."""
    with output.complete_output():
        try:
            app.run(main, flags_parser=cli.parse)
        except SystemExit as ended:
            if not ended.code:
                signals.end_on_interrupt(status=0)  # nothing is left to interrupt
            raise


if __name__ == "__main__":
    start()
