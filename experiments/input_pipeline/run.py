"""Images/s of the input pipeline alone, of the training step alone, and of both together.

python -m experiments.input_pipeline.run --config=configs/deit_tiny.py --config.data.dir=... \
  --config.train.batch_size=32

Protocol. Rows are measured in turn, once a round, and ratios are taken within a round. The pipeline
is the recipe's: records of the data set, host transforms, batches on the devices, with the
configuration's threads and workers; a row first takes a few batches, so that it starts with empty
buffers, and stops its threads or workers before the next row starts. It stands beside the same
Pillow transforms, plainly written, in as many bare threads on encoded pictures in memory, and,
where torch and timm are installed, beside timm's transforms in a PyTorch DataLoader with two
workers. "step alone" trains on one batch that lies on the devices already, "step and pipeline" on
those of the pipeline; `--nostep` leaves both out.
"""

import concurrent.futures
import io
import itertools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict, config_flags
from PIL import Image

from avit_jax.data import randaugment, sources
from avit_jax.training import build, devices, parts, train_step
from avit_jax.utils import errors
from experiments import results, timing

_CONFIG = config_flags.DEFINE_config_file("config", None, "recipe", lock_config=True)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "interleaved repeats")
_IMAGES = flags.DEFINE_integer("images", 512, "images of the pipeline a round")
_STEPS = flags.DEFINE_integer("steps", 4, "training steps a round")
_STEP = flags.DEFINE_bool("step", True, "measures the training step too")
_OUT = flags.DEFINE_string("out", None, "JSON file to write")

_FILL = 8  # batches taken before the clock starts


def take(batches: Iterator[Any], count: int) -> float:
    """Seconds for `count` batches, once the buffers are empty."""
    for batch in itertools.islice(batches, _FILL):
        jax.block_until_ready(batch)
    started = time.perf_counter()
    for batch in itertools.islice(batches, count):
        jax.block_until_ready(batch)
    return time.perf_counter() - started


def plain(encoded: bytes, rng: np.random.Generator, config: ConfigDict) -> np.ndarray:
    """The recipe's transforms without any of the loader's care."""
    picture = Image.open(io.BytesIO(encoded)).convert("RGB")
    area = picture.width * picture.height * rng.uniform(*config.augment.crop_scale)
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    width, height = (
        min(round((area * ratio) ** 0.5), picture.width),
        min(round((area / ratio) ** 0.5), picture.height),
    )
    left, top = rng.integers(picture.width - width + 1), rng.integers(picture.height - height + 1)
    size = config.model.image_size[::-1]
    picture = picture.crop((left, top, left + width, top + height)).resize(
        size, Image.Resampling.BICUBIC
    )
    if rng.random() < config.augment.flip:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.augment.magnitude:
        picture = randaugment.rand_augment(
            picture, rng, magnitude=config.augment.magnitude, deviation=config.augment.deviation
        )
    return np.asarray(picture)


def bare_threads(encoded: list[bytes], config: ConfigDict) -> float:
    """Seconds of the plain transforms in as many bare threads as the configuration names."""
    threads = config.data.num_threads
    out = np.empty((len(encoded), *config.model.image_size, 3), np.uint8)

    def work(first: int) -> None:
        rng = np.random.default_rng(first)
        for i in range(first, len(encoded), threads):
            out[i] = plain(encoded[i], rng, config)

    started = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    return time.perf_counter() - started


def torch_rows(
    records: list[sources.Record], config: ConfigDict, count: int
) -> dict[str, Callable[[], float]]:
    """timm's transforms in a PyTorch DataLoader with two worker processes; none where they are not
    installed.
    """
    try:
        import timm.data
        import torch.utils.data
    except ImportError:
        print("torch and timm are not installed: no comparison with them")
        return {}
    magnitude = config.augment.magnitude
    transform = timm.data.create_transform(
        config.model.image_size[0],
        is_training=True,
        # At most 9: at 10 timm's posterize asks Pillow 13 for what it refuses.
        auto_augment=f"rand-m{magnitude:g}-mmax9-mstd{config.augment.deviation}-inc1"
        if magnitude
        else None,
        interpolation="bicubic",
        color_jitter=None,
        use_prefetcher=True,  # uint8 arrays, as ours
    )

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return (count + _FILL) * config.train.batch_size

        def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
            record = records[i % len(records)]
            return transform(Image.open(io.BytesIO(record["image"])).convert("RGB")), int(
                record["label"]
            )

    return {
        "timm, two workers": lambda: take(
            iter(torch.utils.data.DataLoader(Pictures(), config.train.batch_size, num_workers=2)),
            count,
        )
    }


def step_rows(
    config: ConfigDict, batches: Callable[[], Iterator[Any]]
) -> dict[str, Callable[[], float]]:
    """The training step alone, and fed by the pipeline; compiled beforehand."""
    model, (tx, _) = build.model(config), build.optimizer(config)
    step = train_step.make_train_step(model, tx, build.step_options(config))
    step_fn = devices.parallel(step, donate=True)
    state = devices.replicate(
        jax.jit(lambda: build.new_state(model, tx, seed=0, ema=config.optimizer.ema_decay > 0))()
    )
    first = next(batches())

    def run(fed: Iterator[Any]) -> float:
        nonlocal state
        state, values = step_fn(state, next(fed))
        jax.block_until_ready(values)
        started = time.perf_counter()
        for batch in itertools.islice(fed, _STEPS.value):
            state, values = step_fn(state, batch)
        jax.block_until_ready(values)
        return time.perf_counter() - started

    return {
        "step alone": lambda: run(itertools.repeat(first)),
        "step and pipeline": lambda: run(batches()),
    }


def main(_: list[str]) -> None:
    """Measures all rows, prints and writes."""
    config = _CONFIG.value
    model = build.model(config)
    source = build.source(config, model, config.data.train_split)
    batches = lambda: parts.train_batches(config, model, source)  # noqa: E731
    count = max(1, _IMAGES.value // config.train.batch_size)
    images = count * config.train.batch_size
    records = [source.records[i % len(source.records)] for i in range(images)]
    rows = {
        "pipeline": (lambda: take(batches(), count), images),
        "bare threads": (
            lambda: bare_threads([record["image"] for record in records], config),
            images,
        ),
    }
    rows |= {name: (row, images) for name, row in torch_rows(records, config, count).items()}
    if _STEP.value:
        trained = _STEPS.value * config.train.batch_size
        rows |= {name: (row, trained) for name, row in step_rows(config, batches).items()}
    taken: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(_ROUNDS.value + 1):
        for name, (row, _) in rows.items():
            seconds = row()
            time.sleep(0.5)  # threads that were stopped end their work
            if number:
                taken[name].append(seconds)
    result = {
        **timing.environment(),
        "data": source.name,
        "images_a_round": images,
        "batch": config.train.batch_size,
        "threads": config.data.num_threads,
        "workers": config.data.num_workers,
        "images_per_second": {
            name: count / float(np.median(taken[name])) for name, (_, count) in rows.items()
        },
        "pipeline_over": {
            name: timing.median_ratio(seconds, taken["pipeline"])
            for name, seconds in taken.items()
            if name in ("bare threads", "timm, two workers")
        },
    }
    if _STEP.value:
        result["fed_step_over_step_alone"] = timing.median_ratio(
            taken["step alone"], taken["step and pipeline"]
        )
    print(json.dumps(result, indent=2))
    if _OUT.value:
        results.save(_OUT.value, result)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(errors.exit_on_user_error(main))
