"""Images of several sizes in one batch.

A small image has fewer tokens. It is padded to the number of tokens of the largest image. The
padding is inactive from the start, and buckets and packed execution do not compute inactive tokens.
So one call serves images of several sizes, with little more work than one call for each size.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avit_jax.core.plan import Plan
from avit_jax.inference import adaptive
from avit_jax.models import flops, vit
from avit_jax.weights import positions


def apply(
    model: vit.AViT, variables: Any, groups: Sequence[jax.Array], *, plan: Plan | None = None
) -> list[tuple[jax.Array, vit.Aux]]:
    """Classifies groups of images like `adaptive.apply`; each group has its own image size.

    Position embeddings are resized to the grid of each group, as PyTorch's `interpolate` does.

    Args:
      model: a network with halting, with `pool="token"` and learned position embeddings.
      variables: `{"params": params}`, for the image size of the model.
      groups: one array `(B, H, W, C)` for each size, float, normalized; `patch_size` divides H and
        W.
      plan: as for `adaptive.apply`; for all images together.

    Returns:
      For each group, logits `(B, C)` and `Aux`, as `adaptive.apply` on a network of this size.

    Raises:
      ValueError: the model does not halt, pools its patch tokens or has rotary position embeddings,
        or a group does not fit it.
      TypeError: JAX needs a derivative of the result.
    """
    if model.pool != "token" or model.rope_theta:  # one call has the rotation of one grid
        raise ValueError(
            'images of several sizes need a model with pool="token" and rope_theta=0; got '
            f'pool="{model.pool}" and rope_theta={model.rope_theta}.'
        )
    if not len(groups):
        raise ValueError("there are no groups of images: pass one array for each image size.")
    if any(np.ndim(images) != 4 for images in groups):
        raise ValueError("groups must be a list of arrays (B, H, W, C), one for each image size.")
    networks = [model.clone(image_size=images.shape[1:3]) for images in groups]
    tokens, exists = [], []
    most = max(network.num_tokens for network in networks)
    for network, images in zip(networks, groups, strict=True):
        adaptive.check(network, images)
        run: Any = network.apply
        x = run(_resized(model, variables, network), images, method="embed")
        tokens.append(jnp.pad(x, ((0, 0), (0, most - x.shape[1]), (0, 0))))
        exists.append(jnp.broadcast_to(jnp.arange(most) < x.shape[1], (len(x), most)))
    largest = next(network for network in networks if network.num_tokens == most)
    logits, aux = adaptive.classify_tokens(
        largest,
        _resized(model, variables, largest),
        jnp.concatenate(tokens),
        jnp.concatenate(exists),
        plan=plan,
    )
    results, start = [], 0
    for network, images in zip(networks, groups, strict=True):
        rows = slice(start, start + len(images))
        results.append((logits[rows], _part(aux, rows, network, flops.fixed_macs(largest))))
        start += len(images)
    return results


def _resized(model: vit.AViT, variables: Any, network: vit.AViT) -> Any:
    """Returns the variables of the model for a network of another image size."""
    if network.grid == model.grid:
        return variables
    params = dict(variables["params"])
    count = model.num_prefix_tokens if model.position_class else 0
    prefix, patches = params["pos_embed"][0, :count], params["pos_embed"][0, count:]
    patches = patches.reshape(*model.grid, -1)
    for axis, (old, new) in enumerate(zip(model.grid, network.grid, strict=True)):
        weights = jnp.asarray(positions.bicubic(old, new), patches.dtype)
        exact = jax.lax.Precision.HIGHEST
        patches = jnp.tensordot(weights, patches, (1, axis), precision=exact)
        patches = jnp.moveaxis(patches, 0, axis)
    resized = jnp.concatenate([prefix, patches.reshape(-1, model.width)])
    return variables | {"params": params | {"pos_embed": resized[None]}}


def _part(aux: vit.Aux, rows: slice, network: vit.AViT, fixed: float) -> vit.Aux:
    """Returns `Aux` of some of the images, whose network has fewer tokens."""
    tokens = slice(network.num_tokens)
    active = aux.active[:, rows, tokens]
    assert aux.macs_padded is not None
    padded = aux.macs_padded[rows] + (flops.fixed_macs(network) - fixed)
    distilled = None if aux.distillation_output is None else aux.distillation_output[rows]
    return dataclasses.replace(
        aux,
        score=aux.score[:, rows, tokens],
        active=active,
        depth=aux.depth[rows, tokens],
        ponder_cost=aux.ponder_cost[rows, tokens],
        class_output=aux.class_output[rows],
        distillation_output=distilled,
        macs=flops.image_macs(network, active),
        macs_padded=padded,
    )
