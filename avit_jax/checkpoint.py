"""Checkpoints of the training state, by Orbax: the last and the best are kept."""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from avit_jax import errors

_managers = ocp.checkpoint_managers


def _top1(metrics: dict[str, float]) -> float:
    return metrics["top1"]


class Checkpoints:
    """The checkpoints of one workdir, in its folder `checkpoints`; a context manager that waits for the last write.

    Args:
      workdir: a local path or one that etils reads, such as `gs://`.
    """

    def __init__(self, workdir: epath.PathLike) -> None:
        self._directory = epath.Path(workdir).absolute() / "checkpoints"
        keep = _managers.AnyPreservationPolicy([_managers.LatestN(1), _managers.BestN(get_metric_fn=_top1, n=1)])
        options = ocp.CheckpointManagerOptions(best_fn=_top1, preservation_policy=keep)
        handlers = {"state": ocp.StandardCheckpointHandler(), "extra": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def step(self, which: str = "last") -> int | None:
        """Step of the "last" or the "best" checkpoint, None if there is none."""
        return self._manager.best_step() if which == "best" else self._manager.latest_step()

    def save(self, step: int, state: Any, *, top1: float, extra: dict[str, Any]) -> None:
        """Saves in the background; `state` may be donated as soon as this returns, `extra` is kept as JSON."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(extra))
        self._manager.save(step, args=args, metrics={"top1": top1})

    def restore(self, state: Any, which: str = "last") -> tuple[Any, dict[str, Any]]:
        """Restores a checkpoint.

        Args:
          state: tree of arrays or `jax.ShapeDtypeStruct`, which the checkpoint has to fit.
          which: "last" or "best".

        Returns:
          The state on the first local device, and `extra`.

        Raises:
          errors.UserError: there is none, or it does not fit.
        """
        step = self.step(which)
        if step is None:
            raise errors.UserError(
                f"there is no checkpoint in {self._directory}: train first, or set --workdir to the folder of a run."
            )
        self._manager.wait_until_finished()
        self._check_fit(step, state)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(target), extra=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=args)
        return restored["state"], restored["extra"]

    def _check_fit(self, step: int, state: Any) -> None:
        """Compares shapes before anything is read: Orbax would leave an array out, or fail halfway with a page of text."""
        there, here = _shapes(self._manager.item_metadata(step)["state"]), _shapes(state)
        differing = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
        if differing:
            name = differing[0]
            raise errors.UserError(
                f"the checkpoint of step {step} in {self._directory} does not fit this configuration "
                f"({'/'.join(name)} is {there.get(name, 'missing')} there and {here.get(name, 'missing')} here): "
                "use the --config and overrides it was trained with, or another --workdir."
            )


def _shapes(state: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shape of each array by its path; what is None is left out."""
    return {path: leaf.shape for path, leaf in ocp.tree.to_flat_dict(state).items() if leaf is not None}
