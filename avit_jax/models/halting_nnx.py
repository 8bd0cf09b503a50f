"""Halting as a Flax NNX module; `halting_linen.Halting` is the same for Flax Linen."""

import jax
import jax.numpy as jnp
from flax import nnx

from avit_jax.core import halting


class Halting(nnx.Module):
    """One halting step after a layer; call the same instance after every layer.

    Args:
      config: the gate. With `learnable=True` the module has two scalar float32 parameters, `gamma`
        and `beta`.
      rngs: not used; taken so that `nnx.bridge.ToLinen` can build the module.
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

    def gate(self) -> tuple[jax.typing.ArrayLike, jax.typing.ArrayLike]:
        """Returns gamma and beta, for code that calls the pure functions itself."""
        if self.config.learnable:
            return self.gamma[...], self.beta[...]
        return self.config.gamma, self.config.beta

    def __call__(
        self,
        tokens: jax.Array,
        state: halting.HaltingState | None = None,
        is_last: jax.typing.ArrayLike = False,
    ) -> tuple[halting.HaltingState, jax.Array, jax.Array]:
        """Scores a layer's output `(..., N, D)`; `state` is None at the first layer.

        Returns:
          The new state, the weight `(..., N)` of this output and the raw score `(..., N)`.

        Raises:
          ValueError: halted tokens are to merge, which this layer does not do.
        """
        if self.config.merge:
            raise ValueError(
                "this layer does not merge tokens, as AViT does: in your own model call "
                "avit_jax.merging."
            )
        if state is None:
            state = halting.init(tokens.shape[:-1], jnp.result_type(tokens))
        gamma, beta = self.gate()
        score = halting.score(tokens, gamma=gamma, beta=beta, channel=self.config.channel)
        state, weight = halting.accumulate(
            state, score, epsilon=self.config.epsilon, is_last=is_last
        )
        return state, weight, score
