"""One vision transformer: DeiT without halting, A-ViT with it.

Layers run as one `lax.scan` over stacked parameters, so that the program compiles in the time of a
single layer. Shapes use `B` images, `N` tokens (class token first, then the distillation token if
any, then patches row by row), `D` width, `H` heads, `K` head width, `L` layers, `C` classes, `R`
read-out tokens (1, or 2 when distilled).

Reference: Touvron et al., arXiv 2012.12877 (DeiT); Yin et al., arXiv 2112.07658 (A-ViT).
"""

import dataclasses
import functools
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from avit_jax.core import halting as halting_lib
from avit_jax.core import removal as removal_lib
from avit_jax.models import block, halting_linen

_FLOATS = ("float32", "bfloat16", "float16", "float64")
_token_init = nn.initializers.truncated_normal(0.02)


@flax.struct.dataclass(kw_only=True)
class Aux:
    """What the network computed beside the logits. A network without halting reports score 0 and
    depth L.

    Attributes:
      score: `(L, B, N)` raw halting scores, at least float32; those of halted tokens mean nothing;
        where tokens merge, 1 in the last layer.
      active: `(L, B, N)` bool, whether the token computes in the layer.
      depth: `(B, N)` int32, layers used.
      ponder_cost: `(B, N)` depth + remainder, in layers.
      class_output: `(B, D)` class token accumulated over layers, before the final norm.
      distillation_output: the same of the distillation token, None without one.
      macs: `(B,)` multiply-accumulates of the image, where they do not follow from `active`; else
        None.
      loss: what the network adds to the loss of training by itself, a scalar; else None.
    """

    score: jax.Array
    active: jax.Array
    depth: jax.Array
    ponder_cost: jax.Array
    class_output: jax.Array
    distillation_output: jax.Array | None = None
    macs: jax.Array | None = None
    loss: jax.Array | None = None


class AViT(nn.Module):
    """Vision transformer with adaptive tokens.

    Attributes:
      image_size: pixels, one number for square images or (height, width).
      patch_size: pixels, divides both.
      channels: of the images.
      width: D, of the tokens; divisible by `num_heads`.
      depth: L, number of layers.
      num_heads: H.
      mlp_ratio: width of the MLP in units of D.
      num_classes: C.
      distilled: adds DeiT's distillation token and head.
      halting: the gate; None for a plain DeiT.
      drop_path: probability of leaving out a residual branch in the last layer, rising linearly
        from 0 in the first; training.
      dropout: probability after the embedding, in the MLP and after both branches; training.
      norm_eps: epsilon of the layer norms.
      dtype: of the computation, for example bfloat16; None takes that of parameters and images.
        Parameters and halting sums are float32 all the same.
      remat: recompute each layer in the backward pass: less memory, one more forward pass.
      removal: how halted tokens are removed in training, with the same gradients to rounding; None:
        they are masked. Recomputes as `remat`. Not for the "official" prior, which looks at halted
        tokens too. For inference `adaptive.apply` removes more.
      fused_attention: in bfloat16 and float16, a program for NVIDIA GPUs computes attention by
        cuDNN, with other last digits.
        None: if JAX runs on such a GPU. False: never, so that the program does not need cuDNN.
          True: always; needs cuDNN here.

    Example:
      model = deit_tiny()
      params = model.init(jax.random.key(0), images)["params"]
      logits, aux = model.apply({"params": params}, images)
    """

    image_size: int | tuple[int, int] = 224
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
    dtype: Any = None
    remat: bool = False
    removal: removal_lib.Plan | None = None
    fused_attention: bool | None = None

    @property
    def pixels(self) -> tuple[int, int]:
        """Height and width of the images."""
        size = self.image_size
        return tuple(size) if isinstance(size, tuple | list) else (size, size)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.pixels[0] // self.patch_size, self.pixels[1] // self.patch_size

    @property
    def num_readout(self) -> int:
        """R, tokens that are read out: class token and, if there is one, distillation token."""
        return 2 if self.distilled else 1

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.num_readout + self.grid[0] * self.grid[1]

    @property
    def mlp_width(self) -> int:
        """Channels of the hidden layer of the MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def compared(self) -> int:
        """Channels by which tokens are compared: K, the width of a head, where halted tokens merge,
        else 0.
        """
        return (
            self.width // self.num_heads if self.halting is not None and self.halting.merge else 0
        )

    @property
    def block_sizes(self) -> dict[str, Any]:
        """Arguments of each layer's `Block`."""
        return {
            "width": self.width,
            "num_heads": self.num_heads,
            "mlp_width": self.mlp_width,
            "norm_eps": self.norm_eps,
            "dropout": self.dropout,
            "dtype": self.dtype,
            "halting": self.halting,
            "removal": self.removal,
            "compared": self.compared,
            "fused_attention": self.fused_attention,
        }

    def check(self) -> None:
        """Raises ValueError, saying what to change, where the sizes do not fit together."""
        if len(self.pixels) != 2:
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
                f"mlp_ratio {self.mlp_ratio} leaves the MLP no channel of {self.width}: raise it."
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

    def check_images(self, images: jax.Array) -> None:
        """Raises ValueError, saying what is expected, if the images have another dtype or shape;
        the batch may be symbolic.
        """
        dtype, shape = getattr(images, "dtype", None), getattr(images, "shape", None)
        if dtype is None or not isinstance(shape, tuple):
            raise ValueError(
                f"images must be one array of floats; got a {type(images).__name__}: use "
                "jnp.asarray."
            )
        if str(dtype) not in _FLOATS:  # not np.issubdtype: other libraries have dtypes too
            raise ValueError(
                f"images must be normalised floats ({', '.join(_FLOATS)}); got {dtype}. For "
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
        layer = nn.remat(block.Block, prevent_cse=False) if self.remat else block.Block
        layers = nn.scan(
            layer,
            length=self.depth,
            in_axes=(0, nn.broadcast, nn.broadcast),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
        )
        if (
            not self.is_initializing() and self.removal is None
        ):  # which sums gradients over groups, in the parameters' dtype
            layers = nn.map_variables(
                layers, "params", lambda of: {"params": block.cast(of["params"], self.dtype)}
            )
        self.layers = layers(**self.block_sizes)
        if self.halting is not None:
            self.gate = halting_linen.Halting(self.halting)
        self.norm = block.LayerNorm(
            epsilon=self.norm_eps, dtype=self.dtype, use_fast_variance=False
        )
        self.head = dense(self.num_classes)

    def embed(self, images: jax.Array, image_index: jax.Array | None = None) -> jax.Array:
        """Images `(B, H, W, C)` to tokens `(B, N, D)`; `image_index` turns dropout on."""
        self.check_images(images)
        batch, (rows, columns), patch = images.shape[0], self.grid, self.patch_size
        x = images.reshape(batch, rows, patch, columns, patch, self.channels).swapaxes(2, 3)
        x = block.per_token(self.patch_embed, x.reshape(batch, rows * columns, -1))
        readout = (self.cls_token, self.dist_token) if self.distilled else (self.cls_token,)
        readout = [
            jnp.broadcast_to(token.astype(x.dtype), (batch, 1, self.width)) for token in readout
        ]
        x = jnp.concatenate([*readout, x], axis=1) + self.pos_embed.astype(x.dtype)
        if image_index is None or not self.dropout:
            return x
        return x * block.random_keep(
            self.make_rng("dropout"), image_index, self.dropout, x.shape[1:]
        ).astype(x.dtype)

    def sizes(self, state: halting_lib.HaltingState) -> jax.Array | None:
        """Patches that each token `(B, N)` stands for, before the first layer; None where halted
        tokens do not merge.
        """
        return jnp.ones_like(state.remainder) if self.compared else None

    def classify(
        self, readout: jax.Array, *, train: bool = False
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        """Read-out tokens `(B, R, D)` to logits `(B, C)`, as `__call__` returns them."""
        readout = self.norm(readout)
        logits = self.head(readout[:, 0])
        if not self.distilled:
            return logits
        logits_dist = self.head_dist(readout[:, 1])
        return (logits, logits_dist) if train else (logits + logits_dist) / 2

    def _draw_paths(self, image_index: jax.Array | None) -> jax.Array | None:
        """Drop-path factors `(L, B, 2)` of the two branches of each layer."""
        if image_index is None or not self.drop_path:
            return None
        rate = jnp.linspace(0.0, self.drop_path, self.depth)[:, None]
        return block.random_keep(
            self.make_rng("dropout"), image_index, rate, (self.depth, 2)
        ).swapaxes(0, 1)

    def __call__(
        self, images: jax.Array, *, train: bool = False, image_index: jax.Array | None = None
    ) -> tuple[jax.Array | tuple[jax.Array, jax.Array], Aux]:
        """Classifies images; halted tokens are masked, not removed.

        Args:
          images: `(B, H, W, C)` float, normalised.
          train: turns on dropout and drop path, which want `rngs={"dropout": key}`.
          image_index: `(B,)` int32, place of each image in the global batch, when this is a
            device's share of it: dropout is drawn by it, so that the draw does not depend on the
            number of devices. Default: 0 to B - 1.

        Returns:
          Logits `(B, C)` and `Aux`. A distilled model gives the mean of its two heads; with
          `train=True` it gives `(class logits, distillation logits)` instead, as each has a loss of
          its own.

        Raises:
          ValueError: sizes do not fit together, or the images do not fit the model.
        """
        self.check_images(images)
        batch = images.shape[0]
        noisy = train and (self.dropout > 0.0 or self.drop_path > 0.0)
        image_index = (jnp.arange(batch) if image_index is None else image_index) if noisy else None
        x = self.embed(images, image_index)
        layers = (jnp.arange(self.depth) == self.depth - 1, self._draw_paths(image_index))
        if self.halting is None:
            x, _ = self.layers(x, layers, None, image_index)
            readout = x[:, : self.num_readout]
            state = halting_lib.init(x.shape[:2], x.dtype)
            score = jnp.zeros((self.depth, *x.shape[:2]), state.remainder.dtype)
            active = jnp.ones(score.shape, bool)
            state = dataclasses.replace(state, depth=state.depth + self.depth)
        else:
            state = halting_lib.init(x.shape[:2], x.dtype)
            readout = jnp.zeros((batch, self.num_readout, self.width), state.remainder.dtype)
            carry = (x, state, readout, self.sizes(state))
            (_, state, readout, _), (score, active) = self.layers(
                carry, layers, self.gate.gate(), image_index
            )
        aux = Aux(
            score=score,
            active=active,
            depth=state.depth,
            ponder_cost=halting_lib.ponder_cost(state),
            class_output=readout[:, 0],
            distillation_output=readout[:, 1] if self.distilled else None,
        )
        return self.classify(readout, train=train), aux


deit_tiny = functools.partial(AViT, width=192, num_heads=3)
deit_small = functools.partial(AViT, width=384, num_heads=6)
deit_base = functools.partial(AViT, width=768, num_heads=12)
