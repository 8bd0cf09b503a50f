"""Content, order and placement of batches."""

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import fixtures
import jax
import numpy as np
import pytest
import test_image_files
from PIL import Image

from avit_jax.data import loader, sources, transforms
from avit_jax.utils import errors


def _numbered(count: int, torn: Callable[[int], bool] = lambda i: False) -> sources.Source:
    """Returns images whose label is their number; some cannot be decoded."""
    records = [
        {"image": b"torn" if torn(i) else np.full((2, 3, 1), i % 256, np.uint8), "label": i}
        for i in range(count)
    ]
    return sources.Source("numbers", records, [str(i) for i in range(count)])


def _as_it_is(image: np.ndarray, *_: np.random.Generator) -> np.ndarray:
    return image


def _with_draw(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Replaces all pixels but the first by random ones."""
    drawn = rng.integers(256, size=image.shape, dtype=np.uint8)
    drawn[0, 0] = image[0, 0]
    return drawn


def _take(count: int, images: int = 20, batch_size: int = 8, **settings: int) -> list[loader.Batch]:
    reader = loader.Reader(source=_numbered(images), transform=_with_draw)
    settings = {"seed": 0, "start_step": 0, "num_threads": 1} | settings
    batches = loader.train_batches(reader, batch_size=batch_size, **settings)
    return [jax.device_get(next(batches)) for _ in range(count)]


def _flat(batches: list[loader.Batch], key: str = "label") -> list:
    return np.concatenate([batch[key].reshape(-1) for batch in batches]).tolist()


def _draws(batches: list[loader.Batch]) -> list[bytes]:
    return [image.tobytes()[1:] for batch in batches for image in batch["image"].reshape(-1, 6)]


def test_each_epoch_is_a_new_permutation() -> None:
    labels = np.reshape(_flat(_take(10)), (4, 20))  # 2 1/2 batches an epoch
    np.testing.assert_array_equal(np.sort(labels, axis=1), np.tile(np.arange(20), (4, 1)))
    assert len({tuple(epoch) for epoch in labels}) == 4
    assert _flat(_take(3, seed=1)) != _flat(_take(3))


def test_batches_say_where_each_image_lies() -> None:
    (batch,) = _take(1, images=40, batch_size=16)
    assert {key: x.shape for key, x in batch.items()} == {
        "image": (16, 2, 3, 1), "label": (16,), "skipped": (16,), "index": (16,),
    }  # fmt: skip
    np.testing.assert_array_equal(batch["index"], np.arange(16))
    np.testing.assert_array_equal(batch["image"][..., 0, 0, 0], batch["label"])
    assert (batch["image"].dtype, batch["label"].dtype, batch["index"].dtype) == (
        np.uint8,
        np.int32,
        np.int32,
    )


@pytest.mark.parametrize("start_step", [1, 3, 7])
def test_start_step_goes_on_with_the_same_batches(start_step: int) -> None:
    resumed, whole = _take(9 - start_step, start_step=start_step), _take(9)
    for a, b in zip(resumed, whole[start_step:], strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_number_of_threads_does_not_matter() -> None:
    for a, b in zip(_take(6), _take(6, num_threads=4), strict=True):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_transform_draws_anew_for_each_image_and_epoch() -> None:
    assert len(set(_draws(_take(10)))) == 80
    assert not set(_draws(_take(10))) & set(_draws(_take(10, seed=1)))


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("batch_size", [56, 360, 512])
def test_evaluation_sees_each_image_once_in_order(batch_size: int, num_threads: int) -> None:
    batches = list(
        loader.eval_batches(
            loader.Reader(source=_numbered(360), transform=_as_it_is),
            batch_size=batch_size,
            num_threads=num_threads,
        )
    )
    assert len(batches) == -(-360 // batch_size)
    assert all(batch["image"].shape == (batch_size, 2, 3, 1) for batch in batches)
    labels, weight = np.array(_flat(batches)), np.array(_flat(batches, "weight"))
    assert batches[0]["weight"].dtype == np.float32
    np.testing.assert_array_equal(weight, np.arange(len(weight)) < 360)
    np.testing.assert_array_equal(labels[weight == 1], np.arange(360))


def test_repeated_augmentation() -> None:
    batches = _take(15, images=20, repeats=3)  # 6 epochs of 20
    epochs = np.reshape(_flat(batches), (6, 20))
    for epoch in epochs:
        triples = epoch[:18].reshape(6, 3)
        assert (triples == triples[:, :1]).all()  # three times in a row
        assert epoch[18] == epoch[19]  # cut to the length of the data set
        assert len(set(epoch)) == 7
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert len(set(_draws(batches))) == 120  # each copy is transformed by itself
    assert _flat(_take(5, images=20, repeats=3, start_step=10)) == _flat(batches[10:])


@pytest.mark.parametrize("repeats", [1, 3])
def test_two_processes_see_together_what_one_sees(
    monkeypatch: pytest.MonkeyPatch, repeats: int
) -> None:
    whole = _take(4, batch_size=16, repeats=repeats)
    for rank in (0, 1):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda rank=rank: rank)
        for part, batch in zip(_take(4, batch_size=16, repeats=repeats), whole, strict=True):
            assert list(part["index"]) == list(range(8 * rank, 8 * rank + 8))
            jax.tree.map(
                np.testing.assert_array_equal,
                part,
                {key: x[part["index"]] for key, x in batch.items()},
            )


def test_two_processes_share_the_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for rank in (0, 1):
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda rank=rank: rank)
        reader = loader.Reader(source=_numbered(45), transform=_as_it_is)
        batches = list(loader.eval_batches(reader, batch_size=32, num_threads=2))
        assert [batch["label"].shape for batch in batches] == [(16,)] * 2
        seen += [
            label
            for label, weight in zip(_flat(batches), _flat(batches, "weight"), strict=True)
            if weight
        ]
    assert sorted(seen) == list(range(45))


# Records that cannot be read
# --------------------------------------------------------------------------------------------


def _torn(i: int) -> bool:
    return i % 5 == 3


def test_a_bad_record_is_named_and_stops() -> None:
    reader = loader.Reader(source=_numbered(10, _torn), transform=_as_it_is)
    assert reader(2)["label"] == 2
    with pytest.raises(
        errors.UserError, match=r"cannot read record 3 of numbers: no JPEG.*; .*bad_records=skip"
    ):
        reader(3)
    with pytest.raises(errors.UserError, match=r"cannot read record \d of numbers"):
        next(loader.train_batches(reader, batch_size=16, seed=0, start_step=0, num_threads=2))


def test_bad_records_are_skipped_counted_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    reader = loader.Reader(source=_numbered(20, _torn), transform=_as_it_is, skip_bad=True)
    batches = loader.train_batches(reader, batch_size=16, seed=0, start_step=0, num_threads=2)
    taken = [jax.device_get(next(batches)) for _ in range(5)]  # four epochs
    labels, skipped = np.array(_flat(taken)), np.array(_flat(taken, "skipped"))
    assert not (labels % 5 == 3).any()
    np.testing.assert_array_equal(labels[skipped == 1] % 5, 4)  # the next one took its place
    assert skipped.sum() == 16 and skipped.max() == 1
    assert "skipped record 13 of numbers: no JPEG" in caplog.text


def test_evaluation_leaves_bad_records_out() -> None:
    reader = loader.Reader(source=_numbered(20, _torn), transform=_as_it_is, skip_bad=True)
    batches = list(loader.eval_batches(reader, batch_size=16, num_threads=1))
    labels, weight = np.array(_flat(batches)), np.array(_flat(batches, "weight"))
    assert labels[weight == 1].tolist() == [i for i in range(20) if i % 5 != 3]


def test_a_split_without_labels_is_refused() -> None:
    source = dataclasses.replace(
        _numbered(4), records=[{"image": np.zeros((2, 2, 3), np.uint8), "label": -1}]
    )
    with pytest.raises(
        errors.UserError, match="record 0 of numbers has the label -1, which is no class"
    ):
        loader.Reader(source=source, transform=_as_it_is, skip_bad=True)(0)


def test_a_source_of_nothing_but_bad_records() -> None:
    source = _numbered(4, lambda i: True)
    with pytest.raises(errors.UserError, match="no record of numbers can be read"):
        loader.Reader(source=source, transform=_as_it_is, skip_bad=True)(0)


def test_a_file_that_vanishes_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "train/cat").mkdir(parents=True)
    path = tmp_path / "train/cat/a.png"
    path.write_bytes(fixtures.png(np.zeros((4, 4, 3), np.uint8)))
    source = sources.load("folder", split="train", data_dir=str(tmp_path), image_size=(8, 8))
    reader = loader.Reader(
        source=source, transform=transforms.Evaluate(image_size=(4, 4), crop_ratio=1.0)
    )
    assert reader(0)["image"].shape == (4, 4, 3)
    path.write_bytes(b"torn")
    with pytest.raises(errors.UserError, match=rf"cannot read {path}: no JPEG"):
        reader(0)
    path.unlink()
    with pytest.raises(errors.UserError, match=rf"{path}"):
        reader(0)


def test_two_hundred_malformed_pictures(tmp_path: pathlib.Path) -> None:
    (tmp_path / "train/any").mkdir(parents=True)
    good = [i % 11 == 4 for i in range(220)]  # 20 good ones, spread out
    bad = iter(test_image_files.malformed())
    for i, is_good in enumerate(good):
        noise = np.random.default_rng(i).integers(0, 256, (1 + i % 30, 40, 3), dtype=np.uint8)
        path = (
            tmp_path / f"train/any/{i:03}.{('jpg', 'png', 'webp')[i % 3]}"
        )  # a PNG whatever its ending says
        path.write_bytes(fixtures.png(noise) if is_good else next(bad))
    assert next(bad, None) is None
    source = sources.load("folder", split="train", data_dir=str(tmp_path), image_size=(16, 16))
    transform = transforms.Train(image_size=(16, 16), magnitude=9.0)
    reader = loader.Reader(source=source, transform=transform)
    for i, is_good in enumerate(good):
        if is_good:
            assert isinstance(reader.decode(i)["image"], Image.Image)
        else:
            with pytest.raises(
                errors.UserError, match=rf"^cannot read .*/{i:03}\.[a-z]+: .+; fix or remove it"
            ):
                reader.decode(i)
    # In one epoch every record is asked for once, and each bad one leads on to the next good one.
    to_the_next = [next(k for k in range(220) if good[(i + k) % 220]) for i in range(220)]
    reader = loader.Reader(source=source, transform=transform, skip_bad=True)
    batches = loader.train_batches(reader, batch_size=2 * 220, seed=0, start_step=0, num_threads=1)
    assert next(batches)["skipped"].sum() == 2 * sum(to_the_next)
    batches.close()


def test_a_worker_that_has_been_killed_is_reported() -> None:
    def batches() -> Iterator[loader.Batch]:
        yield {}
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")

    read = loader._from_workers(batches())
    assert next(read) == {}
    with pytest.raises(errors.UserError, match=r"exit code -9.*lower --config\.data\.num_workers"):
        next(read)


# Killed and resumed
# -----------------------------------------------------------------------------------------------------

_SCRIPT = """
import hashlib, sys
import numpy as np
from absl import flags
from avit_jax.data import loader, sources, transforms

if __name__ == "__main__":
    folder, start, workers, steps = sys.argv[1], *map(int, sys.argv[2:])
    flags.FLAGS(sys.argv[:1])
    reader = loader.Reader(
        source=sources.load("folder", split="train", data_dir=folder, image_size=(16, 16)),
        transform=transforms.Train(image_size=(16, 16), magnitude=9.0),
    )
    batches = loader.train_batches(
        reader, batch_size=8, seed=0, start_step=start, num_threads=2, num_workers=workers, repeats=3
    )
    for step in range(start, steps):
        batch = next(batches)
        digest = hashlib.sha256(b"".join(np.asarray(batch[key]).tobytes() for key in sorted(batch))).hexdigest()
        print(step, digest, flush=True)
"""


def _digests(
    folder: pathlib.Path, *, start: int, workers: int, steps: int, kill_after: int | None = None
) -> dict[int, str]:
    """Returns the digests of batches by step, from a process that is killed after `kill_after` of them."""
    command = [
        sys.executable,
        str(folder / "script.py"),
        str(folder),
        str(start),
        str(workers),
        str(steps),
    ]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    digests = {}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        for line in process.stdout:
            step, digest = line.split()
            digests[int(step)] = digest
            if len(digests) == kill_after:
                os.killpg(process.pid, signal.SIGKILL)  # with its workers
                break
    return digests


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "workers_after"), [(0, 2), (2, 1)])
def test_killed_and_resumed_with_another_number_of_workers(
    tmp_path: pathlib.Path, workers: int, workers_after: int
) -> None:
    (tmp_path / "script.py").write_text(_SCRIPT)
    (tmp_path / "train/cat").mkdir(parents=True)
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        (tmp_path / f"train/cat/{i}.png").write_bytes(fixtures.png(pixels))
    whole = _digests(tmp_path, start=0, workers=0, steps=9)
    assert len(set(whole.values())) == 9
    before = _digests(tmp_path, start=0, workers=workers, steps=10_000, kill_after=4)
    after = _digests(tmp_path, start=4, workers=workers_after, steps=9)
    assert {**before, **after} == whole
