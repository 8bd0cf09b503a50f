"""One training step: augmentation, losses, update."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from avit_jax.data import augment, loader
from avit_jax.models import flops, vit
from avit_jax.training import devices, losses
from avit_jax.training.state import TrainState

Values = dict[str, jax.Array]  # metrics of one step by name
# Change of the gate bias per step if the MACs ratio is off by 1. It is small: the noise of single
# batches hardly moves the bias.
_BUDGET_RATE = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Augmentation on the device.

    Attributes:
      mean: mean of the pixels scaled to [0, 1], one number per channel or one for all.
      std: standard deviation of the same pixels, in the same form.
      affine: ranges of the random affine map.
      erase: probability of random erasing.
      mix: mixup and cutmix.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    affine: augment.Affine
    erase: float
    mix: augment.Mix


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The losses other than the teacher's. See `losses`."""

    sigmoid: bool
    class_weights: tuple[float, ...]
    label_smoothing: float
    ponder_weight: float
    prior_weight: float
    target_depth: float
    prior_width: float
    prior_mode: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillOptions:
    """The teacher's loss. `weight` is its fraction of the task loss. See `losses`."""

    targets: str
    weight: float
    temperature: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """What the training step needs to know.

    Attributes:
      seed: seed of augmentation and dropout.
      augmentation: on the device.
      loss: weights and targets of the losses.
      distill: weight and kind of the teacher's loss.
      budget: target MACs ratio, reached by moving the gate bias; 0: no budget.
      learnable_gate: whether the optimizer moves the gate; with a budget, only its scale.
      ema_decay: decay of the moving average of the parameters.
      skip_nonfinite: keeps parameters, average and optimizer moments if the loss or a norm is not
        finite.
      accumulate: number of equal parts of a device's batch that run one after the other, in less
        memory. The gradient is the mean over the parts. Each part has its own prior loss.
    """

    seed: int
    augmentation: Augmentation
    loss: LossOptions
    distill: DistillOptions
    budget: float
    learnable_gate: bool
    ema_decay: float
    skip_nonfinite: bool
    accumulate: int


def augment_batch(
    batch: loader.Batch,
    key: jax.Array,
    options: Augmentation,
    num_classes: int,
    axis_name: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Normalizes and augments the images of one device.

    Args:
      batch: this device's part: images `(B, H, W, channels)` uint8, indices `(B,)` int32, and
        labels, as in `loader`.
      key: random key of the step.
      options: the augmentation.
      num_classes: number of classes, C.
      axis_name: mapped axis over the devices that share the batch, if there are several.

    Returns:
      Images `(B, H, W, channels)` float32, and labels; if images are mixed, probabilities
      `(B, C)` float32.
    """
    affine_key, erase_key, mix_key = jax.random.split(key, 3)
    images, targets = batch["image"], batch["label"]
    if any(vars(options.affine).values()):
        images = augment.random_affine(images, affine_key, batch["index"], options.affine)
    images = augment.normalize(images, options.mean, options.std)
    if options.erase:
        images = augment.random_erase(images, erase_key, batch["index"], options.erase)
    if options.mix.mixup or options.mix.cutmix:
        targets = jax.nn.one_hot(targets, num_classes) if targets.ndim == 1 else targets
        images, targets = augment.mix(images, targets, mix_key, options.mix, axis_name)
    return images, targets


def task_loss(
    logits: Any,
    targets: jax.Array,
    teacher_logits: jax.Array | None,
    options: StepOptions,
    *,
    distilled: bool,
) -> tuple[jax.Array, Values]:
    """Returns the weighted loss against labels and teacher, each a mean over its heads.

    With a teacher, a distilled model learns the labels with its first head and the teacher with
    its second. Otherwise all heads learn both.

    Args:
      logits: `(B, C)`, or one such array per head.
      targets: `(B,)` labels, or `(B, C)` probabilities.
      teacher_logits: `(B, C)`, or None without a teacher.
      options: weights.
      distilled: whether the second head is that of a distillation token.

    Returns:
      The loss, and its parts by name; in nats.
    """
    heads = taught_heads = logits if isinstance(logits, tuple) else (logits,)
    if distilled and teacher_logits is not None:
        heads, taught_heads = heads[:1], heads[1:]
    loss, distill = options.loss, options.distill
    cross_entropy = functools.partial(
        losses.cross_entropy,
        label_smoothing=loss.label_smoothing,
        class_weights=loss.class_weights,
        sigmoid=loss.sigmoid,
    )
    task = sum(cross_entropy(head, targets) for head in heads) / len(heads)
    if teacher_logits is None:
        return task, {"task_loss": task}
    how = {"targets": distill.targets, "temperature": distill.temperature}
    taught = sum(
        losses.distillation_loss(head, teacher_logits, **how) for head in taught_heads
    ) / len(taught_heads)
    total = (1.0 - distill.weight) * task + distill.weight * taught
    return total, {"task_loss": task, "distill_loss": taught}


def total_loss(
    model: vit.AViT,
    logits: Any,
    aux: vit.Aux,
    targets: jax.Array,
    options: StepOptions,
    axis_name: str | None = None,
    teacher_logits: jax.Array | None = None,
) -> tuple[jax.Array, Values]:
    """Returns the weighted sum of the task, distillation, ponder and prior losses.

    Args:
      model: the network.
      logits: as in `task_loss`.
      aux: of the same forward pass.
      targets: as in `task_loss`.
      options: weights.
      axis_name: as in `losses.prior_loss`.
      teacher_logits: as in `task_loss`.

    Returns:
      The loss, and its parts by name; in nats, the ponder loss in layers.
    """
    c = options.loss
    total, parts = task_loss(logits, targets, teacher_logits, options, distilled=model.distilled)
    if model.halting is not None:
        parts["ponder_loss"] = losses.ponder_loss(aux)
        parts["prior_loss"] = losses.prior_loss(
            aux,
            target_depth=c.target_depth,
            width=c.prior_width,
            mode=c.prior_mode,
            axis_name=axis_name,
        )
        parts["macs_ratio"] = aux.macs.mean() / flops.static_macs(model)
        total += c.ponder_weight * parts["ponder_loss"] + c.prior_weight * parts["prior_loss"]
    own_loss = getattr(aux, "loss", None)  # `Aux` of some experiments has a loss
    if own_loss is not None:
        parts["own_loss"] = own_loss
        total += own_loss
    return total, parts | {"loss": total}


def update_budget_bias(gate: Any, before: Any, macs_ratio: jax.Array, *, budget: float) -> Any:
    """Returns the gate's parameters after a step towards a MACs ratio.

    If the ratio is above the budget, the bias rises, so more tokens halt. The optimizer's update of
    the bias is dropped. If the bias must move by d in each step, the ratio stays d / `_BUDGET_RATE`
    away from the budget.

    Args:
      gate: gamma and beta after the optimizer's update.
      before: gamma and beta before the step.
      macs_ratio: MACs ratio of the batch.
      budget: the target MACs ratio.
    """
    return {"gamma": gate["gamma"], "beta": before["beta"] + _BUDGET_RATE * (macs_ratio - budget)}


def make_train_step(
    model: vit.AViT,
    tx: optax.GradientTransformation,
    options: StepOptions,
    teacher: vit.AViT | None = None,
) -> Callable[..., tuple[TrainState, Values]]:
    """Returns the training step of one device, for `devices.parallel`.

    Its arguments are the state, the device's part of the batch and, with a teacher, the teacher's
    parameters. It returns the new state and the metrics of the step.
    """
    has_budget = _has_budget(model, options)

    def train_step(
        state: TrainState, batch: loader.Batch, teacher_params: Any = None
    ) -> tuple[TrainState, Values]:
        augment_key, dropout_key = jax.random.split(
            jax.random.fold_in(jax.random.key(options.seed), state.step)
        )
        images, targets = augment_batch(
            batch, augment_key, options.augmentation, model.num_classes, devices.AXIS
        )
        teacher_logits = None
        if teacher is not None:
            teacher_logits, _ = teacher.apply({"params": teacher_params}, images)
        loss_fn = functools.partial(_loss, model=model, options=options, dropout_key=dropout_key)
        own = {name: batch[name] for name in ("index", "label")}
        grads, values = _gradient(
            loss_fn, options.accumulate, state.params, (own, images, targets, teacher_logits)
        )
        grads, values = devices.mean((grads, values))
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if has_budget:
            gate = update_budget_bias(
                params["gate"], state.params["gate"], values["macs_ratio"], budget=options.budget
            )
            params = {**params, "gate": gate}
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = optax.incremental_update(params, ema_params, 1.0 - options.ema_decay)
        new = TrainState(
            step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
        )
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
        finite = jnp.isfinite(jnp.stack([values["loss"], *norms.values()])).all()
        if options.skip_nonfinite:  # the counters advance anyway, and so does the learning rate
            new = jax.tree.map(
                lambda a, b: a if a.dtype == jnp.int32 else jnp.where(finite, a, b), new, state
            )
        counts = {"skipped": devices.total(batch["skipped"].sum()), "nonfinite": ~finite}
        return new, values | counts | norms

    return train_step


def _gradient(
    loss_fn: Callable[..., tuple[jax.Array, Values]], parts: int, params: Any, inputs: tuple
) -> tuple[Any, Values]:
    """Returns gradient and metrics: means over equal parts of the batch, which run in turn.

    Image i is in part i modulo `parts`, so the parts do not depend on the number of devices.
    """
    gradient = jax.grad(loss_fn, has_aux=True)
    if parts == 1:
        return gradient(params, *inputs)

    def add(sums: Any, part: tuple) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, gradient(params, *part)), None

    inputs = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), inputs)
    first = jax.tree.map(lambda x: x[0], inputs)
    shapes = jax.eval_shape(gradient, params, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.tree.map(lambda x: x / parts, jax.lax.scan(add, zeros, inputs)[0])


def _has_budget(model: vit.AViT, options: StepOptions) -> bool:
    return bool(options.budget) and model.halting is not None


def _loss(
    params: Any,
    batch: loader.Batch,
    images: jax.Array,
    targets: jax.Array,
    teacher_logits: jax.Array | None,
    *,
    model: vit.AViT,
    options: StepOptions,
    dropout_key: jax.Array,
) -> tuple[jax.Array, Values]:
    """Returns the loss of one device's augmented images as a function of the parameters."""
    if _has_budget(model, options):
        params = _without_bias_gradient(params, options.learnable_gate)
    logits, aux = model.apply(
        {"params": params},
        images,
        train=True,
        image_index=batch["index"],
        rngs={"dropout": dropout_key},
    )
    loss, values = total_loss(model, logits, aux, targets, options, devices.AXIS, teacher_logits)
    first_head = logits[0] if isinstance(logits, tuple) else logits
    return loss, values | {"top1": losses.is_right(first_head, batch["label"]).mean()}


def _without_bias_gradient(params: Any, learnable: bool) -> Any:
    """Stops the gradient of gate parameters that the optimizer does not move.

    So the norm of the gradient leaves them out.
    """
    gate = {
        name: x if learnable and name == "gamma" else jax.lax.stop_gradient(x)
        for name, x in params["gate"].items()
    }
    return {**params, "gate": gate}
