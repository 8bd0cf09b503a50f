"""One training step: augmentation, losses, update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from avit_jax.data import augment, loader
from avit_jax.models import flops, vit
from avit_jax.training import evaluate, losses
from avit_jax.training.build import TrainState

AXIS = evaluate.AXIS
# What the shift of the gate moves by in a step, for each unit that the share of MACs is off: slow
# beside the noise of a batch.
_BUDGET_RATE = 1.0


def augment_batch(
    batch: loader.Batch, key: jax.Array, config: ConfigDict, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Normalised, augmented images of a device's share of the batch; their labels, or probabilities
    where they are mixed.
    """
    c = config.augment
    ranges, mixing = (
        augment.Affine(**config.affine),
        augment.Mix(mixup=c.mixup, cutmix=c.cutmix, switch=c.switch),
    )
    affine_key, erase_key, mix_key = jax.random.split(key, 3)
    images, targets = batch["image"], batch["label"]
    if any(vars(ranges).values()):
        images = augment.random_affine(images, affine_key, batch["index"], ranges)
    images = augment.normalize(images, config.data.mean, config.data.std)
    if c.erase:
        images = augment.random_erase(images, erase_key, batch["index"], c.erase)
    if c.mixup or c.cutmix:
        targets = jax.nn.one_hot(targets, config.model.num_classes)
        images, targets = augment.mix(images, targets, mix_key, mixing, axis_name)
    return images, targets


def task_loss(
    logits: Any,
    targets: jax.Array,
    teacher_logits: jax.Array | None,
    config: ConfigDict,
    *,
    distilled: bool,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What labels and teacher ask for, weighted, each the mean over the heads that it speaks to.

    Both speak to all heads; but in a distilled model, where there is a teacher, labels to the first
    and the teacher to the second.
    """
    smoothing, c = config.loss.label_smoothing, config.distill
    heads = logits if isinstance(logits, tuple) else (logits,)
    taught_heads = heads
    if distilled and teacher_logits is not None:
        heads, taught_heads = heads[:1], heads[1:]
    task = sum(
        losses.cross_entropy(head, targets, label_smoothing=smoothing) for head in heads
    ) / len(heads)
    if teacher_logits is None:
        return task, {"task_loss": task}
    taught = sum(
        losses.distillation_loss(head, teacher_logits, targets=c.targets, temperature=c.temperature)
        for head in taught_heads
    ) / len(taught_heads)
    return (1.0 - c.weight) * task + c.weight * taught, {"task_loss": task, "distill_loss": taught}


def total_loss(
    model: vit.AViT,
    logits: Any,
    aux: vit.Aux,
    targets: jax.Array,
    config: ConfigDict,
    axis_name: str | None,
    teacher_logits: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Task, distillation, ponder and prior loss, weighted, and each by itself; targets are labels
    or probabilities.
    """
    c = config.loss
    total, parts = task_loss(logits, targets, teacher_logits, config, distilled=model.distilled)
    if model.halting is not None:
        parts["ponder_loss"] = losses.ponder_loss(aux)
        # With a budget, its share of the layers: a prior around another depth would undo what the
        # shift of the gate does.
        target_depth = max(1.0, config.budget * model.depth) if config.budget else c.target_depth
        parts["prior_loss"] = losses.prior_loss(
            aux,
            target_depth=target_depth,
            width=c.prior_width,
            mode=c.prior_mode,
            axis_name=axis_name,
        )
        parts["macs_ratio"] = aux.macs.mean() / flops.static_macs(model)
        total += c.ponder_weight * parts["ponder_loss"] + c.prior_weight * parts["prior_loss"]
    own_loss = getattr(aux, "loss", None)  # of a network of another method
    if own_loss is not None:
        parts["own_loss"] = own_loss
        total += own_loss
    return total, parts | {"loss": total}


def hold_budget(gate: Any, before: Any, macs_ratio: jax.Array, *, budget: float) -> Any:
    """The gate's parameters after a step that is to end at a share of the static network's MACs.

    The shift moves against the error, in place of what its gradient would do, and stays in the
    checkpoint. Where the losses push the other way so hard that it has to move by d in each step,
    the share stays off by d / `_BUDGET_RATE`.

    Args:
      gate: gamma and beta, as the optimizer leaves them.
      before: as they were before the step.
      macs_ratio: share of the MACs that the batch took.
      budget: the share that it should take.
    """
    return {"gamma": gate["gamma"], "beta": before["beta"] + _BUDGET_RATE * (macs_ratio - budget)}


def make_train_step(
    model: vit.AViT,
    tx: optax.GradientTransformation,
    config: ConfigDict,
    teacher: vit.AViT | None = None,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    """The training step as a function of one device's state and share of the batch, to run under
    `pmap` over `AXIS`.

    With a teacher its parameters are the function's third argument.
    """
    seed, ema_decay = config.seed, config.optimizer.ema_decay
    holds = bool(config.budget) and model.halting is not None

    def train_step(
        state: TrainState, batch: loader.Batch, teacher_params: Any = None
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        augment_key, dropout_key = jax.random.split(
            jax.random.fold_in(jax.random.key(seed), state.step)
        )
        images, targets = augment_batch(batch, augment_key, config, AXIS)
        teacher_logits = (
            None if teacher is None else teacher.apply({"params": teacher_params}, images)[0]
        )

        def loss_fn(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            # what the optimizer does not move takes no part in the norm that gradients are clipped
            # by
            if holds:
                learns = {"gamma"} if config.halting.learnable else set()
                gate = {
                    name: x if name in learns else jax.lax.stop_gradient(x)
                    for name, x in params["gate"].items()
                }
                params = {**params, "gate": gate}
            logits, aux = model.apply(
                {"params": params},
                images,
                train=True,
                image_index=batch["index"],
                rngs={"dropout": dropout_key},
            )
            loss, values = total_loss(model, logits, aux, targets, config, AXIS, teacher_logits)
            heads = logits if isinstance(logits, tuple) else (logits,)
            return loss, values | {"top1": (heads[0].argmax(-1) == batch["label"]).mean()}

        grads, values = jax.grad(loss_fn, has_aux=True)(state.params)
        grads, values = jax.lax.pmean((grads, values), AXIS)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if holds:
            gate = hold_budget(
                params["gate"], state.params["gate"], values["macs_ratio"], budget=config.budget
            )
            params = {**params, "gate": gate}
        ema_params = None
        if state.ema_params is not None:
            ema_params = optax.incremental_update(params, state.ema_params, 1.0 - ema_decay)
        new = TrainState(
            step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state
        )
        norms = {"grad_norm": grad_norm, "param_norm": optax.tree.norm(params)}
        finite = jnp.isfinite(jnp.stack([values["loss"], *norms.values()])).all()
        if (
            config.train.nonfinite == "skip"
        ):  # steps, and with them the learning rate, go on all the same
            new = jax.tree.map(
                lambda a, b: a if a.dtype == jnp.int32 else jnp.where(finite, a, b), new, state
            )
        counts = {"skipped": jax.lax.psum(batch["skipped"].sum(), AXIS), "nonfinite": ~finite}
        return new, values | counts | norms

    return train_step
