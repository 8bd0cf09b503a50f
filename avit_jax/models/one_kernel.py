"""All layers of a network by `kernels.vit_tpu`, as the executor `AtOnce`. Axes as in `vit`.

`adaptive.apply` uses it on TPUs if the plan says so and `supports` is true. Otherwise, XLA runs the
layers on buckets of images.
"""

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from avit_jax.core.arrays import Array
from avit_jax.kernels import vit_tpu, vit_tpu_layer
from avit_jax.models import executors, flops, forward
from avit_jax.models.block import Gate

if TYPE_CHECKING:
    from avit_jax.models import vit


def sizes(model: "vit.AViT", token_multiple: int) -> vit_tpu_layer.Sizes:
    """Returns the sizes of a network with halting, as the kernel needs them."""
    assert model.halting is not None
    return vit_tpu_layer.Sizes(
        num_tokens=model.num_tokens,
        num_prefix_tokens=model.num_prefix_tokens,
        width=model.width,
        num_heads=model.num_heads,
        mlp_width=model.mlp_width,
        depth=model.depth,
        norm_eps=model.norm_eps,
        epsilon=model.halting.epsilon,
        channel=model.halting.channel,
        token_multiple=token_multiple,
    )


def supports(model: "vit.AViT", dtype: jax.typing.DTypeLike, token_multiple: int) -> bool:
    """Returns whether the kernel can run a network.

    It needs halting without merging, a plain network (`AViT.is_plain`), a `token_multiple` that is
    a multiple of 16, and what `vit_tpu.supports` needs. The weights of DeiT-B are too large.

    Args:
      model: the network.
      dtype: of the embedded tokens.
      token_multiple: the kernel is compiled for multiples of it.
    """
    merges = model.halting is None or model.halting.merge
    if merges or not model.is_plain or token_multiple % 16:
        return False
    return vit_tpu.supports(sizes(model, token_multiple), dtype)


def executor(model: "vit.AViT", token_multiple: int) -> executors.AtOnce:
    """Returns the executor of a network that the kernel supports."""
    return executors.AtOnce(functools.partial(_run, sizes(model, token_multiple)))


def _run(
    sizes: vit_tpu_layer.Sizes, gate: Gate, carry: forward.Carry, params: Any
) -> tuple[Array, Array]:
    return vit_tpu.run(carry.x, carry.state.active.any(axis=1), gate, params, sizes)


def padded_macs(model: "vit.AViT", active: Array, token_multiple: int) -> Array:
    """Returns the MACs of all layers for each image, including the kernel's padding.

    Prefix tokens stay until the image is finished.

    Args:
      model: for its sizes.
      active: `(L, B, N)` bool, False for all tokens of finished images.
      token_multiple: as in `supports`.

    Returns:
      `(B,)` float32.
    """
    prefix = model.num_prefix_tokens
    count = jnp.where(active.any(axis=-1), prefix + active[..., prefix:].sum(axis=-1), 0)
    compiled = jnp.array((0, *sizes(model, token_multiple).token_counts()))
    ran = compiled[jnp.searchsorted(compiled, count)].astype(jnp.float32)
    return flops.layer_macs(ran, model).sum(axis=0)
