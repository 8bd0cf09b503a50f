"""How a layer runs: `masked` on all tokens, `Bucketed` and `Packed` on the active ones.

`AtOnce` runs all layers by one function. Axes as in `vit`.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, PyTree

from avit_jax.core import packed, ragged
from avit_jax.core.arrays import Array
from avit_jax.core.plan import Plan
from avit_jax.core.ragged import Inputs
from avit_jax.kernels import packed as packed_kernels

if TYPE_CHECKING:
    from avit_jax.models.forward import Carry

# (layer, params, x, values, inputs, active) -> (x, values), as `ragged.transform` without a plan.
Executor = Callable[..., tuple[Float[Array, "B N D"], PyTree[Float[Array, "B N"]]]]


def masked(
    layer: ragged.Layer,
    params: PyTree[Array],
    x: Float[Array, "B N D"],
    values: PyTree[Float[Array, "B N"]],
    inputs: Inputs,
    active: Bool[Array, "B N"],
) -> tuple[Float[Array, "B N D"], PyTree[Float[Array, "B N"]]]:
    """Sets halted tokens to 0, then runs a layer on all tokens; arguments as `ragged.transform`.

    Outputs and values of halted tokens are meaningless.
    """
    del values
    # Straight-through, as in the released code: this step does not set the gradient of halted
    # tokens to 0. It is 0 anyway, unless the "official" prior reads halted tokens.
    x = x + jax.lax.stop_gradient(jnp.where(active[..., None], 0.0, -x).astype(x.dtype))
    return layer(params, x, inputs, active)


@dataclasses.dataclass(frozen=True)
class Bucketed:
    """Runs a layer on the active tokens only; see `ragged.transform`.

    Attributes:
      plan: sizes of the buckets.
    """

    plan: Plan

    def __call__(
        self, layer: ragged.Layer, *args: PyTree[Array]
    ) -> tuple[Float[Array, "B N D"], PyTree[Float[Array, "B N"]]]:
        return ragged.transform(layer, self.plan, *args)


@dataclasses.dataclass(frozen=True)
class AtOnce:
    """Runs all layers by one function, which decides which tokens halt; for inference only.

    Attributes:
      layers: maps `(gate, carry, params)`, as in `forward.run`, to scores `(L, B, N)` and readout
        `(B, R, D)`. It must stop finished images. Scores of halted tokens are meaningless.
    """

    layers: Callable[..., tuple[Array, Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """Runs a layer on the active tokens of all images, which share one buffer; see `core.packed`.

    The tokens stay in the buffer between layers. It is for inference, with layers for which
    `kernels.packed.supports` is True. It computes the layers by these kernels and ignores `layer`.

    Attributes:
      num_heads: H.
      norm_eps: epsilon of the layer norms.
      params: of all layers, stacked; set by `forward.run`.
    """

    num_heads: int
    norm_eps: float
    params: Any = None

    def start(self, carry: "Carry", params: Any) -> tuple["Packed", "Carry", Array]:
        """Returns the executor with its parameters, the carry with a buffer, and layer indices."""
        rows = packed_kernels.num_rows(carry.x.shape[0] * carry.x.shape[1])
        carry = dataclasses.replace(carry, x=packed.buffer(carry.x, rows))
        index = jnp.arange(len(jax.tree.leaves(params)[0]), dtype=jnp.int32)
        return dataclasses.replace(self, params=params), carry, index

    def __call__(
        self,
        layer: ragged.Layer,
        params: Any,
        x: packed.PackedTokens,
        values: Any,
        inputs: Inputs,
        active: Array,
    ) -> tuple[Any, Any]:
        """Runs a layer; as `ragged.transform`, but `params[0]` is the index of the layer."""
        del layer, inputs
        packing = packed.pack(active, len(x.rows))
        source = x.row.reshape(-1).at[packing.token].get(mode="promise_in_bounds")
        rows = packed_kernels.layer(
            self.params,
            params[0][None],
            x.rows,
            source,
            packing.first,
            num_tokens=active.shape[1],
            num_heads=self.num_heads,
            eps=self.norm_eps,
        )
        return packed.PackedTokens(rows=rows, row=packing.row), values
