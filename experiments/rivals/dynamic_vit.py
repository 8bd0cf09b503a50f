"""DynamicViT: small networks score the patch tokens in three stages, and a fixed share of them goes
on.

Reference: Rao et al., "DynamicViT: Efficient Vision Transformers with Dynamic Token
Sparsification", arXiv 2106.02034, sections 3.2 to 3.4. Of its losses the one on the ratio is here;
a teacher is the trainer's business (`config.distill`), and the one on the features of the last
layer is left out.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avit_jax.models import block, vit
from experiments.rivals import unrolled


class Predictor(nn.Module):
    """Patch tokens `(B, n, D)` and which still count `(B, n)` to log probabilities of staying and
    leaving `(B, n, 2)`.
    """

    @nn.compact
    def __call__(self, x: jax.Array, policy: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = nn.gelu(
            nn.Dense(width, kernel_init=block.kernel_init)(nn.LayerNorm(epsilon=1e-6)(x)),
            approximate=False,
        )
        local, everywhere = jnp.split(x, 2, axis=-1)
        weight = policy / jnp.maximum(
            policy.sum(axis=1, keepdims=True), 1.0
        )  # of draws of 0 or 1: perhaps of none
        everywhere = jnp.broadcast_to(
            jnp.einsum("bn,bnd->bd", weight, everywhere)[:, None], local.shape
        )
        x = jnp.concatenate([local, everywhere], axis=-1)
        for size in (width // 2, width // 4):
            x = nn.gelu(nn.Dense(size, kernel_init=block.kernel_init)(x), approximate=False)
        return jax.nn.log_softmax(nn.Dense(2, kernel_init=block.kernel_init)(x).astype(jnp.float32))


def straight_through(keys: jax.Array, log_probability: jax.Array) -> jax.Array:
    """Gumbel-softmax of the first of two classes: a draw `(B, n)` of 0 or 1, with the gradient of
    the soft one.

    Args:
      keys: `(B,)` random keys.
      log_probability: `(B, n, 2)`.
    """
    noise = jax.vmap(lambda key: jax.random.gumbel(key, log_probability.shape[1:]))(keys)
    soft = jax.nn.softmax(log_probability + noise)[..., 0]
    return soft + jax.lax.stop_gradient((soft > 0.5).astype(soft.dtype) - soft)


def weighted_attention(
    layer: block.Block, x: jax.Array, keep: jax.Array | None, sees: jax.Array
) -> jax.Array:
    """The attention branch of a layer in which each query multiplies the weight of each key.

    Args:
      layer: the layer, bound to its parameters.
      x: tokens `(B, N, D)`.
      keep: `(B, 2)` drop-path factors; None for 1.
      sees: `(B, N, N)` factors, or `(B, 1, N)` for all queries.
    """
    query, key, value = layer.queries_keys_values(layer.norm1(x))
    logits = jnp.matmul(query * query.shape[-1] ** -0.5, key.swapaxes(-2, -1))
    weight = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    weight = weight * sees[:, None]
    out = jnp.matmul(weight, value) / weight.sum(axis=-1, keepdims=True)
    out = block.per_token(layer.proj, out.swapaxes(1, 2).reshape(x.shape))
    return x + layer.drop(out, keep, 0, None)


class DynamicViT(unrolled.Unrolled):
    """DynamicViT.

    Attributes:
      keep_rate: share of the patch tokens that each of the three stages keeps.
      ratio_weight: of the loss that asks for these shares in training.
    """

    keep_rate: float = 0.7
    ratio_weight: float = 2.0

    def setup(self) -> None:
        super().setup()
        self.predictors = [Predictor() for _ in self.stages]

    def run_layers(self, x: jax.Array, layers: unrolled.Layers) -> tuple[jax.Array, vit.Aux]:
        """In training tokens are masked, so that the scores learn; else they leave. Before the
        layer of each stage.
        """
        if self.is_initializing():
            for predictor in self.predictors:
                predictor(x[:, 1:], jnp.ones(x.shape[:2])[:, 1:])
        return self._masked(x, layers) if layers.train else self._removed(x, layers)

    def _masked(self, x: jax.Array, layers: unrolled.Layers) -> tuple[jax.Array, vit.Aux]:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
            self.make_rng("dropout"), layers.image_index
        )
        policy, itself = jnp.ones((len(x), x.shape[1] - 1)), jnp.eye(x.shape[1])[None]
        loss, share, sees = 0.0, 1.0, None
        for i in range(self.depth):
            if i in self.stages:
                stage = self.stages.index(i)
                staying = self.predictors[stage](x[:, 1:], policy)
                policy = policy * straight_through(
                    jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, i), staying
                )
                share *= self.keep_rate
                loss += jnp.mean((policy.mean(axis=1) - share) ** 2) / len(self.stages)
                stays = jnp.pad(policy, ((0, 0), (1, 0)), constant_values=1.0)[:, None]
                sees = (
                    stays + (1 - stays) * itself
                )  # a token that has left sees itself, so that it keeps a gradient
            if sees is None:
                x = layers(i, x, "attention")
            else:
                x = layers(i, x, weighted_attention, sees=sees)
            x = layers(i, x, "mlp")
        aux = self.aux([self.num_tokens] * self.depth, len(x), None).replace(
            loss=self.ratio_weight * loss
        )
        return self.classify(x[:, :1], train=True), aux

    def _removed(self, x: jax.Array, layers: unrolled.Layers) -> tuple[jax.Array, vit.Aux]:
        counts, macs, share = [], 0.0, 1.0
        for i in range(self.depth):
            if i in self.stages:
                macs += self._predictor_macs(x.shape[1] - 1)
                share *= self.keep_rate
                staying = self.predictors[self.stages.index(i)](
                    x[:, 1:], jnp.ones(x.shape[:2])[:, 1:]
                )[..., 0]
                x, _ = unrolled.class_and_best(x, staying, self.kept(self.num_tokens - 1, share))
            counts.append(x.shape[1])
            macs += self.attention_macs(x.shape[1]) + self.mlp_macs(x.shape[1])
            x = layers(i, x)
        return self.classify(x[:, :1]), self.aux(counts, len(x), macs)

    def _predictor_macs(self, patches: int) -> float:
        half, quarter = self.width // 2, self.width // 4
        return patches * (self.width**2 + self.width * half + half * quarter + 2 * quarter)
