"""ToMe whose images may merge different numbers of tokens: by a threshold of similarity.

After ATM (arXiv 2505.15160) and LTMP (arXiv 2307.10780), which also merge where a similarity
exceeds a threshold of the layer. They learn the thresholds. Here the caller gives them, such
as `experiments.pareto.counts`. Merged tokens are masked, so this saves no time.
"""

from typing import Any

import jax
import jax.numpy as jnp

from avit_jax.models import flops, vit
from experiments.rivals import tome, unrolled


def candidates(metric: jax.Array, active: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most similar token with an odd place, of each token with an even one.

    Args:
      metric: `(B, N, K)` whose cosine tells how similar tokens are.
      active: `(B, N)` bool, True for the first ones of each image.

    Returns:
      `(B, N)` cosine similarity, -inf for tokens that cannot merge; `(B, N)` place of the other.
    """
    metric = metric / jnp.maximum(jnp.linalg.norm(metric, axis=-1, keepdims=True), 1e-12)
    odd = (jnp.arange(metric.shape[1]) % 2 == 1)[None]
    scores = jnp.where((active & odd)[:, None], metric @ metric.swapaxes(1, 2), -jnp.inf)
    mergeable = (active & ~odd).at[:, 0].set(False)
    return jnp.where(mergeable, scores.max(axis=-1), -jnp.inf), scores.argmax(axis=-1)


def merge(
    x: jax.Array, size: jax.Array, active: jax.Array, merged: jax.Array, partner: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`tome.merge` with any number of tokens in each image.

    Args:
      x: `(B, N, D)`.
      size: `(B, N)` patches that each token stands for.
      active: `(B, N)` bool.
      merged: `(B, N)` bool, tokens that merge.
      partner: `(B, N)` place of the token that each one merges into.

    Returns:
      Tokens, sizes and which of them are active, in the order of `tome.merge`, the others last.
    """
    weight = size * merged.astype(size.dtype)
    total = jnp.concatenate([x * size[..., None], size[..., None]], axis=-1)
    more = jnp.concatenate([x * weight[..., None], weight[..., None]], axis=-1)
    total = jax.vmap(lambda total, place, more: total.at[place].add(more))(total, partner, more)
    stays = active & ~merged
    odd = jnp.arange(x.shape[1])[None] % 2
    order = jnp.argsort(jnp.where(stays, odd, 2), axis=1, stable=True)
    total = jnp.take_along_axis(total, order[..., None], axis=1)
    stays = jnp.take_along_axis(stays, order, axis=1)
    size = jnp.where(stays, total[..., -1], 1.0)
    return total[..., :-1] / size[..., None] * stays[..., None].astype(x.dtype), size, stays


class CountedToMe(tome.ToMe):
    """ToMe with the number of merges of each image by a threshold.

    Attributes:
      thresholds: similarity of each layer above which tokens merge.
      blend: weight of the image's own number of merges, from 0 to 1. The fixed number `merges` has
        the rest of the weight, and the weighted mean is rounded.
    """

    thresholds: tuple[Any, ...] = ()
    blend: float = 1.0

    def run_layers(self, x: jax.Array, layers: unrolled.Layers) -> tuple[jax.Array, vit.Aux]:
        """As ToMe; sows "similarity" `(B, N)` of the tokens that can merge, for each layer."""
        size, active = jnp.ones(x.shape[:2], jnp.float32), jnp.ones(x.shape[:2], bool)
        actives, macs = [], jnp.zeros(len(x))
        for i in range(self.depth):
            actives.append(active)
            count = active.sum(axis=1)
            pairs_compared = (count // 2) * ((count + 1) // 2)
            pairs_macs = pairs_compared * self.width // self.num_heads
            macs += self.attention_macs(count.astype(float)) + pairs_macs.astype(float)
            similarity, partner = candidates(layers.queries_and_keys(i, x)[1].mean(axis=1), active)
            self.sow("intermediates", "similarity", similarity)
            x = layers(i, x, "attention", active=active, size=size)
            merged = self.merged(similarity, (count - 1) // 2, self.thresholds[i])
            x, size, active = merge(x, size, active, merged, partner)
            x = layers(i, x, "mlp", active=active)
            macs += self.mlp_macs(active.sum(axis=1).astype(float))
        active = jnp.stack(actives)
        aux = self.aux([x.shape[1]] * self.depth, len(x), None)
        logits = self.classify(x[:, :1], train=layers.train)
        return logits, aux.replace(
            macs=macs + flops.fixed_macs(self), active=active, depth=active.sum(axis=0)
        )

    def merged(self, similarity: jax.Array, most: jax.Array, threshold: Any) -> jax.Array:
        """Which tokens `(B, N)` merge.

        Args:
          similarity: `(B, N)` of `candidates`.
          most: `(B,)` how many tokens of each image can merge.
          threshold: of this layer.
        """
        fixed = jnp.minimum(self.merges, most)
        own = (similarity > threshold).sum(axis=1)
        count = jnp.round(fixed.astype(float) + self.blend * (own - fixed).astype(float)).astype(
            int
        )
        rank = jnp.argsort(jnp.argsort(-similarity, axis=1, stable=True), axis=1)
        return (rank < jnp.minimum(count, most)[:, None]) & jnp.isfinite(similarity)
