"""The recipe `finetune`, which takes over the sizes of any backbone."""

import dataclasses
import pathlib

import fakes
import fixtures
import jax
import numpy as np
import pytest
import variants
from command_line import as_the_program_starts, parse  # noqa: F401

import avit_jax
from avit_jax import networks
from avit_jax.training import build, loop, restore

# How ml_collections loads a recipe.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"
)


@pytest.mark.parametrize("kind", ["plain", "siglip_average", "dinov2_registers"])
def test_the_recipe_takes_over_the_backbone(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = variants.write(tmp_path, variants.static(kind))
    loaded, params = avit_jax.load(path)
    with monkeypatch.context() as patch:  # several processes start JAX after the recipe
        patch.setattr(jax.random, "key", None)
        config = parse(f"--config=finetune:{path}", "--config.model.num_classes=2")
    model = build.model(config).clone(removal=None)
    expected = variants.static(kind).clone(num_classes=2, halting=model.halting, remat=model.remat)
    assert model.clone(drop_path=0.0, dtype=None) == expected.clone(dtype=None)
    assert model.halting is not None and model.halting.merge and config.budget == 0.6
    assert config.data.mean == loaded.mean and config.data.std == loaded.std
    start = restore.initial_params(config, model)
    assert start["head"]["kernel"].shape[-1] == 2
    np.testing.assert_array_equal(start["patch_embed"]["kernel"], params["patch_embed"]["kernel"])


def test_the_recipe_keeps_the_gate_of_a_backbone(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = fixtures.small_config(**{"data.crop_ratio": 0.9, "train.adaptive": True})
    fakes.real_run(config, tmp_path / "run")
    monkeypatch.setattr(jax, "device_count", None)  # it starts the devices
    for backbone in (str(tmp_path / "run"), "digits"):
        found = parse(f"--config=finetune:{backbone}")
        gate = networks.describe(backbone).halting
        assert gate and dict(found.halting) == {"enabled": True, **dataclasses.asdict(gate)}
        assert found.model.channels == 1 and not found.halting.merge
        assert found.loss.prior_weight == 0.1
    data = parse(f"--config=finetune:{tmp_path}/run").data
    assert data.crop_ratio == 0.9 and data.mean == (0.3,)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [("finetune", "name the backbone after a colon"), ("finetune:nothing", "there is no nothing")],
)
def test_the_recipe_without_a_backbone(
    recipe: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        parse(f"--config={recipe}")
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_a_fine_tune_runs(tmp_path: pathlib.Path) -> None:
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i, image in enumerate(
                np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), np.uint8)
            ):
                (folder / f"{i}.png").write_bytes(fixtures.png(image))
    path = variants.write(tmp_path, variants.static("siglip_average"))
    config = parse(
        f"--config=finetune:{path}",
        f"--config.data.dir={tmp_path / 'images'}",
        "--config.model.num_classes=2",
        "--config.train.steps=2",
        "--config.train.batch_size=8",
        "--config.eval.batch_size=8",
        "--config.augment.repeats=1",
    )
    loop.train(config, tmp_path / "run")
    model, _ = avit_jax.load(tmp_path / "run")
    assert model.pool == "avg" and model.label_names == ("cat", "dog")
