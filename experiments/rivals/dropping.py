"""Patch tokens that leave without a look at them: at random, or evenly spread. What any choice has
to beat.
"""

import jax
import jax.numpy as jnp

from avit_jax.models import vit
from experiments.rivals import unrolled


class Dropping(unrolled.Unrolled):
    """Keeps the same share of patch tokens in each of the three stages, whatever they hold.

    Attributes:
      keep_rate: the share.
      choice: "random", drawn anew for each image and step; in evaluation by the image's place in
        its batch. "uniform": every so-many-eth token of those that are left.
    """

    keep_rate: float = 0.7
    choice: str = "random"

    def run_layers(self, x: jax.Array, layers: unrolled.Layers) -> tuple[jax.Array, vit.Aux]:
        """Tokens leave before the layer of each stage."""
        counts, macs = [], 0.0
        key = self.make_rng("dropout") if layers.train else jax.random.key(0)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, layers.image_index)
        for i in range(self.depth):
            if i in self.stages:
                patches = x.shape[1] - 1
                stays = self.kept(patches, self.keep_rate)
                if self.choice == "random":
                    rank = jax.vmap(
                        lambda key, i=i, n=patches: jax.random.uniform(
                            jax.random.fold_in(key, i), (n,)
                        )
                    )(keys)
                else:
                    places = jnp.linspace(0, patches - 1, stays).round().astype(jnp.int32)
                    rank = jnp.broadcast_to(
                        jnp.zeros(patches).at[places].set(1.0), (len(x), patches)
                    )
                x, _ = unrolled.class_and_best(x, rank, stays)
            counts.append(x.shape[1])
            macs += self.attention_macs(x.shape[1]) + self.mlp_macs(x.shape[1])
            x = layers(i, x)
        return self.classify(x[:, :1], train=layers.train), self.aux(counts, len(x), macs)
