"""What several tests make use of."""

import io
import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from avit_jax import config as config_lib
from avit_jax.training import build, checkpoint, state


def png(pixels: np.ndarray) -> bytes:
    """An encoded picture of the given pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


LABELS = ["cat", "dog", "grass", "sky"]


def multi_label_folder(root: pathlib.Path) -> None:
    """Two splits of noise with any of four labels; each label makes a quarter of a picture bright."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 13)):
        (root / split / "sub").mkdir(parents=True)
        rows = ["file,labels"]
        for i in range(count):
            labels = np.flatnonzero(rng.random(4) < 0.4)
            pixels = rng.integers(0, 99, (20, 20, 3), dtype=np.uint8)
            for label in labels:
                pixels[:, 5 * label : 5 * label + 5] += 120
            (root / split / f"sub/{i}.png").write_bytes(png(pixels))
            rows.append(f"sub/{i}.png,{';'.join(LABELS[label] for label in labels)}")
        (root / split / "labels.csv").write_text("\n".join(rows))


def small_config(**overrides: object) -> ConfigDict:
    """Digits at 16x16 with 17 tokens, two layers: seconds to train."""
    config = config_lib.default()
    config.data.update({"mean": (0.3,), "std": (0.36,)})
    config.affine.update({"rotate": 10.0, "translate": 0.1})
    config.model.update({"image_size": (16, 16), "patch_size": 4, "channels": 1, "num_classes": 10})
    config.model.update(
        {"width": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 2.0, "drop_path": 0.2}
    )
    config.halting.update({"gamma": 5.0, "beta": -1.0})
    config.loss.update({"prior_weight": 0.1, "target_depth": 2.0})
    config.optimizer.update({"learning_rate": 1e-3, "ema_decay": 0.5, "warmup": 0.2})
    config.train.update({"batch_size": 16, "steps": 6, "log_every": 2})
    config.eval.update({"batch_size": 64, "pictures": 2})
    with config.unlocked():
        config.update_from_flattened_dict(overrides)
    return config


def restored_state(config: ConfigDict, workdir: pathlib.Path) -> state.TrainState:
    """The last checkpoint of a run."""
    tx, _ = build.optimizer(config)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        return checkpoints.restore(build.new_state(build.model(config), tx, seed=0, ema=True))[0]


def big_vision_outside_layers(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Embedding, head and last norm in the names and layouts of big_vision, of tensors by timm's
    names.
    """
    return {
        "embedding/kernel": tensors["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": tensors["patch_embed.proj.bias"],
        "head/kernel": tensors["head.weight"].T,
        "head/bias": tensors["head.bias"],
        "Transformer/encoder_norm/scale": tensors["norm.weight"],
        "Transformer/encoder_norm/bias": tensors["norm.bias"],
    }


def messages(caplog: pytest.LogCaptureFixture, logger: str) -> list[str]:
    """What a logger and those below it said; threads of an earlier test may still use others."""
    return [r.getMessage() for r in caplog.records if f"{r.name}.".startswith(f"{logger}.")]
