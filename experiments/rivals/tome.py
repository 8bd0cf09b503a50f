"""ToMe: in every layer the most similar pairs of tokens become one.

Reference: Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461, sections 3.1 to
  3.3.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from avit_jax.models import vit
from experiments.rivals import unrolled


def match(metric: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Bipartite soft matching.

    Args:
      metric: `(B, n, K)` whose cosine tells how similar tokens are; the class token is the first,
        and stays.
      count: pairs to merge, at most half of the tokens, without the class token.

    Returns:
      Among the tokens with even places: those that are merged `(B, count)` and those that are not,
      in their order; and `(B, count)` the place among the odd ones of the token that each of the
      merged goes into.
    """
    metric = metric / jnp.maximum(jnp.linalg.norm(metric, axis=-1, keepdims=True), 1e-12)
    scores = metric[:, ::2] @ metric[:, 1::2].swapaxes(1, 2)
    scores = scores.at[:, 0].set(-jnp.inf)
    best, partner = scores.max(axis=-1), scores.argmax(axis=-1)
    order = jnp.argsort(-best, axis=-1)
    merged, stays = order[:, :count], jnp.sort(order[:, count:], axis=-1)
    return merged, stays, jnp.take_along_axis(partner, merged, axis=1)


def merge(
    x: jax.Array, size: jax.Array, pairs: tuple[jax.Array, jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Means of merged tokens `(B, n - count, D)`, weighted by how many patches each stands for, and
    these numbers.

    Args:
      x: `(B, n, D)`.
      size: `(B, n)` patches that each token stands for.
      pairs: of `match`.
    """
    merged, stays, partner = pairs
    total = jnp.concatenate([x * size[..., None], size[..., None]], axis=-1)
    even, odd = total[:, ::2], total[:, 1::2]
    take = lambda places: jnp.take_along_axis(even, places[..., None], axis=1)  # noqa: E731
    odd = jax.vmap(lambda odd, place, more: odd.at[place].add(more))(odd, partner, take(merged))
    total = jnp.concatenate([take(stays), odd], axis=1)
    return (total[..., :-1] / total[..., -1:]).astype(x.dtype), total[..., -1]


class ToMe(unrolled.Unrolled):
    """ToMe.

    Attributes:
      merges: pairs of tokens that every layer merges; fewer where fewer are left.
      after_mlp: whether they merge at the end of a layer, where A-ViT's tokens halt, in place of
        between attention and MLP.
    """

    merges: int = 4
    after_mlp: bool = False

    def through(
        self, x: jax.Array, layers: unrolled.Layers
    ) -> Iterator[tuple[jax.Array, int, float]]:
        """Runs layer after layer; attention counts a token as often as it has patches.

        Yields after each layer: the tokens that are left `(B, n, D)`, how many there were at its
        input, and the MACs so far.
        """
        macs, size = 0.0, jnp.ones(x.shape[:2], jnp.float32)
        for i in range(self.depth):
            count = x.shape[1]
            macs += self.attention_macs(count)
            macs += (count // 2) * ((count + 1) // 2) * self.width // self.num_heads  # comparison
            keys = layers.queries_and_keys(i, x)[1].mean(axis=1)
            pairs = match(keys, min(self.merges, (count - 1) // 2))
            x = layers(i, x, "attention", size=size)
            if not self.after_mlp:
                x, size = merge(x, size, pairs)
            x = layers(i, x, "mlp")
            macs += self.mlp_macs(x.shape[1])
            if self.after_mlp:
                x, size = merge(x, size, pairs)
            yield x, count, macs

    def run_layers(self, x: jax.Array, layers: unrolled.Layers) -> tuple[jax.Array, vit.Aux]:
        """Tokens merge in each layer."""
        counts, macs = [], 0.0
        tokens = x
        for tokens, count, macs in self.through(x, layers):
            counts.append(count)
            # Nothing is stored unless the caller makes "intermediates" mutable.
            self.sow("intermediates", "class_token", tokens[:, 0])
            self.sow("intermediates", "macs", jnp.asarray(macs))
        return self.classify(tokens[:, :1], train=layers.train), self.aux(counts, len(x), macs)
