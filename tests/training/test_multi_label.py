"""Images with any number of labels: their files, the sigmoid loss, mean average precision."""

import functools
import io
import json
import pathlib
from collections.abc import Iterator

import fixtures
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from sklearn.metrics import average_precision_score

import avit_jax
from avit_jax.data import loader, sources
from avit_jax.training import devices, evaluate, loop, losses, metrics, parts, train_step
from avit_jax.utils import errors

_NAMES = fixtures.LABELS


def _average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Sum of precision times gain in recall, over the distinct thresholds from above."""
    total = before = 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        found = scores >= threshold
        recall = labels[found].sum() / labels.sum()
        total += (recall - before) * labels[found].mean()
        before = recall
    return total


def test_average_precision() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((50, 6)) < 0.3).astype(np.float64)
    logits = rng.integers(-5, 5, (50, 6)).astype(np.float32)  # many are equal
    labels[:, 4] = 0
    found = metrics.average_precision(logits, labels)
    expected = [_average_precision(labels[:, c], logits[:, c]) for c in (0, 1, 2, 3, 5)]
    each = found["class_average_precision"]
    np.testing.assert_allclose(np.delete(each, 4), expected, rtol=1e-12)
    assert np.isnan(each[4])
    assert found["mean_average_precision"] == pytest.approx(np.mean(expected), rel=1e-12)
    assert set(evaluate.by_class(found, list("abcdef"))) == {"class_average_precision"}
    assert evaluate.by_class(found, list("abcdef"))["class_average_precision"]["e"] is None
    with pytest.raises(errors.UserError, match="no image of the evaluation has a label"):
        metrics.average_precision(logits, 0 * labels)


def test_nan_ranks_last() -> None:
    labels = np.array([[1.0], [0.0], [0.0], [1.0]])
    logits = np.array([[np.nan], [-9.0], [np.inf], [2.0]])
    found = metrics.average_precision(logits, labels)["mean_average_precision"]
    assert found == pytest.approx(_average_precision(labels[:, 0], np.array([-99.0, -9, 9, 2])))


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    fixtures.multi_label_folder(tmp_path)
    return tmp_path


def _config(folder: pathlib.Path, **overrides: object) -> ConfigDict:
    config = fixtures.small_config(**{"loss.sigmoid": True, "train.steps": 2} | overrides)
    config.data.update({"name": "folder", "dir": str(folder), "eval_split": "val"})
    config.model.num_classes = 4
    config.eval.batch_size = 8
    return config


def test_labels_of_a_folder(folder: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    def load() -> sources.Source:
        return sources.load("folder", split="val", data_dir=str(folder), image_size=(8, 8))

    file = folder / "val/labels.csv"
    file.write_bytes(
        b'\xef\xbb\xbfsub/3.png,"dog; cat"\r\n\r\nsub/1.png,\r\n sub/3.png ,sky\r\n../val/sub/2.png,dog'
    )
    with caplog.at_level("INFO", logger="avit_jax"):
        source = load()
    assert "3 images with any of 4 labels" in caplog.text
    assert (source.label_names, source.multi_label) == (_NAMES, True)
    assert [record["label"] for record in source.records] == [[0, 1, 3], [], [1]]
    assert source.describe(1, source.records[1]) == str(folder / "val/sub/1.png")
    before = source.fingerprint()
    file.write_text(file.read_text().replace("sky", "grass"))
    assert load().fingerprint() != before
    train = sources.load("folder", split="train", data_dir=str(folder), image_size=(8, 8))
    sources.check_same_classes(train, source)
    one_label = sources.Source("pets", [], _NAMES)
    for pair in ((train, one_label), (one_label, train)):
        with pytest.raises(
            errors.UserError, match=r"train.* any number of labels, and pets exactly one"
        ):
            sources.check_same_classes(*pair)


def test_labels_of_a_prepared_data_set(tmp_path: pathlib.Path) -> None:
    import tensorflow_datasets as tfds

    labels = [["grass", "cat"], [], ["sky"]]

    class LabelledPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            names = tfds.features.ClassLabel(names=_NAMES)
            features = {"image": tfds.features.Image(), "labels": tfds.features.Sequence(names)}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _: object) -> dict[str, Iterator]:
            return {"train": self._generate_examples()}

        def _generate_examples(self) -> Iterator:
            for i, found in enumerate(labels):
                image = io.BytesIO(fixtures.png(np.full((6, 8, 3), i, np.uint8)))
                yield i, {"image": image, "labels": found}

    LabelledPictures(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = sources.load(
        "labelled_pictures", split="train", data_dir=str(tmp_path), image_size=(8, 8)
    )
    assert (source.label_names, source.multi_label) == (_NAMES, True)
    read = loader.Reader(source=source, transform=np.asarray)
    for record in map(read, range(3)):
        expected = np.isin(_NAMES, labels[record["image"][0, 0, 0]])
        np.testing.assert_array_equal(record["label"], expected)
        assert record["label"].dtype == np.float32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names no image with a label"),
        (b"file,labels\n", "names no image with a label"),
        (b"sub/1.png,\nsub/2.png,;\n", "names no image with a label"),
        (b"name,tags\nsub/1.png,cat\n", 'row 1 must be "file,labels", .*got "name"'),
        (b'sub/1.png,"cat\nsub/2.png,dog\n', "cannot read .*labels.csv"),
        (b"a.png,cat\nb.png,cat,dog\n", r"labels\.csv.*row 2 must hold a file and its labels"),
        (b"a.png\n", "row 1 must hold"),
        (b",cat\n", "row 1 must hold"),
        (b"a.png,\xff\n", "cannot read .*labels.csv"),
    ],
)
def test_unusable_labels(folder: pathlib.Path, content: bytes, message: str) -> None:
    (folder / "val/labels.csv").write_bytes(content)
    with pytest.raises(errors.UserError, match=message):
        sources.load("folder", split="val", data_dir=str(folder), image_size=(8, 8))


def test_splits_in_other_places(folder: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "more").mkdir()
    (folder / "val").rename(folder / "more/val")
    (folder / "more/val/labels.csv").write_text("sub/1.png,cat\n./sub/1.png,cow\n")
    load = functools.partial(sources.load, "folder", image_size=(8, 8))
    nested = load(split="more/val", data_dir=str(folder))
    assert nested.label_names == ["cat", "cow", "dog", "grass", "sky"]
    assert [record["label"] for record in nested.records] == [[0, 1]]
    assert "more/val has no image with these labels of other splits: dog, grass, sky" in caplog.text
    here = load(split=".", data_dir=str(folder / "more/val"))
    assert here.label_names == ["cat", "cow"]
    with pytest.raises(errors.UserError, match=r"cannot read .*File name too long"):
        load(split="x" * 300, data_dir=str(folder))


def test_a_split_without_its_labels(folder: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "val/labels.csv").unlink()
    sources.load("folder", split="val", data_dir=str(folder), image_size=(8, 8))
    assert "val holds no labels.csv, as " in caplog.text
    (folder / "val/labels.csv").write_text("/dev/null,cat\n")
    with pytest.raises(errors.UserError, match='row 1 must be "file,labels"'):
        sources.load("folder", split="val", data_dir=str(folder), image_size=(8, 8))
    (folder / "val/labels.csv").write_text("file,labels\n/dev/null,cat\n")
    source = sources.load("folder", split="val", data_dir=str(folder), image_size=(8, 8))
    with pytest.raises(OSError, match="/dev/null is not a file"):
        source.records[0]


def test_what_several_labels_need(folder: pathlib.Path) -> None:
    for key, value, message in (
        ("loss.sigmoid", False, r"val.*set --config\.loss\.sigmoid=True"),
        ("distill.teacher", "x", "remove config.distill.teacher"),
        ("model.num_classes", 3, "num_classes=4"),
    ):
        config = _config(folder)
        config.update_from_flattened_dict({key: value})
        with pytest.raises(errors.UserError, match=message):
            evaluate.Evaluator(config, parts.build.model(config))
    (folder / "val/sub/2.png").unlink()
    config = _config(folder)
    evaluator = evaluate.Evaluator(config, parts.build.model(config))
    with pytest.raises(errors.UserError, match=r"cannot read .*val/sub/2\.png"):
        evaluator.reader(2)


def test_a_run(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Grey images from an RGB folder; the last batch has padding, and 8 devices share each one."""
    config, workdir = _config(folder, **{"augment.mixup": 0.8}), tmp_path / "run"
    loop.train(config, workdir)
    summary = json.loads((workdir / "summary.json").read_text())
    config.eval.batch_size = 16
    evaluate.evaluate_checkpoint(config, workdir)
    other = json.loads((workdir / "eval.json").read_text())
    assert (workdir / "eval.png").exists()

    model, params = avit_jax.load(workdir)
    paths = [folder / f"val/sub/{i}.png" for i in range(13)]
    found = avit_jax.predict(model, params, paths)
    probabilities = np.array(
        [[dict(zip(one.top5, one.probabilities, strict=True))[n] for n in _NAMES] for one in found]
    )
    assert found[0].image.shape == (16, 16, 1)
    assert not np.allclose(probabilities.sum(axis=1), 1, atol=1e-3)  # sigmoids
    source = sources.load("folder", split="val", data_dir=str(folder), image_size=(16, 16))
    labels = np.array([np.isin(range(4), record["label"]) for record in source.records])
    expected = {
        name: average_precision_score(labels[:, c], probabilities[:, c])
        for c, name in enumerate(_NAMES)
    }
    for report in (summary, other):
        assert report["class_average_precision"] == pytest.approx(expected, abs=1e-6)
        mean = np.mean(list(expected.values()))
        assert report["mean_average_precision"] == pytest.approx(mean, abs=1e-6)
        assert not {"top1", "class_top1"} & set(report) and report["images"] == 13
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["mean_average_precision"] == summary["mean_average_precision"]
    sigmoids = -np.log(np.where(labels, probabilities, 1 - probabilities)).mean()
    assert rows[-1]["loss"] == pytest.approx(sigmoids, rel=1e-4)


def test_training_learns_all_labels_of_an_image(folder: pathlib.Path) -> None:
    config = _config(folder)
    made = parts.of_config(config)
    batch = devices.first(jax.device_get(next(made.batches(0))))
    assert batch["label"].shape == (2, 4) and batch["image"].shape == (2, 16, 16, 1)
    assert set(np.unique(batch["label"])) <= {0.0, 1.0}
    options = parts.build.step_options(config)
    _, targets = train_step.augment_batch(batch, jax.random.key(0), options.augmentation, 4)
    np.testing.assert_array_equal(targets, batch["label"])
    logits = np.array([[3.0, 1.0, -2.0, 0.0], [0.0, 0.5, 2.0, 1.0]], np.float32)
    labels = np.array([[1, 1, 0, 0], [1, 1, 0, 1]], np.float32)
    np.testing.assert_array_equal(losses.is_right(logits, labels), [True, False])
    loss, _ = train_step.task_loss(logits, labels, None, options, distilled=False)
    p = 1 / (1 + np.exp(-logits))
    expected = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
