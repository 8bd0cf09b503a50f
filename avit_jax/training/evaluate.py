"""Evaluation: every image exactly once, whatever the batch and the number of devices; the summary
and the picture of a run.
"""

import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import jax_utils
from ml_collections import ConfigDict

from avit_jax.data import augment, loader, sources, transforms
from avit_jax.inference import adaptive
from avit_jax.models import flops, vit
from avit_jax.training import distributed, metrics
from avit_jax.utils import errors, files, visualize

AXIS = "devices"
_logger = logging.getLogger(__name__)
Results = dict[str, np.ndarray]


def replicate(tree: Any, devices: list[jax.Device] | None = None) -> Any:
    """A copy of the tree on each local device, or on the given ones, along a new first axis.

    Placed exactly as `pmap` over `AXIS` places its outputs; `flax.jax_utils.replicate` does not,
    and a step that is fed its own output would compile twice.
    """
    devices = devices or jax.local_devices()
    sharding = jax.sharding.NamedSharding(
        jax.sharding.Mesh(devices, (AXIS,)), jax.sharding.PartitionSpec(AXIS)
    )
    return jax.device_put(
        jax.tree.map(lambda x: np.broadcast_to(x, (len(devices), *x.shape)), jax.device_get(tree)),
        sharding,
    )


class Evaluator:
    """Evaluates parameters of one model on one data set; compiles once.

    Args:
      config: of the run.
      model: of the run.
      training: the data it is trained on, where it is.

    Raises:
      errors.UserError: the data set is not there, or does not fit the model, or the training data.
    """

    def __init__(
        self, config: ConfigDict, model: vit.AViT, training: sources.Source | None = None
    ) -> None:
        model = model.clone(removal=None)  # which is for training
        self._config, self._model = config, model
        self.source = sources.load(
            config.data.name,
            split=config.data.eval_split,
            data_dir=config.data.dir,
            image_size=model.pixels,
        )
        if training is not None:
            sources.check_same_classes(training, self.source)
        sources.check_fit(self.source, num_classes=model.num_classes, channels=model.channels)
        distributed.check_same(self.source.fingerprint(), self.source.name)
        images, macs_ratio = config.eval.batch_size // jax.device_count(), config.budget or 1.0
        remove = adaptive.make_apply(model, images=images, macs_ratio=macs_ratio)
        self._apply = remove if config.eval.adaptive else model.apply
        transform = transforms.Evaluate(image_size=model.pixels, crop_ratio=config.data.crop_ratio)
        self.reader = loader.Reader(
            source=self.source, transform=transform, skip_bad=config.data.bad_records == "skip"
        )
        step = make_eval_step(model, self._apply, mean=config.data.mean, std=config.data.std)
        self._step = jax.pmap(step, axis_name=AXIS)

    def __call__(self, params: Any, stop: Callable[[], bool] = lambda: False) -> Results | None:
        """Evaluates `params`, replicated over local devices.

        Returns the means of `metrics.eval_sums`, or None where `stop`, which is asked before each
        batch, has ended it.
        """
        config = self._config
        batches = loader.eval_batches(
            self.reader, batch_size=config.eval.batch_size, num_threads=config.data.num_threads
        )
        sums = []  # nothing is read back before the last batch
        for batch in batches:
            if stop():
                return None
            sums.append(self._step(params, batch))
        results = metrics.means([jax_utils.unreplicate(batch) for batch in jax.device_get(sums)])
        left_out = len(self.source.records) - int(results["images"])
        if left_out:
            _logger.warning(
                "%d of %d images could not be read and are left out",
                left_out,
                len(self.source.records),
            )
        if left_out > config.data.max_bad_share * len(self.source.records):
            raise errors.UserError(
                f"{left_out} of the {len(self.source.records)} images of {self.source.name} could "
                "not be read: "
                "mend the data set or raise --config.data.max_bad_share."
            )
        return results

    def scalars(self, results: Results) -> dict[str, float]:
        """The results that are single numbers, with `macs_ratio`, the share of the static network's
        MACs.
        """
        values = {name: float(value) for name, value in results.items() if value.ndim == 0}
        return values | {"macs_ratio": values["macs"] / flops.static_macs(self._model)}

    def measure(self, params: Any) -> dict[str, float]:
        """The `scalars` of parameters that are not replicated."""
        return self.scalars(self(replicate(params)))

    def report(
        self, summary: epath.Path, picture: epath.Path, params: Any, results: Results, **more: float
    ) -> None:
        """Writes a summary (JSON), with `more` in it, and a picture of depths, on the first
        process; `params` as in a call.
        """
        if not distributed.is_first():
            return
        values = self.scalars(results)
        told = {
            "top1": values["top1"],
            "macs_per_image": values["macs"],
            "macs_ratio": values["macs_ratio"],
            "mean_depth": values["depth_patch"],
            "images": int(values["images"]),
        } | more
        files.write(summary, json.dumps(told, indent=2) + "\n")
        count = min(self._config.eval.pictures, len(self.source.records))
        images, labels, logits, depth = self._predict(jax_utils.unreplicate(params), count)
        figure = visualize.depth_figure(
            images,
            depth,
            num_layers=self._model.depth,
            titles=[
                _title(label, guess, self.source.label_names)
                for label, guess in zip(labels, logits.argmax(-1), strict=True)
            ],
            patch_depth=results["patch_depth"],
            score=results["score"],
            caption=f"top-1 {values['top1']:.1%} at {values['macs_ratio']:.2f} of the static "
            "network's MACs, "
            f"mean depth of patch tokens {values['depth_patch']:.2f} of {self._model.depth} layers",
        )
        visualize.write(figure, picture)
        _logger.info("wrote %s and %s", summary, picture)

    def _predict(
        self, params: Any, count: int
    ) -> tuple[np.ndarray, list[int], np.ndarray, np.ndarray]:
        """Pixels, labels, logits and depth maps `(count, rows, columns)` of the first images."""
        records = [self.reader(i) for i in range(count)]
        images = np.stack([record["image"] for record in records])
        normal = augment.normalize(images, self._config.data.mean, self._config.data.std)
        logits, aux = jax.device_get(jax.jit(self._apply)({"params": params}, normal))
        depth = np.asarray(flops.patch_depth(self._model, aux.active))
        return images, [int(record["label"]) for record in records], logits, depth


def make_eval_step(
    model: vit.AViT, apply: Callable[..., Any], *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Callable[[Any, loader.Batch], metrics.Sums]:
    """The evaluation step as a function of one device's share of the batch, to run under `pmap`
    over `AXIS`.

    Args:
      model: for its sizes.
      apply: variables and normalised images to logits and aux: `model.apply`, or `adaptive.apply`
        of the model.
      mean: of the pixels, by channel.
      std: likewise.
    """

    def eval_step(params: Any, batch: loader.Batch) -> metrics.Sums:
        logits, aux = apply({"params": params}, augment.normalize(batch["image"], mean, std))
        return jax.lax.psum(
            metrics.eval_sums(model, logits, aux, batch["label"], batch["weight"]), AXIS
        )

    return eval_step


def _title(label: int, guess: int, names: list[str]) -> str:
    return names[label] if label == guess else f"{names[label]},\ntaken for {names[guess]}"
