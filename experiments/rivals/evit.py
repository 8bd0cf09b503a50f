"""EViT: patch tokens that the class token looks at least are fused into one.

Reference: Liang et al., "Not All Patches are What You Need: Expediting Vision Transformers via
Token Reorganizations", arXiv 2202.07800, section 3. The share of tokens that stay is that of the
end from the first step on.
"""

import jax
import jax.numpy as jnp

from avit_jax.models import vit
from experiments.rivals import unrolled


def class_attention(query: jax.Array, key: jax.Array) -> jax.Array:
    """Mean attention `(B, n)` of the class token to the patch tokens, of queries and keys `(B, H, 1
    + n, K)`.
    """
    logits = jnp.einsum("bhk,bhnk->bhn", query[:, :, 0] * query.shape[-1] ** -0.5, key)
    return jax.nn.softmax(logits, axis=-1).mean(axis=1)[:, 1:]


def reorganise(x: jax.Array, attention: jax.Array, count: int) -> jax.Array:
    """The class token, the `count` patch tokens of highest attention, and the sum of the others
    times their attention.
    """
    best, kept = unrolled.class_and_best(x, attention, count)
    leaves = jax.nn.one_hot(kept, attention.shape[1]).sum(axis=1) == 0
    fused = jnp.einsum("bn,bnd->bd", jnp.where(leaves, attention, 0.0), x[:, 1:])[:, None]
    return jnp.concatenate([best, fused.astype(x.dtype)], axis=1)


class EViT(unrolled.Unrolled):
    """EViT.

    Attributes:
      keep_rate: share of the patch tokens that each of the three stages keeps.
    """

    keep_rate: float = 0.7

    def run_layers(self, x: jax.Array, layers: unrolled.Layers) -> tuple[jax.Array, vit.Aux]:
        """Tokens leave between attention and MLP of the stages, as in the paper."""
        counts, macs = [], 0.0
        for i in range(self.depth):
            counts.append(x.shape[1])
            macs += self.attention_macs(x.shape[1])
            stays = self.kept(x.shape[1] - 1, self.keep_rate)
            if i in self.stages and stays < x.shape[1] - 2:  # fusing a single token gains nothing
                attention = class_attention(*layers.queries_and_keys(i, x))
                x = reorganise(layers(i, x, "attention"), attention, stays)
            else:
                x = layers(i, x, "attention")
            x = layers(i, x, "mlp")
            macs += self.mlp_macs(x.shape[1])
        return self.classify(x[:, :1], train=layers.train), self.aux(counts, len(x), macs)
