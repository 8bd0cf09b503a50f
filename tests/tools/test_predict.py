"""Predictions: the numbers of the model itself as a table, JSON lines and figures; unusable inputs."""

import itertools
import json
import os
import pathlib
import socket
from collections.abc import Iterator

import fakes
import fixtures
import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import avit_jax
from avit_jax import config as config_lib
from avit_jax.data import image_files, transforms
from avit_jax.inference import adaptive
from avit_jax.models import flops
from avit_jax.tools import predict
from avit_jax.training import build, evaluate, restore
from avit_jax.training.state import RunMetadata
from avit_jax.utils import errors
from avit_jax.weights import weight_files

_WEIGHTS = pathlib.Path(__file__).parents[1] / "data/weights/timm.safetensors"


def _config() -> ConfigDict:
    config = config_lib.default()
    config.model.update(
        {
            "image_size": (16, 16),
            "patch_size": 8,
            "width": 12,
            "depth": 2,
            "num_heads": 3,
            "num_classes": 5,
        }
    )
    config.halting.update({"gamma": 5.0, "beta": 1.0})
    config.loss.target_depth = 1.5
    return config


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """Makes twenty readable images of several aspect ratios, a truncated one, and a text file."""
    rng = np.random.default_rng(0)
    root = tmp_path / "pictures"
    (root / "more").mkdir(parents=True)
    for i in range(20):
        data = fixtures.png(rng.integers(0, 256, (20 + 3 * i, 40, 3), dtype=np.uint8))
        (root / ("more" if i % 3 else "") / f"{i % 10}.png").write_bytes(data)
    (root / "torn.png").write_bytes(data[:100])
    (root / "notes.txt").write_text("not a picture")
    return root


def test_a_gpu_masks_the_tokens_of_so_few_pictures(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removed = list(predict.predict(_config(), _WEIGHTS, [folder / "0.png"]))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(adaptive, "apply", None)  # is not called
    masked = list(predict.predict(_config(), _WEIGHTS, [folder / "0.png"]))
    assert masked[0].top5 == removed[0].top5 and masked[0].macs == removed[0].macs
    np.testing.assert_array_equal(masked[0].depth, removed[0].depth)


def test_predictions_are_the_models_own(
    folder: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config()
    with caplog.at_level("WARNING", logger="avit_jax"):
        predictions = list(predict.predict(config, _WEIGHTS, [folder, folder / "0.png"]))
    assert f"cannot read {folder}/torn.png" in caplog.text
    paths = sorted(str(path) for path in folder.rglob("[0-9].png"))
    assert [one.path for one in predictions] == [*paths, str(folder / "0.png")]
    assert len(paths) > 16  # more than one batch

    model = build.model(config)
    params = weight_files.load(_WEIGHTS, model)
    transform = transforms.Evaluate(image_size=(16, 16), crop_ratio=config.data.crop_ratio)
    images = np.stack(
        [transform(image_files.decode(pathlib.Path(one.path).read_bytes())) for one in predictions]
    )
    normal = (images / 255.0 - np.array(config.data.mean)) / np.array(config.data.std)
    logits, aux = model.apply({"params": params}, normal.astype(np.float32))
    probabilities = np.asarray(jax.nn.softmax(logits))
    depth = np.asarray(flops.is_computed(aux.active, 1).sum(axis=0))[:, 1:]
    assert len(np.unique(depth)) > 1
    for i, one in enumerate(predictions):
        assert one.top5 == [str(k) for k in np.argsort(-probabilities[i])]
        np.testing.assert_allclose(one.probabilities, np.sort(probabilities[i])[::-1], atol=1e-5)
        np.testing.assert_array_equal(one.depth, depth[i].reshape(2, 2))
        assert one.macs == pytest.approx(float(flops.image_macs(model, aux.active)[i]))
        assert one.macs_ratio == pytest.approx(one.macs / flops.static_macs(model))
        np.testing.assert_array_equal(one.image, images[i])


def test_table_lines_and_pictures(
    folder: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    predictions = predict.predict(_config(), _WEIGHTS, [folder])
    count = predict.report(
        predictions, num_layers=2, jsonl=tmp_path / "out.jsonl", folder=tmp_path / "drawn"
    )
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    head, *rows = capsys.readouterr().out.splitlines()
    assert count == len(lines) == len(rows) == len(list((tmp_path / "drawn").glob("*.png"))) == 17
    assert head.split()[:3] == ["depth", "GMACs", "ratio"]
    for line, row in zip(lines, rows, strict=True):
        assert f"{line['path']}: {line['top5'][0]} {line['probabilities'][0]:.1%}" in row
        assert set(line) == {
            *("path", "top5", "words", "probabilities", "depth", "macs", "macs_ratio")
        }
    assert (tmp_path / "drawn/0.depth.png").read_bytes().startswith(b"\x89PNG")


def test_an_interruption_loses_no_line(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    def interrupted() -> Iterator[predict.Prediction]:
        yield from itertools.islice(predict.predict(_config(), _WEIGHTS, [folder]), 3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict.report(interrupted(), num_layers=2, jsonl=tmp_path / "new/out.jsonl", folder=None)
    assert len((tmp_path / "new/out.jsonl").read_text().splitlines()) == 3


def test_a_run_knows_the_names_of_its_classes_and_grey_pictures(
    folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    config = fixtures.small_config(**{"train.steps": 2})
    fakes.real_run(config, tmp_path / "run")
    (one,) = predict.predict(config, tmp_path / "run", [folder / "0.png"])
    assert set(one.top5) <= set("0123456789")
    assert one.image.shape == (16, 16, 1) and one.depth.shape == (4, 4)


def test_a_network_used_otherwise_than_trained_is_reported(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = _config()
    trained = json.loads(config.to_json_best_effort())
    del trained["halting"]["merge"]  # a run from before the key was known did as its default says
    trained["halting"]["gamma"] = 3.0
    trained["data"]["range"], trained["loss"]["sigmoid"] = [0, 4095], True
    metadata = RunMetadata(config=trained, label_names=[])
    monkeypatch.setattr(restore, "params", lambda *_: ({}, metadata))
    with caplog.at_level("WARNING", logger="avit_jax"):
        restore.trained(config, build.model(config), tmp_path)
    assert caplog.messages == [
        f"config.{key}, and the network was trained with {before}"
        for key, before in (
            ("data.range is []", "[0, 4095]"),
            ("halting.gamma is 5.0", "3.0"),
            ("loss.sigmoid is False", "True"),
        )
    ]


def test_linked_folders_are_looked_into_once(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links/there").symlink_to(folder / "more")
    (folder / "more/circle").symlink_to(tmp_path / "links")
    found = [
        prediction.path for prediction in predict.predict(_config(), _WEIGHTS, [tmp_path / "links"])
    ]
    assert found == sorted(
        str(tmp_path / "links/there" / file.name) for file in (folder / "more").glob("*.png")
    )


def test_the_network_sees_what_it_saw_in_training(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also a grey image of 12 bits in a folder of a class, with a range."""
    values = np.random.default_rng(0).integers(0, 4096, (20, 30), dtype=np.uint16)
    (tmp_path / "val/cat/deep").mkdir(parents=True)
    Image.fromarray(values).save(tmp_path / "val/cat/deep/a.tiff")
    (tmp_path / "val/cat/deep/b.tif").write_bytes(b"II*")
    config = _config()
    config.data.update({"name": "folder", "dir": str(tmp_path), "eval_split": "val"})
    config.data.range, config.model.num_classes = (0, 4095), 1
    evaluator = evaluate.Evaluator(config, build.model(config))
    config.model.num_classes = 5
    (one,) = predict.predict(config, _WEIGHTS, [tmp_path])
    np.testing.assert_array_equal(one.image, evaluator.reader(0)["image"])
    assert one.image.max() > 100
    config.data.update({"mean": (0.5,), "std": (0.5,)})
    config.model.channels = 1
    (grey,) = predict.predict(config, _WEIGHTS, [tmp_path])
    np.testing.assert_array_equal(grey.image, one.image[..., :1])
    assert f"cannot read {tmp_path}/val/cat/deep/b.tif: " in caplog.text
    with pytest.raises(errors.UserError, match=r"cannot read .*val/cat/deep/b\.tif: "):
        evaluator.reader(1)


def test_what_cannot_be_predicted(tmp_path: pathlib.Path) -> None:
    for paths, message in (
        ([], "name images"),
        ([""], "is empty"),
        ([tmp_path], "no image in"),
        ([tmp_path / "no.png"], r"no image .*no\.png"),
    ):
        with pytest.raises(errors.UserError, match=message):
            list(predict.predict(_config(), _WEIGHTS, paths))
    (tmp_path / "bad.png").write_bytes(b"bad")
    with pytest.raises(errors.UserError, match="none of the images can be read"):
        predict.report(
            predict.predict(_config(), _WEIGHTS, [tmp_path / "bad.png"]),
            num_layers=2,
            jsonl=None,
            folder=None,
        )
    with pytest.raises(errors.UserError, match=r"there is no .*nowhere\.pth"):
        list(predict.predict(_config(), tmp_path / "nowhere.pth", [tmp_path / "bad.png"]))


def test_pictures_do_not_have_four_channels(tmp_path: pathlib.Path) -> None:
    config = fixtures.small_config(**{"model.channels": 4, "data.mean": (0.5,), "data.std": (0.5,)})
    with pytest.raises(
        errors.UserError, match="images have 1 or 3 channels, and the network has 4"
    ):
        next(predict.predict(config, tmp_path, [tmp_path]))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(errors.UserError, match="and the network has 4"):
        avit_jax.predict(build.model(config), {}, tmp_path / "a.png")


def test_what_is_no_file_is_never_read(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    os.mkfifo(folder / "more/pipe.png")
    (folder / "more/loop.png").symlink_to(folder / "more/loop.png")
    (folder / "more/gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "more/deep.png").mkdir()
    with socket.socket(socket.AF_UNIX) as open_socket:
        open_socket.bind(str(folder / "socket.png"))
        assert len(list(predict.predict(_config(), _WEIGHTS, [folder]))) == 17
        for path in (folder / "more/pipe.png", folder / "socket.png", pathlib.Path("/dev/zero")):
            with pytest.raises(
                errors.UserError, match="is no file, but a pipe, a socket or a device"
            ):
                list(predict.predict(_config(), _WEIGHTS, [path]))
    for name in ("loop", "gone"):
        with pytest.raises(errors.UserError, match=rf"there is no image .*{name}\.png"):
            list(predict.predict(_config(), _WEIGHTS, [folder / f"more/{name}.png"]))
