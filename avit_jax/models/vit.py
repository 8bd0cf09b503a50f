"""The vision transformer: DeiT without halting, A-ViT with it.

The layers run as one `lax.scan` over stacked parameters, so the program compiles in about the time
of a single layer.

Axes: `B` images, `N` tokens (class token, then the distillation token if any, then patches row by
row), `D` width, `H` heads, `K` channels of a head, `L` layers, `C` classes, `R` prefix tokens (1,
or 2 if distilled).

Reference: Touvron et al., arXiv 2012.12877 (DeiT); Yin et al., arXiv 2112.07658 (A-ViT).
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from avit_jax.core import halting as halting_lib
from avit_jax.core.arrays import Array, UncheckedArray
from avit_jax.core.plan import Plan
from avit_jax.models import block, flops, forward, halting_linen
from avit_jax.models.forward import Aux

_FLOATS = ("float32", "bfloat16", "float16", "float64")
Logits = Float[Array, "B C"] | tuple[Float[Array, "B C"], Float[Array, "B C"]]
_token_init = nn.initializers.truncated_normal(0.02)


class AViT(nn.Module):
    """Vision transformer with adaptive tokens.

    Attributes:
      image_size: pixels, one number for square images, or (height, width).
      patch_size: pixels; divides both.
      channels: number of channels of an image.
      width: D, channels of a token; divisible by `num_heads`.
      depth: L, number of layers.
      num_heads: H.
      mlp_ratio: width of the MLP in units of D.
      num_classes: C.
      distilled: adds DeiT's distillation token and head.
      halting: the gate; None for a plain DeiT.
      drop_path: probability of dropping a residual branch in the last layer, in training. It rises
        linearly from 0 in the first layer.
      dropout: probability after the embedding, in the MLP and after both branches, in training.
      norm_eps: epsilon of the layer norms.
      dtype: of the computation, for example bfloat16. None for the dtype of parameters and images.
        Parameters and halting sums are always at least float32.
      remat: recomputes each layer in the backward pass, which needs less memory and one more
        forward pass.
      removal: plan of the buckets with which `__call__` removes halted tokens; None to mask them.
        Gradients are equal up to rounding. The backward pass recomputes each layer, as with
        `remat`. Not valid for the "official" prior, which reads halted tokens. For inference, use
        `adaptive.apply`, which also stops finished images.
      fused_attention: whether to use cuDNN's attention in bfloat16 and float16 on NVIDIA GPUs;
        results are equal up to rounding. None: if JAX runs on a supported GPU. False: never.
        True: always, which needs cuDNN on this machine.

    Example:
      model = deit_tiny()
      params = model.init(jax.random.key(0), images)["params"]
      logits, aux = model.apply({"params": params}, images)
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
    halting: halting_lib.HaltingConfig | None = halting_lib.HaltingConfig()
    drop_path: float = 0.0
    dropout: float = 0.0
    norm_eps: float = 1e-6
    dtype: jax.typing.DTypeLike | None = None
    remat: bool = False
    removal: Plan | None = None
    fused_attention: bool | None = None

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the images."""
        size: Any = self.image_size
        return tuple(size) if isinstance(size, tuple | list) else (size, size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.pixels[0] // self.patch_size, self.pixels[1] // self.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """R: the class token and, if there is one, the distillation token."""
        return 2 if self.distilled else 1

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.num_prefix_tokens + self.grid[0] * self.grid[1]

    @property
    def mlp_width(self) -> int:
        """Channels of the MLP's hidden layer."""
        return int(self.width * self.mlp_ratio)

    @property
    def similarity_dim(self) -> int:
        """Channels by which tokens are compared: K, the width of a head, with merging; else 0."""
        merges = self.halting is not None and self.halting.merge
        return self.width // self.num_heads if merges else 0

    @property
    def block_kwargs(self) -> dict[str, Any]:
        """Arguments of each layer's `Block`."""
        return {
            "width": self.width,
            "num_heads": self.num_heads,
            "mlp_width": self.mlp_width,
            "norm_eps": self.norm_eps,
            "dropout": self.dropout,
            "dtype": self.dtype,
            "halting": self.halting,
            "similarity_dim": self.similarity_dim,
            "fused_attention": self.fused_attention,
        }

    def check(self) -> None:
        """Raises ValueError if the attributes are invalid; the message says what to change."""
        if isinstance(self.image_size, Sequence) and len(self.image_size) != 2:
            raise ValueError(
                f"image_size must be one number or (height, width); got {self.image_size}."
            )
        for name in ("patch_size", "channels", "width", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}.")
        if self.pixels[0] % self.patch_size or self.pixels[1] % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} must divide the image size {self.pixels}."
            )
        if self.width % self.num_heads:
            raise ValueError(f"width {self.width} must be divisible by num_heads {self.num_heads}.")
        if self.mlp_width < 1:
            raise ValueError(
                f"mlp_ratio {self.mlp_ratio} gives the MLP no hidden channel at width "
                f"{self.width}: raise it."
            )
        for name in ("drop_path", "dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} must lie in [0, 1); got {getattr(self, name)}.")
        if self.removal is not None and (self.halting is None or self.dropout or self.remat):
            raise ValueError(
                "removal in training needs halting, dropout 0, and remat off (the backward pass "
                "recomputes anyway)."
            )
        if self.halting is not None and not -self.width <= self.halting.channel < self.width:
            raise ValueError(
                f"halting channel {self.halting.channel} is not among the {self.width} channels "
                "of a token."
            )

    def check_images(self, images: UncheckedArray) -> None:
        """Raises ValueError if the images do not have the model's dtype or shape.

        The batch may be symbolic.
        """
        dtype, shape = getattr(images, "dtype", None), getattr(images, "shape", None)
        if dtype is None or not isinstance(shape, tuple):
            raise ValueError(
                f"images must be one array of floats; got a {type(images).__name__}: use "
                "jnp.asarray."
            )
        if str(dtype) not in _FLOATS:  # not np.issubdtype: other libraries have dtypes too
            raise ValueError(
                f"images must be normalized floats ({', '.join(_FLOATS)}); got {dtype}. For "
                "pixels from 0 to 255 call "
                "avit_jax.data.augment.normalize(images, mean, std) first."
            )
        if len(shape) != 4 or shape[1:] != (*self.pixels, self.channels):
            raise ValueError(
                f"images must be (B, {self.pixels[0]}, {self.pixels[1]}, {self.channels}); got "
                f"{shape}."
            )
        if isinstance(shape[0], int) and not shape[0]:
            raise ValueError("there are no images: the batch must be at least 1.")

    def setup(self) -> None:
        self.check()
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=block.kernel_init)
        self.cls_token = self.param("cls_token", _token_init, (1, 1, self.width))
        if self.distilled:
            self.dist_token = self.param("dist_token", _token_init, (1, 1, self.width))
            self.head_dist = dense(self.num_classes)
        self.pos_embed = self.param("pos_embed", _token_init, (1, self.num_tokens, self.width))
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
        self.norm = block.LayerNorm(
            epsilon=self.norm_eps, dtype=self.dtype, use_fast_variance=False
        )
        self.head = dense(self.num_classes)

    def embed(
        self, images: UncheckedArray, image_index: Int[Array, "B"] | None = None
    ) -> Float[Array, "B N D"]:
        """Maps images `(B, H, W, C)` to tokens `(B, N, D)`; `image_index` turns dropout on."""
        self.check_images(images)
        batch, (rows, columns), patch = images.shape[0], self.grid, self.patch_size
        x = images.reshape(batch, rows, patch, columns, patch, self.channels).swapaxes(2, 3)
        x = block.per_token(self.patch_embed, x.reshape(batch, rows * columns, -1))
        tokens = (self.cls_token, self.dist_token) if self.distilled else (self.cls_token,)
        prefix = [
            jnp.broadcast_to(token.astype(x.dtype), (batch, 1, self.width)) for token in tokens
        ]
        x = jnp.concatenate([*prefix, x], axis=1) + self.pos_embed.astype(x.dtype)
        if image_index is None or not self.dropout:
            return x
        key = self.make_rng("dropout")
        return x * block.random_keep(key, image_index, self.dropout, x.shape[1:]).astype(x.dtype)

    def classify(self, prefix: Float[Array, "B R D"], *, train: bool = False) -> Logits:
        """Maps prefix tokens `(B, R, D)` to logits `(B, C)`, as `__call__` returns them."""
        prefix = self.norm(prefix)
        logits = self.head(prefix[:, 0])
        if not self.distilled:
            return logits
        logits_dist = self.head_dist(prefix[:, 1])
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
        executor: forward.Executor | forward.AtOnce,
        *,
        exists: Bool[Array, "B"] | None = None,
        image_index: Int[Array, "B"] | None = None,
        train: bool = False,
    ) -> tuple[Logits, Aux]:
        """Maps embedded tokens to logits and `Aux`; `adaptive.apply` calls it.

        Args:
          x: `(B, N, D)`.
          executor: how a layer runs, see `forward`.
          exists: `(B,)` bool, False for padding images, whose tokens are inactive from the start.
            If it is given, all tokens of an image also stop once its prefix tokens have halted.
            None for training and masked inference.
          image_index: see `__call__`; None without dropout and drop path.
          train: see `__call__`.

        Returns:
          As `__call__`.
        """
        cell = block.Block(**self.block_kwargs, parent=None)
        carry = forward.start(cell, x, self.num_prefix_tokens)
        if exists is not None:
            active = carry.state.active & exists[:, None]
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
            stop_finished=exists is not None,
        )
        aux = Aux(
            score=score,
            active=active,
            depth=carry.state.depth,
            ponder_cost=halting_lib.ponder_cost(carry.state),
            class_output=carry.readout[:, 0],
            distillation_output=carry.readout[:, 1] if self.distilled else None,
            macs=flops.image_macs(self, active),
        )
        return self.classify(carry.readout, train=train), aux

    def __call__(
        self,
        images: UncheckedArray,
        *,
        train: bool = False,
        image_index: Int[Array, "B"] | None = None,
    ) -> tuple[Logits, Aux]:
        """Classifies images; halted tokens are masked, or removed with the attribute `removal`.

        Args:
          images: `(B, H, W, C)` float, normalized.
          train: turns on dropout and drop path, which need `rngs={"dropout": key}`.
          image_index: `(B,)` int32, index of each image in the global batch, if this is the share
            of one device. Dropout draws by it, so that the draw does not depend on the number of
            devices. Default: 0 to B - 1.

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
        executor = forward.masked if self.removal is None else forward.Bucketed(self.removal)
        return self.from_tokens(x, executor, image_index=image_index, train=train)


def deit_tiny(**attributes: Any) -> AViT:
    """Returns DeiT-Ti's sizes: width 192, 3 heads, 12 layers; `attributes` are those of `AViT`."""
    return AViT(**{"width": 192, "num_heads": 3, **attributes})


def deit_small(**attributes: Any) -> AViT:
    """Returns DeiT-S's sizes: width 384, 6 heads, 12 layers; `attributes` are those of `AViT`."""
    return AViT(**{"width": 384, "num_heads": 6, **attributes})


def deit_base(**attributes: Any) -> AViT:
    """Returns DeiT-B's sizes: width 768, 12 heads, 12 layers; `attributes` are those of `AViT`."""
    return AViT(**{"width": 768, "num_heads": 12, **attributes})
