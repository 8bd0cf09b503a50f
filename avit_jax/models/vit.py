"""The vision transformer: DeiT and its relatives without halting, A-ViT with it.

The layers run as one `lax.scan` over stacked parameters, so the program compiles in about the time
of a single layer.

Axes: `B` images, `N` tokens (first the prefix tokens: class token, distillation token and register
tokens, if the network has them; then patches row by row), `D` width, `H` heads, `K` channels of a
head, `L` layers, `C` classes, `R` prefix tokens, `M` tokens that the classifier reads: class and
distillation token, or all patches with pooling.

Reference: Touvron et al., arXiv 2012.12877 (DeiT); Yin et al., arXiv 2112.07658 (A-ViT); Darcet et
al., arXiv 2309.16588 (register tokens).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from avit_jax.core import features as features_lib
from avit_jax.core import halting as halting_lib
from avit_jax.core.arrays import Array, UncheckedArray
from avit_jax.core.plan import Plan
from avit_jax.models import (
    attention_pool,
    block,
    checks,
    executors,
    flops,
    forward,
    halting_linen,
    sizes,
)
from avit_jax.models.forward import Aux

Logits = Float[Array, "B C"] | tuple[Float[Array, "B C"], Float[Array, "B C"]]
_token_init = nn.initializers.truncated_normal(0.02)


class AViT(sizes.Sizes, nn.Module):
    """Vision transformer with adaptive tokens.

    Attributes:
      image_size: pixels, one number for square images, or (height, width).
      patch_size: pixels; divides both.
      channels: number of channels of an image.
      width: D, channels of a token; divisible by `num_heads`.
      depth: L, number of layers.
      num_heads: H.
      mlp_ratio: width of the MLP's hidden layer in units of D; with "swiglu", after its product.
      num_classes: C. If it is 0, there is no head: the logits are the pooled features `(B, D)`.
      distilled: adds DeiT's distillation token and head.
      pool: what the classifier reads: "token", the class token; "avg" or "max", the mean or maximum
        over all patch tokens; "map", SigLIP's attention over them. With pooling and halting, each
        patch token is averaged over layers with its own weights first. Halted tokens count too.
      class_token: adds a class token. The classifier reads it only if `pool` is "token".
      num_registers: number of register tokens, which the classifier does not read.
      position_class: whether prefix tokens have a position embedding too.
      pre_norm: adds a layer norm before the first layer, as in CLIP.
      fc_norm: applies the last norm after pooling instead of before, under the name `fc_norm`.
      mlp: see `layer_spec.LayerSpec`, also for the three attributes below.
      qkv_bias: whether queries, keys and values have a bias.
      qk_norm: whether queries and keys are normalized.
      layer_scale: whether the output of each branch is scaled by a learned vector.
      rope_theta: base of rotary position embeddings, see `rotary`. 0: learned embeddings.
      halting: the gate; None for a network without halting.
      drop_path: probability of dropping a residual branch in the last layer, in training. It rises
        linearly from 0 in the first layer.
      dropout: probability after the embedding, in the MLP and after both branches, in training.
      norm_eps: epsilon of the layer norms.
      dtype: of the computation, for example bfloat16. None for the dtype of parameters and images.
        Parameters and halting sums are always at least float32.
      remat: recomputes each layer in the backward pass. This takes less memory, and one more
        forward pass.
      removal: plan of the buckets with which `__call__` removes halted tokens; None to mask them.
        Gradients are equal up to rounding. The backward pass recomputes each layer, as with
        `remat`. Not valid for the "official" prior, which reads halted tokens. For inference, use
        `adaptive.apply`, which also stops finished images.
      fused_attention: whether to use cuDNN's attention in bfloat16 and float16 on NVIDIA GPUs;
        results are equal up to rounding. None: if JAX runs on a supported GPU. False: never.
        True: always, which needs cuDNN on this machine.

    Examples:
      >>> model = deit_tiny()
      >>> params = model.init(jax.random.key(0), images)["params"]
      >>> logits, aux = model.apply({"params": params}, images)
    """

    image_size: int | Sequence[int] = 224
    patch_size: int = 16
    channels: int = 3
    width: int = 192
    depth: int = 12
    num_heads: int = 3
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    distilled: bool = False
    pool: str = "token"
    class_token: bool = True
    num_registers: int = 0
    position_class: bool = True
    pre_norm: bool = False
    fc_norm: bool = False
    mlp: str = "gelu"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    rope_theta: float = 0.0
    halting: halting_lib.HaltingConfig | None = halting_lib.HaltingConfig()
    drop_path: float = 0.0
    dropout: float = 0.0
    norm_eps: float = 1e-6
    dtype: jax.typing.DTypeLike | None = None
    remat: bool = False
    removal: Plan | None = None
    fused_attention: bool | None = None

    def check(self) -> None:
        """Raises ValueError if the attributes are invalid; the message says what to change."""
        checks.check(self)

    def check_images(self, images: UncheckedArray) -> None:
        """Raises ValueError if the images do not have the model's dtype or shape.

        The batch may be symbolic.
        """
        checks.check_images(self, images)

    def setup(self) -> None:
        self.check()
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=block.kernel_init)
        if self.class_token:
            self.cls_token = self.param("cls_token", _token_init, (1, 1, self.width))
        if self.distilled:
            self.dist_token = self.param("dist_token", _token_init, (1, 1, self.width))
            self.head_dist = dense(self.num_classes)
        if self.num_registers:
            self.reg_token = self.param(
                "reg_token", _token_init, (1, self.num_registers, self.width)
            )
        if not self.rope_theta:
            positions = self.num_tokens - (0 if self.position_class else self.num_prefix_tokens)
            self.pos_embed = self.param("pos_embed", _token_init, (1, positions, self.width))
        self.patch_embed = dense(self.width)
        layers = nn.scan(
            block.Block,
            length=self.depth,
            in_axes=nn.broadcast,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        self.layers = layers(**self.block_kwargs)
        if self.halting is not None:
            self.gate = halting_linen.Halting(self.halting)
        norm = functools.partial(
            block.LayerNorm, epsilon=self.norm_eps, dtype=self.dtype, use_fast_variance=False
        )
        if self.pre_norm:
            self.norm_pre = norm()
        self.norm = norm(name="fc_norm" if self.fc_norm else "norm")
        if self.pool == "map":
            self.attn_pool = attention_pool.AttentionPool(
                num_heads=self.num_heads,
                mlp_width=self.mlp_width,
                norm_eps=self.norm_eps,
                dtype=self.dtype,
                spec=self.spec,
            )
        if self.num_classes:
            self.head = dense(self.num_classes)

    def embed(
        self, images: UncheckedArray, image_index: Int[Array, "B"] | None = None
    ) -> Float[Array, "B N D"]:
        """Maps images `(B, H, W, C)` to tokens `(B, N, D)`; `image_index` turns dropout on."""
        self.check_images(images)
        batch, (rows, columns), patch = images.shape[0], self.grid, self.patch_size
        x = images.reshape(batch, rows, patch, columns, patch, self.channels).swapaxes(2, 3)
        x = block.per_token(self.patch_embed, x.reshape(batch, rows * columns, -1))
        tokens = [self.cls_token] if self.class_token else []
        tokens += [self.dist_token] if self.distilled else []
        tokens += [self.reg_token] if self.num_registers else []
        prefix = [
            jnp.broadcast_to(token.astype(x.dtype), (batch, *token.shape[1:])) for token in tokens
        ]
        positions = 0 if self.rope_theta else self.pos_embed.astype(x.dtype)
        if self.position_class:
            x = jnp.concatenate([*prefix, x], axis=1) + positions
        else:
            x = jnp.concatenate([*prefix, x + positions], axis=1)
        if image_index is not None and self.dropout:
            key = self.make_rng("dropout")
            keep = block.random_keep(key, image_index, self.dropout, x.shape[1:])
            x = x * keep.astype(x.dtype)
        return self.norm_pre(x) if self.pre_norm else x

    def _pooled(self, readout: Array) -> Array:
        """Maps the tokens that are read out `(B, M, D)` to the tokens of the heads."""
        if self.pool == "token":
            return readout
        if self.pool == "map":
            return self.attn_pool(self.norm(readout))
        reduce = jnp.mean if self.pool == "avg" else jnp.max
        return reduce(readout, axis=1, keepdims=True)

    def classify(self, readout: Float[Array, "B M D"], *, train: bool = False) -> Logits:
        """Maps the tokens that are read out `(B, M, D)` to logits, as `__call__` returns them."""
        if self.pool == "map":
            pooled = self._pooled(readout)
        elif self.fc_norm:
            pooled = self.norm(self._pooled(readout))
        else:
            pooled = self._pooled(self.norm(readout))
        if not self.num_classes:
            return pooled[:, 0]
        logits = self.head(pooled[:, 0])
        if not self.distilled:
            return logits
        logits_dist = self.head_dist(pooled[:, 1])
        return (logits, logits_dist) if train else (logits + logits_dist) / 2

    def draw_drop_path(self, image_index: Int[Array, "B"] | None) -> Float[Array, "L B 2"] | None:
        """Draws drop-path factors `(L, B, 2)` of the two branches of each layer."""
        if image_index is None or not self.drop_path:
            return None
        rate = jnp.linspace(0.0, self.drop_path, self.depth)[:, None]
        key = self.make_rng("dropout")
        return block.random_keep(key, image_index, rate, (self.depth, 2)).swapaxes(0, 1)

    def from_tokens(
        self,
        x: Float[Array, "B N D"],
        executor: executors.Executor | executors.AtOnce,
        *,
        exists: Bool[Array, "B"] | Bool[Array, "B N"] | None = None,
        image_index: Int[Array, "B"] | None = None,
        train: bool = False,
        features: bool = False,
    ) -> tuple[Logits, Aux]:
        """Maps embedded tokens to logits and `Aux`; `adaptive.apply` calls it.

        Args:
          x: `(B, N, D)`.
          executor: how a layer runs, or all of them; see `executors`.
          exists: `(B,)` or `(B, N)` bool, False for padding, which is inactive from the start. If
            it is given, and `features` is False, all tokens of an image also stop once those that
            the classifier reads have halted. None for training and masked inference.
          image_index: see `__call__`; None without dropout and drop path.
          train: see `__call__`.
          features: see `__call__`.

        Returns:
          As `__call__`.
        """
        cell = block.Block(**self.block_kwargs, parent=None)
        carry = forward.start(cell, x, self.num_prefix_tokens, self.readout, features=features)
        if exists is not None:
            active = carry.state.active & exists.reshape(len(exists), -1)
            state = dataclasses.replace(carry.state, active=active)
            carry = dataclasses.replace(carry, state=state)
        params = self.layers.variables["params"]
        noisy = image_index is not None
        carry, (score, active) = forward.run(
            cell,
            executor,
            None if self.halting is None else self.gate.gate(),
            carry,
            # Training with removal sums gradients over buckets, in the dtype of the parameters.
            params if self.removal else block.cast(params, self.dtype),
            keep=self.draw_drop_path(image_index),
            image_index=image_index,
            dropout_key=self.make_rng("dropout") if noisy and self.dropout else None,
            remat=self.remat,
            stop_finished=exists is not None and not features,
        )
        aux = Aux(
            score=score,
            active=active,
            depth=carry.state.depth,
            ponder_cost=halting_lib.ponder_cost(carry.state),
            class_output=self._pooled(carry.readout)[:, 0],
            distillation_output=carry.readout[:, 1] if self.distilled else None,
            macs=flops.image_macs(self, active, slice(None) if features else None),
            features=None if carry.features is None else self._on_grid(carry.features),
        )
        return self.classify(carry.readout, train=train), aux

    def _on_grid(self, features: features_lib.Features) -> Array:
        x = features_lib.of_all(features)[:, self.num_prefix_tokens :]
        x = x if self.fc_norm else self.norm(x)
        return x.reshape(len(x), *self.grid, self.width)

    def __call__(
        self,
        images: UncheckedArray,
        *,
        train: bool = False,
        image_index: Int[Array, "B"] | None = None,
        features: bool = False,
    ) -> tuple[Logits, Aux]:
        """Classifies images; halted tokens are masked, or removed with the attribute `removal`.

        Args:
          images: `(B, H, W, C)` float, normalized.
          train: turns on dropout and drop path, which need `rngs={"dropout": key}`.
          image_index: `(B,)` int32, index of each image in the global batch, if this is the share
            of one device. Dropout draws by it, so that the draw does not depend on the number of
            devices. Default: 0 to B - 1.
          features: whether `Aux` holds the features of all patches, for dense tasks.

        Returns:
          Logits `(B, C)` and `Aux`. A distilled model returns the mean of its two heads; with
          `train=True` it returns `(class logits, distillation logits)` instead, because each head
          has its own loss.

        Raises:
          ValueError: sizes do not fit together, or the images do not fit the model.
        """
        self.check_images(images)
        noisy = train and (self.dropout > 0.0 or self.drop_path > 0.0)
        if noisy and image_index is None:
            image_index = jnp.arange(images.shape[0])
        image_index = image_index if noisy else None
        x = self.embed(images, image_index)
        if self.is_initializing():
            self.layers(x[:1, :1], None)
        executor = executors.masked if self.removal is None else executors.Bucketed(self.removal)
        return self.from_tokens(
            x, executor, image_index=image_index, train=train, features=features
        )


def deit_tiny(**attributes: Any) -> AViT:
    """Returns DeiT-Ti's sizes: width 192, 3 heads, 12 layers; `attributes` are those of `AViT`."""
    return AViT(**{"width": 192, "num_heads": 3, **attributes})


def deit_small(**attributes: Any) -> AViT:
    """Returns DeiT-S's sizes: width 384, 6 heads, 12 layers; `attributes` are those of `AViT`."""
    return AViT(**{"width": 384, "num_heads": 6, **attributes})


def deit_base(**attributes: Any) -> AViT:
    """Returns DeiT-B's sizes: width 768, 12 heads, 12 layers; `attributes` are those of `AViT`."""
    return AViT(**{"width": 768, "num_heads": 12, **attributes})
