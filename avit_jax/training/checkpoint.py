"""Checkpoints of a run, written by Orbax: the last two and the best, each with its digests."""

import contextlib
import fcntl
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from avit_jax.training import damage
from avit_jax.utils import errors

_managers = ocp.checkpoint_managers
_REPLACED = "replaced_checkpoint_"
_STEP = re.compile("0|[1-9][0-9]*")  # name of a checkpoint's folder
_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def lock_workdir(workdir: epath.Path) -> Iterator[None]:
    """Creates the folder of a run and locks it against other runs.

    Uses an OS file lock, which is released if the process dies. On a bucket there is no lock.

    Raises:
      errors.UserError: another run uses the folder, it cannot be created, or an OSError occurs
        inside.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "lock").open("w") as file:
            if not damage.is_bucket(workdir):
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError as error:
                    raise errors.UserError(
                        f"another run uses {workdir}: wait until it ends, or set another --workdir."
                    ) from error
            yield
    except OSError as error:
        raise errors.UserError(
            f"{error}: correct that and start again; earlier checkpoints in {workdir} are still "
            "valid."
        ) from error


def folder(workdir: epath.PathLike) -> epath.Path:
    """Returns the folder of a workdir's checkpoints, as the absolute path that Orbax requires."""
    path = epath.Path(workdir)
    # absolute() would make a local folder of a bucket.
    return (path if damage.is_bucket(path) else path.absolute()) / "checkpoints"


def _is_finished(step: epath.Path) -> bool:
    """Returns whether a checkpoint is complete.

    On a bucket, an incomplete checkpoint has the final name too.
    """
    return not damage.is_bucket(step) or ocp.utils.is_checkpoint_finalized(step)


def _top1(metrics: dict[str, float]) -> float:
    return metrics["top1"]


def _shapes(state: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the shape of each array by its path; None is left out."""
    flat = ocp.tree.to_flat_dict(state)
    return {path: leaf.shape for path, leaf in flat.items() if leaf is not None}


class Checkpoints:
    """The checkpoints of one workdir. A context manager, which waits for the last write.

    Only the first process uses it. A checkpoint appears under its name when it is complete.

    If a file changed, the folder is a link, or the metadata names another step, the checkpoint is
    renamed with a warning, and the previous checkpoint is used. If only the state names another
    step, `restore` raises an error.

    Args:
      workdir: a local path or one that etils reads, such as `gs://`.
      read_only: writes, renames and deletes nothing.

    Raises:
      errors.UserError: all checkpoints are damaged, or the folder is not readable.
    """

    def __init__(self, workdir: epath.PathLike, *, read_only: bool = False) -> None:
        self._directory = folder(workdir)
        self._saving: int | None = None
        try:
            self._prepare(read_only)
        except OSError as error:
            use = "read" if read_only else "read and written"
            raise errors.UserError(
                f"{self._directory} is no folder that can be {use} ({errors.first_line(error)}): "
                "correct its permissions, or move it away."
            ) from error
        best = _managers.BestN(get_metric_fn=_top1, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=_top1,
            preservation_policy=_managers.AnyPreservationPolicy([_managers.LatestN(2), best]),
            create=False,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            async_options=ocp.options.AsyncOptions(post_finalization_callback=self._write_digests),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                active_processes={0}, barrier_sync_key_prefix="first"
            ),
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
        try:
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_handlers=handlers
            )
        except Exception as error:  # a damaged checkpoint that could not be renamed
            raise errors.UserError(
                f"{self._directory} cannot be read ({errors.first_line(error)}): correct that, or "
                "set another --workdir."
            ) from error
        # Disables Orbax's preemption check, which would advance the counter of `distributed.Stop`.
        self._manager.reached_preemption = lambda step: False

    def _prepare(self, read_only: bool) -> None:
        """Cleans up after a run that was killed, and finds damaged checkpoints."""
        if os.path.islink(self._directory) and not self._directory.exists():
            raise FileNotFoundError("it is a link to nothing")
        if not read_only:
            self._directory.mkdir(parents=True, exist_ok=True)
            for step in self._step_folders():
                if not _is_finished(step):
                    step.rmtree()  # Orbax would do so in the background, during a save
            self._restore_replaced()
        self._damaged = self._find_damaged()
        if not read_only:
            while self._damaged:
                self._set_aside(self._damaged.pop())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        with self._write_errors():
            self._manager.close()

    def step(self, which: str = "last") -> int | None:
        """Returns the step of the "last" or the "best" checkpoint, None if there is none.

        Raises:
          errors.UserError: the metrics that pick the best checkpoint cannot be read.
        """
        if which == "best":
            try:
                return self._manager.best_step()
            except Exception as error:  # metrics of a damaged checkpoint that was not renamed
                raise errors.UserError(
                    f"the best checkpoint in {self._directory} cannot be found "
                    f"({errors.first_line(error)}): use --config.eval.checkpoint=last."
                ) from error
        return max(set(self._manager.all_steps()) - set(self._damaged), default=None)

    def save(self, step: int, state: Any, *, top1: float | None, extra: dict[str, Any]) -> None:
        """Saves a snapshot in the background; replaces a checkpoint of the same step.

        The arguments may change, and the arrays may be donated, as soon as this returns.

        Args:
          step: of the training.
          state: tree of arrays.
          top1: accuracy that picks the best checkpoint; None if it was not measured.
          extra: saved as JSON, with the step.

        Raises:
          errors.UserError: the checkpoint cannot be written, or there is one of a later step.
        """
        extra = json.loads(json.dumps(extra | {"step": step}))  # Orbax copies arrays only
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.device_get(state)), extra=ocp.args.JsonSave(extra)
        )
        with self._write_errors():
            self._manager.wait_until_finished()
            replaced = self._directory / f"{_REPLACED}{step}"
            if step in self._manager.all_steps():
                # The old one stays until the new one is complete, see `_restore_replaced`.
                (self._directory / str(step)).rename(replaced)
                self._manager.reload()
            self._saving = step
            metrics = None if top1 is None else {"top1": top1}
            if not self._manager.save(step, args=args, metrics=metrics):
                latest = max(self._manager.all_steps(), default=None)
                raise ValueError(f"there is a later one, of step {latest}")
            if replaced.exists():
                self._manager.wait_until_finished()
                replaced.rmtree()

    def wait(self) -> None:
        """Waits until the last checkpoint is written; raises errors.UserError if that failed."""
        with self._write_errors():
            self._manager.wait_until_finished()

    def restore(self, state: Any, which: str = "last") -> tuple[Any, dict[str, Any]]:
        """Restores a checkpoint.

        Args:
          state: tree of arrays or `jax.ShapeDtypeStruct` of the expected shapes.
          which: "last" or "best".

        Returns:
          The state, of NumPy arrays, and `extra` with the step.

        Raises:
          errors.UserError: there is no checkpoint, the best one is damaged, or it does not fit.
        """
        step = self._choose(which)
        self._check_fit(step, state)
        # NumPy arrays: Orbax would place others on the devices of the run that saved them.
        target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), state)
        restored = self._read(
            step, state=ocp.args.StandardRestore(target), extra=ocp.args.JsonRestore()
        )
        found = int(getattr(restored["state"], "step", step))
        if found != step:
            raise errors.UserError(
                f"the checkpoint of step {step} in {self._directory} holds the state of step "
                f"{found}: move {self._directory / str(step)} away, and start again."
            )
        return restored["state"], restored["extra"]

    def extra(self, which: str = "last") -> dict[str, Any]:
        """Returns `extra` of a checkpoint only; raises errors.UserError as `restore` does."""
        return self._read(self._choose(which), extra=ocp.args.JsonRestore())["extra"]

    def _choose(self, which: str) -> int:
        """Returns the step of the checkpoint to restore."""
        self.wait()
        step, use_last = self.step(which), "use --config.eval.checkpoint=last."
        if step is not None and step not in self._damaged:
            return step
        if step is not None:
            fault = (
                f"the best checkpoint in {self._directory}, of step {step}, is damaged: {use_last}"
            )
        elif self.step() is not None:
            fault = f"no checkpoint in {self._directory} was evaluated: {use_last}"
        else:
            fault = (
                f"there is no checkpoint in {self._directory}: train first, or set --workdir to "
                "that of a run."
            )
        raise errors.UserError(fault)

    def _read(self, step: int, **parts: Any) -> Any:
        with self._read_errors(step):
            return self._manager.restore(step, args=ocp.args.Composite(**parts))

    def _check_fit(self, step: int, state: Any) -> None:
        """Compares shapes before reading: Orbax leaves arrays out, or fails without naming them."""
        with self._read_errors(step):
            saved = _shapes(self._manager.item_metadata(step)["state"])
        expected = _shapes(state)
        for name in sorted(saved.keys() | expected.keys()):
            if saved.get(name) != expected.get(name):
                raise errors.UserError(
                    f"the checkpoint of step {step} in {self._directory} does not fit this "
                    f"configuration ({'/'.join(name)} is {saved.get(name, 'missing')} there and "
                    f"{expected.get(name, 'missing')} here): use the --config and overrides it was "
                    "trained with, or another --workdir."
                )

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """Turns any error of writing into one sentence."""
        try:
            yield
        except Exception as error:
            raise errors.UserError(
                f"the checkpoint of step {self._saving} cannot be written into {self._directory} "
                f"({errors.first_line(error)}): correct that and start again; earlier checkpoints "
                "are still valid."
            ) from error

    @contextlib.contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        """Turns any error of reading into one sentence; another program may have written it."""
        try:
            yield
        except Exception as error:
            raise errors.UserError(
                f"the checkpoint of step {step} in {self._directory} cannot be read "
                f"({errors.first_line(error)}): move {self._directory / str(step)} away, and start "
                "again."
            ) from error

    def _write_digests(self) -> None:
        """Adds the digests before Orbax gives the checkpoint its final name."""
        for path in self._directory.iterdir():
            if path.name.split(".")[0] == str(self._saving):
                (path / damage.DIGESTS).write_text(json.dumps(damage.digests(path), indent=1))

    def _restore_replaced(self) -> None:
        """Brings back a checkpoint whose replacement was interrupted before it was complete."""
        for old in list(self._directory.iterdir()):
            target = self._directory / old.name.removeprefix(_REPLACED)
            is_other = target == old or not _STEP.fullmatch(target.name)
            if is_other or os.path.islink(old) or not old.is_dir():
                continue
            if os.path.lexists(target):
                old.rmtree()
            else:
                old.rename(target)

    def _step_folders(self) -> list[epath.Path]:
        """Returns the folders whose name is that of a checkpoint."""
        paths = self._directory.iterdir() if self._directory.exists() else ()
        return [path for path in paths if _STEP.fullmatch(path.name)]

    def _find_damaged(self) -> list[int]:
        """Returns the steps of damaged checkpoints, with a warning for each."""
        finished = [path for path in self._step_folders() if _is_finished(path)]
        steps = sorted((int(path.name) for path in finished), reverse=True)
        faults = {step: damage.describe(self._directory / str(step), step) for step in steps}
        faults = {step: fault for step, fault in faults.items() if fault}
        for step, fault in faults.items():
            _logger.warning(
                "the checkpoint of step %d in %s is damaged: %s", step, self._directory, fault
            )
        if steps and len(faults) == len(steps):
            raise errors.UserError(
                f"the last checkpoint in {self._directory} is damaged ({faults[steps[0]]}), and "
                "there is no valid one before it: remove the folder to start again."
            )
        return list(faults)

    def _set_aside(self, step: int) -> None:
        target = self._directory / f"damaged_checkpoint_{step}"
        if os.path.islink(target):
            target.unlink()
        elif target.exists():
            target.rmtree()
        (self._directory / str(step)).rename(target)
        _logger.warning("renamed it to %s", target)
