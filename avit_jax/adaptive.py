"""Inference with halted tokens removed: the logits of `vit.AViT`, for the work that is left.

XLA compiles for fixed shapes, so that tokens cannot simply leave. In each layer the images are sorted by how many tokens they
still have, and taken in groups of a few; a group runs at the smallest of some compiled numbers of tokens that holds its first
image, and a finished image is never visited. All of it is one program: loops whose length the device decides, and no value that
the host reads back. Parameters and the code of a layer are those of `vit`.

Tokens of an image lie at the front of its rows ("slots"), closed up anew in each layer; halting is computed where it always is,
on tokens in their own order ("home").

Why this gives the same logits: a halted token is a key of weight 0, and feeds nothing else; and once the read-out tokens of an
image have halted, its logits are final, so that its other tokens may stop as well. `Aux.depth` is therefore how far tokens
really ran: for those others less than the method's own depth, which `vit.AViT` reports.
"""

import dataclasses
import json
import logging
import os
import pathlib
import statistics
import time
from typing import Any

import flax
import jax
import jax.numpy as jnp

from avit_jax import flops, halting, vit

_logger = logging.getLogger(__name__)
_CACHE = pathlib.Path("~/.cache/avit_jax/plans.json")
_ROUNDS = 5


@flax.struct.dataclass(kw_only=True)
class Aux:
    """What was computed beside the logits.

    Attributes:
      score: `(L, B, N)` raw halting scores, at least float32; only those of active tokens mean something.
      active: `(L, B, N)` bool, whether the token really computed in the layer.
      depth: `(B, N)` int32, layers the token really computed in.
      macs: `(B,)` float32, multiply-accumulates of the image without padding: `flops.image_macs`.
      macs_padded: `(B,)` float32, the same with padding: rows without a token, and the share of empty places in its group.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How images are batched; affects speed, memory and the last digits only.

    Attributes:
      group: images that go through a layer together.
      step: tokens; a group is padded to a multiple of it, of twice as many below a third of all tokens. Compile time grows with
        the number of multiples.
      wave: images that are sorted, and whose tokens are held in memory, at a time.
    """

    group: int
    step: int
    wave: int

    def __post_init__(self) -> None:
        if min(self.group, self.step, self.wave) < 1:
            raise ValueError(f"group, step and wave must be at least 1; got {self}.")

    def token_counts(self, num_tokens: int) -> tuple[int, ...]:
        """The compiled numbers of tokens, ascending; the last is all of them."""
        fine = range(self.step, num_tokens, self.step)
        return (*(n for n in fine if 3 * n >= num_tokens or n % (2 * self.step) == 0), num_tokens)


def default_plan(batch: int | None, backend: str | None = None) -> Plan:
    """A good plan for batches of this size.

    On CPU as measured (`experiments/inference_speed`); on accelerators, not measured, larger groups.

    Args:
      batch: images of a call, None if unknown.
      backend: "cpu", "gpu" or "tpu"; default: that of JAX.
    """
    if (backend or jax.default_backend()) != "cpu":
        return Plan(group=16, step=32, wave=256)
    if batch is None or batch >= 32:
        return Plan(group=4, step=8, wave=128)
    return Plan(group=2 if batch > 2 else 1, step=8, wave=128)


def apply(model: vit.AViT, variables: Any, images: jax.Array, *, plan: Plan | None = None) -> tuple[jax.Array, Aux]:
    """Classifies images as `model.apply(variables, images)`, without computing what has halted.

    Runs under `jit` and `pmap` (each device sorts its own images), and under `jax.export`, with a symbolic batch too. It has no
    gradient.

    Args:
      model: a network with halting.
      variables: `{"params": params}`, as for `model.apply`.
      images: `(B, H, W, C)`, normalised, B at least 1.
      plan: None for `default_plan`.

    Returns:
      Logits `(B, C)`, and `Aux`.

    Raises:
      ValueError: the model does not halt, or the images do not fit it.
    """
    if model.halting is None:
        raise ValueError("this model has no halting, so that nothing can be removed: call model.apply instead.")
    batch = images.shape[0]
    known = isinstance(batch, int)
    plan = plan or default_plan(batch if known else None)
    waves = -(-batch // plan.wave)
    size = -(-batch // waves) if known else plan.wave
    total = waves * size
    images = jnp.pad(images, ((0, total - batch), *((0, 0),) * 3))

    def run(start: jax.Array) -> tuple[jax.Array, Aux]:
        exists = start + jnp.arange(size) < batch
        x = _embed(model, variables, images, start, exists, min(plan.group, size))
        return _classify(model, variables, x, exists, dataclasses.replace(plan, group=min(plan.group, size)))

    outputs = jax.lax.map(run, jnp.arange(waves) * size)
    logits, aux = jax.tree.map(lambda x: x.reshape(total, *x.shape[2:])[:batch], outputs)
    return logits, aux.replace(score=aux.score.swapaxes(0, 1), active=aux.active.swapaxes(0, 1))


def _embed(model: vit.AViT, variables: Any, images: jax.Array, start: jax.Array, exists: jax.Array, group: int) -> jax.Array:
    """Tokens `(size, N, D)` of the images from `start` on, group by group: of small arrays, which stay in the cache."""
    size = len(exists)

    def embed(begin: jax.Array) -> jax.Array:
        return model.apply(variables, jax.lax.dynamic_slice_in_dim(images, begin, group), method="embed")

    def body(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, place = carry
        begin = jnp.minimum(place, size - group)  # the last group may overlap the one before
        return jax.lax.dynamic_update_slice_in_dim(x, embed(start + begin), begin, 0), place + group

    tokens = jax.eval_shape(embed, start)
    x = jnp.zeros((size, *tokens.shape[1:]), tokens.dtype)
    return jax.lax.while_loop(lambda carry: carry[1] < exists.sum(), body, (x, 0))[0]


def _classify(model: vit.AViT, variables: Any, x: jax.Array, exists: jax.Array, plan: Plan) -> tuple[jax.Array, Aux]:
    """Tokens `(B, N, D)` of one wave to logits and `Aux`, with the images first in every array of it.

    Images that do not exist, `(B,)` bool, cost nothing.
    """
    config, num_readout = model.halting, model.num_readout
    gamma, beta = model.apply(variables, method=lambda model: model.gate.gate())
    state = halting.init(x.shape[:2], x.dtype)
    state = dataclasses.replace(state, active=state.active & exists[:, None])
    readout = jnp.zeros((len(x), num_readout, model.width), state.remainder.dtype)
    slot = jnp.broadcast_to(jnp.arange(model.num_tokens), x.shape[:2])

    def layer(carry: tuple, layer: tuple) -> tuple[tuple, tuple]:
        x, slot, state, readout = carry
        params, is_last = layer
        active = state.active
        x, slot = _transform(model, params, x, slot, active, plan)
        score = halting.score(x, gamma=gamma, beta=beta, channel=config.channel)
        score = jnp.take_along_axis(score, slot, axis=1)
        state, weight = halting.accumulate(state, score, epsilon=config.epsilon, is_last=is_last)
        readout = readout + weight[:, :num_readout, None] * jnp.take_along_axis(x, slot[:, :num_readout, None], axis=1)
        unfinished = state.active[:, :num_readout].any(axis=1, keepdims=True)
        state = dataclasses.replace(state, active=state.active & unfinished)
        return (x, slot, state, readout), (score, active)

    layers = (variables["params"]["layers"], jnp.arange(model.depth) == model.depth - 1)
    (_, _, state, readout), (score, active) = jax.lax.scan(layer, (x, slot, state, readout), layers)
    padded = jax.vmap(lambda count: padded_macs(model, count, plan))(active.sum(axis=-1))
    aux = Aux(
        score=score.swapaxes(0, 1),
        active=active.swapaxes(0, 1),
        depth=state.depth,
        macs=flops.image_macs(model, active),
        macs_padded=flops.fixed_macs(model) + padded.sum(axis=0),
        class_output=readout[:, 0],
        distillation_output=readout[:, 1] if model.distilled else None,
    )
    return model.apply(variables, readout, method="classify"), aux


def _groups(count: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
    """Images in groups, those with most tokens first.

    Args:
      count: `(B,)` tokens each image still has.
      group: images a group.

    Returns:
      Image, B for an empty place, and its tokens, both `(ceil(B / group), group)`.
    """
    order = jnp.argsort(-count)
    empty = -len(count) % group
    image = jnp.pad(order, (0, empty), constant_values=len(count))
    return image.reshape(-1, group), jnp.pad(count[order], (0, empty)).reshape(-1, group)


def padded_macs(model: vit.AViT, count: jax.Array, plan: Plan) -> jax.Array:
    """MACs of one layer on each image of a wave, with the padding that the plan brings.

    Args:
      model: for its sizes.
      count: `(B,)` tokens each image still has.
      plan: for its group and step.

    Returns:
      `(B,)` float32; the images of a group share its cost evenly, that of empty places included.
    """
    batch = len(count)
    image, count = _groups(count, plan.group)
    compiled = jnp.array((0, *plan.token_counts(model.num_tokens)))
    ran = compiled[jnp.searchsorted(compiled, count[:, :1])].astype(jnp.float32)
    macs = plan.group * flops.layer_macs(ran, width=model.width, mlp_width=model.mlp_width)
    macs = jnp.where(count > 0, macs / jnp.maximum((count > 0).sum(axis=1, keepdims=True), 1), 0.0)
    return jnp.zeros(batch).at[image.reshape(-1)].set(macs.reshape(-1), mode="drop")


def _transform(
    model: vit.AViT, params: Any, x: jax.Array, slot: jax.Array, active: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """One transformer layer on the active tokens.

    Args:
      model: for its sizes.
      params: of this layer.
      x: `(B, N, D)` tokens in their slots.
      slot: `(B, N)` int32, slot of each active token.
      active: `(B, N)` bool.
      plan: `group` at most B.

    Returns:
      `x` and `slot` after the layer.
    """
    batch, num_tokens, _ = x.shape
    block = vit.Block(**model.block_sizes)
    ends = jnp.cumsum(active, axis=1)
    token = jax.vmap(lambda ends: jnp.searchsorted(ends, jnp.arange(num_tokens) + 1))(ends)  # in each slot from now on
    source = jnp.take_along_axis(slot, jnp.minimum(token, num_tokens - 1), axis=1)
    image, count = _groups(ends[:, -1], plan.group)
    largest = jnp.pad(count[:, 0], (0, 1))  # a 0 ends the loops

    def run(num: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, group = carry
        there = jnp.arange(num)[None] < count[group][:, None]
        images = jnp.minimum(image[group], batch - 1)
        tokens = jnp.where(there[..., None], x[images[:, None], source[images, :num]], 0)
        tokens = block.apply({"params": params}, tokens, there, method="transform")
        for i in range(plan.group):
            start = (images[i], 0, 0)
            before = jax.lax.dynamic_slice(x, start, (1, num, x.shape[-1]))
            x = jax.lax.dynamic_update_slice(x, jnp.where(image[group, i] < batch, tokens[i : i + 1], before), start)
        return x, group + 1

    # From the fullest groups to the emptiest; a loop runs those that need its number of tokens, none if there is none. Loops
    # and not lax.switch, whose branches XLA runs on a single core of a CPU.
    token_counts = plan.token_counts(num_tokens)[::-1]
    carry = (x, jnp.zeros((), jnp.int32))
    for num, fewer in zip(token_counts, (*token_counts[1:], 0), strict=True):
        carry = jax.lax.while_loop(
            lambda carry, fewer=fewer: largest[carry[1]] > fewer, lambda carry, num=num: run(num, carry), carry
        )
    return carry[0], ends - 1


def autotune(model: vit.AViT, variables: Any, images: jax.Array, *, cache: os.PathLike | str = _CACHE) -> Plan:
    """Measures plans around the default one on these images, and returns the fastest; give it to `apply`.

    The first call takes a minute or two, nearly all of it to compile. The result is remembered for this device, version of JAX,
    model, shape and dtype of the images: the same question is answered from the file from then on. Measure on real images and
    trained weights, on an idle machine: what is fastest depends on what halts.

    Args:
      model: as for `apply`.
      variables: as for `apply`.
      images: a typical batch.
      cache: JSON file that remembers; delete it to measure anew.
    """
    cache = pathlib.Path(cache).expanduser()
    shape = f"{images.dtype}{list(images.shape)}"
    key = f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {shape}, {' '.join(repr(model).split())}"
    try:
        known = json.loads(cache.read_text())
        return Plan(**known[key])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not there, or not ours: measured, and written anew
    default = default_plan(len(images))
    groups = sorted({max(1, default.group // 2), default.group, min(2 * default.group, len(images))})
    plans = [
        dataclasses.replace(default, group=group, step=step) for group in groups for step in (default.step, 2 * default.step)
    ]
    runs = []
    for plan in plans:
        _logger.info("compiling %s, %d of %d", plan, len(runs) + 1, len(plans))
        run = jax.jit(lambda variables, images, plan=plan: apply(model, variables, images, plan=plan))
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
    """Adds the plan to the file; whole or not at all."""
    try:
        known = dict(json.loads(cache.read_text()))
    except (OSError, ValueError, TypeError):
        known = {}
    cache.parent.mkdir(parents=True, exist_ok=True)
    partial = cache.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(known | {key: dataclasses.asdict(plan)}, indent=2) + "\n")
    partial.replace(cache)
