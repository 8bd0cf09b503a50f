"""One layer of the vision transformer, with its halting step. Axes as in `vit`."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from avit_jax.core import halting as halting_lib
from avit_jax.core import merging
from avit_jax.core import removal as removal_lib
from avit_jax.kernels import attention as attention_lib

kernel_init = (
    nn.initializers.xavier_uniform()
)  # learns from random weights far sooner than 0.02 everywhere


def _gelu(x: jax.Array) -> jax.Array:
    """Exact GELU; by erf, which XLA computes faster than the erfc of `jax.nn.gelu`."""
    # In half precision by tanh it would enter the product before it on a GPU, but differs from this
    # by up to 5e-4.
    return 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))


def _recomputes(dtype: jax.typing.DTypeLike | None) -> bool:
    """Whether the backward pass recomputes norms and GELU from their inputs.

    It does so in half precision alone. Otherwise XLA stores several float32 arrays of each layer,
    and a GPU spends most of its time moving memory.
    """
    return dtype in (jnp.bfloat16, jnp.float16)


def per_token(dense: nn.Dense, x: jax.Array) -> jax.Array:
    """A dense layer on tokens `(B, N, D)` as one matrix product: its backward pass is faster on
    CPU.
    """
    return dense(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def random_keep(
    key: jax.Array, image_index: jax.Array, rate: jax.typing.ArrayLike, shape: tuple[int, ...]
) -> jax.Array:
    """Dropout factors `(B, *shape)`, 0 or 1 / (1 - rate), drawn for each image from its place in
    the global batch.

    So the draw does not depend on how the batch is spread over devices.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, image_index)
    return jax.vmap(
        lambda key: jax.random.bernoulli(key, 1.0 - rate, shape).astype(float) / (1.0 - rate)
    )(keys)


def cast(params: Any, dtype: jax.typing.DTypeLike | None) -> Any:
    """Parameters of layers with those of the dense ones in the dtype of the computation, which
    these would cast them to.

    Done outside the loop over layers, it is done once. Norms compute with their parameters as they
    are.
    """
    if dtype is None:
        return params
    return {
        name: of_module
        if name.startswith("norm")
        else jax.tree.map(lambda x: x.astype(dtype), of_module)
        for name, of_module in params.items()
    }


class LayerNorm(nn.LayerNorm):
    """Flax's layer norm. It promotes dtypes implicitly, which strict promotion would refuse."""

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x)


class _QueryKeyValue(nn.Module):
    """Dense layer `(..., D)` to queries, keys and values `(..., 3 D)`, with the parameters of
    `nn.Dense`.

    Softmax does not see the key bias, so that its gradient is exactly 0. It is cut here: Adam would
    blow up the rounding noise in its place, which differs from one number of devices to the next.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, *, apart: bool = False) -> jax.Array | list[jax.Array]:
        """Of rows `(..., D)`; `apart`: as three arrays `(..., D)`, each the result of a product of
        its own.
        """
        kernel = self.param("kernel", kernel_init, (x.shape[-1], 3 * x.shape[-1]))
        bias = self.param("bias", nn.initializers.zeros, (3 * x.shape[-1],))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        query, key, value = jnp.split(bias, 3)
        biases = [query, jax.lax.stop_gradient(key), value]
        ones = (1,) * (x.ndim - 1)
        if not apart:
            return x @ kernel + jnp.concatenate(biases).reshape(*ones, -1)
        results = []
        for part, bias in zip(jnp.split(kernel, 3, axis=1), biases, strict=True):
            results.append(x @ part + bias.reshape(*ones, -1))
            x = jax.lax.optimization_barrier(
                x
            )  # else XLA makes one product of them, and copies its result apart
        return results


class Block(nn.Module):
    """A pre-norm transformer layer, followed by one halting step where the network halts."""

    width: int
    num_heads: int
    mlp_width: int
    norm_eps: float
    dropout: float
    dtype: Any
    halting: halting_lib.HaltingConfig | None
    removal: removal_lib.Plan | None
    compared: int
    fused_attention: bool | None

    def setup(self) -> None:
        norm_class = (
            nn.remat(LayerNorm, prevent_cse=False) if _recomputes(self.dtype) else LayerNorm
        )
        norm = functools.partial(
            norm_class, epsilon=self.norm_eps, dtype=self.dtype, use_fast_variance=False
        )
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=kernel_init)
        self.norm1 = norm()
        self.qkv = _QueryKeyValue(dtype=self.dtype)
        self.proj = dense(self.width)
        self.norm2 = norm()
        self.fc1 = dense(self.mlp_width)
        self.fc2 = dense(self.width)

    def transform(
        self,
        x: jax.Array,
        active: jax.Array | None = None,
        keep: jax.Array | None = None,
        image_index: jax.Array | None = None,
    ) -> jax.Array:
        """Attention and MLP on tokens `(B, N, D)`.

        Args:
          x: tokens; halted ones must be 0.
          active: `(B, N)` bool, None if all are: no token attends to one that is not.
          keep: `(B, 2)` factors of the two residual branches, drop path; None for 1.
          image_index: `(B,)` places in the global batch, for dropout; None in evaluation.
        """
        x = self.attention(x, active, keep, image_index)
        return self.mlp(x, active, keep, image_index)

    def attention(
        self,
        x: jax.Array,
        active: jax.Array | None = None,
        keep: jax.Array | None = None,
        image_index: jax.Array | None = None,
        *,
        size: jax.Array | None = None,
        key_weight: jax.Array | None = None,
    ) -> jax.Array:
        """The first branch of `transform`.

        Args:
          x: as in `transform`, like the next three.
          active: see there.
          keep: see there.
          image_index: see there.
          size: `(B, N)` how many keys each token counts as; None for 1.
          key_weight: `(B, N, N)` what queries give to keys is multiplied by it; may be 0.
        """
        a = self._where_active(self.norm1(x), active)
        return x + self._drop(self._attend(a, active, size, key_weight), keep, 0, image_index)

    def mlp(
        self,
        x: jax.Array,
        active: jax.Array | None = None,
        keep: jax.Array | None = None,
        image_index: jax.Array | None = None,
    ) -> jax.Array:
        """The second branch of `transform`."""
        a = self.norm2(self._where_active(x, active))
        a = per_token(self.fc1, self._where_active(a, active))
        a = jax.checkpoint(_gelu, prevent_cse=False)(a) if _recomputes(a.dtype) else _gelu(a)
        return x + self._drop(
            per_token(self.fc2, self._dropout(a, image_index)), keep, 1, image_index
        )

    def _where_active(self, x: jax.Array, active: jax.Array | None) -> jax.Array:
        return x if active is None else x * active[..., None].astype(x.dtype)

    def queries_keys_values(self, a: jax.Array) -> jax.Array:
        """Of normed tokens `(B, N, D)`, all heads: `(3, B, H, N, K)`."""
        return (
            per_token(self.qkv, a)
            .reshape(*a.shape[:2], 3, self.num_heads, -1)
            .transpose(2, 0, 3, 1, 4)
        )

    def _attend(
        self,
        a: jax.Array,
        active: jax.Array | None,
        size: jax.Array | None,
        key_weight: jax.Array | None,
    ) -> jax.Array:
        bias = attention_lib.key_bias(active, size)
        if key_weight is None and self._fuses(a.dtype):
            query, key, value = self.qkv(a.reshape(-1, a.shape[-1]), apart=True)
            heads = (*a.shape[:2], self.num_heads, -1)
            out = attention_lib.fused(
                query.reshape(heads), key.reshape(heads), value.reshape(heads), bias
            )
        else:
            out = attention_lib.exact(*self.queries_keys_values(a), bias, key_weight).swapaxes(1, 2)
        return per_token(self.proj, out.reshape(a.shape))

    def _fuses(self, dtype: jax.typing.DTypeLike) -> bool:
        if not attention_lib.can_fuse(dtype, self.width // self.num_heads):
            return False
        return attention_lib.has_cudnn() if self.fused_attention is None else self.fused_attention

    def _dropout(self, x: jax.Array, image_index: jax.Array | None) -> jax.Array:
        if image_index is None or not self.dropout:
            return x
        return x * random_keep(
            self.make_rng("dropout"), image_index, self.dropout, x.shape[1:]
        ).astype(x.dtype)

    def _drop(
        self, x: jax.Array, keep: jax.Array | None, branch: int, image_index: jax.Array | None
    ) -> jax.Array:
        x = self._dropout(x, image_index)
        return x if keep is None else x * keep[:, branch, None, None].astype(x.dtype)

    def transform_and_score(
        self,
        x: jax.Array,
        notes: merging.Notes | None,
        active: jax.Array | None,
        gate: tuple[jax.Array, jax.Array],
        is_last: jax.Array,
        keep: jax.Array | None = None,
        image_index: jax.Array | None = None,
    ) -> tuple[jax.Array, merging.Notes | None, jax.Array]:
        """`transform`, and what follows for halting.

        Args:
          x: tokens `(B, N, D)`; halted ones must be 0.
          notes: on the tokens, where halted ones merge; else None.
          active: as in `transform`.
          gate: gamma and beta.
          is_last: whether this is the last layer, after which all halt, so that none merges.
          keep: as in `transform`.
          image_index: as in `transform`.

        Returns:
          Tokens, their notes, and halting scores `(B, N)`.
        """
        channel = self.halting.channel
        if notes is None:
            x = self.transform(x, active, keep, image_index)
            return x, None, halting_lib.score(x, gamma=gate[0], beta=gate[1], channel=channel)
        x = self.attention(x, active, keep, image_index, size=notes.size)
        x = self.mlp(x, active, keep, image_index)
        merge = functools.partial(self._merge_and_score, active=active, gate=gate)
        return jax.lax.cond(
            is_last, lambda x, notes: (x, notes, jnp.ones_like(notes.size)), merge, x, notes
        )

    def _merge_and_score(
        self,
        x: jax.Array,
        notes: merging.Notes,
        active: jax.Array | None,
        gate: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, merging.Notes, jax.Array]:
        """The rest of `transform_and_score` where halted tokens merge."""
        patches = notes.is_patch if active is None else notes.is_patch & active
        similar = merging.similarity(x, self.compared)
        redundancy = self.halting.redundancy * merging.redundancy(similar, patches)
        score = halting_lib.score(
            x, gamma=gate[0], beta=gate[1] + redundancy, channel=self.halting.channel
        )
        cumulative = notes.cumulative + score
        stays = halting_lib.goes_on(cumulative, self.halting.epsilon)
        x, size = merging.merge(
            x, notes.size, similar, leaves=patches & ~stays, stays=patches & stays
        )
        return x, notes.replace(size=size, cumulative=cumulative), score

    def __call__(self, carry, layer, gate, image_index):
        """One layer of the scan.

        Args:
          carry: tokens `(B, N, D)`; without halting that is all, else also the halting state, the
            read-out `(B, R, D)` and sizes `(B, N)`, None where halted tokens do not merge.
          layer: `(is_last, keep)`, a scalar and as in `transform`.
          gate: `(gamma, beta)`, None without halting.
          image_index: as in `transform`.

        Returns:
          The carry, and `(score, active)` of this layer, None without halting.
        """
        is_last, keep = layer
        if self.halting is None:
            return self.transform(carry, None, keep, image_index), None
        x, state, readout, size = carry
        num_readout, active = readout.shape[1], state.active
        if self.removal is None or self.is_initializing():
            # The value of a halted token is 0 from here on; its gradient passes as identity, as in
            # the released code. With the prior over active tokens alone no gradient arrives here
            # for a halted token.
            x = x + jax.lax.stop_gradient(jnp.where(active[..., None], 0.0, -x).astype(x.dtype))
            notes = merging.note(size, state, num_readout)
            x, notes, score = self.transform_and_score(
                x, notes, active, gate, is_last, keep, image_index
            )
        else:
            block, params = self.clone(parent=None), self.variables["params"]
            packed = x if size is None else merging.pack(x, merging.note(size, state, num_readout))
            packed, score = run_removed(
                block, params, self.removal, gate, packed, active, x.dtype, is_last, keep
            )
            x, notes = (packed, None) if size is None else merging.unpack(packed, x.dtype)[:2]
        size = None if size is None else notes.size
        state, weight = halting_lib.accumulate(
            state, score, epsilon=self.halting.epsilon, is_last=is_last
        )
        readout = readout + weight[:, :num_readout, None] * x[:, :num_readout].astype(weight.dtype)
        return (x, state, readout, size), (score, active)


def run_block(
    block: Block, params: Any, tokens: jax.Array, active: jax.Array | None, keep: jax.Array | None
) -> jax.Array:
    """`Block.transform` as a function of its parameters, for `removal.transform`."""
    return block.apply({"params": params}, tokens, active, keep, method="transform")


def run_removed(
    block: Block,
    params: Any,
    plan: removal_lib.Plan,
    gate: tuple[jax.typing.ArrayLike, jax.typing.ArrayLike],
    x: jax.Array,
    active: jax.Array,
    dtype: jax.typing.DTypeLike,
    is_last: jax.Array,
    keep: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`Block.transform_and_score` of the active tokens alone; halted ones, and what is noted of
    them, stay as they are.

    Args:
      block: the layer.
      params: its parameters.
      plan: groups.
      gate: gamma and beta.
      x: tokens `(B, N, D)`; packed (`merging.pack`) where halted ones merge.
      active: `(B, N)` bool.
      dtype: of the tokens before they were packed.
      is_last: as in `Block.transform_and_score`.
      keep: as in `Block.transform`.

    Returns:
      Tokens as they came, and scores `(B, N)`; those of halted tokens mean nothing.
    """
    if not block.compared:
        x = removal_lib.transform(
            functools.partial(run_block, block), plan, params, x, active, keep
        )
        return x, halting_lib.score(x, gamma=gate[0], beta=gate[1], channel=block.halting.channel)
    run = functools.partial(_run_packed, block, jnp.dtype(dtype))
    differentiable = (params, *map(jnp.asarray, gate), jnp.asarray(is_last, jnp.float32))
    x = removal_lib.transform(run, plan, differentiable, x, active, keep)
    return x, x[..., -1]


def _run_packed(
    block: Block,
    dtype: Any,
    differentiable: Any,
    packed: jax.Array,
    active: jax.Array | None,
    keep: jax.Array | None,
) -> jax.Array:
    params, gamma, beta, is_last = differentiable
    x, notes, _ = merging.unpack(packed, dtype)
    layer = functools.partial(block.apply, {"params": params}, method="transform_and_score")
    return merging.pack(*layer(x, notes, active, (gamma, beta), is_last > 0, keep))
