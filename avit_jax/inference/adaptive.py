"""Inference with halted tokens removed: the logits of `vit.AViT`, for the work that is left.

`removal` says how tokens leave in spite of fixed shapes. Here it is put to use from the pictures to
the logits, in waves of images that bound the memory. Parameters and the code of a layer are those
of `vit`.

Why this gives the same logits: a halted token is a key of weight 0, and feeds nothing else (one
that merges has done so in the layer at which it halts); and once the read-out tokens of an image
have halted, its logits are final, so that its other tokens may stop as well. `Aux.depth` is
therefore how far tokens really ran: for those others less than the method's own depth, which
  `vit.AViT` reports.
"""

import dataclasses
import functools
import json
import logging
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp

from avit_jax.core import halting, merging, no_gradient, removal
from avit_jax.core.removal import Plan
from avit_jax.models import block, flops, vit
from avit_jax.utils import files

_logger = logging.getLogger(__name__)
_CACHE = pathlib.Path("~/.cache/avit_jax/plans.json")
_ROUNDS = 5
_NO_GRADIENT = (
    "adaptive.apply has no gradient: train with model.apply (AViT(removal=...) removes halted "
    "tokens there too), or put "
    "jax.lax.stop_gradient around the variables and the images."
)


@flax.struct.dataclass(kw_only=True)
class Aux:
    """What was computed beside the logits.

    Attributes:
      score: `(L, B, N)` raw halting scores, at least float32; only those of active tokens mean
        something; where tokens merge, 1 in the last layer.
      active: `(L, B, N)` bool, whether the token really computed in the layer.
      depth: `(B, N)` int32, layers the token really computed in.
      macs: `(B,)` float32, multiply-accumulates of the image without padding: `flops.image_macs`.
      macs_padded: `(B,)` float32, the same with padding: rows without a token, and the share of
        empty places in its group. So it depends on the images beside it.
      class_output: `(B, D)` class token accumulated over layers, before the final norm.
      distillation_output: the same of the distillation token, None without one.
    """

    score: jax.Array
    active: jax.Array
    depth: jax.Array
    macs: jax.Array
    macs_padded: jax.Array
    class_output: jax.Array
    distillation_output: jax.Array | None = None


def default_plan(batch: int | None, backend: str | None = None, cores: int | None = None) -> Plan:
    """A good plan for batches of this size.

    Chosen by measuring DeiT-T, on two cores of a CPU and on one NVIDIA H200; on TPUs a guess, not
    measured.

    Args:
      batch: images of a call, None if unknown.
      backend: "cpu", "gpu" or "tpu"; default: that of JAX.
      cores: of a CPU that each device has; default: `cores_a_device`.
    """
    backend = backend or jax.default_backend()
    if backend == "gpu":  # of an unknown batch a whole wave is held in memory
        return (
            Plan(group=256, step=32, wave=1024, switch=True)
            if batch
            else Plan(group=64, step=32, wave=256, switch=True)
        )
    if backend != "cpu":
        return Plan(group=16, step=32, wave=256)
    if (cores or cores_a_device()) <= 1:  # a core alone loses little by an image at a time
        return Plan(group=1, step=8, wave=16, full=2)
    if (
        batch and batch >= 64
    ):  # larger groups are faster by themselves, but lose more to padding, in small batches most
        return Plan(group=8, step=8, wave=64 if batch < 128 else 128)
    if batch is None or batch >= 16:
        return Plan(group=4, step=8)
    return Plan(group=2, step=8) if batch > 2 else Plan(group=1, step=16)


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_a_device() -> int:
    """The cores that this process may use, shared out over its devices; at least 1."""
    return max(1, usable_cores() // jax.local_device_count())


def apply(
    model: vit.AViT, variables: Any, images: jax.Array, *, plan: Plan | None = None
) -> tuple[jax.Array, Aux]:
    """Classifies images as `model.apply(variables, images)`, without computing what has halted.

    Runs under `jit`, under `pmap` where there are several devices (each sorts its own images), and
    under `jax.export`, with a
    symbolic batch too. It has no gradient: to train, use `model.apply`.

    A CPU is used best if each core is a device of its own, as in `--mode=eval`. In Python, before
    JAX is used:

      jax.config.update("jax_num_cpu_devices", adaptive.usable_cores())
      run = jax.pmap(functools.partial(adaptive.apply, model), in_axes=(None, 0))
      logits, aux = run({"params": params}, images)  # images: (devices, images of each, H, W, C)

    Args:
      model: a network with halting.
      variables: `{"params": params}`, as for `model.apply`.
      images: `(B, H, W, C)` float, normalised, B at least 1.
      plan: None for `default_plan`.

    Returns:
      Logits `(B, C)`, and `Aux`.

    Raises:
      ValueError: the model does not halt, or the images do not fit it, or there are none.
      TypeError: a derivative of it is needed.
    """
    _check(model, images)
    run = no_gradient.without_gradient(functools.partial(_apply, model, plan), _NO_GRADIENT)
    return run(variables, images)


def _check(model: vit.AViT, images: jax.Array) -> None:
    if model.halting is None:
        raise ValueError(
            "this model has no halting, so that nothing can be removed: call model.apply instead."
        )
    model.check_images(images)


def _apply(
    model: vit.AViT, plan: Plan | None, variables: Any, images: jax.Array
) -> tuple[jax.Array, Aux]:
    """`apply` of images that fit."""
    batch = images.shape[0]
    known = isinstance(batch, int)
    plan = plan or default_plan(batch if known else None)
    plan = dataclasses.replace(
        plan, group=min(plan.group, plan.wave, batch if known else plan.wave)
    )
    size = plan.wave_size(batch) if known else plan.wave
    plan = plan.evenly(size)
    waves = -(-batch // size)
    begins = jnp.arange(waves) * size
    # the last wave begins earlier, with images that do not count: no copy of all images to fill it
    # up
    if known:
        starts = jnp.minimum(begins, batch - size)
    else:
        starts = begins
        images = jnp.pad(images, ((0, waves * size - batch), *((0, 0),) * 3))

    def run(places: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, Aux]:
        begin, start = places
        place = start + jnp.arange(size)
        exists = (begin <= place) & (place < batch)
        x = _embed(
            model, variables, images, start, exists, size if plan.switch and known else plan.group
        )
        return _classify(model, variables, x, exists, plan)

    def in_order(x: jax.Array) -> jax.Array:
        if not known:
            return x.reshape(waves * size, *x.shape[2:])[:batch]
        return jnp.concatenate([x[:-1].reshape(-1, *x.shape[2:]), x[-1, waves * size - batch :]])

    logits, aux = jax.tree.map(in_order, jax.lax.map(run, (begins, starts)))
    return logits, aux.replace(score=aux.score.swapaxes(0, 1), active=aux.active.swapaxes(0, 1))


def removes(
    model: vit.AViT, *, images: int | None = None, macs_ratio: float = 1.0
) -> Callable[[Any, jax.Array], tuple[Any, Any]]:
    """`apply` of a network that halts, `model.apply` of one that does not: variables and images to
    logits and aux.

    Args:
      model: the network.
      images: of a call, on each device; then it is `model.apply` too where `removal.pays` says that
        masking is faster.
      macs_ratio: share of the static network's MACs that the network takes; 1 if it is not known.
    """
    masks = model.halting is None or (
        images is not None and not removal.pays(model.width, images, macs_ratio)
    )
    return model.apply if masks else functools.partial(apply, model)


def _embed(
    model: vit.AViT,
    variables: Any,
    images: jax.Array,
    start: jax.Array,
    exists: jax.Array,
    group: int,
) -> jax.Array:
    """Tokens `(size, N, D)` of the images from `start` on, so many at a time: small arrays stay in
    the cache of a CPU.
    """
    size = len(exists)

    def embed(begin: jax.Array) -> jax.Array:
        return model.apply(
            variables, jax.lax.dynamic_slice_in_dim(images, begin, group), method="embed"
        )

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, place = carry
        begin = jnp.minimum(place, size - group)  # the last group may overlap the one before
        return jax.lax.dynamic_update_slice_in_dim(x, embed(start + begin), begin, 0), place + group

    if group == size:
        return embed(start)
    tokens = jax.eval_shape(embed, start)
    x = jnp.zeros((size, *tokens.shape[1:]), tokens.dtype)
    stop = jnp.max(jnp.where(exists, jnp.arange(size) + 1, 0))
    return jax.lax.while_loop(lambda carry: carry[1] < stop, body, (x, 0))[0]


def _classify(
    model: vit.AViT, variables: Any, x: jax.Array, exists: jax.Array, plan: Plan
) -> tuple[jax.Array, Aux]:
    """Tokens `(B, N, D)` of one wave to logits and `Aux`, with the images first in every array of
    it.

    Images that do not exist, `(B,)` bool, cost nothing.
    """
    config, num_readout = model.halting, model.num_readout
    gate = model.apply(variables, method=lambda model: model.gate.gate())
    state = halting.init(x.shape[:2], x.dtype)
    state = dataclasses.replace(state, active=state.active & exists[:, None])
    readout = jnp.zeros((len(x), num_readout, model.width), state.remainder.dtype)
    each, dtype = block.Block(**model.block_sizes), x.dtype
    if model.compared:
        x = merging.pack(x, merging.note(model.sizes(state), state, num_readout))

    def layer(carry: tuple, of_layer: tuple) -> tuple[tuple, tuple]:
        x, state, readout = carry
        params, is_last = of_layer
        active = state.active
        x, score = block.run_removed(each, params, plan, gate, x, active, dtype, is_last)
        state, weight = halting.accumulate(state, score, epsilon=config.epsilon, is_last=is_last)
        readout = readout + weight[:, :num_readout, None] * x[
            :, :num_readout, : model.width
        ].astype(weight.dtype)
        unfinished = state.active[:, :num_readout].any(axis=1, keepdims=True)
        state = dataclasses.replace(state, active=state.active & unfinished)
        return (x, state, readout), (score, active)

    lasts = jnp.arange(model.depth) == model.depth - 1
    layers = (block.cast(variables["params"]["layers"], model.dtype), lasts)
    (_, state, readout), (score, active) = jax.lax.scan(layer, (x, state, readout), layers)
    macs = flops.image_macs(model, active)
    padded = jax.vmap(lambda count, is_last: padded_macs(model, count, plan, is_last))(
        active.sum(axis=-1), lasts
    )
    aux = Aux(
        score=score.swapaxes(0, 1),
        active=active.swapaxes(0, 1),
        depth=state.depth,
        macs=macs,
        macs_padded=jnp.maximum(
            flops.fixed_macs(model) + padded.sum(axis=0), macs
        ),  # whatever the last digits
        class_output=readout[:, 0],
        distillation_output=readout[:, 1] if model.distilled else None,
    )
    return model.apply(variables, readout, method="classify"), aux


def padded_macs(
    model: vit.AViT, count: jax.Array, plan: Plan, is_last: jax.typing.ArrayLike = False
) -> jax.Array:
    """MACs of one layer on each image of a wave, with the padding that the plan brings.

    Args:
      model: for its sizes.
      count: `(B,)` tokens each image still has.
      plan: for its group and step.
      is_last: whether it is the last layer.

    Returns:
      `(B,)` float32; the images of a group share its cost evenly, that of empty places included.
    """
    batch = len(count)
    image, count = removal.groups(count, plan.group)
    compiled = jnp.array((0, *plan.token_counts(model.num_tokens)))
    ran = compiled[jnp.searchsorted(compiled, count[:, :1])].astype(jnp.float32)
    macs = plan.group * flops.layer_macs(ran, model, is_last)
    images = (count > 0).sum(axis=1, keepdims=True).astype(macs.dtype)
    macs = jnp.where(count > 0, macs / jnp.maximum(images, 1.0), 0.0)
    return jnp.zeros(batch, macs.dtype).at[image.reshape(-1)].set(macs.reshape(-1), mode="drop")


def autotune(
    model: vit.AViT, variables: Any, images: jax.Array, *, cache: os.PathLike | str = _CACHE
) -> Plan:
    """Measures plans around the default one on these images, and returns the fastest; give it to
    `apply`.

    The first call takes a minute or two, on a GPU longer, nearly all of it to compile. The result
    is remembered for this kind and number of devices, their cores, version of JAX, model, shape and
    dtype of the images: the same question is answered from the file from then on. Measure on real
    images and trained weights, on an idle machine: what is fastest depends on what halts.

    Args:
      model: as for `apply`.
      variables: as for `apply`.
      images: a typical batch.
      cache: JSON file that remembers; delete it to measure anew.

    Raises:
      ValueError: as for `apply`.
    """
    _check(model, images)
    cache = pathlib.Path(cache).expanduser()
    shape = f"{images.dtype}{list(images.shape)}"
    devices = (
        f"{jax.local_device_count()} x {jax.devices()[0].device_kind}, {cores_a_device()} "
        "cores each"
    )
    key = f"{devices}, jax {jax.__version__}, {shape}, {' '.join(repr(model).split())}"
    try:
        known = json.loads(cache.read_text())
        return Plan(**known[key])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not there, or not ours: measured, and written anew
    default = default_plan(len(images))
    default = dataclasses.replace(default, group=min(default.group, len(images)))
    groups = sorted(
        {max(1, default.group // 2), default.group, min(2 * default.group, len(images))}
    )
    plans = [
        dataclasses.replace(default, group=group, step=step)
        for group in groups
        for step in (default.step, 2 * default.step)
    ]
    runs = []
    for plan in plans:
        _logger.info("compiling %s, %d of %d", plan, len(runs) + 1, len(plans))
        run = jax.jit(
            lambda variables, images, plan=plan: apply(model, variables, images, plan=plan)
        )
        runs.append(run.lower(variables, images).compile())
    seconds: list[list[float]] = [[] for _ in plans]
    for _ in range(_ROUNDS + 1):
        for run, taken in zip(runs, seconds, strict=True):
            started = time.perf_counter()
            jax.block_until_ready(run(variables, images))
            taken.append(time.perf_counter() - started)
    medians = [statistics.median(taken[1:]) for taken in seconds]
    best = plans[medians.index(min(medians))]
    _logger.info(
        "fastest: %s, %.1f images/s; the default: %.1f",
        best,
        len(images) / min(medians),
        len(images) / medians[plans.index(default)],
    )
    _remember(cache, key, best)
    return best


def _remember(cache: pathlib.Path, key: str, plan: Plan) -> None:
    """Adds the plan to the file, whole or not at all; what was measured is not lost where the file
    cannot be written.
    """
    try:
        known = dict(json.loads(cache.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}
    try:
        files.write(cache, json.dumps(known | {key: dataclasses.asdict(plan)}, indent=2) + "\n")
    except OSError as error:
        _logger.warning("the plan is not remembered, name another file as `cache`: %s", error)
