"""A transformer layer on the tokens that are still active, under the fixed shapes that XLA compiles
for.

The images are sorted by how many tokens they still have, and taken in groups of a few. A group
gathers its active tokens, runs at the smallest of some compiled numbers of tokens that holds its
first image, and puts the results back into their places; an image without active tokens is never
visited. All of it is one program: loops whose length the device decides, or switches, and no value
  that Python reads back. Nothing is known here of the layer but that it takes `(params, tokens,
  active, extras)`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """How images are batched; affects speed, memory and the last digits only.

    Attributes:
      group: images that go through a layer together; fewer, to have groups of about one size.
      full: with loops, images that go through a layer together where all of them still have all
        tokens: as many groups as fit.
      step: tokens; a group is padded to a multiple of it, of twice as many below half of all
        tokens. Compile time grows with the number of multiples, and with the group.
      wave: images that are sorted, and whose tokens are held in memory, at a time; of inference. A
        group is not larger.
      switch: a switch chooses the number of tokens of each group, in place of loops, and one
        scatter puts its tokens back, in place of a slice for each image. For a GPU: there the host
        reads the condition of a loop, but not that of a switch as long as XLA keeps it in a command
        buffer (by default it does). On CPU XLA runs the branches of a switch on one core.
    """

    group: int
    step: int
    wave: int = 96
    full: int = 12
    switch: bool = False

    def __post_init__(self) -> None:
        if min(self.group, self.step, self.wave, self.full) < 1:
            raise ValueError(f"group, step, wave and full must be at least 1; got {self}.")

    def evenly(self, batch: int) -> "Plan":
        """The plan whose groups, as many as this one's, share out the batch."""
        return dataclasses.replace(self, group=-(-batch // -(-batch // self.group)))

    def wave_size(self, batch: int) -> int:
        """Images a wave of this batch: at most `wave`, rounded up to whole groups; the last wave
        may hold fewer.
        """
        waves = -(-batch // self.wave)
        return min(batch, -(-batch // (waves * self.group)) * self.group)

    def token_counts(self, num_tokens: int) -> tuple[int, ...]:
        """The compiled numbers of tokens, ascending; the last is all of them."""
        fine = range(self.step, num_tokens, self.step)
        return (*(n for n in fine if 2 * n >= num_tokens or n % (2 * self.step) == 0), num_tokens)


def training_plan(num_tokens: int, backend: str | None = None) -> Plan:
    """A good plan for training with N tokens: groups of a power of two images, of 2,080 tokens (on
    a GPU 25,600) at most.

    Args:
      num_tokens: N.
      backend: "cpu", "gpu" or "tpu"; None: the default backend of JAX, which is then started.
    """
    gpu = (backend or jax.default_backend()) == "gpu"
    group = 2 ** (max(1, (25_600 if gpu else 2080) // num_tokens).bit_length() - 1)
    return Plan(group=group, step=max(8, num_tokens // 48 * 8), switch=gpu)


# Where removal was measured to be faster than masking on a GPU: at least so many channels and
# images a device, at most such a MACs ratio. NVIDIA H200, bfloat16, 224 pixels:
# experiments/inference_speed/h200_*.json, and for training, against masking with `remat`,
# experiments/training_removal/h200.json; both are tables of docs/speed.md.
_FASTER_ON_GPU = {
    False: ((192, 1024, 0.62), (384, 256, 0.4)),
    True: ((192, 256, 0.4),),
}  # by whether it is training


def pays(
    width: int,
    images: int,
    macs_ratio: float,
    *,
    training: bool = False,
    backend: str | None = None,
) -> bool:
    """Whether to remove halted tokens instead of masking them: on a GPU only where removal was
    measured to be faster.

    Args:
      width: D, channels of a token.
      images: of a call, on each device.
      macs_ratio: share of the static network's MACs that the network takes; 1 if it is not known.
      training: whether gradients are needed.
      backend: "cpu", "gpu" or "tpu"; None: the default backend of JAX, which is then started.
    """
    if (backend or jax.default_backend()) != "gpu":
        return True
    return any(
        width >= d and images >= b and macs_ratio <= ratio
        for d, b, ratio in _FASTER_ON_GPU[training]
    )


def groups(count: jax.Array, group: int) -> tuple[jax.Array, jax.Array]:
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


@flax.struct.dataclass(kw_only=True)
class _Group:
    """A group of images at `num` tokens each.

    Attributes:
      image: `(g,)`; an empty place names any.
      exists: `(g,)` bool, whether the place is taken.
      token: `(g, num)` the active tokens of each image, then padding.
      there: `(g, num)` bool, whether it is not padding; None where every image exists and has all
        tokens.
      active: `(g, N)` bool, of the images.
      place: `(g, N)` where each active token is among the `num`.
      scatter: whether tokens go back all at once.
    """

    image: jax.Array
    exists: jax.Array
    token: jax.Array
    there: jax.Array | None
    active: jax.Array
    place: jax.Array
    scatter: bool = flax.struct.field(pytree_node=False)

    def gather(self, x: jax.Array) -> jax.Array:
        """Tokens `(g, num, D)` of `(B, N, D)`; padding is 0."""
        if self.there is None:
            return x[self.image]
        return jnp.where(self.there[..., None], x[self.image[:, None], self.token], 0)

    def put(self, x: jax.Array, tokens: jax.Array) -> jax.Array:
        """`x` with the tokens in their places."""
        if (
            self.scatter
        ):  # what is not there gets a place that does not exist, and that nothing else has
            image = jnp.where(self.exists, self.image, len(x) + jnp.arange(len(self.image)))
            beyond = x.shape[1] + jnp.arange(self.token.shape[1])
            token = self.token if self.there is None else jnp.where(self.there, self.token, beyond)
            return x.at[image[:, None], token].set(tokens, mode="drop", unique_indices=True)
        if self.there is not None:
            tokens = jnp.take_along_axis(tokens, self.place[..., None], axis=1)
        replace = self.active & self.exists[:, None]
        for i in range(len(self.image)):
            start, new = (self.image[i], 0, 0), tokens[i : i + 1]
            if self.there is not None:
                new = jnp.where(
                    replace[i : i + 1, :, None],
                    new,
                    jax.lax.dynamic_slice(x, start, (1, *x.shape[1:])),
                )
            x = jax.lax.dynamic_update_slice(x, new, start)
        return x


def _visit(step: Callable[[Any, _Group], Any], carry: Any, active: jax.Array, plan: Plan) -> Any:
    """Runs `carry = step(carry, group)` for every group that has an active token."""
    batch, num_tokens = active.shape
    plan = plan.evenly(batch)
    ends = jnp.cumsum(active, axis=1)
    search = functools.partial(jnp.searchsorted, method="compare_all" if plan.switch else "scan")
    token = jax.vmap(lambda ends: search(ends, jnp.arange(num_tokens) + 1))(ends)
    token = jnp.minimum(token, num_tokens - 1)
    image, count = groups(ends[:, -1], plan.group)
    together = 1 if plan.switch else min(max(1, plan.full // plan.group), len(image))
    largest, smallest = (
        jnp.pad(count[:, i], (0, together)) for i in (0, -1)
    )  # the 0 at the end ends the loops

    def run(num: int, state: tuple[Any, jax.Array], full: bool = False) -> tuple[Any, jax.Array]:
        carry, i = state
        width = together if full else 1
        place = jax.lax.dynamic_slice_in_dim(image, i, width).reshape(-1)
        images = jnp.minimum(place, batch - 1)
        group = _Group(
            image=images,
            exists=place < batch,
            token=token[images, :num],
            there=None if full else jnp.arange(num)[None] < count[i][:, None],
            active=active[images],
            place=jnp.clip(ends[images] - 1, 0, num - 1),
            scatter=plan.switch,
        )
        return step(carry, group), i + width

    token_counts = plan.token_counts(num_tokens)
    full = functools.partial(run, num_tokens, full=True)
    state = (carry, jnp.zeros((), jnp.int32))
    if plan.switch:
        nothing = lambda state: (state[0], state[1] + 1)  # noqa: E731
        branches = [nothing, *(functools.partial(run, num) for num in token_counts), full]

        def switch(_: int, state: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
            which = search(jnp.array((0, *token_counts)), largest[state[1]])
            which = jnp.where(smallest[state[1]] == num_tokens, len(branches) - 1, which)
            return jax.lax.switch(which, branches, state)

        return jax.lax.fori_loop(0, len(image), switch, state)[0]
    # From the fullest groups to the emptiest; a loop runs those that need its number of tokens,
    # none if there is none. Where nothing has halted yet, as in the first layers, several groups
    # run as one, without a mask.
    state = jax.lax.while_loop(
        lambda state: smallest[state[1] + together - 1] == num_tokens, full, state
    )
    for num, fewer in zip(token_counts[::-1], (*token_counts[-2::-1], 0), strict=True):
        state = jax.lax.while_loop(
            lambda state, fewer=fewer: largest[state[1]] > fewer,
            lambda state, num=num: run(num, state),
            state,
        )
    return state[0]


Layer = Callable[[Any, jax.Array, jax.Array | None, Any], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def transform(
    layer: Layer, plan: Plan, params: Any, x: jax.Array, active: jax.Array, extras: Any = None
) -> jax.Array:
    """A layer on the active tokens; halted ones stay as they are.

    The backward pass goes through the same groups and computes the layer anew: only `x` is kept for
    it.

    Args:
      layer: `(params, tokens (g, n, D), active (g, n), extras)` to tokens `(g, n, D)`; active is
        None if all are.
      plan: group and step.
      params: of the layer.
      x: `(B, N, D)` tokens.
      active: `(B, N)` bool.
      extras: a tree of arrays `(B, ...)` that belong to the images, without a gradient; None for
        none.

    Returns:
      `(B, N, D)` tokens.
    """

    def step(x: jax.Array, group: _Group) -> jax.Array:
        return group.put(x, layer(params, group.gather(x), group.there, _of(extras, group)))

    return _visit(step, x, active, plan)


def _of(extras: Any, group: _Group) -> Any:
    return jax.tree.map(lambda extra: extra[group.image], extras)


def _forward(
    layer: Layer, plan: Plan, params: Any, x: jax.Array, active: jax.Array, extras: Any
) -> tuple:
    return transform(layer, plan, params, x, active, extras), (params, x, active, extras)


def _backward(layer: Layer, plan: Plan, saved: tuple, grad: jax.Array) -> tuple:
    params, x, active, extras = saved

    def step(carry: tuple, group: _Group) -> tuple:
        grad, param_grads = carry
        more, tokens = jax.vjp(
            lambda params, tokens: layer(params, tokens, group.there, _of(extras, group)),
            params,
            group.gather(x),
        )[1](group.gather(grad))
        return group.put(grad, tokens), jax.tree.map(jnp.add, param_grads, more)

    grad, param_grads = _visit(step, (grad, jax.tree.map(jnp.zeros_like, params)), active, plan)
    return param_grads, grad, None, None


transform.defvjp(_forward, _backward)
