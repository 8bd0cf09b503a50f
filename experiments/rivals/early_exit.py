"""Confidence early exit: an image is done at the first layer whose class token is sure enough.

After Teerapittayanon et al., "BranchyNet", arXiv 1709.01686, with the network's own norm and head
at every layer, and the likeliest class's probability as the confidence.
"""

import jax
import jax.numpy as jnp

from avit_jax.models import flops, vit
from experiments.rivals import unrolled


class EarlyExit(unrolled.Unrolled):
    """Early exit of whole images; in training the loss is the mean over all exits.

    Attributes:
      confidence: probability of the likeliest class at which an image is done; another one needs no
        training.
    """

    confidence: float = 0.9

    def run_layers(
        self, x: jax.Array, layers: unrolled.Layers
    ) -> tuple[jax.Array | tuple[jax.Array, ...], vit.Aux]:
        """In training logits of all exits, the last first; else those of the exit taken: images
        that are done cost nothing.
        """
        batch, num_tokens = x.shape[:2]
        aux = self.aux([num_tokens] * self.depth, batch, None)
        if layers.train:
            exits = []
            for i in range(self.depth):
                x = layers(i, x)
                exits.append(self.classify(x[:, :1]))
            return tuple(exits[::-1]), aux
        going, active = jnp.ones(batch, bool), []
        taken = jnp.zeros((batch, self.num_classes))
        for i in range(self.depth):
            active.append(jnp.broadcast_to(going[:, None], (batch, num_tokens)))
            x = unrolled.run_active(layers.block, layers.params_of(i), x, active[-1])
            logits = self.classify(x[:, :1])
            taken = jnp.where(going[:, None], logits, taken)
            going &= jax.nn.softmax(logits).max(axis=-1) < self.confidence
        active = jnp.stack(active)
        heads = (
            (active[:, :, 0].sum(axis=0) - 1) * self.width * self.num_classes
        )  # the last one is in fixed_macs
        macs = flops.image_macs(self, active) + heads.astype(jnp.float32)
        return taken, aux.replace(macs=macs, active=active, depth=active.sum(axis=0))
