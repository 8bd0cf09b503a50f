"""Resolves a configuration into objects: the network, its optimizer, the initial state, options.

Other modules of training receive these objects and not the configuration.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from avit_jax import config as config_lib
from avit_jax.core import halting
from avit_jax.core import plan as plan_lib
from avit_jax.data import augment, sources
from avit_jax.models import flops, vit
from avit_jax.training import distributed, train_step
from avit_jax.training import optimizer as optimizer_lib
from avit_jax.training.state import TrainState
from avit_jax.utils import errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the training loop and its log need to know.

    Attributes:
      steps: of the whole run.
      batch_size: images per step, over all devices.
      log_every: steps between two rows of metrics.jsonl.
      eval_every: steps between two evaluations; 0: evaluates after the last step only.
      save_every: steps between two checkpoints.
      skip_nonfinite: skips and counts updates that are not finite; otherwise they end the run.
      max_bad_share: largest fraction of records that may be unreadable.
      ema_decay: of the moving average of the parameters; 0: no average.
      profile: first and last step that the profiler records; (0, 0): none.
      find_nans: names the operation that returns the first nan.
      wandb: project of Weights & Biases that gets the metrics; empty: none.
    """

    steps: int
    batch_size: int
    log_every: int
    eval_every: int
    save_every: int
    skip_nonfinite: bool
    max_bad_share: float
    ema_decay: float
    profile: tuple[int, int]
    find_nans: bool
    wandb: str = ""


def run_options(config: ConfigDict) -> RunOptions:
    """Returns the options of the training loop."""
    keys = ("steps", "batch_size", "log_every", "eval_every", "save_every")
    return RunOptions(
        **{key: config.train[key] for key in keys},
        skip_nonfinite=config.train.nonfinite == "skip",
        max_bad_share=config.data.max_bad_share,
        ema_decay=config.optimizer.ema_decay,
        profile=tuple(config.debug.profile),
        find_nans=config.debug.nans,
        wandb=config.train.wandb,
    )


def step_options(config: ConfigDict) -> train_step.StepOptions:
    """Returns the options of the training step."""
    c, budget, num_layers = config.augment, config.budget, config.model.depth
    augmentation = train_step.Augmentation(
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        affine=augment.Affine(**config.affine),
        erase=c.erase,
        mix=augment.Mix(mixup=c.mixup, cutmix=c.cutmix, switch=c.switch),
    )
    loss = dict(config.loss) | {"class_weights": tuple(config.loss.class_weights)}
    if budget:  # a prior around another depth would pull against the gate bias
        loss["target_depth"] = max(1.0, budget * num_layers)
    distill = {key: value for key, value in config.distill.items() if key != "teacher"}
    return train_step.StepOptions(
        seed=config.seed,
        augmentation=augmentation,
        loss=train_step.LossOptions(**loss),
        distill=train_step.DistillOptions(**distill),
        budget=budget,
        learnable_gate=config.halting.learnable,
        ema_decay=config.optimizer.ema_decay,
        skip_nonfinite=config.train.nonfinite == "skip",
        accumulate=config.train.accumulate,
    )


def model(config: ConfigDict) -> vit.AViT:
    """Returns the network. If `train.adaptive` is set, chooses removal or remat.

    This choice starts JAX's devices.

    Raises:
      errors.UserError: sizes, gate, dtype or budget are invalid.
    """
    gate = dict(config.halting)
    try:
        gate["learnable"] |= config.budget > 0  # training moves the bias to reach the budget
        halts = halting.HaltingConfig(**gate) if gate.pop("enabled") else None
        sizes = config.model.to_dict() | {"dtype": jnp.dtype(config.model.dtype)}
        network = vit.AViT(**sizes, halting=halts)
        network.check()
        if config.train.adaptive and halts:
            images = config.train.batch_size // jax.device_count() // config.train.accumulate
            removes = plan_lib.removal_pays(
                network.width, images, config.budget or 1.0, training=True
            )
            plan = plan_lib.training_plan(network.num_tokens) if removes else None
            # The backward pass of removal recomputes the layers itself and needs no remat.
            network = network.clone(removal=plan, remat=not removes)
            network.check()
        if network.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
            raise ValueError(f"dtype must be float32, bfloat16 or float16; got {network.dtype}.")
    except (ValueError, TypeError) as error:
        raise errors.UserError(f"config.model or config.halting: {error}") from error
    first_layer = flops.fixed_macs(network) + flops.layer_macs(network.num_tokens, network)
    least = first_layer / flops.static_macs(network)
    if halts and 0 < config.budget < least:
        raise errors.UserError(
            f"config.budget {config.budget} is out of reach: set at least "
            f"{math.ceil(1000 * least) / 1000:.3f}, the MACs ratio of one layer with patch "
            "embedding and head."
        )
    return network


def optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer, and its learning rate as a function of the step."""
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
    """Returns the random state before the first step; its random numbers depend on the seed
    alone.

    Args:
      network: the network.
      tx: the optimizer.
      seed: seed of the random parameters.
      ema: whether the state holds a moving average.
    """
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
    """Returns a function that returns the random state before the first step."""
    tx, ema = optimizer(config)[0], config.optimizer.ema_decay > 0
    return functools.partial(new_state, network, tx, seed=config.seed, ema=ema)


def source(config: ConfigDict, network: vit.AViT, split: str) -> sources.Source:
    """Returns a split of the data set.

    Raises:
      errors.UserError: the split is missing; does not fit the network or the losses; or differs
        from that of the first process.
    """
    found = sources.load(
        config.data.name, split=split, data_dir=config.data.dir, image_size=network.pixels
    )
    sources.check_fit(found, num_classes=network.num_classes, channels=network.channels)
    if found.multi_label and not config.loss.sigmoid:
        raise errors.UserError(
            f"{found.name} gives an image any number of labels: set --config.loss.sigmoid=True."
        )
    if found.multi_label and config.distill.teacher:
        raise errors.UserError(
            f"{found.name} gives an image any number of labels, and a teacher gives one: remove "
            "config.distill.teacher."
        )
    distributed.check_same(found.fingerprint(), found.name)
    return found


def check(config: ConfigDict, *names: str) -> None:
    """Checks the configuration before it is used.

    Args:
      config: of the run.
      names: "train", "eval" or both: the number of devices must divide this batch size.

    Raises:
      errors.UserError: a value is invalid; a value differs from that of the first process, except
        for keys that `config.changes` does not compare; or a batch size is not a multiple of the
        number of devices.
    """
    config_lib.check(config)
    values = config_lib.to_json(config)
    differing = config_lib.changes(values, distributed.from_first_json(values))
    if differing:
        raise errors.UserError(
            f"the configuration differs from that of the first process: {differing}; start all "
            "processes with the same configuration."
        )
    for name in names:
        size = config[name].batch_size
        if size % jax.device_count():
            raise errors.UserError(
                f"config.{name}.batch_size {size} must be a multiple of the number of devices, "
                f"{jax.device_count()}."
            )
    if "train" in names and config.train.batch_size // jax.device_count() % config.train.accumulate:
        raise errors.UserError(
            f"config.train.accumulate {config.train.accumulate} must divide the batch of a device, "
            f"{config.train.batch_size // jax.device_count()} images."
        )
