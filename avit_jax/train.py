"""The training state, one training step, and the `pmap` loop. All that knows about devices is here and in `evaluate`."""

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from flax import jax_utils
from ml_collections import ConfigDict

from avit_jax import checkpoint, distributed, errors, evaluate, halting, losses, optimizer, progress, removal, vit, weight_files
from avit_jax import config as config_lib
from avit_jax.data import augment, loader, sources, transforms

AXIS = evaluate.AXIS
_logger = logging.getLogger(__name__)


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


def build_model(config: ConfigDict) -> vit.AViT:
    """The model of a configuration; raises errors.UserError where its sizes do not fit together."""
    gate = dict(config.halting)
    try:
        halts = halting.HaltingConfig(**gate) if gate.pop("enabled") else None
        sizes = config.model.to_dict() | {"dtype": jnp.dtype(config.model.dtype)}
        if config.train.adaptive and halts:  # its backward pass recomputes anyway
            sizes |= {"removal": removal.Plan(group=8, step=32), "remat": False}
        model = vit.AViT(**sizes, halting=halts)
        model.check()
        if not jnp.issubdtype(model.dtype, jnp.floating) or jnp.finfo(model.dtype).bits > 32:
            raise ValueError(f"dtype must be a floating-point type of at most 32 bits; got {model.dtype}.")
    except (ValueError, TypeError) as error:
        raise errors.UserError(f"config.model or config.halting: {error}") from error
    return model


def build_optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of a configuration, and its learning rate by step."""
    c = config.optimizer
    learning_rate = optimizer.schedule(
        steps=config.train.steps,
        learning_rate=c.learning_rate,
        warmup=c.warmup,
        warmup_learning_rate=c.warmup_learning_rate,
        min_learning_rate=c.min_learning_rate,
    )
    return optimizer.create(learning_rate, weight_decay=c.weight_decay, clip_norm=c.clip_norm), learning_rate


def create_state(model: vit.AViT, tx: optax.GradientTransformation, *, seed: int, ema: bool) -> TrainState:
    """The state before the first step; random, by the seed alone."""
    images = jnp.zeros((1, *model.pixels, model.channels))
    params = model.init(jax.random.key(seed), images)["params"]
    ema_params = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, ema_params=ema_params, opt_state=tx.init(params))


def total_loss(
    model: vit.AViT, logits: Any, aux: vit.Aux, targets: jax.Array, config: ConfigDict, axis_name: str | None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Task, ponder and prior loss, weighted; a distilled model's two heads share the targets, labels or probabilities."""
    c = config.loss
    heads = logits if isinstance(logits, tuple) else (logits,)
    task = sum(losses.cross_entropy(head, targets, label_smoothing=c.label_smoothing) for head in heads) / len(heads)
    parts = {"task_loss": task}
    total = task
    if model.halting is not None:
        parts["ponder_loss"] = losses.ponder_loss(aux)
        parts["prior_loss"] = losses.prior_loss(
            aux, target_depth=c.target_depth, width=c.prior_width, mode=c.prior_mode, axis_name=axis_name
        )
        total += c.ponder_weight * parts["ponder_loss"] + c.prior_weight * parts["prior_loss"]
    return total, parts | {"loss": total}


def augment_batch(
    batch: loader.Batch, key: jax.Array, config: ConfigDict, axis_name: str | None
) -> tuple[jax.Array, jax.Array]:
    """Normalised, augmented images of a device's share of the batch; their labels, or probabilities where they are mixed."""
    c = config.augment
    ranges, mixing = augment.Affine(**config.affine), augment.Mix(mixup=c.mixup, cutmix=c.cutmix, switch=c.switch)
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


def make_train_step(
    model: vit.AViT, tx: optax.GradientTransformation, config: ConfigDict
) -> Callable[[TrainState, loader.Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The training step as a function of one device's state and share of the batch, to run under `pmap` over `AXIS`."""
    seed, ema_decay = config.seed, config.optimizer.ema_decay

    def train_step(state: TrainState, batch: loader.Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        images, targets = augment_batch(batch, augment_key, config, AXIS)

        def loss_fn(params: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
            logits, aux = model.apply(
                {"params": params}, images, train=True, image_index=batch["index"], rngs={"dropout": dropout_key}
            )
            loss, values = total_loss(model, logits, aux, targets, config, AXIS)
            heads = logits if isinstance(logits, tuple) else (logits,)
            return loss, values | {"top1": (heads[0].argmax(-1) == batch["label"]).mean()}

        grads, values = jax.grad(loss_fn, has_aux=True)(state.params)
        grads, values = jax.lax.pmean((grads, values), AXIS)
        grad_norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = None
        if state.ema_params is not None:
            ema_params = optax.incremental_update(params, state.ema_params, 1.0 - ema_decay)
        new = TrainState(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state)
        norms = {"grad_norm": grad_norm, "param_norm": optax.tree.norm(params)}
        finite = jnp.isfinite(jnp.stack([values["loss"], *norms.values()])).all()
        if config.train.nonfinite == "skip":  # steps, and with them the learning rate, go on all the same
            new = jax.tree.map(lambda a, b: a if a.dtype == jnp.int32 else jnp.where(finite, a, b), new, state)
        counts = {"skipped": jax.lax.psum(batch["skipped"].sum(), AXIS), "nonfinite": ~finite}
        return new, values | counts | norms

    return train_step


def load_source(config: ConfigDict, model: vit.AViT) -> sources.Source:
    """The training split; raises errors.UserError where it is not there or does not fit the model."""
    source = sources.load(config.data.name, split=config.data.train_split, data_dir=config.data.dir, image_size=model.pixels)
    sources.check_fit(source, num_classes=model.num_classes, channels=model.channels)
    return source


def input_batches(config: ConfigDict, model: vit.AViT, source: sources.Source, start_step: int = 0) -> Iterator[loader.Batch]:
    """Training batches on the devices, from the given step on."""
    c = config.augment
    transform = transforms.Train(
        image_size=model.pixels, crop_scale=c.crop_scale, flip=c.flip, magnitude=c.magnitude, deviation=c.deviation
    )
    return loader.train_batches(
        loader.Reader(source=source, transform=transform, skip_bad=config.data.bad_records == "skip"),
        batch_size=config.train.batch_size,
        seed=config.seed,
        start_step=start_step,
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        repeats=c.repeats,
    )


def _next(batches: Iterator[loader.Batch], running: dict[str, jax.Array] | None) -> tuple[loader.Batch, float]:
    """The next batch, and the seconds that the devices may have waited for it: none if the step before is still running."""
    started = time.monotonic()
    batch = next(batches)
    idle = running is not None and running["loss"].is_ready()
    return batch, idle * (time.monotonic() - started)


def check_batch_sizes(config: ConfigDict) -> None:
    """Raises errors.UserError where a batch cannot be spread evenly over all devices."""
    for name in ("train", "eval"):
        size = config[name].batch_size
        if size % jax.device_count():
            raise errors.UserError(
                f"config.{name}.batch_size {size} must be a multiple of the number of devices, {jax.device_count()}."
            )


def train(config: ConfigDict, workdir: epath.PathLike, *, allow_changed_config: bool = False) -> None:
    """Trains to the last step, from the last checkpoint in `workdir` if there is one, and reports.

    SIGTERM or SIGINT makes it save after the step in hand, and return; the next call goes on from there.

    Args:
      config: see `avit_jax/config.py`.
      workdir: gets `metrics.jsonl`, `timing.jsonl`, `tensorboard/`, `checkpoints/`, `summary.json` and `depth.png`.
      allow_changed_config: goes on from a checkpoint of another configuration too.

    Raises:
      errors.UserError: a mistake in the configuration, the data set is missing, the workdir cannot be written or belongs to
        another run, the loss is no longer finite, or another process of the run has ended.
    """
    workdir = epath.Path(workdir)
    config_lib.check(config)
    check_batch_sizes(config)
    model = build_model(config)
    tx, learning_rate = build_optimizer(config)
    source = load_source(config, model)
    evaluator = evaluate.Evaluator(config, model, source)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(distributed.Stop())
        stack.enter_context(distributed.ended_together())
        stack.enter_context(_named_nans(config.debug.nans))
        checkpoints = None
        if distributed.is_first():
            stack.enter_context(checkpoint.claim(workdir))
            checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir))
        state, past = _begin(config, model, tx, checkpoints, allow_changed_config)
        start = int(state.step)
        kept = {"config": json.loads(config.to_json_best_effort()), "label_names": source.label_names}
        kept["parent"] = past["parent"] if past else _evaluate_parent(config, model, state.params)
        log = stack.enter_context(progress.Log(config, workdir if checkpoints else None, learning_rate, start, past))
        batches = stack.enter_context(contextlib.closing(input_batches(config, model, source, start)))
        state = evaluate.replicate(state)
        step_fn = jax.pmap(make_train_step(model, tx, config), axis_name=AXIS, donate_argnums=0)
        results, values, seconds = None, None, past.get("train_seconds", 0.0)
        for step in range(start, config.train.steps + 1):
            results, new = None, step > start
            if new:
                batch, waited = _next(batches, values)
                state, values = step_fn(state, batch)
                log.add(step, values, waited)
            evaluates = _evaluates_after(step, config) and (new or not past["evaluated"])
            if evaluates:
                log.flush()
            stopping = stop()
            try:
                if evaluates and not stopping:
                    results = evaluator(state.eval_params, stop)
                    stopping = results is None
                if results:
                    log.evaluated(step, evaluator.scalars(results))
            finally:  # what has been trained is saved, even where it cannot be evaluated
                if results or (new and (evaluates or stopping or step % config.train.save_every == 0)):
                    seconds = _save(checkpoints, step, state, log, kept, results)
            if stopping:
                _logger.info("stopped by %s after step %d; the same command goes on from there", stop.name, step)
                return
        results = results or evaluator(state.eval_params, stop)
        if results is None:
            _logger.info("stopped by %s before the report; the same command writes it", stop.name)
            return
        evaluator.report(workdir, state.eval_params, results, train_seconds=seconds, **kept["parent"])


@contextlib.contextmanager
def _named_nans(find: bool) -> Iterator[None]:
    """Looks for the operation that gives the first nan, if asked to; slow."""
    try:
        with jax.debug_nans(find):
            yield
    except FloatingPointError as error:
        raise errors.UserError(f"{errors.first_line(error)} (found by --config.debug.nans).") from error


def _evaluates_after(step: int, config: ConfigDict) -> bool:
    every = config.train.eval_every
    return step == config.train.steps or bool(step and every and step % every == 0)


def _begin(
    config: ConfigDict,
    model: vit.AViT,
    tx: optax.GradientTransformation,
    checkpoints: checkpoint.Checkpoints | None,
    allow_changed_config: bool,
) -> tuple[TrainState, dict[str, Any]]:
    """The state of the last checkpoint and what was saved beside it, on all processes; a new one and {} where there is none."""
    create, state = _creation(config, model, tx)
    past: dict[str, Any] = {}
    if checkpoints is not None and checkpoints.step() is not None:
        state, past = checkpoints.restore(state)
        progress.check_past(past)
        if not allow_changed_config:
            config_lib.check_same(config, past["config"])
        if int(state.step) > config.train.steps:
            raise errors.UserError(
                f"the checkpoint is of step {int(state.step)}, beyond config.train.steps, {config.train.steps}: raise it, "
                "or set another --workdir."
            )
        _logger.info("going on from the checkpoint of step %d", int(state.step))
    past = distributed.from_first_json(past)
    if past:
        return distributed.from_first(state), past
    if not config.init:
        return jax.jit(create)(), {}
    params = weight_files.load(config.init, model, new_head=config.init_new_head)
    state = jax.jit(create)()
    return state.replace(params=params, ema_params=None if state.ema_params is None else jax.tree.map(jnp.copy, params)), {}


def _creation(
    config: ConfigDict, model: vit.AViT, tx: optax.GradientTransformation
) -> tuple[Callable[[], TrainState], TrainState]:
    """What makes the state before the first step, and a state of its shapes."""
    create = functools.partial(create_state, model, tx, seed=config.seed, ema=config.optimizer.ema_decay > 0)
    return create, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(create))


def _evaluate_parent(config: ConfigDict, model: vit.AViT, params: Any) -> dict[str, float]:
    """Accuracy of the static network that a halting one starts from, which is what its own is to be measured against."""
    if not config.init or config.init_new_head or model.halting is None:
        return {}
    static = model.clone(halting=None, removal=None)
    params = {name: value for name, value in params.items() if name != "halting"}
    evaluator = evaluate.Evaluator(config, static)
    top1 = float(evaluator(evaluate.replicate(params))["top1"])
    _logger.info("the static network of %s, before training: top-1 %.2f%%", config.init, 100 * top1)
    return {"parent_top1": top1}


def _save(
    checkpoints: checkpoint.Checkpoints | None,
    step: int,
    state: TrainState,
    log: progress.Log,
    kept: dict[str, Any],
    results: evaluate.Results | None,
) -> float:
    """Saves all that the run is made of, once its losses are known to be finite; returns the seconds of training until then."""
    past = log.past() | kept | {"evaluated": results is not None}
    if checkpoints is not None:
        top1 = None if results is None else float(results["top1"])
        checkpoints.save(step, jax_utils.unreplicate(state), top1=top1, extra=past)
    return past["train_seconds"]


def restore_params(config: ConfigDict, model: vit.AViT, workdir: epath.PathLike) -> tuple[Any, dict[str, Any]]:
    """The parameters that are evaluated, of a checkpoint of `workdir` or `config.init`, and what was saved beside them.

    `config.eval.checkpoint` tells which.

    Raises:
      errors.UserError: no such checkpoint, or it does not fit the configuration.
    """
    if config.eval.checkpoint == "init":
        return weight_files.load(config.init, model, new_head=config.init_new_head), {"train_seconds": 0.0}
    _, state = _creation(config, model, build_optimizer(config)[0])
    past: dict[str, Any] = {}
    if distributed.is_first():
        with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
            state, past = checkpoints.restore(state, config.eval.checkpoint)
        progress.check_past(past)
    return distributed.from_first(state.eval_params), distributed.from_first_json(past)


def restore_and_evaluate(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Evaluates a checkpoint of `workdir` (`config.eval.checkpoint`), and reports there.

    Raises:
      errors.UserError: no such checkpoint, it does not fit the configuration, or the data set is missing.
    """
    workdir = epath.Path(workdir)
    config_lib.check(config)
    check_batch_sizes(config)
    model = build_model(config)
    evaluator = evaluate.Evaluator(config, model)
    with distributed.ended_together():
        params, past = restore_params(config, model, workdir)
        params = evaluate.replicate(params)
        results = evaluator(params)
        for name, value in evaluator.scalars(results).items():
            _logger.info("%s: %.6g", name, value)
        workdir.mkdir(parents=True, exist_ok=True)  # of a weight file there is none yet
        evaluator.report(workdir, params, results, train_seconds=past["train_seconds"], **past.get("parent", {}))
