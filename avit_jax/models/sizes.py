"""Sizes of a network that follow from the attributes of `vit.AViT`."""

from collections.abc import Sequence
from typing import Any

from avit_jax.core import halting as halting_lib
from avit_jax.models.layer_spec import LayerSpec
from avit_jax.models.rotary import Rotation


class Sizes:
    """Base class of `AViT`. Axes as in `vit`."""

    image_size: int | Sequence[int]
    patch_size: int
    width: int
    num_heads: int
    mlp_ratio: float
    distilled: bool
    pool: str
    class_token: bool
    num_registers: int
    mlp: str
    qkv_bias: bool
    qk_norm: bool
    layer_scale: bool
    rope_theta: float
    halting: halting_lib.HaltingConfig | None
    dropout: float
    norm_eps: float
    dtype: Any
    fused_attention: bool | None

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
        """R: number of class, distillation and register tokens that the network has."""
        return self.class_token + self.distilled + self.num_registers

    @property
    def readout(self) -> slice:
        """The tokens that the classifier reads: class and distillation token, or all patches."""
        if self.pool != "token":
            return slice(self.num_prefix_tokens, self.num_tokens)
        return slice(0, 1 + self.distilled)

    @property
    def spec(self) -> LayerSpec:
        """What each layer consists of."""
        return LayerSpec(
            mlp=self.mlp,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            layer_scale=self.layer_scale,
            rotation=self.rotation,
        )

    @property
    def rotation(self) -> Rotation | None:
        """How queries and keys rotate; None without rotary position embeddings."""
        if not self.rope_theta:
            return None
        prefix = self.num_prefix_tokens
        return Rotation(theta=self.rope_theta, grid=self.grid, num_prefix_tokens=prefix)

    @property
    def is_plain(self) -> bool:
        """Whether the layers are those of DeiT and the classifier reads exactly the prefix tokens.

        Special kernels may require it.
        """
        return self.spec.is_plain and self.readout == slice(0, self.num_prefix_tokens)

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
            "spec": self.spec,
        }
