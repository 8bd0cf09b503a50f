"""Builds what a configuration describes: the network, its optimizer, the initial state."""

import functools
from collections.abc import Callable
from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from avit_jax.core import halting
from avit_jax.core import plan as plan_lib
from avit_jax.models import flops, vit
from avit_jax.training import optimizer as optimizer_lib
from avit_jax.utils import errors


@flax.struct.dataclass(kw_only=True)
class TrainState:
    """All that a training step changes. Random keys follow from the seed and the step.

    Attributes:
      step: int32, updates done.
      params: parameter tree.
      ema_params: moving average of it, None without one.
      opt_state: of the optimizer.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: Any

    @property
    def eval_params(self) -> Any:
        """What is evaluated: the moving average where there is one."""
        return self.params if self.ema_params is None else self.ema_params


def model(config: ConfigDict) -> vit.AViT:
    """The model of a configuration; raises errors.UserError where its sizes do not fit together."""
    gate = dict(config.halting)
    try:
        gate["learnable"] |= config.budget > 0  # which moves its shift
        halts = halting.HaltingConfig(**gate) if gate.pop("enabled") else None
        sizes = config.model.to_dict() | {"dtype": jnp.dtype(config.model.dtype)}
        network = vit.AViT(**sizes, halting=halts)
        network.check()
        if config.train.adaptive and halts:  # its backward pass recomputes anyway, without remat
            images = config.train.batch_size // jax.device_count()
            removes = plan_lib.removal_pays(
                network.width, images, config.budget or 1.0, training=True
            )
            plan = plan_lib.training_plan(network.num_tokens) if removes else None
            network = network.clone(removal=plan, remat=not removes)
            network.check()
        if network.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16; got {network.dtype}.")
    except (ValueError, TypeError) as error:
        raise errors.UserError(f"config.model or config.halting: {error}") from error
    least = (
        flops.fixed_macs(network) + flops.layer_macs(network.num_tokens, network)
    ) / flops.static_macs(network)
    if halts and 0 < config.budget < least:
        raise errors.UserError(
            f"config.budget {config.budget} is out of reach: the first layer alone costs "
            f"{least:.3f}."
        )
    return network


def optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a configuration, and its learning rate by step."""
    c = config.optimizer
    learning_rate = optimizer_lib.schedule(
        steps=config.train.steps,
        learning_rate=c.learning_rate,
        warmup=c.warmup,
        warmup_learning_rate=c.warmup_learning_rate,
        min_learning_rate=c.min_learning_rate,
    )
    tx = optimizer_lib.create(
        learning_rate, weight_decay=c.weight_decay, clip_norm=c.clip_norm, layer_decay=c.layer_decay
    )
    return tx, learning_rate


def new_state(
    network: vit.AViT, tx: optax.GradientTransformation, *, seed: int, ema: bool
) -> TrainState:
    """The state before the first step; random, by the seed alone."""
    images = jnp.zeros((1, *network.pixels, network.channels))
    params = network.init(jax.random.key(seed), images)["params"]
    ema_params = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=ema_params,
        opt_state=tx.init(params),
    )


def creation(config: ConfigDict, network: vit.AViT) -> Callable[[], TrainState]:
    """What makes the state before the first step of a configuration's run."""
    return functools.partial(
        new_state,
        network,
        optimizer(config)[0],
        seed=config.seed,
        ema=config.optimizer.ema_decay > 0,
    )
