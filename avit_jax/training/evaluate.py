"""Evaluates each image exactly once, for every batch size and number of devices."""

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from avit_jax.data import augment, class_names, loader, sources, transforms
from avit_jax.inference import adaptive
from avit_jax.models import flops, vit
from avit_jax.training import announce, build, devices, distributed, metrics, restore
from avit_jax.utils import errors, files, visualize

_logger = logging.getLogger(__name__)
Results = dict[str, np.ndarray]


class Evaluator:
    """Evaluates parameters of one model on one data set; compiles its program once.

    Args:
      config: of the run.
      model: of the run.
      training: the training split, if the run trains.

    Attributes:
      source: the evaluation split.
      reader: reads and transforms its records.

    Raises:
      errors.UserError: the data set is missing, or does not fit the model or the training split.
    """

    def __init__(
        self, config: ConfigDict, model: vit.AViT, training: sources.Source | None = None
    ) -> None:
        model = model.clone(removal=None)  # its plan is for training
        data, self._model = config.data, model
        self.source = build.source(config, model, data.eval_split)
        if training is not None:
            sources.check_same_classes(training, self.source)
        transform = transforms.Evaluate(
            image_size=model.pixels, crop_ratio=data.crop_ratio, channels=model.channels
        )
        self.reader = loader.Reader(
            source=self.source,
            transform=transform,
            value_range=tuple(data.range),
            skip_bad=data.bad_records == "skip",
        )
        self._batching = {"batch_size": config.eval.batch_size, "num_threads": data.num_threads}
        self._max_bad_share, self._num_pictures = data.max_bad_share, config.eval.pictures
        self._normalization = {"mean": tuple(data.mean), "std": tuple(data.std)}
        images, macs_ratio = config.eval.batch_size // jax.device_count(), config.budget or 1.0
        remove = adaptive.make_apply(model, images=images, macs_ratio=macs_ratio)
        self._apply = remove if config.eval.adaptive else model.apply
        step = devices.parallel(make_eval_step(model, self._apply, **self._normalization))
        self._step = announce.first_call(step, "the evaluation")

    def __call__(self, params: Any, stop: Callable[[], bool] = lambda: False) -> Results | None:
        """Evaluates parameters.

        Args:
          params: as `devices.replicate` returns them.
          stop: whether to stop now; asked before each batch.

        Returns:
          The means of `metrics.eval_sums`, with `metrics.average_precision` if images have any
          number of labels; or None if `stop` ended the evaluation.

        Raises:
          errors.UserError: too many images cannot be read, or no image has a label.
        """
        sums, ranked = [], []  # stay on the devices until the last batch
        for batch in devices.prefetch(loader.eval_batches(self.reader, **self._batching)):
            if stop():
                return None
            of_batch, logits = self._step(params, batch)
            sums.append(of_batch)
            ranked.append(devices.first(logits))  # one copy: they are large
        results = metrics.means(devices.first(jax.device_get(sums)))
        if self.source.multi_label:
            logits, labels, weight = map(np.concatenate, zip(*jax.device_get(ranked), strict=True))
            results |= metrics.average_precision(logits[weight > 0], labels[weight > 0])
        total = len(self.source.records)
        unread = total - int(results["images"])
        if unread:
            _logger.warning("%d of %d images could not be read and are left out", unread, total)
        if unread > self._max_bad_share * total:
            raise errors.UserError(
                f"{unread} of the {total} images of {self.source.name} could not be read: fix the "
                "data set or raise --config.data.max_bad_share."
            )
        return results

    def scalars(self, results: Results) -> dict[str, float]:
        """Returns the results that are single numbers, with `macs_ratio`."""
        values = {name: float(value) for name, value in results.items() if value.ndim == 0}
        return values | {"macs_ratio": values["macs"] / flops.static_macs(self._model)}

    def measure(self, params: Any) -> dict[str, float]:
        """Returns the `scalars` of one copy of the parameters."""
        return self.scalars(self(devices.replicate(params)))

    def report(
        self, summary: epath.Path, figure: epath.Path, params: Any, results: Results, **more: float
    ) -> None:
        """Writes the report of a run, on the first process.

        Args:
          summary: JSON file to write.
          figure: PNG file to write, with the token depths of some images.
          params: as in a call.
          results: of the call.
          **more: values to add to the summary.
        """
        if not distributed.is_first():
            return
        values = self.scalars(results)
        measured = "mean_average_precision" if self.source.multi_label else "top1"
        content = {
            measured: values[measured],
            "macs_per_image": values["macs"],
            "macs_ratio": values["macs_ratio"],
            "mean_depth": values["depth_patch"],
            "images": int(values["images"]),
            **by_class(results, self.source.label_names),
        }
        files.write(summary, json.dumps(content | more, indent=2) + "\n")
        visualize.write(self._figure(devices.first(params), results, values), figure)
        _logger.info("wrote %s and %s", summary, figure)

    def _figure(self, params: Any, results: Results, values: dict[str, float]) -> Any:
        """Draws the token depths of the first images, and the means over all of them."""
        count = min(self._num_pictures, len(self.source.records))
        records = [self.reader(i) for i in range(count)]
        images = np.stack([record["image"] for record in records])
        normal = augment.normalize(images, **self._normalization)
        with announce.compiling("the figure's program"):
            logits, aux = jax.device_get(jax.jit(self._apply)({"params": params}, normal))
        guesses = logits > 0 if self.source.multi_label else logits.argmax(-1)
        names, (measured, quality) = self.source.label_names, metrics.quality(values)
        return visualize.depth_figure(
            images,
            np.asarray(flops.patch_depth(self._model, aux.active)),
            num_layers=self._model.depth,
            titles=[
                _title(record["label"], guess, names)
                for record, guess in zip(records, guesses, strict=True)
            ],
            patch_depth=results["patch_depth"],
            score=results["score"],
            caption=f"{measured} {quality:.1%} at {values['macs_ratio']:.2f} of the static "
            f"network's MACs, mean depth of patch tokens {values['depth_patch']:.2f} of "
            f"{self._model.depth} layers",
        )


def by_class(results: Results, names: Sequence[str]) -> dict[str, dict[str, float | None]]:
    """Returns `class_top1` or `class_average_precision`: a value for the name of each class.

    A class without images has None.
    """
    if "class_average_precision" in results:
        each = results["class_average_precision"]
        parts = zip(names, each, strict=True)
        precision = {name: None if np.isnan(x) else float(x) for name, x in parts}
        return {"class_average_precision": precision}
    parts = zip(names, results["class_top1"], results["class_images"], strict=True)
    accuracy = {name: float(right / images) if images else None for name, right, images in parts}
    return {"class_top1": accuracy}


def make_eval_step(
    model: vit.AViT, apply: Callable[..., Any], *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Any, loader.Batch], tuple[metrics.Sums, tuple[jax.Array, ...]]]:
    """Returns the evaluation step of one device, for `devices.parallel`.

    The step returns the sums over all devices. If images have any number of labels, it also returns
    logits, labels and weights of the images of all devices; otherwise an empty tuple.

    Args:
      model: for its sizes.
      apply: maps variables and normalized images to logits and aux: `model.apply`, or
        `adaptive.apply` of the model.
      mean: mean of the pixels scaled to [0, 1], one number per channel or one for all.
      std: standard deviation of the same pixels, in the same form.
    """

    def eval_step(params: Any, batch: loader.Batch) -> tuple[metrics.Sums, tuple[jax.Array, ...]]:
        logits, aux = apply({"params": params}, augment.normalize(batch["image"], mean, std))
        labels, weight = batch["label"], batch["weight"]
        sums = devices.total(metrics.eval_sums(model, logits, aux, labels, weight))
        ranked = (logits, labels, weight) if labels.ndim == 2 else ()
        return sums, devices.gather(ranked)

    return eval_step


def _title(label: np.ndarray, guess: np.ndarray, names: list[str]) -> str:
    """Returns the title of an image.

    Label and prediction are each the number of a class, or `(C,)` with 1 for each of several.
    """
    texts = []
    for found in (label, guess):
        numbers = np.flatnonzero(found) if np.ndim(found) else [found]
        texts.append(", ".join(class_names.words(names[i]) for i in numbers) or "no label")
    return texts[0] if texts[0] == texts[1] else f"{texts[0]},\npredicted {texts[1]}"


def top1(
    config: ConfigDict, model: vit.AViT, params: Any, name: str, stop: Callable[[], bool]
) -> float | None:
    """Measures the top-1 accuracy of a network, and logs it under a name.

    Returns:
      A fraction in [0, 1]; None if `stop` ended the evaluation.
    """
    results = Evaluator(config, model)(devices.replicate(params), stop)
    if results is None:
        return None
    _logger.info("%s: top-1 %.2f%%", name, 100 * results["top1"])
    return float(results["top1"])


def evaluate_checkpoint(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Evaluates a checkpoint of `workdir`, and writes `eval.json` and `eval.png` there.

    Args:
      config: of the run; `config.eval.checkpoint` says which checkpoint.
      workdir: of the run.

    Raises:
      errors.UserError: there is no such checkpoint, it does not fit the configuration, or the data
        set is missing.
    """
    workdir = epath.Path(workdir).expanduser()
    build.check(config, "eval")
    model = build.model(config)
    evaluator = Evaluator(config, model)
    params, metadata = restore.params(config, model, workdir)
    names, known = evaluator.source.label_names, restore.class_names(config, metadata)
    mismatch = restore.changed_class(known, names) if known else ""
    if mismatch:
        _logger.warning(
            "%s: the accuracy is meaningless unless both name the same classes", mismatch
        )
    params = devices.replicate(params)
    results = evaluator(params)
    _logger.info("%s", metrics.in_words(evaluator.scalars(results)))
    seconds, baselines = (metadata.log.train_seconds, metadata.parent) if metadata else (0.0, {})
    paths = (workdir / "eval.json", workdir / "eval.png")  # keeps the report of the run
    evaluator.report(*paths, params, results, train_seconds=seconds, **baselines)
