"""Receivers of metrics besides the workdir: any object with the two methods of `ScalarWriter`.

Writers of clu have these methods. `loop.train(config, workdir, writers=[...])` takes such objects.
"""

import secrets
from collections.abc import Mapping
from typing import Any, Protocol

from etils import epath

from avit_jax.utils import errors, files

_ID_FILE = "wandb_id"


class ScalarWriter(Protocol):
    """Receives the metrics of a run, on the first process only."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Receives the values of one step by name, such as `train/loss` or `eval/top1`."""

    def close(self) -> None:
        """Ends the output; the run calls it at its end, also after an error."""


class WandbWriter:
    """Writes to Weights & Biases; a resumed run continues there too.

    Args:
      project: name of the project.
      workdir: of the run; its name becomes the name of the run, and it keeps the run's id.
      config: the configuration, which the run shows.

    Raises:
      errors.UserError: wandb is not installed, or there is no login or network.
    """

    def __init__(self, project: str, workdir: epath.Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise errors.UserError(
                "config.train.wandb needs a package: run `pip install wandb`, or set "
                "--config.train.wandb= to train without it."
            ) from error
        file = workdir / _ID_FILE
        if not file.exists():
            files.write(file, secrets.token_hex(8))
        how = {"project": project, "id": file.read_text(), "resume": "allow"}
        try:
            self._run = wandb.init(name=workdir.name, config=dict(config), **how)
        except Exception as error:  # no login, no network
            raise errors.UserError(
                f"Weights & Biases cannot be used ({errors.first_line(error)}): run `wandb login`, "
                "or set --config.train.wandb= to train without it."
            ) from error

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Logs the values of one step."""
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        """Sends the values that are not sent yet, and ends the run."""
        self._run.finish()
