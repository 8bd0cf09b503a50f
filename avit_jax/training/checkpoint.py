"""Checkpoints of the training state, by Orbax: the last two and the best are kept, each with the
digests of its files.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import IO, Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from avit_jax.utils import errors

_managers = ocp.checkpoint_managers
_DIGESTS = "sha256.json"
_REPLACED = "replaced_checkpoint_"
_STEP = re.compile("0|[1-9][0-9]*")  # name of a folder
# JSON that Orbax completes when the checkpoint has appeared
_ORBAX_METADATA = "_CHECKPOINT_METADATA"
_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def claim(workdir: epath.Path) -> Iterator[None]:
    """Makes the folder of a run and keeps other runs out of it; on a bucket nothing keeps them out.

    The lock is the system's, so that of a run that was killed is gone with it.

    Raises:
      errors.UserError: another run writes there, or it cannot be written, from the beginning or
        later.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with (workdir / "lock").open("w") as file:
            if not _on_bucket(workdir):
                _lock(file, workdir)
            yield
    except OSError as error:
        raise errors.UserError(
            f"{error}: training has stopped; the checkpoints in {workdir}, if any, stand."
        ) from error


def _lock(file: IO[str], workdir: epath.Path) -> None:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise errors.UserError(
            f"another run is at work in {workdir}: wait for its end, or set another --workdir."
        ) from error


def _on_bucket(path: epath.PathLike) -> bool:
    return "://" in str(path)


def _is_finished(step: epath.Path) -> bool:
    """Whether all of a checkpoint has been written: on a bucket, which cannot rename, it has its
    name from the beginning.
    """
    return not _on_bucket(step) or ocp.utils.is_checkpoint_finalized(step)


def folder(workdir: epath.PathLike) -> epath.Path:
    """Where the checkpoints of a workdir are; an absolute path, as Orbax wants it."""
    path = epath.Path(workdir)
    return (
        path if _on_bucket(path) else path.absolute()
    ) / "checkpoints"  # absolute() makes a local folder of a bucket


def _top1(metrics: dict[str, float]) -> float:
    return metrics["top1"]


class Checkpoints:
    """The checkpoints of one workdir, in its folder `checkpoints`; a context manager that waits for
    the last write.

    Used by one process, the first where there are several. A checkpoint appears under its name when
    all of it has been written. A checkpoint is damaged if its files have changed since, if it is a
    link, or if its folder's number, its state and its metadata do not name the same step. A damaged
    one is never restored: it is renamed, with a warning, and the one before takes its place.

    Args:
      workdir: a local path or one that etils reads, such as `gs://`.
      read_only: nothing is written, moved or cleaned up.

    Raises:
      errors.UserError: there are checkpoints, and all of them are damaged.
    """

    def __init__(self, workdir: epath.PathLike, *, read_only: bool = False) -> None:
        self._directory = folder(workdir)
        self._saving: int | None = None
        try:
            self._prepare(read_only)
        except OSError as error:
            raise errors.UserError(
                f"{self._directory} is no folder that can be "
                f"read{'' if read_only else ' and written'} "
                f"({errors.first_line(error)}): correct its permissions, or move it away."
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
        # of a damaged checkpoint that could not be moved away, or cannot be told by its digests
        except Exception as error:
            raise errors.UserError(
                f"{self._directory} cannot be read ({errors.first_line(error)})."
            ) from error
        # Asked so, processes count their steps otherwise than `distributed.Stop`, and would miss
        # the one to stop after.
        self._manager.reached_preemption = lambda step: False

    def _prepare(self, read_only: bool) -> None:
        """Cleans up after a run that was killed, and finds damaged checkpoints."""
        if os.path.islink(self._directory) and not self._directory.exists():
            raise FileNotFoundError("it is a link to nothing")
        if not read_only:
            self._directory.mkdir(parents=True, exist_ok=True)
            for step in self._named():
                if not _is_finished(step):
                    # Orbax would, but in the background, where a save may come across it
                    step.rmtree()
            self._put_back()
        self._ignored = self._damaged()
        if not read_only:
            while self._ignored:
                self._set_aside(self._ignored.pop())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        with self._told():
            self._manager.close()

    def step(self, which: str = "last") -> int | None:
        """Step of the "last" or the "best" checkpoint, None if there is none."""
        if which == "best":
            try:
                return self._manager.best_step()
            except Exception as error:  # metrics of a damaged one that was not moved away
                raise errors.UserError(
                    f"the best checkpoint in {self._directory} cannot be found "
                    f"({errors.first_line(error)}): use "
                    "--config.eval.checkpoint=last."
                ) from error
        return max(set(self._manager.all_steps()) - set(self._ignored), default=None)

    def save(self, step: int, state: Any, *, top1: float | None, extra: dict[str, Any]) -> None:
        """Saves in the background, in place of a checkpoint of the same step.

        What is written is a snapshot: state and extra may change as soon as this returns.

        Args:
          step: of the training.
          state: tree of arrays; they may be donated as soon as this returns.
          top1: what makes a checkpoint the best one; None where it was not evaluated.
          extra: kept as JSON, with the step.

        Raises:
          errors.UserError: it cannot be written, or the folder holds a checkpoint of a later step.
        """
        extra = json.loads(
            json.dumps(extra | {"step": step})
        )  # a copy, which Orbax makes of arrays alone
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(jax.device_get(state)), extra=ocp.args.JsonSave(extra)
        )
        with self._told():
            self._manager.wait_until_finished()
            replaced = self._directory / f"{_REPLACED}{step}"
            if step in self._manager.all_steps():
                (self._directory / str(step)).rename(
                    replaced
                )  # it is not gone before the other is there, see `_put_back`
                self._manager.reload()
            self._saving = step
            if not self._manager.save(
                step, args=args, metrics=None if top1 is None else {"top1": top1}
            ):
                raise ValueError(
                    f"there is a later one, of step {max(self._manager.all_steps(), default=None)}"
                )
            if replaced.exists():
                self._manager.wait_until_finished()
                replaced.rmtree()

    def wait(self) -> None:
        """Returns when what has been saved is written; raises errors.UserError where it could not
        be.
        """
        with self._told():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Whatever goes wrong while files are written ends in a sentence."""
        try:
            yield
        except Exception as error:
            raise errors.UserError(
                f"the checkpoint of step {self._saving} cannot be written into {self._directory} "
                f"({errors.first_line(error)}): mend that and start again; the checkpoints before "
                "it stand."
            ) from error

    def restore(self, state: Any, which: str = "last") -> tuple[Any, dict[str, Any]]:
        """Restores a checkpoint.

        Args:
          state: tree of arrays or `jax.ShapeDtypeStruct`, which the checkpoint has to fit.
          which: "last" or "best".

        Returns:
          The state, of NumPy arrays, and `extra`, with the step.

        Raises:
          errors.UserError: there is none, the best one is damaged, or it does not fit.
        """
        step = self._choose(which)
        self._check_fit(step, state)
        # Orbax looks at arrays of its own where they are to lie on a device; here they are NumPy's,
        # for any number of devices.
        target = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), state)
        restored = self._read(
            step, state=ocp.args.StandardRestore(target), extra=ocp.args.JsonRestore()
        )
        found = int(getattr(restored["state"], "step", step))
        if found != step:
            raise errors.UserError(
                f"the checkpoint of step {step} in {self._directory} holds the state of step "
                f"{found}: move this folder away, "
                "and start again."
            )
        return restored["state"], restored["extra"]

    def extra(self, which: str = "last") -> dict[str, Any]:
        """Reads only the metadata that `restore` returns; raises errors.UserError as it does."""
        return self._read(self._choose(which), extra=ocp.args.JsonRestore())["extra"]

    def _choose(self, which: str) -> int:
        """Step of the checkpoint to restore."""
        self.wait()
        step = self.step(which)
        if step is None:
            raise errors.UserError(
                "there is no checkpoint in "
                f"{self._directory}{' that was evaluated' if self.step() is not None else ''}: "
                + (
                    "use --config.eval.checkpoint=last."
                    if self.step() is not None
                    else "train first, or set --workdir to a run's."
                )
            )
        if step in self._ignored:
            raise errors.UserError(
                f"the best checkpoint in {self._directory}, of step {step}, is damaged: use "
                "--config.eval.checkpoint=last."
            )
        return step

    def _read(self, step: int, **parts: Any) -> Any:
        with self._read_errors(step):
            return self._manager.restore(step, args=ocp.args.Composite(**parts))

    def _saved_shapes(self, step: int) -> dict[tuple[str, ...], tuple[int, ...]]:
        with self._read_errors(step):
            return _shapes(self._manager.item_metadata(step)["state"])

    @contextlib.contextmanager
    def _read_errors(self, step: int) -> Iterator[None]:
        """Whatever goes wrong while a checkpoint is read ends in a sentence: a stranger or another
        version wrote its files.
        """
        try:
            yield
        except Exception as error:
            raise errors.UserError(
                f"the checkpoint of step {step} in {self._directory} cannot be read "
                f"({errors.first_line(error)}): move this "
                "folder away and start again."
            ) from error

    def _write_digests(self) -> None:
        """Before Orbax makes the checkpoint appear: the folder still has its temporary name, where
        there are such.
        """
        for folder in self._directory.iterdir():
            if folder.name.split(".")[0] == str(self._saving):
                (folder / _DIGESTS).write_text(json.dumps(_digests(folder), indent=1))

    def _put_back(self) -> None:
        """After a run that ended while it replaced a checkpoint: the old one takes its place again,
        unless the new one has.
        """
        for old in list(self._directory.iterdir()):
            target = self._directory / old.name.removeprefix(_REPLACED)
            if (
                target == old
                or not _STEP.fullmatch(target.name)
                or os.path.islink(old)
                or not old.is_dir()
            ):
                continue  # it is no checkpoint that was replaced
            if os.path.lexists(target):
                old.rmtree()
            else:
                old.rename(target)

    def _named(self) -> list[epath.Path]:
        """Folders that have the name of a checkpoint."""
        there = self._directory.iterdir() if self._directory.exists() else ()
        return [path for path in there if _STEP.fullmatch(path.name)]

    def _damaged(self) -> list[int]:
        """Steps of the checkpoints that are not as they were written; each is told."""
        steps = sorted(
            (int(path.name) for path in self._named() if _is_finished(path)), reverse=True
        )
        damages = {step: damage for step in steps if (damage := self._damage(step))}
        for step, damage in damages.items():
            _logger.warning(
                "the checkpoint of step %d in %s is damaged: %s", step, self._directory, damage
            )
        if steps and len(damages) == len(steps):
            raise errors.UserError(
                f"the last checkpoint in {self._directory} is damaged ({damages[steps[0]]}), and "
                "there is no whole one before "
                "it: remove the folder to start anew."
            )
        return list(damages)

    def _damage(self, step: int) -> str:
        """What is wrong with a checkpoint; empty if nothing is."""
        folder = self._directory / str(step)
        try:
            if os.path.islink(folder):
                return "it is a link"
            then, now = _json(folder / _DIGESTS), _digests(folder)
            names = then.keys() | {name for name in now if _is_of_orbax(name)}
            changed = [name for name in names if then.get(name) != now.get(name)]
            if changed:
                return f"{min(changed)} is not as it was written"
            _check_orbax_metadata(_json(folder / _ORBAX_METADATA))
            saved = _json(folder / "extra/metadata").get(
                "step", step
            )  # older runs did not write it
            if (folder / "metrics/metrics").exists():
                _check_metrics(_json(folder / "metrics/metrics"))
        except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            return errors.first_line(error)
        return "" if type(saved) is int and saved == step else f"its metadata is of step {saved}"

    def _set_aside(self, step: int) -> None:
        target = self._directory / f"damaged_checkpoint_{step}"
        if os.path.islink(target):
            target.unlink()
        elif target.exists():
            target.rmtree()
        (self._directory / str(step)).rename(target)
        _logger.warning("renamed it to %s", target)

    def _check_fit(self, step: int, state: Any) -> None:
        """Compares shapes before anything is read: Orbax would leave an array out, or fail halfway
        with a page of text.
        """
        there, here = self._saved_shapes(step), _shapes(state)
        differing = sorted(
            name for name in there.keys() | here.keys() if there.get(name) != here.get(name)
        )
        if differing:
            name = differing[0]
            raise errors.UserError(
                f"the checkpoint of step {step} in {self._directory} does not fit this "
                "configuration "
                f"({'/'.join(name)} is {there.get(name, 'missing')} there and "
                f"{here.get(name, 'missing')} here): "
                "use the --config and overrides it was trained with, or another --workdir."
            )


def _is_file(path: epath.Path) -> bool:
    """Whether it is a file, and not a pipe, which epath takes for one."""
    return path.is_file() if _on_bucket(path) else os.path.isfile(path)


def _json(path: epath.Path) -> Any:
    """What a JSON file holds; raises ValueError if it is no file: reading a pipe may never end."""
    if not _is_file(path):
        raise ValueError(f"{path.name} is missing")
    return json.loads(path.read_text())


def _is_of_orbax(name: str) -> bool:
    """Whether a file of a checkpoint, by its path in there, has been there since the digests were
    taken.

    Orbax adds files to the folder itself later, and operating systems add files whose names begin
    with a dot.
    """
    folder, _, file = name.rpartition("/")
    return bool(folder) and not file.startswith(".")


def _check_metrics(values: Any) -> None:
    """Raises ValueError if saved metrics are not what `_top1` reads."""
    if not isinstance(values, dict) or type(values.get("top1")) not in (int, float):
        raise ValueError("its metrics hold no top1")


def _check_orbax_metadata(values: Any) -> None:
    """Raises ValueError if Orbax's own JSON, which the digests leave out, is not of the types that
    Orbax writes.
    """
    kinds = {
        "item_handlers": dict,
        "metrics": dict,
        "performance_metrics": dict,
        "custom_metadata": dict,
    }
    kinds |= {"init_timestamp_nsecs": int, "commit_timestamp_nsecs": int}
    if not isinstance(values, dict):
        raise ValueError(f"{_ORBAX_METADATA} holds no object")
    wrong = [key for key, kind in kinds.items() if not isinstance(values.get(key), kind | None)]
    if wrong:
        raise ValueError(f"{wrong[0]} in {_ORBAX_METADATA} is no {kinds[wrong[0]].__name__}")


def _digests(folder: epath.Path) -> dict[str, str]:
    """SHA-256 of every file in a checkpoint's folder by its path in there."""
    digests = {}
    for parent, _, names in folder.walk():
        for path in (parent / name for name in set(names) - {_DIGESTS, _ORBAX_METADATA}):
            if _is_file(path):
                with path.open("rb") as file:
                    digests[str(path.relative_to(folder))] = hashlib.file_digest(
                        file, "sha256"
                    ).hexdigest()
    return dict(sorted(digests.items()))


def _shapes(state: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of each array by its path; what is None is left out."""
    return {
        path: leaf.shape for path, leaf in ocp.tree.to_flat_dict(state).items() if leaf is not None
    }
