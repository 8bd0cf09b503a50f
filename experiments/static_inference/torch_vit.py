"""A plain PyTorch DeiT with timm's parameter names, written for this comparison."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from avit_jax import weights


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    """Two layers with an exact GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """A pre-norm layer."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, num_heads), Mlp(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """Patches of 16 pixels, by a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """DeiT at 224 pixels: images (B, 3, 224, 224) to logits (B, 1000)."""

    def __init__(self, width: int, num_heads: int, depth: int = 12) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 197, width))
        self.patch_embed = PatchEmbed(width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def _build(
    params: Any,
    images: np.ndarray,
    *,
    width: int,
    num_heads: int,
    depth: int,
    dtype: str,
    device: str,
) -> tuple[nn.Module, torch.Tensor]:
    """The network and the images, both in `dtype` and on the device."""
    network = VisionTransformer(width, num_heads, depth).eval()
    state_dict = weights.to_torch(params, patch_shape=(16, 16, 3))
    network.load_state_dict({name: torch.tensor(array) for name, array in state_dict.items()})
    network.to(device, getattr(torch, dtype))
    return network, torch.tensor(
        images.transpose(0, 3, 1, 2).copy(), dtype=getattr(torch, dtype), device=device
    )


def function(
    params: Any,
    images: np.ndarray,
    *,
    width: int,
    num_heads: int,
    dtype: str = "float32",
    device: str = "cpu",
) -> Callable[[], np.ndarray]:
    """Logits of the images `(B, 224, 224, 3)`, by a DeiT with the given parameters of ours, all in
    `dtype`.
    """
    network, pixels = _build(
        params, images, width=width, num_heads=num_heads, depth=12, dtype=dtype, device=device
    )

    def run() -> np.ndarray:
        with torch.inference_mode():
            return network(pixels).float().cpu().numpy()

    return run


def on_device(
    params: Any,
    images: np.ndarray,
    *,
    width: int,
    num_heads: int,
    depth: int,
    dtype: str,
    compiled: bool = False,
) -> Callable[[], torch.Tensor]:
    """As `function`, on the GPU if there is one; logits stay there, and a call ends when they are
    computed.

    Args:
      params: of ours.
      images: `(B, 224, 224, 3)`.
      width: D.
      num_heads: H.
      depth: L.
      dtype: of network and images.
      compiled: through `torch.compile`.
    """
    on_gpu = torch.cuda.is_available()
    sizes = {"width": width, "num_heads": num_heads, "depth": depth}
    network, pixels = _build(
        params, images, **sizes, dtype=dtype, device="cuda" if on_gpu else "cpu"
    )
    forward = torch.compile(network, dynamic=False) if compiled else network

    def run() -> torch.Tensor:
        with torch.inference_mode():
            logits = forward(pixels)
        if on_gpu:
            torch.cuda.synchronize()
        return logits

    return run
