"""The halting layer for Flax NNX; `halting_linen` is the same for Flax Linen."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import ArrayLike, Float, Shaped

from avit_jax.core import halting
from avit_jax.core.arrays import Array


class Halting(nnx.Module):
    """One halting step; call the same instance after every layer.

    Args:
      config: the gate. With `learnable=True` the module has two scalar float32 parameters, `gamma`
        and `beta`.
      rngs: unused; `nnx.bridge.ToLinen` passes it.
    """

    def __init__(
        self,
        config: halting.HaltingConfig = halting.HaltingConfig(),
        *,
        rngs: nnx.Rngs | None = None,
    ) -> None:
        self.config = config
        if config.learnable:
            self.gamma = nnx.Param(jnp.float32(config.gamma))
            self.beta = nnx.Param(jnp.float32(config.beta))

    def gate(self) -> tuple[Shaped[ArrayLike, ""], Shaped[ArrayLike, ""]]:
        """Returns gamma and beta, for code that calls the pure functions itself."""
        if self.config.learnable:
            return self.gamma[...], self.beta[...]
        return self.config.gamma, self.config.beta

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
        gamma, beta = self.gate()
        score = halting.score(tokens, gamma=gamma, beta=beta, channel=self.config.channel)
        state, weight = halting.accumulate(
            state, score, epsilon=self.config.epsilon, is_last=is_last
        )
        return state, weight, score
