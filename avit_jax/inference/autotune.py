"""Measures which plan is the fastest for a model on typical images."""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import statistics
import time
from typing import Any

import jax

from avit_jax.core.plan import Plan
from avit_jax.inference import adaptive
from avit_jax.models import vit
from avit_jax.utils import files

_logger = logging.getLogger(__name__)
_CACHE = pathlib.Path("~/.cache/avit_jax/plans.json")
_ROUNDS = 5


def autotune(
    model: vit.AViT, variables: Any, images: jax.Array, *, cache: os.PathLike | str = _CACHE
) -> Plan:
    """Measures plans similar to the default one, and returns the fastest, for `adaptive.apply`.

    On a GPU, packed execution is one of them if `adaptive.can_pack` returns True.

    The first call compiles all of these plans, which takes most of its time. It stores the fastest
    one in `cache`. Later calls read it if devices, cores, version of JAX, model, and shape and
    dtype of the images match. They do not compare the weights: delete the file after further
    training. The fastest plan depends on which tokens halt. So use real images and trained weights,
    on an idle machine.

    Args:
      model: as for `adaptive.apply`.
      variables: as for `adaptive.apply`.
      images: a typical batch.
      cache: JSON file that stores the results; delete it to measure again.

    Returns:
      The fastest plan.

    Raises:
      ValueError: as for `adaptive.apply`.
    """
    adaptive.check(model, images)
    cache = pathlib.Path(cache).expanduser()
    devices = (
        f"{jax.local_device_count()} x {jax.devices()[0].device_kind}, "
        f"{adaptive.cores_per_device()} cores each"
    )
    shape = f"{images.dtype}{list(images.shape)}"
    key = f"{devices}, jax {jax.__version__}, {shape}, {' '.join(repr(model).split())}"
    try:
        return Plan(**json.loads(cache.read_text())[key])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not measured yet, or another version wrote the file
    embed = functools.partial(model.apply, method="embed")
    embedded = jax.eval_shape(embed, variables, images[:1])  # `apply` checks each chunk
    default, plans = _candidates(len(images), adaptive.can_pack(model, variables, embedded))
    medians = _measure(model, variables, images, plans)
    best = plans[medians.index(min(medians))]
    _logger.info(
        "fastest: %s, %.1f images/s; the default: %.1f",
        best,
        len(images) / min(medians),
        len(images) / medians[plans.index(default)],
    )
    _store(cache, key, best)
    return best


def _candidates(batch: int, can_pack: bool) -> tuple[Plan, list[Plan]]:
    """Returns the default plan, and the plans to measure."""
    default = adaptive.default_plan(batch)
    default = dataclasses.replace(default, bucket=min(default.bucket, batch))
    half, double = max(1, default.bucket // 2), min(2 * default.bucket, batch)
    plans = [
        dataclasses.replace(default, bucket=bucket, token_multiple=multiple, one_kernel=False)
        for bucket in sorted({half, default.bucket, double})
        for multiple in (default.token_multiple, 2 * default.token_multiple)
    ]
    if default.one_kernel:
        plans.append(default)
    if can_pack and jax.default_backend() == "gpu":
        plans.append(dataclasses.replace(default, packed=True))
    return default, plans


def _measure(model: vit.AViT, variables: Any, images: jax.Array, plans: list[Plan]) -> list[float]:
    """Returns the median seconds of each plan. A round runs all plans; the first does not count."""
    runs: list[jax.stages.Compiled] = []
    for plan in plans:
        _logger.info("compiling %s, %d of %d", plan, len(runs) + 1, len(plans))
        apply = jax.jit(functools.partial(adaptive.apply, model, plan=plan))
        runs.append(apply.lower(variables, images).compile())
    seconds: list[list[float]] = [[] for _ in plans]
    for _ in range(_ROUNDS + 1):
        for run, each in zip(runs, seconds, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(run(variables, images))
            each.append(time.perf_counter() - started)
    return [statistics.median(each[1:]) for each in seconds]


def _store(cache: pathlib.Path, key: str, plan: Plan) -> None:
    """Adds the plan to the file; logs a warning if the file cannot be written."""
    try:
        known = dict(json.loads(cache.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}
    try:
        files.write(cache, json.dumps(known | {key: dataclasses.asdict(plan)}, indent=2) + "\n")
    except OSError as error:
        _logger.warning("the plan is not stored; name another file as `cache`: %s", error)
