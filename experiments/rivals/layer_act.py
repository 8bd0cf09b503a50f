"""Naive ACT: all tokens of an image halt together, as one; the straw man of the A-ViT paper.

Graves, "Adaptive Computation Time for Recurrent Neural Networks", arXiv 1603.08983, over the layers
of a transformer. Gate, losses and budget are those of A-ViT; but for which token halts when, it is
the same.
"""

import jax
import jax.numpy as jnp

from avit_jax.core import halting
from avit_jax.models import block, flops, vit
from experiments.rivals import unrolled


class LayerACT(vit.AViT):
    """The gate reads the mean of all tokens, and there is one halting score for an image in a
    layer.
    """

    def __call__(
        self, images: jax.Array, *, train: bool = False, image_index: jax.Array | None = None
    ) -> tuple[jax.Array, vit.Aux]:
        """See `AViT.__call__`; without a gate it is that. It has no dropout.

        Raises:
          ValueError: it is to train with one.
        """
        if train and (self.dropout or self.drop_path):
            raise ValueError("naive ACT has no dropout and no stochastic depth: set both to 0.")
        if self.halting is None or self.is_initializing():
            return super().__call__(images, train=train, image_index=image_index)
        x = self.embed(images)
        batch, num_tokens, _ = x.shape
        state, readout = halting.init((batch, 1)), jnp.zeros((batch, 1, self.width))
        gamma, beta = self.gate.gate()
        layer = block.Block(**self.block_kwargs, parent=None)
        scores, active = [], []
        for i in range(self.depth):
            params = jax.tree.map(lambda stacked, i=i: stacked[i], self.layers.variables["params"])
            going = jnp.broadcast_to(state.active, (batch, num_tokens))
            if train:
                x = layer.apply({"params": params}, x, going, method="transform")
            else:
                x = unrolled.run_active(layer, params, x, going)
            score = halting.score(
                x.mean(axis=1, keepdims=True), gamma=gamma, beta=beta, channel=self.halting.channel
            )
            scores.append(jnp.broadcast_to(score, going.shape))
            active.append(going)
            state, weight = halting.accumulate(
                state, score, epsilon=self.halting.epsilon, is_last=i == self.depth - 1
            )
            readout = readout + weight[..., None] * x[:, :1]
        aux = vit.Aux(
            score=jnp.stack(scores),
            active=jnp.stack(active),
            depth=jnp.broadcast_to(state.depth, going.shape),
            ponder_cost=jnp.broadcast_to(halting.ponder_cost(state), going.shape),
            class_output=readout[:, 0],
            macs=flops.image_macs(self, jnp.stack(active)),
        )
        return self.classify(readout, train=train), aux
