"""The training state, one training step, and the `pmap` loop. All that knows about devices is here and in `evaluate`."""

import contextlib
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

from avit_jax import checkpoint, errors, evaluate, halting, losses, metrics, optimizer, removal, vit
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
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema_params = None
        if state.ema_params is not None:
            ema_params = optax.incremental_update(params, state.ema_params, 1.0 - ema_decay)
        state = TrainState(step=state.step + 1, params=params, ema_params=ema_params, opt_state=opt_state)
        skipped = jax.lax.psum(batch["skipped"].sum(), AXIS)
        return state, values | {"grad_norm": optax.tree.norm(grads), "skipped": skipped}

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
        if size < 1 or size % jax.device_count():
            raise errors.UserError(
                f"config.{name}.batch_size {size} must be a multiple of the number of devices, {jax.device_count()}."
            )


def train(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains to the last step, from the last checkpoint in `workdir` if there is one, and reports.

    Args:
      config: see `avit_jax/config.py`.
      workdir: gets `metrics.jsonl`, `tensorboard/`, `checkpoints/`, `summary.json` and `depth.png`.

    Raises:
      errors.UserError: a mistake in the configuration, the data set is missing, or the loss is no longer finite.
    """
    workdir = epath.Path(workdir)
    config_lib.check(config)
    check_batch_sizes(config)
    model = build_model(config)
    tx, learning_rate = build_optimizer(config)
    source = load_source(config, model)
    evaluator = evaluate.Evaluator(config, model, source)
    state = jax.jit(lambda: create_state(model, tx, seed=config.seed, ema=config.optimizer.ema_decay > 0))()
    workdir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(checkpoint.Checkpoints(workdir))
        seconds = 0.0
        if checkpoints.step() is not None:
            state, extra = checkpoints.restore(state)
            seconds = extra["train_seconds"]
            _logger.info("going on from the checkpoint of step %d", int(state.step))
        start = int(state.step)
        batches = stack.enter_context(contextlib.closing(input_batches(config, model, source, start)))
        state = evaluate.replicate(state)
        step_fn = jax.pmap(make_train_step(model, tx, config), axis_name=AXIS, donate_argnums=0)
        results = values = None
        with contextlib.closing(_Log(config, workdir, learning_rate, seconds)) as log:
            for step in range(start + 1, config.train.steps + 1):
                batch, waited = _next(batches, values)
                state, values = step_fn(state, batch)
                log.add(step, values, waited)
                last = step == config.train.steps
                if last or (config.train.eval_every and step % config.train.eval_every == 0):
                    log.flush()  # nothing is saved before all its losses are known to be finite
                    top1 = -1.0  # of an evaluation that fails: what has been trained is saved all the same
                    try:
                        results = evaluator(state.eval_params)
                        log.evaluated(step, evaluator.scalars(results))
                        top1 = float(results["top1"])
                    finally:
                        seconds = log.seconds
                        extra = {"train_seconds": seconds, "config": json.loads(config.to_json_best_effort())}
                        checkpoints.save(step, jax_utils.unreplicate(state), top1=top1, extra=extra)
    if results is None:
        results = evaluator(state.eval_params)
    evaluator.report(workdir, state.eval_params, results, train_seconds=seconds)


class _Log:
    """Progress on the console and in the metrics files; looks at values of the device at `log_every` only."""

    def __init__(self, config: ConfigDict, workdir: epath.Path, learning_rate: optax.Schedule, seconds: float) -> None:
        self._config, self._learning_rate = config, learning_rate
        self._writer = metrics.Writer(workdir)
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._waited, self._skipped, self._steps = 0.0, 0, 0
        self._seconds_before, self._started = seconds, time.monotonic()
        self._flushed = self._started

    @property
    def seconds(self) -> float:
        """Wall time of training so far, evaluation and compilation included, over all starts."""
        return self._seconds_before + time.monotonic() - self._started

    def add(self, step: int, values: dict[str, jax.Array], waited: float) -> None:
        """Takes the step's values, still on the device, and the seconds that the devices waited for its batch."""
        self._pending.append((step, values))
        self._waited += waited
        if step % self._config.train.log_every == 0:
            self.flush()

    def flush(self) -> None:
        """Writes the mean of what has come since the last time, and how many records could not be read.

        Raises errors.UserError at a non-finite loss or gradient, or where too many records could not be read.
        """
        if not self._pending:
            return
        steps, values = zip(*self._pending, strict=True)
        self._pending = []
        values = jax.device_get(values)
        for step, row in zip(steps, values, strict=True):
            for name in ("loss", "grad_norm"):
                if not np.isfinite(row[name][0]):
                    raise errors.UserError(
                        f"{name} became {row[name][0]} at step {step}, learning rate {self._learning_rate(step - 1):.2e}: "
                        "training has stopped and the last checkpoint stands; lower --config.optimizer.learning_rate or "
                        "set --config.optimizer.clip_norm=1."
                    )
        mean = {name: float(np.mean([row[name][0] for row in values])) for name in values[0]}
        mean["skipped"] = sum(int(row["skipped"][0]) for row in values)
        self._check_skipped(mean["skipped"], len(steps))
        step, total = steps[-1], self._config.train.steps
        now = time.monotonic()
        rate = len(steps) / (now - self._flushed)
        mean["data_wait"] = self._waited / (now - self._flushed)
        self._flushed, self._waited = now, 0.0
        mean["learning_rate"] = float(self._learning_rate(step - 1))
        mean["images_per_second"] = rate * self._config.train.batch_size
        self._writer.write(step, "train", mean)
        minutes, seconds = divmod(round((total - step) / rate), 60)
        _logger.info(
            "step %d/%d  loss %.4f  top-1 %.3f  %.0f images/s  ETA %d:%02d",
            *(step, total, mean["loss"], mean["top1"], mean["images_per_second"], minutes, seconds),
        )

    def _check_skipped(self, skipped: int, steps: int) -> None:
        self._skipped += skipped
        self._steps += steps
        share = self._skipped / (self._skipped + self._steps * self._config.train.batch_size)
        if share > self._config.data.max_bad_share:
            raise errors.UserError(
                f"{self._skipped} records, {share:.1%} of all, could not be read: training has stopped and the last checkpoint "
                "stands; mend the data set or raise --config.data.max_bad_share."
            )

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        """Writes the result of an evaluation, whose time does not count as training in images/s."""
        self._flushed, self._waited = time.monotonic(), 0.0
        self._writer.write(step, "eval", values)
        _logger.info(
            "step %d  evaluation of %d images: top-1 %.2f%%  MACs ratio %.3f  depth of patch tokens %.2f, of class token %.2f",
            *(step, values["images"], 100 * values["top1"], values["macs_ratio"], values["depth_patch"], values["depth_class"]),
        )

    def close(self) -> None:
        """Closes the metrics files."""
        self._writer.close()


def restore_and_evaluate(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Evaluates a checkpoint of `workdir` (`config.eval.checkpoint`), and reports there.

    Raises:
      errors.UserError: no such checkpoint, it does not fit the configuration, or the data set is missing.
    """
    workdir = epath.Path(workdir)
    config_lib.check(config)
    check_batch_sizes(config)
    model = build_model(config)
    tx, _ = build_optimizer(config)
    evaluator = evaluate.Evaluator(config, model)
    abstract = jax.eval_shape(lambda: create_state(model, tx, seed=config.seed, ema=config.optimizer.ema_decay > 0))
    with checkpoint.Checkpoints(workdir) as checkpoints:
        state, extra = checkpoints.restore(abstract, config.eval.checkpoint)
    params = evaluate.replicate(state.eval_params)
    results = evaluator(params)
    for name, value in evaluator.scalars(results).items():
        _logger.info("%s: %.6g", name, value)
    evaluator.report(workdir, params, results, train_seconds=extra["train_seconds"])
