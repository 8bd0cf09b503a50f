"""Writes the networks of `avit_jax.zoo`: weights, model cards and networks.json.

python -m avit_jax.main --config=digits --workdir=runs/digits
python -m experiments.pareto.run --data_dir=... --arm=avit_0.6 --seed=0 --out=mine --runs=runs/mine
python -m experiments.zoo.run --digits=runs/digits --avit=runs/mine/avit_0.6_0

Nothing is trained or measured here. Accuracy and MACs of a network with a workdir are those of its
run. Those of the other networks on CIFAR-10 are in experiments/pareto/untrained.json, which
experiments/pareto/untrained.py measured on the 10,000 test images. Without its flag, a network
stays as it is; `--nocifar10` leaves those of untrained.json as they are.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict

from avit_jax import networks, publish, run_config, zoo
from avit_jax.core.halting import HaltingConfig
from avit_jax.models import flops
from avit_jax.utils import errors
from avit_jax.weights import weight_files
from configs import cifar10

_DIGITS = flags.DEFINE_string("digits", None, "workdir of the digits run")
_CIFAR10 = flags.DEFINE_boolean("cifar10", True, "write the two networks of untrained.json")
_AVIT = flags.DEFINE_string("avit", None, "workdir of the run avit_0.6, seed 0, of the study")
_ZOO = pathlib.Path(zoo.__file__).parent
_PARETO = pathlib.Path(__file__).parents[1] / "pareto"
# The class names of CIFAR-10, as tensorflow-datasets gives them.
_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]
_PARENT = "python -m experiments.pareto.run --data_dir=... --arm=static"
_AVIT_ROW = "python -m experiments.pareto.run --data_dir=... --arm=avit_0.6 --seed=0"
_UNTRAINED = "python -m experiments.pareto.untrained --data_dir=..."


def _write(
    name: str, model: Any, params: Any, config: ConfigDict, labels: list[str], **facts: Any
) -> dict[str, Any]:
    """Writes weights and card; returns the entry of networks.json."""
    path = _ZOO / f"{name}.safetensors"
    run_config.write_weights(path, params, model, config, labels)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    facts["macs"] = facts["macs_ratio"] * flops.static_macs(model)
    entry = zoo.Network(sha256=digest, **facts)
    card = publish.model_card(
        name,
        networks.prepared(model, config, labels),
        source=name,
        about=entry.about,
        results={
            "top-1": f"{100 * entry.top1:.2f}% of {entry.images:,} test images",
            "MACs": f"{entry.macs / 1e6:.2f} million per image, "
            f"{entry.macs_ratio:.3f} of the static network's",
            "recipe": f"`{entry.recipe}`",
            "command": f"`{entry.command}`",
            "file": f"{path.name}, SHA-256 `{digest}`",
        },
    )
    (_ZOO / f"{name}.md").write_text(card)
    return dataclasses.asdict(entry)


def _of_run(
    name: str, workdir: str, config: ConfigDict | None = None, **facts: Any
) -> dict[str, Any]:
    """Writes the network of a workdir, with the accuracy and MACs of its summary."""
    model, params = networks.load(workdir)
    summary = json.loads((pathlib.Path(workdir) / "summary.json").read_text())
    config, labels = config or publish.config_of(model), list(model.label_names)
    facts |= {key: summary[key] for key in ("top1", "images", "macs_ratio")}
    return _write(name, model, params, config, labels, **facts)


def _cifar10() -> dict[str, dict[str, Any]]:
    measured = json.loads((_PARETO / "untrained.json").read_text())
    config = cifar10.get_config()
    config.halting.enabled = False
    file = weight_files.read(_PARETO / "parent.safetensors")
    model, params = weight_files.infer(file, image_size=(32, 32), name="parent.safetensors")
    images = measured["images"]
    static = _write(
        *("cifar10", model, params, config, _CLASSES),
        about="A static vision transformer on CIFAR-10, trained for 13 epochs: the parent of the "
        "study in experiments/pareto.",
        top1=measured["static_top1"],
        images=images,
        macs_ratio=1.0,
        recipe="cifar10",
        command=_PARENT,
    )
    row = measured["rows"][0]
    gate = {"merge": True, "redundancy": 50.0, "gamma": 0.0, "beta": row["beta"]}
    config.halting.update({"enabled": True, **gate})
    merging = _write(
        *("cifar10_merging", model.clone(halting=HaltingConfig(**gate)), params, config, _CLASSES),
        about="The weights of `cifar10` with threshold merging, without further training: a token "
        "merges into the most similar active token once their cosine similarity exceeds "
        f"{row['cosine']:.3f}.",
        top1=row["threshold"]["top1"],
        images=images,
        macs_ratio=row["threshold"]["macs_ratio"],
        recipe="cifar10_merging",
        command=_UNTRAINED,
    )
    return {"cifar10": static, "cifar10_merging": merging}


def main(_: list[str]) -> None:
    """Writes all networks."""
    entries = {name: dataclasses.asdict(network) for name, network in zoo.NETWORKS.items()}
    if _DIGITS.value:
        entries["digits"] = _of_run(
            *("digits", _DIGITS.value),
            about="An A-ViT with the paper's gate on scikit-learn's handwritten digits.",
            recipe="digits",
            command="python -m avit_jax.main --config=digits --workdir=runs/digits",
        )
    if _CIFAR10.value:
        entries |= _cifar10()
    if _AVIT.value:
        entries["cifar10_avit"] = _of_run(
            *("cifar10_avit", _AVIT.value),
            about="An A-ViT with the paper's gate and losses, our budget controller and a teacher. "
            "Trained for 1,000 steps from `cifar10`, as in the study in experiments/pareto.",
            config=cifar10.get_config(),
            recipe="cifar10",
            command=f"{_AVIT_ROW} --out=mine --runs=runs/mine",
        )
    (_ZOO / "networks.json").write_text(json.dumps(entries, indent=2) + "\n")
    print(zoo.table(zoo.read()))


if __name__ == "__main__":
    app.run(errors.exit_on_user_error(main))
