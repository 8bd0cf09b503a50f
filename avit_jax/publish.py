"""Writes a trained network as a folder for the Hugging Face hub, and uploads it."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from etils import epath

from avit_jax import config as config_lib
from avit_jax import run_config
from avit_jax.models import flops, pretrained, vit
from avit_jax.models.pretrained import PretrainedAViT
from avit_jax.utils import errors, files
from avit_jax.weights import locate, tensor_files

_OWNER = "hf-hub:owner"  # in a model card until the owner is known
_CARD = """\
---
library_name: avit_jax
pipeline_tag: image-classification
license: {license}
tags:
- vision-transformer
- adaptive-computation
- jax
---

# {name}

{about}

| | |
|---|---|
{rows}

```python
import avit_jax

model, params = avit_jax.load("{source}")
for one in avit_jax.predict(model, params, ["photo.png"]):
    print(one.top5, one.probabilities, one.macs_ratio)
```

This network runs with the Python package avit_jax, an implementation of
[A-ViT](https://arxiv.org/abs/2112.07658): each token stops once its halting score is high enough.
"""


def save(
    folder: epath.PathLike,
    model: vit.AViT,
    params: Mapping[str, Any],
    *,
    about: str = "A vision transformer with adaptive tokens.",
    results: Mapping[str, object] | None = None,
    license: str = "apache-2.0",
) -> None:
    """Writes `model.safetensors`, `config.json` and a model card, for `push` and for `load`.

    Args:
      folder: to write to; it is created.
      model: from `avit_jax.load`, or any other `AViT`, whose images get ImageNet's mean and std.
      params: its parameters.
      about: first sentences of the model card.
      results: what was measured, by name, for the model card.
      license: of the weights, in the hub's spelling.

    Raises:
      errors.UserError: the folder holds a run.
      OSError: the folder cannot be written.
    """
    path = epath.Path(files.resolve(os.fspath(folder), "the folder"))
    if (path / "checkpoints").exists():
        raise errors.UserError(f"{path} is the workdir of a run: name another folder.")
    full = model if isinstance(model, PretrainedAViT) else pretrained.of_model(model)
    config = config_of(full)
    weights = path / "model.safetensors"
    run_config.write_weights(weights, params, full, config, full.label_names)
    files.write(path / "config.json", json.dumps(to_json(full), indent=2) + "\n")
    card = model_card(
        *(path.name, full),
        source=f"{_OWNER}/{path.name}",
        about=about,
        results=results,
        license=license,
    )
    files.write(path / "README.md", card)


def push(folder: epath.PathLike, name: str, *, private: bool = False) -> str:
    """Uploads a folder that `save` wrote to the Hugging Face hub.

    Args:
      folder: to upload.
      name: `owner/name` on the hub; it is created if it does not exist.
      private: whether a new repository is private.

    Returns:
      The name for `avit_jax.load`.

    Raises:
      errors.UserError: the folder holds no network, huggingface_hub is not installed, or the upload
        fails.
    """
    name, path = name.removeprefix(tensor_files.HUB), epath.Path(folder)
    if not (path / "model.safetensors").exists():
        raise errors.UserError(f"{folder} holds no network: write one with avit_jax.save first.")
    if locate.hub_name(name) is None:
        raise errors.UserError(f"a name on the hub is owner/name; got {name!r}.")
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise errors.UserError(
            "an upload needs a package: run `pip install huggingface_hub`."
        ) from error
    if (path / "README.md").exists():
        card = (path / "README.md").read_text()
        files.write(path / "README.md", card.replace(f"{_OWNER}/{path.name}", f"hf-hub:{name}"))
    try:
        api = HfApi()
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:  # no network, no login, no permission
        raise errors.UserError(
            f"{name} cannot be uploaded ({errors.first_line(error)}): log in with `hf auth login`, "
            "and check the owner."
        ) from error
    return f"{tensor_files.HUB}{name}"


def config_of(model: PretrainedAViT) -> Any:
    """Returns the default configuration with sizes, gate and preprocessing of a model."""
    config = config_lib.default()
    values = {key: getattr(model, key) for key in config.model}
    values |= {
        "image_size": model.pixels,
        "dtype": str(jnp.dtype(model.dtype or jnp.float32)),
    }
    config.model.update(values)
    config.halting.enabled = model.halting is not None
    if model.halting is not None:
        config.halting.update(dataclasses.asdict(model.halting))
    config.data.name = ""  # a model does not know its data set
    config.data.update({"mean": model.mean, "std": model.std, "crop_ratio": model.crop_ratio})
    config.data.range, config.loss.sigmoid = model.value_range, model.sigmoid
    config.loss.target_depth = min(config.loss.target_depth, float(model.depth))
    return config


def to_json(model: PretrainedAViT) -> dict[str, Any]:
    """Returns the `config.json` of a network, in timm's names where timm has one."""
    return {
        "library_name": "avit_jax",
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.num_heads,
        "patch_size": model.patch_size,
        "in_chans": model.channels,
        "num_classes": model.num_classes,
        "img_size": list(model.pixels),
        "norm_eps": model.norm_eps,
        "mean": list(model.mean),
        "std": list(model.std),
        "crop_pct": model.crop_ratio,
        "label_names": list(model.label_names),
    }


def model_card(
    name: str,
    model: PretrainedAViT,
    *,
    source: str,
    about: str,
    results: Mapping[str, object] | None = None,
    license: str = "apache-2.0",
) -> str:
    """Returns a model card in Markdown.

    Args:
      name: title.
      model: gives the sizes.
      source: what `avit_jax.load` takes.
      about: first sentences.
      results: what was measured, by name.
      license: of the weights.
    """
    gate = model.halting
    kind = "no halting" if gate is None else "merging" if gate.merge else "halting"
    facts = {
        "images": f"{model.pixels[0]} x {model.pixels[1]} pixels, {model.channels} channel(s)",
        "network": f"{model.depth} layers of width {model.width}, patches of {model.patch_size}",
        "tokens": f"{model.num_tokens}, {kind}",
        "MACs of the static network": f"{flops.static_macs(model) / 1e6:.2f} million per image",
        **(results or {}),
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return _CARD.format(name=name, about=about, rows=rows, source=source, license=license)
