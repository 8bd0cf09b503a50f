"""Is it better to start an A-ViT from its static parent, and to let the parent teach it? On
CIFAR-10, three seeds, equal steps.

python -m experiments.finetune.run --data_dir=... --out=experiments/finetune/result.json

Trains one static parent, exports it to safetensors, and trains the same A-ViT in three ways: from
random weights, from that file, and from that file with its logits as soft targets. Runs that are
done are not run again, and one that was stopped goes on; delete --runs to start over.
"""

import json
import pathlib
import subprocess
import sys

import numpy as np
from absl import app, flags

from avit_jax.training import build, restore
from avit_jax.utils import errors
from avit_jax.weights import weight_files
from configs import cifar10
from experiments import results, timing

_DATA_DIR = flags.DEFINE_string("data_dir", None, "folder of the prepared data set", required=True)
_RUNS = flags.DEFINE_string("runs", "runs/finetune", "folder of the runs")
_OUT = flags.DEFINE_string("out", None, "result.json", required=True)
_PARENT_STEPS = 3000
_STEPS = 400
_SEEDS = (0, 1, 2)
_SHARED = {
    "model.width": 64, "model.num_heads": 2, "model.remat": False, "augment.magnitude": 0.0,
    "train.eval_every": 0,
}  # fmt: skip
_PARENT = {
    "halting.enabled": False,
    "optimizer.learning_rate": 2e-3,
    "train.steps": _PARENT_STEPS,
    "train.save_every": 200,
}
_CHILD = {"optimizer.learning_rate": 1e-3, "optimizer.ema_decay": 0.99, "train.steps": _STEPS}
_TEACHING = {"distill.targets": "soft", "distill.weight": 0.5, "distill.temperature": 2.0}


def train(name: str, overrides: dict[str, object]) -> dict[str, float]:
    """Trains one network unless that is done, and returns its summary."""
    workdir = pathlib.Path(_RUNS.value) / name
    if not (workdir / "summary.json").exists():
        command = [
            sys.executable,
            "-m",
            "avit_jax.main",
            "--config=configs/cifar10.py",
            f"--workdir={workdir}",
        ]
        command += [f"--config.data.dir={_DATA_DIR.value}"]
        command += [f"--config.{key}={value}" for key, value in (_SHARED | overrides).items()]
        print(" ".join(command), flush=True)
        subprocess.run(command, check=True)
    return json.loads((workdir / "summary.json").read_text())


def export(parent: pathlib.Path) -> pathlib.Path:
    """The parent's weights as a file in timm's names."""
    config = cifar10.get_config()
    config.update_from_flattened_dict(_SHARED | _PARENT)
    model = build.model(config)
    weight_files.write(
        parent / "parent.safetensors", restore.params(config, model, parent)[0], model
    )
    return parent / "parent.safetensors"


def main(_: list[str]) -> None:
    """Trains, gathers and writes."""
    static = train("parent", _PARENT)
    file = export(pathlib.Path(_RUNS.value) / "parent")
    start = {"init": file}
    arms = {
        "scratch": {},
        "finetuned": start,
        "distilled": start | {"distill.teacher": file} | _TEACHING,
    }
    rows = {
        (name, seed): train(f"{name}_{seed}", _CHILD | overrides | {"seed": seed})
        for seed in _SEEDS
        for name, overrides in arms.items()
    }
    result: dict[str, object] = timing.environment() | {
        "parent_top1": static["top1"],
        "steps": _STEPS,
    }
    for name in arms:
        result[name] = {}
        for key in ("top1", "macs_ratio", "train_seconds"):
            values = [rows[name, seed][key] for seed in _SEEDS]
            result[name][key] = {
                "mean": float(np.mean(values)),
                "std": float(np.std(values, ddof=1)),
                "runs": values,
            }
    for better, worse in (("finetuned", "scratch"), ("distilled", "finetuned")):
        gains = [rows[better, seed]["top1"] - rows[worse, seed]["top1"] for seed in _SEEDS]
        error = float(np.std(gains, ddof=1) / np.sqrt(len(gains)))
        result[f"{better}_minus_{worse}"] = {
            "mean": float(np.mean(gains)),
            "standard_error": error,
            "pairs": gains,
        }
    results.save(_OUT.value, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
