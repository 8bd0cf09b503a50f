"""A vision transformer whose layers run one after the other in Python, so that tokens may leave in
between.

Its parameters are those of `avit_jax.AViT` without halting. The number of tokens of each layer is
known when it compiles, so what a rival leaves out is really not computed.
"""

import dataclasses
import math
from typing import Any

import flax
import jax
import jax.numpy as jnp

from avit_jax.core import halting as halting_lib
from avit_jax.core import ragged
from avit_jax.core.plan import Plan
from avit_jax.models import block, flops, vit

# For rivals in which images end early, with all their tokens.
PLAN = Plan(bucket=8, token_multiple=32)
_FLAX = ("parent", "name")  # attributes of every module


@flax.struct.dataclass(kw_only=True)
class Aux(vit.Aux):
    """`vit.Aux` with a loss that the network adds in training, a scalar; None for none."""

    loss: jax.Array | None = None


class Unrolled(vit.AViT):
    """What the rivals share; one of them says in `run_layers` what happens to the tokens.

    `__call__` takes and gives what `AViT.__call__` does. `Aux.active` holds how many tokens enter
    each layer, not which.
    """

    halting: halting_lib.HaltingConfig | None = None

    @property
    def stages(self) -> tuple[int, ...]:
        """The layers, counted from 0, in which tokens leave: a quarter, half and three quarters of
        the way, rounded down.
        """
        return tuple(self.depth * quarter // 4 for quarter in (1, 2, 3))

    def run_layers(self, x: jax.Array, layers: "Layers") -> tuple[Any, Aux]:
        """Embedded tokens `(B, N, D)` to logits and Aux."""
        raise NotImplementedError

    def __call__(
        self, images: jax.Array, *, train: bool = False, image_index: jax.Array | None = None
    ) -> tuple[Any, Aux]:
        """See `AViT.__call__`; but it has no dropout.

        Raises:
          ValueError: it is to train with one.
        """
        if train and self.dropout:
            raise ValueError("the rivals have no dropout: set it to 0.")
        if self.is_initializing():
            super().__call__(images)  # creates the parameters of the layers
        index = jnp.arange(len(images)) if image_index is None else image_index
        noisy = index if train else None
        layers = Layers(
            block=block.Block(**self.block_kwargs, parent=None),
            params=self.layers.variables["params"],
            keep=self.draw_drop_path(noisy),
            image_index=index,
            train=train,
        )
        return self.run_layers(self.embed(images, noisy), layers)

    def aux(self, counts: list[int], batch: int, macs: float | None) -> Aux:
        """Aux of a network in which every image has `counts[l]` tokens at the input of layer l.

        MACs are of all layers; None if all tokens compute.
        """
        count = jnp.array(counts)[:, None, None]
        active = jnp.broadcast_to(
            jnp.arange(self.num_tokens)[None, None] < count, (self.depth, batch, self.num_tokens)
        )
        depth = active.sum(axis=0)
        macs = self.depth * flops.layer_macs(self.num_tokens, self) if macs is None else macs
        return Aux(
            score=jnp.zeros(active.shape),
            active=active,
            depth=depth,
            ponder_cost=depth.astype(jnp.float32),
            class_output=jnp.zeros((batch, self.width)),
            macs=jnp.full((batch,), float(macs + flops.fixed_macs(self))),
        )

    def attention_macs(self, count: float) -> float:
        """MACs of the attention of one layer on `count` tokens."""
        return count * (4 * self.width**2 + 2 * self.width * count)

    def mlp_macs(self, count: float) -> float:
        """MACs of the MLP of one layer on `count` tokens."""
        return count * 2 * self.width * self.mlp_width

    def kept(self, patches: int, share: float) -> int:
        """How many of the patch tokens stay."""
        return max(1, math.ceil(patches * share))


def attributes(model: vit.AViT) -> dict[str, Any]:
    """What a rival of the same sizes is made from."""
    return {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(vit.AViT)
        if field.name not in _FLAX
    }


@dataclasses.dataclass(frozen=True)
class Layers:
    """The layers of a network, to be called one by one.

    Attributes:
      block: one layer.
      params: of all, stacked.
      keep: `(L, B, 2)` drop-path factors, None for 1.
      image_index: `(B,)` place of each image in the global batch.
      train: whether this is training.
    """

    block: block.Block
    params: Any
    keep: jax.Array | None
    image_index: jax.Array
    train: bool

    def __call__(
        self, i: int, x: jax.Array, method: str = "transform", **arguments: Any
    ) -> jax.Array:
        """Layer i, or one of the two branches of it, on tokens `(B, n, D)`."""
        keep = None if self.keep is None else self.keep[i]
        return self.block.apply(
            {"params": self.params_of(i)}, x, method=method, keep=keep, **arguments
        )

    def params_of(self, i: int) -> Any:
        """Parameters of layer i."""
        return jax.tree.map(lambda stacked: stacked[i], self.params)

    def queries_and_keys(self, i: int, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys `(B, H, n, K)` of layer i; XLA computes them once, though the layer does
        so too.
        """
        params = self.params_of(i)
        normed = self.block.apply({"params": params}, x, method=lambda layer, x: layer.norm1(x))
        query, key, _ = self.block.apply({"params": params}, normed, method="queries_keys_values")
        return query, key


def run_active(layer: block.Block, params: Any, x: jax.Array, active: jax.Array) -> jax.Array:
    """Runs a layer on the active tokens `(B, N)` of `(B, N, D)` only."""

    def run(params: Any, x: jax.Array, _: Any, active: jax.Array | None) -> tuple[jax.Array, dict]:
        return layer.apply({"params": params}, x, active, method="transform"), {}

    return ragged.transform(run, PLAN, params, x, {}, ragged.Inputs(), active)[0]


def class_and_best(x: jax.Array, rank: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The class token and the `count` patch tokens of highest rank, in their order.

    Args:
      x: `(B, 1 + n, D)`, class token first.
      rank: `(B, n)` of the patch tokens.
      count: how many of them stay.

    Returns:
      Tokens `(B, 1 + count, D)`, and `(B, count)` which of the patch tokens they are.
    """
    kept = jnp.sort(jax.lax.top_k(rank, count)[1], axis=1)
    return jnp.concatenate(
        [x[:, :1], jnp.take_along_axis(x[:, 1:], kept[..., None], axis=1)], axis=1
    ), kept
