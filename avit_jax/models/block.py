"""One pre-norm transformer layer, with its halting score. Axes as in `vit`."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import ArrayLike, Bool, Float, Int, PRNGKeyArray, PyTree, Shaped

from avit_jax.core import halting as halting_lib
from avit_jax.core import merging
from avit_jax.core.arrays import Array
from avit_jax.core.ragged import Inputs
from avit_jax.kernels import attention as attention_lib
from avit_jax.models.layer_spec import ACTIVATIONS, LayerSpec

Gate = tuple[Shaped[ArrayLike, ""], Shaped[ArrayLike, ""]]
# Networks train much faster from it than from a standard deviation of 0.02.
kernel_init = nn.initializers.xavier_uniform()
_LAYER_SCALE = 1e-5  # initial value, as in DINOv2 (arXiv 2304.07193)


def _recomputes(dtype: jax.typing.DTypeLike | None) -> bool:
    """Returns whether the backward pass recomputes norms, GELU and the input of `fc2`.

    It does so only if the dtype is bfloat16 or float16. Without recomputation, XLA stores several
    float32 arrays of each layer, and a GPU spends most of its time moving memory.
    """
    return dtype in (jnp.bfloat16, jnp.float16)


def per_token(
    dense: Callable[[Array], Array], x: Float[Array, "*B N D"]
) -> Float[Array, "*B N out"]:
    """Applies a dense layer to tokens `(B, N, D)` as one matrix product.

    Its backward pass is faster on a CPU.
    """
    return dense(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def random_keep(
    key: PRNGKeyArray,
    image_index: Int[Array, "B"],
    rate: ArrayLike,
    shape: tuple[int, ...],
) -> Float[Array, "B ..."]:
    """Draws dropout factors `(B, *shape)`, 0 or 1 / (1 - rate), in JAX's default float dtype.

    The index of an image in the global batch seeds its draw. So the draw does not depend on how the
    batch is spread over devices. `rate` is the probability of 0; it broadcasts to `shape`.
    """
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, image_index)
    return jax.vmap(
        lambda key: jax.random.bernoulli(key, 1.0 - rate, shape).astype(float) / (1.0 - rate)
    )(keys)


def cast(params: PyTree[Array], dtype: jax.typing.DTypeLike | None) -> PyTree[Array]:
    """Casts the parameters of dense layers to the dtype of the computation.

    Without this call, each layer casts them. A call before the loop over layers casts them once.
    Norms use their parameters as they are.
    """
    if dtype is None:
        return params
    return {
        name: module if "norm" in name else jax.tree.map(lambda x: x.astype(dtype), module)
        for name, module in params.items()
    }


class LayerNorm(nn.LayerNorm):
    """Flax's layer norm, which also works if JAX refuses to promote dtypes implicitly."""

    def __call__(
        self, x: Float[Array, "*B D"], *, mask: Bool[Array, "*#B #D"] | None = None
    ) -> Float[Array, "*B D"]:
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, mask=mask)


def _three_products(x: Array, kernel: Array) -> list[Array]:
    results = []
    for part in jnp.split(kernel, 3, axis=1):
        results.append(x @ part)
        # Without the barrier, XLA computes one product and copies the parts of its result.
        x = jax.lax.optimization_barrier(x)
    return results


class _QueryKeyValue(nn.Module):
    """Maps rows `(..., D)` to queries, keys and values, with the parameters of one `nn.Dense`.

    The bias of the keys is not trained. Softmax does not depend on it, so its true gradient is 0.
    The computed gradient would be rounding noise that depends on the number of devices, and Adam
    would amplify it. If keys rotate, softmax depends on it, but DINOv3 does not train it either.
    """

    dtype: jax.typing.DTypeLike | None
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*rows D"], *, split: bool = False) -> Any:
        """Returns `(..., 3 D)`, or with `split` three arrays `(..., D)` from separate products."""
        kernel = self.param("kernel", kernel_init, (x.shape[-1], 3 * x.shape[-1]))
        if not self.use_bias:
            x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
            return _three_products(x, kernel) if split else x @ kernel
        bias = self.param("bias", nn.initializers.zeros, (3 * x.shape[-1],))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        query, key, value = jnp.split(bias, 3)
        biases = [query, jax.lax.stop_gradient(key), value]
        ones = (1,) * (x.ndim - 1)
        if not split:
            return x @ kernel + jnp.concatenate(biases).reshape(*ones, -1)
        products = zip(_three_products(x, kernel), biases, strict=True)
        return [product + bias.reshape(*ones, -1) for product, bias in products]


class _LayerScale(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        gamma = self.param("gamma", nn.initializers.constant(_LAYER_SCALE), (x.shape[-1],))
        return x * gamma.astype(x.dtype).reshape(*(1,) * (x.ndim - 1), -1)


class Block(nn.Module):
    """A pre-norm transformer layer. `forward` runs it for all layers of a network.

    Attributes are those of `vit.AViT`; `mlp_width`, `similarity_dim` and `spec` are its properties.
    """

    width: int
    num_heads: int
    mlp_width: int
    norm_eps: float
    dropout: float
    dtype: jax.typing.DTypeLike | None
    halting: halting_lib.HaltingConfig | None
    similarity_dim: int
    fused_attention: bool | None
    spec: LayerSpec = LayerSpec()

    def setup(self) -> None:
        norm_class = (
            nn.remat(LayerNorm, prevent_cse=False) if _recomputes(self.dtype) else LayerNorm
        )
        norm = functools.partial(
            norm_class, epsilon=self.norm_eps, dtype=self.dtype, use_fast_variance=False
        )
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=kernel_init)
        self.norm1 = norm()
        self.qkv = _QueryKeyValue(dtype=self.dtype, use_bias=self.spec.qkv_bias)
        if self.spec.qk_norm:
            self.q_norm, self.k_norm = norm(), norm()
        self.proj = dense(self.width)
        self.norm2 = norm()
        self.fc1 = dense(self.mlp_width * self.spec.mlp_inputs)
        self.fc2 = dense(self.width)
        if self.spec.layer_scale:
            self.ls1, self.ls2 = _LayerScale(), _LayerScale()

    def __call__(
        self, x: Float[Array, "B N D"], _: None = None
    ) -> tuple[Float[Array, "B N D"], None]:
        """Creates the parameters as the body of a scan over layers; the result is meaningless."""
        heads = self.qkv(self.norm1(x)).reshape(*x.shape[:-1], 3 * self.num_heads, -1)
        self._norm_heads(heads, heads)
        hidden = self.fc1(self.norm2(self._scale_branch(0, self.proj(x))))
        return self._scale_branch(1, self.fc2(ACTIVATIONS[self.spec.mlp](hidden))), None

    def layer(
        self,
        x: Float[Array, "B N D"],
        inputs: Inputs,
        active: Bool[Array, "B N"] | None,
        gate: Gate | None,
    ) -> tuple[Float[Array, "B N D"], dict[str, Float[Array, "B N"]]]:
        """Runs the layer; with merging, scores its output and merges the tokens that halt.

        Args:
          x: tokens `(B, N, D)`; halted ones must be 0.
          inputs: `tokens` is `merging.TokenInfo`, or None without merging. `images` is `(keep,
            image_index)`, see `attention`. `shared` is a scalar bool, True in the last layer, in
            which no token merges. `index` is read if tokens rotate; see `rotary`.
          active: `(B, N)` bool, None if all are active. Other tokens are masked as keys.
          gate: gamma and beta; only with merging.

        Returns:
          Tokens `(B, N, D)`, and a dictionary: with merging, the values of
            `merging.score_and_merge`; otherwise empty.
        """
        info, (keep, image_index) = inputs.tokens, inputs.images
        size = None if info is None else info.size
        x = self.attention(x, active, keep, image_index, size=size, index=inputs.index)
        x = self.mlp(x, active, keep, image_index)
        if info is None or gate is None or self.halting is None:
            return x, {}
        merge = functools.partial(
            merging.score_and_merge,
            info=info,
            active=active,
            gate=gate,
            config=self.halting,
            channels=self.similarity_dim,
        )
        last = {"score": jnp.ones_like(info.size), "size": info.size}
        last |= {} if info.index is None else {"target": info.index}
        return jax.lax.cond(inputs.shared, lambda x: (x, last), merge, x)

    def transform(
        self,
        x: Float[Array, "B N D"],
        active: Bool[Array, "B N"] | None = None,
        keep: Float[Array, "B 2"] | None = None,
        image_index: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Runs attention and MLP on tokens `(B, N, D)`; arguments as in `attention`."""
        x = self.attention(x, active, keep, image_index)
        return self.mlp(x, active, keep, image_index)

    def attention(
        self,
        x: Float[Array, "B N D"],
        active: Bool[Array, "B N"] | None = None,
        keep: Float[Array, "B 2"] | None = None,
        image_index: Int[Array, "B"] | None = None,
        *,
        size: Float[Array, "B N"] | None = None,
        index: Int[Array, "B N"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Adds the attention branch to the tokens.

        Args:
          x: tokens `(B, N, D)`; halted ones must be 0.
          active: `(B, N)` bool, None if all are active. Other tokens are masked as keys.
          keep: `(B, 2)` drop-path factors of the two residual branches; None for 1.
          image_index: `(B,)` indices in the global batch, for dropout; None in evaluation.
          size: `(B, N)` number of patches that each token stands for; None for 1.
          index: `(B, N)` indices of the tokens in their image; None for 0 to N - 1.
        """
        a = self._where_active(self.norm1(x), active)
        a = self._scale_branch(0, self._attend(a, active, size, index))
        return x + self.drop(a, keep, 0, image_index)

    def mlp(
        self,
        x: Float[Array, "B N D"],
        active: Bool[Array, "B N"] | None = None,
        keep: Float[Array, "B 2"] | None = None,
        image_index: Int[Array, "B"] | None = None,
    ) -> Float[Array, "B N D"]:
        """Adds the MLP branch to the tokens; arguments as in `attention`."""
        a = self.norm2(self._where_active(x, active))
        a = per_token(self.fc1, self._where_active(a, active))
        # Recomputed with the input of `fc2`, the scan over layers stores one wide array, not two.
        shrink = (
            nn.remat(Block._shrink, prevent_cse=False) if _recomputes(a.dtype) else Block._shrink
        )
        a = self._scale_branch(1, shrink(self, a, image_index))
        return x + self.drop(a, keep, 1, image_index)

    def _scale_branch(self, branch: int, x: Array) -> Array:
        return (self.ls1, self.ls2)[branch](x) if self.spec.layer_scale else x

    def _shrink(
        self, a: Float[Array, "B N mlp"], image_index: Int[Array, "B"] | None
    ) -> Float[Array, "B N D"]:
        a = ACTIVATIONS[self.spec.mlp](a)
        return per_token(self.fc2, self._dropout(a, image_index))

    def _where_active(
        self, x: Float[Array, "B N D"], active: Bool[Array, "B N"] | None
    ) -> Float[Array, "B N D"]:
        return x if active is None else x * active[..., None].astype(x.dtype)

    def queries_keys_values(self, a: Float[Array, "B N D"]) -> Float[Array, "3 B H N K"]:
        """Maps normed tokens `(B, N, D)` to the inputs of all heads, `(3, B, H, N, K)`.

        The norms of `qk_norm` and the rotation are not applied.
        """
        heads = per_token(self.qkv, a).reshape(*a.shape[:2], 3, self.num_heads, -1)
        return heads.transpose(2, 0, 3, 1, 4)

    def heads(
        self, a: Float[Array, "B N D"], index: Int[Array, "B N"] | None = None
    ) -> tuple[Array, Array, Array]:
        """Returns queries, keys and values `(B, H, N, K)` as `attention_lib.exact` takes them."""
        query, key, value = self.queries_keys_values(a)
        query, key = (self._turn(x, index, 1) for x in self._norm_heads(query, key))
        return query, key, value

    def _attend(
        self,
        a: Float[Array, "B N D"],
        active: Bool[Array, "B N"] | None,
        size: Float[Array, "B N"] | None,
        index: Int[Array, "B N"] | None,
    ) -> Float[Array, "B N D"]:
        bias = attention_lib.key_bias(active, size)
        if self._fuses(a.dtype):
            query, key, value = self.qkv(a.reshape(-1, a.shape[-1]), split=True)
            heads = (*a.shape[:2], self.num_heads, -1)
            query, key = self._norm_heads(query.reshape(heads), key.reshape(heads))
            query, key = (self._turn(x, index, 2) for x in (query, key))
            out = attention_lib.fused(query, key, value.reshape(heads), bias)
        else:
            out = attention_lib.exact(*self.heads(a, index), bias).swapaxes(1, 2)
        return per_token(self.proj, out.reshape(a.shape))

    def _norm_heads(self, query: Array, key: Array) -> tuple[Array, Array]:
        if not self.spec.qk_norm:
            return query, key
        return self.q_norm(query), self.k_norm(key)

    def _turn(self, heads: Array, index: Int[Array, "B N"] | None, axis: int) -> Array:
        """Rotates queries or keys by the places of their tokens; `axis` is the heads' axis."""
        rotation = self.spec.rotation
        return heads if rotation is None else rotation.turn(heads, index, axis)

    def _fuses(self, dtype: jax.typing.DTypeLike) -> bool:
        if not attention_lib.can_fuse(dtype, self.width // self.num_heads):
            return False
        return attention_lib.has_cudnn() if self.fused_attention is None else self.fused_attention

    def _dropout(
        self, x: Float[Array, "B N D"], image_index: Int[Array, "B"] | None
    ) -> Float[Array, "B N D"]:
        if image_index is None or not self.dropout:
            return x
        key = self.make_rng("dropout")
        return x * random_keep(key, image_index, self.dropout, x.shape[1:]).astype(x.dtype)

    def drop(
        self,
        x: Float[Array, "B N D"],
        keep: Float[Array, "B 2"] | None,
        branch: int,
        image_index: Int[Array, "B"] | None,
    ) -> Float[Array, "B N D"]:
        """Applies dropout and drop path to the output of branch 0 (attention) or 1 (MLP)."""
        x = self._dropout(x, image_index)
        return x if keep is None else x * keep[:, branch, None, None].astype(x.dtype)
