"""ToMe in which an image ends as soon as its class token is sure enough of a class.

After some layers, an exit reads the class token: a residual linear map of its own, then the norm
and the head of the network. In training, each exit learns the probabilities that the last layer of
the same network gives. At inference, an image ends at the first exit that gives one class a
high enough probability.

Reference: Phuong and Lampert, "Distillation-Based Training for Multi-Exit Architectures", ICCV 2019
  (exits that learn from the last one).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from avit_jax.models import flops, vit
from avit_jax.training import losses
from experiments.rivals import tome, unrolled

_TEMPERATURE = 2.0


class Ends(tome.ToMe):
    """ToMe with early ends.

    Attributes:
      exits: layers, counted from 0, after which an image may end.
      confidence: an image ends once a class has this probability; above 1, no image ends.
      exit_weight: of the mean loss of the exits in training.
      detached: whether the layers get no gradient from the exits.
    """

    exits: tuple[int, ...] = (2, 3, 4)
    confidence: float = 2.0
    exit_weight: float = 1.0
    detached: bool = False

    def setup(self) -> None:
        super().setup()
        # At first, an exit is the norm and the head of the network alone.
        self.exit_maps = [
            nn.Dense(self.width, kernel_init=nn.initializers.zeros) for _ in self.exits
        ]

    def run_layers(self, x: jax.Array, layers: unrolled.Layers) -> tuple[jax.Array, vit.Aux]:
        """In training, returns the logits of the last layer; else those with which an image ends.

        The intermediates "logits" `(B, K + 1, C)` and "cost" `(K + 1,)` are those of the K exits
        and the last layer: logits, and MACs of an image that ends there.
        """
        counts, exits, spent, macs = [], [], [], 0.0
        map_macs, head_macs = self.width**2, self.width * self.num_classes
        tokens = x
        for i, (tokens, count, macs) in enumerate(self.through(x, layers)):
            counts.append(count)
            if i in self.exits:
                # `fixed_macs` counts the head of the exit at which an image ends.
                spent.append(macs + map_macs + len(exits) * (map_macs + head_macs))
                exits.append(self._exit(len(exits), tokens[:, :1]))
        logits = self.classify(tokens[:, :1], train=layers.train)
        aux = self.aux(counts, len(x), macs)
        if layers.train:
            how = {"targets": "soft", "temperature": _TEMPERATURE}
            loss = sum(losses.distillation_loss(exit, logits, **how) for exit in exits) / len(exits)
            return logits, aux.replace(loss=self.exit_weight * loss)
        spent.append(macs + len(exits) * (map_macs + head_macs))
        cost, all_logits = jnp.array(spent) + flops.fixed_macs(self), jnp.stack([*exits, logits], 1)
        self.sow("intermediates", "logits", all_logits)
        self.sow("intermediates", "cost", cost)
        place = end(all_logits, self.confidence)
        taken = jnp.take_along_axis(all_logits, place[:, None, None], axis=1)[:, 0]
        return taken, aux.replace(macs=cost[place])

    def _exit(self, k: int, token: jax.Array) -> jax.Array:
        """Logits `(B, C)` of an exit for class tokens `(B, 1, D)`."""
        token = jax.lax.stop_gradient(token) if self.detached else token
        return self.classify(token + self.exit_maps[k](token))


def end(logits: jax.Array, confidence: float) -> jax.Array:
    """Returns at which exit each image ends, `(B,)`; the last one for an image that none ends.

    Args:
      logits: `(B, K + 1, C)` of the exits and the last layer.
      confidence: as in `Ends`.
    """
    sure = jax.nn.softmax(logits).max(axis=-1) >= confidence
    return jnp.where(sure.any(axis=1), sure.argmax(axis=1), logits.shape[1] - 1)
