"""The halting layer for Flax Linen; `halting_nnx` is the same for Flax NNX."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import ArrayLike, Float, Shaped

from avit_jax.core import halting
from avit_jax.core.arrays import Array


class Halting(nn.Module):
    """One halting step; call the same instance after every layer.

    Attributes:
      config: the gate. With `learnable=True` the module has two scalar float32 parameters, `gamma`
        and `beta`.
    """

    config: halting.HaltingConfig = halting.HaltingConfig()

    def setup(self) -> None:
        self.gamma: ArrayLike
        self.beta: ArrayLike
        if self.config.learnable:
            self.gamma = self.param("gamma", nn.initializers.constant(self.config.gamma), ())
            self.beta = self.param("beta", nn.initializers.constant(self.config.beta), ())
        else:
            self.gamma, self.beta = self.config.gamma, self.config.beta

    def gate(self) -> tuple[Shaped[ArrayLike, ""], Shaped[ArrayLike, ""]]:
        """Returns gamma and beta, for code that calls the pure functions itself."""
        return self.gamma, self.beta

    def __call__(
        self,
        tokens: Float[Array, "*N D"],
        state: halting.HaltingState | None = None,
        is_last: Shaped[ArrayLike, ""] = False,
    ) -> tuple[halting.HaltingState, Float[Array, "*N"], Float[Array, "*N"]]:
        """Scores the output of a layer, and decides which tokens halt.

        Args:
          tokens: `(..., N, D)` outputs of the layer.
          state: from the previous call; None in the first call.
          is_last: whether this is the last layer. Only then do the weights sum to 1.

        Returns:
          The new state, the weight `(..., N)` of this output, and the score `(..., N)`.

        Raises:
          ValueError: the config asks for merging, which only `AViT` does.
        """
        if self.config.merge:
            raise ValueError(
                "this layer does not merge tokens: set merge=False, or call "
                "avit_jax.core.merging in your model."
            )
        if state is None:
            state = halting.init(tokens.shape[:-1], jnp.result_type(tokens))
        score = halting.score(tokens, gamma=self.gamma, beta=self.beta, channel=self.config.channel)
        state, weight = halting.accumulate(
            state, score, epsilon=self.config.epsilon, is_last=is_last
        )
        return state, weight, score
