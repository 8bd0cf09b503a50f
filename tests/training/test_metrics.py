"""Sums and means against NumPy, and the files that rows are written to."""

import json
import pathlib
import unittest.mock
from typing import Any

import fixtures
import jax
import numpy as np
import pytest
from etils import epath
from fsspec.implementations import memory
from matplotlib.figure import Figure
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2

from avit_jax.models import flops, vit
from avit_jax.training import evaluate, metrics
from avit_jax.utils import visualize

_IMAGES, _CLASSES = 12, 8


@pytest.fixture(scope="module")
def model() -> vit.AViT:
    return vit.AViT(image_size=8, patch_size=4, width=8, num_heads=2, depth=4, num_classes=_CLASSES)


@pytest.fixture(scope="module")
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(_IMAGES, _CLASSES)).astype(np.float32)


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, _CLASSES, _IMAGES)


@pytest.fixture(scope="module")
def aux(model: vit.AViT) -> vit.Aux:
    score = (
        np.random.default_rng(2)
        .uniform(0, 0.8, (model.depth, _IMAGES, model.num_tokens))
        .astype(np.float32)
    )
    before = np.cumsum(score, axis=0) - score
    active = before < 0.99
    depth = active.sum(axis=0).astype(np.int32)
    return vit.Aux(
        score=score,
        active=active,
        depth=depth,
        ponder_cost=depth,
        class_output=np.zeros((_IMAGES, model.width)),
        macs=flops.image_macs(model, active),
    )


_jitted = jax.jit(metrics.eval_sums, static_argnums=0)


def _eval_sums(*args: Any) -> dict[str, np.ndarray]:
    return jax.device_get(_jitted(*args))


def _some(aux: vit.Aux, images: slice) -> vit.Aux:
    """`aux` of some of the images."""
    per_layer = {"score": aux.score[:, images], "active": aux.active[:, images]}
    return vit.Aux(
        **per_layer,
        **{n: getattr(aux, n)[images] for n in ("depth", "ponder_cost", "class_output", "macs")},
    )


def _expected(
    model: vit.AViT, logits: np.ndarray, aux: vit.Aux, labels: np.ndarray
) -> dict[str, np.ndarray]:
    order = np.argsort(-logits, axis=1)
    ran = (
        np.asarray(aux.active) & np.asarray(aux.active)[:, :, :1]
    )  # an image goes on as long as its class token
    assert (ran != aux.active).any()
    depth = ran.sum(axis=0)
    score = np.where(ran, aux.score, 0)
    return {
        "images": len(labels),
        "loss": np.mean(
            [
                np.log(np.exp(row).sum()) - row[label]
                for row, label in zip(logits, labels, strict=True)
            ]
        ),
        "top1": np.mean(order[:, 0] == labels),
        "top5": np.mean([label in row[:5] for row, label in zip(order, labels, strict=True)]),
        "depth_patch": depth[:, 1:].mean(),
        "depth_class": depth[:, 0].mean(),
        "macs": np.mean(jax.jit(flops.image_macs, static_argnums=0)(model, aux.active)),
        "patch_depth": [np.mean(depth[:, 1:] == layer + 1) for layer in range(model.depth)],
        "score": score.mean(axis=(1, 2)),
        "class_images": [np.mean(labels == c) for c in range(_CLASSES)],
        "class_top1": [np.mean((labels == c) & (order[:, 0] == c)) for c in range(_CLASSES)],
    }


def _check(values: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert values.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(values[name], expected[name], rtol=1e-5, err_msg=name)


def test_means_over_uneven_batches(
    model: vit.AViT, logits: np.ndarray, aux: vit.Aux, labels: np.ndarray
) -> None:
    sums = [
        _eval_sums(model, logits[i], _some(aux, i), labels[i], np.ones(i.stop - i.start))
        for i in (slice(0, 7), slice(7, _IMAGES))
    ]
    _check(metrics.means(sums), _expected(model, logits, aux, labels))


def test_padding_counts_for_nothing(
    model: vit.AViT, logits: np.ndarray, aux: vit.Aux, labels: np.ndarray
) -> None:
    real = slice(0, 9)
    weight = np.arange(_IMAGES) < real.stop
    sums = _eval_sums(model, logits, aux, labels, weight.astype(np.float32))
    _check(metrics.means([sums]), _expected(model, logits[real], _some(aux, real), labels[real]))


def test_accuracy_of_each_class() -> None:
    results = {"class_images": np.array([0.5, 0.0, 0.5]), "class_top1": np.array([0.125, 0, 0.5])}
    found = evaluate.by_class(results, ["cat", "dog", "cow"])
    assert found == {"class_top1": {"cat": 0.25, "dog": None, "cow": 1.0}}


def test_with_pooling_the_class_depth_is_that_of_the_image(
    model: vit.AViT, logits: np.ndarray, aux: vit.Aux, labels: np.ndarray
) -> None:
    pooled = model.clone(pool="avg")
    values = _eval_sums(pooled, logits, aux, labels, np.ones(_IMAGES))
    longest = np.asarray(aux.depth)[:, 1:].max(axis=1)  # of the patches, which are read out
    assert values["depth_class"] == longest.sum()
    assert values["depth_class"] != np.asarray(aux.depth)[:, 0].sum()


@pytest.mark.parametrize("rank", range(_CLASSES))
def test_top_5(model: vit.AViT, aux: vit.Aux, rank: int) -> None:
    logits = -np.arange(_CLASSES, dtype=np.float32)[None]  # class 0 is likeliest, then 1
    sums = _eval_sums(model, logits, _some(aux, slice(0, 1)), np.array([rank]), np.ones(1))
    assert (sums["top1"], sums["top5"]) == (rank == 0, rank < 5)


def test_of_equal_logits_the_first_wins_and_nan_is_never_right(
    model: vit.AViT, aux: vit.Aux, labels: np.ndarray
) -> None:
    zeros = np.zeros((_IMAGES, _CLASSES))
    sums = _eval_sums(model, zeros, aux, labels, np.ones(_IMAGES))
    assert sums["top1"] == (labels == 0).sum()
    assert sums["top5"] == (labels < 5).sum()
    np.testing.assert_allclose(sums["loss"], _IMAGES * np.log(_CLASSES), rtol=1e-6)
    sums = _eval_sums(model, zeros + np.nan, aux, labels, np.ones(_IMAGES))
    assert sums["top1"] == sums["top5"] == 0


def test_means_add_up_in_float64() -> None:
    batches = [{"images": np.float32(1), "macs": np.float32(2**24)}] + [
        {"images": np.float32(1), "macs": np.float32(1)}
    ] * 15
    assert metrics.means(batches)["macs"] == (2**24 + 15) / 16


def _events(folder: pathlib.Path) -> list[tuple[str, int, float]]:
    """Tag, step and value of the scalars in an event file: length, its checksum, the record, its
    checksum, and so on.
    """
    (path,) = folder.glob("events.out.tfevents.*")
    content, scalars = path.read_bytes(), []
    while content:
        length = int.from_bytes(content[:8], "little")
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        scalars += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return scalars


def _rows(workdir: pathlib.Path, name: str = "metrics.jsonl") -> list[dict[str, object]]:
    return [json.loads(line) for line in (workdir / name).read_text().splitlines()]


def test_writer(tmp_path: pathlib.Path) -> None:
    writer = metrics.Writer(tmp_path, 0, {})
    writer.write(3, "train", {"loss": 0.5, "top1": 0.25}, {"images_per_second": 7.5})
    writer.write(3, "eval", {"loss": 1.5})
    assert _rows(tmp_path) == [  # there before close()
        {"step": 3, "split": "train", "loss": 0.5, "top1": 0.25},
        {"step": 3, "split": "eval", "loss": 1.5},
    ]
    assert _rows(tmp_path, "timing.jsonl") == [
        {"step": 3, "split": "train", "images_per_second": 7.5}
    ]
    writer.close()
    assert _events(tmp_path / "tensorboard") == [
        ("train/loss", 3, 0.5),
        ("train/top1", 3, 0.25),
        ("train/images_per_second", 3, 7.5),
        ("eval/loss", 3, 1.5),
    ]


def test_a_full_disk_is_told_and_nobody_waits_for_tensorboard(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = metrics.Writer(tmp_path, 0, {})

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(record_writer.RecordWriter, "write", full)
        writer.write(1, "train", {"loss": 0.5})
    for step in range(2, 40):  # more than a queue would hold
        writer.write(step, "train", {"loss": 0.25})
    writer.close()
    assert len(_events(tmp_path / "tensorboard")) == 38


def test_writer_goes_on_where_the_checkpoint_was(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    def write(*steps: int, sizes: dict[str, int]) -> dict[str, int]:
        writer = metrics.Writer(tmp_path, steps[0] - 1, sizes)
        for step in steps:
            writer.write(step, "train", {"loss": 0.0}, {"images_per_second": 1.0})
            size = writer.sizes() if step == 2 else sizes
        writer.close()
        return size

    sizes = write(1, 2, sizes={})
    write(3, 4, sizes=sizes)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "spl')  # where the run was killed
    write(3, sizes=sizes)
    assert [row["step"] for row in _rows(tmp_path)] == [1, 2, 3]
    assert [row["step"] for row in _rows(tmp_path, "timing.jsonl")] == [1, 2, 3]
    assert not fixtures.messages(caplog, "avit_jax.training")
    (tmp_path / "metrics.jsonl").unlink()
    write(3, sizes=sizes)
    assert [row["step"] for row in _rows(tmp_path)] == [3]
    assert f"metrics.jsonl has lost {sizes['metrics.jsonl']} bytes" in caplog.text
    write(1, sizes={})  # from the beginning
    assert [row["step"] for row in _rows(tmp_path)] == [1]


class _Bucket(memory.MemoryFileSystem):
    """Objects as those of a bucket: read, or written as a whole."""

    cachable = False
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix("s3://"))

    def _open(self, path: str, mode: str = "rb", **options: object) -> memory.MemoryFile:
        assert mode in ("rb", "wb"), "there is no appending to an object"
        return super()._open(path, mode, **options)


def test_rows_and_figures_in_a_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epath.backend.fsspec_backend, "fs", lambda path: _Bucket())
    monkeypatch.setattr(metrics, "event_file_writer", unittest.mock.MagicMock())
    workdir = epath.Path("s3://bucket/run")
    writer = metrics.Writer(workdir, 0, {})
    writer.write(1, "train", {"loss": 0.5})
    sizes = writer.sizes()
    assert sizes == {
        "metrics.jsonl": len((workdir / "metrics.jsonl").read_bytes()),
        "timing.jsonl": 0,
    }
    writer.write(2, "train", {"loss": 0.25})
    assert [row["step"] for row in _rows(workdir)] == [1, 2]
    metrics.Writer(workdir, 1, sizes).write(2, "train", {"loss": 0.125})
    assert [row["loss"] for row in _rows(workdir)] == [0.5, 0.125]
    visualize.write(Figure(), workdir / "depth.png")
    assert (workdir / "depth.png").read_bytes().startswith(b"\x89PNG")
