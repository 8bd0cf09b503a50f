"""Golden cases: what the authors' implementation gives on seeded weights and images.

Each `tests/data/case_*.npz` holds a configuration and outputs; A and D hold their weights and
images too, F (the size of DeiT-T) is made here from the recipe that its file describes.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avit_jax import weights
from avit_jax.core import halting
from avit_jax.models import vit
from avit_jax.training import losses

_DATA = pathlib.Path(__file__).parent / "data"


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden case.

    Attributes:
      name: A, D or F.
      config: the reference's settings, in its own names.
      state_dict: PyTorch name -> float32 array.
      images: `(B, H, W, C)` float32.
      labels: `(B,)` int.
      data: everything in the file, by key.
    """

    name: str
    config: Mapping[str, Any]
    state_dict: Mapping[str, np.ndarray]
    images: np.ndarray
    labels: np.ndarray
    data: Mapping[str, np.ndarray]

    def model(self, **changes: Any) -> vit.AViT:
        """The network of the case, with some attributes changed; its gate is a parameter, so that A
        and D share a program.
        """
        c = self.config
        sizes = dict(
            width=c["dim"],
            depth=c["depth"],
            num_heads=c["heads"],
            mlp_ratio=c["mlp_ratio"],
            channels=c["in_chans"],
        )
        image = dict(
            image_size=(c["img_h"], c["img_w"]), patch_size=c["patch"], num_classes=c["classes"]
        )
        gate = dict(halting=halting.HaltingConfig(epsilon=c["eps"], learnable=True))
        return vit.AViT(**(sizes | image | gate | changes))

    def params(self, dtype: Any = np.float32, **gate: float) -> dict[str, Any]:
        """Our parameter tree; gamma and beta are the case's own if not given."""
        params = weights.from_torch(
            {name: array.astype(dtype) for name, array in self.state_dict.items()}
        )
        gate = {"gamma": self.config["gate_scale"], "beta": -self.config["gate_center"]} | gate
        return params | {"gate": {name: jnp.asarray(value, dtype) for name, value in gate.items()}}

    def run(
        self,
        dtype: Any = np.float32,
        share: Any = (1, 1, 1, 0),
        pick: Any = slice(None),
        **gate: float,
    ) -> Any:
        """Runs images forwards and backwards.

        Args:
          dtype: of the computation.
          share: weights of task, ponder, official and paper prior loss in the sum that is
            differentiated.
          pick: which images, a slice or indices.
          **gate: gamma or beta, where they are not the case's own.

        Returns:
          `(the four losses, logits, aux)` and the gradient, in PyTorch's names.
        """
        c = self.config
        gradient = _gradient(
            self.model(), c["ponder_scale"], c["alpha"], c["target_depth"], fast=dtype == np.float64
        )
        images, labels = self.images[pick].astype(dtype), self.labels[pick]
        (_, outputs), grads = jax.device_get(
            gradient(self.params(dtype, **gate), np.asarray(share, dtype), images, labels)
        )
        return outputs, weights.to_torch(grads, patch_shape=(c["patch"], c["patch"], c["in_chans"]))


@functools.cache
def forward(model: vit.AViT) -> Callable[..., Any]:
    """The compiled `apply` of a model, one for all equal models."""
    return jax.jit(model.apply)


@functools.cache
def _gradient(
    model: vit.AViT, ponder_weight: float, prior_weight: float, target_depth: float, fast: bool
) -> Callable[..., Any]:
    """The compiled gradient; `fast` compiles faster to a slower program."""

    def total(params, share, images, labels):
        logits, aux = model.apply({"params": params}, images)
        ponder = ponder_weight * losses.ponder_loss(aux)
        priors = [
            prior_weight * losses.prior_loss(aux, target_depth=target_depth, mode=mode)
            for mode in ("official", "paper")
        ]
        terms = (losses.cross_entropy(logits, labels), ponder, *priors)
        return share @ jnp.stack(terms), (terms, logits, aux)

    options = {"xla_backend_optimization_level": 0} if fast else {}
    return jax.jit(jax.value_and_grad(total, has_aux=True), compiler_options=options)


@functools.cache
def load(name: str) -> Case:
    with np.load(_DATA / f"case_{name}.npz") as file:
        data = dict(file)
    config = json.loads(str(data["config_json"]))
    state_dict = {
        key.removeprefix("params/"): array
        for key, array in data.items()
        if key.startswith("params/")
    }
    if "images" in data:
        images, labels = data["images"], data["labels"]
    else:
        state_dict, (images, labels) = recipe_params(config), recipe_images(config)
    return Case(name, config, state_dict, images.transpose(0, 2, 3, 1), labels, data)


def digest(state_dict: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names and little-endian float32 values, in order."""
    sha = hashlib.sha256()
    for name, array in state_dict.items():
        sha.update(name.encode())
        sha.update(np.ascontiguousarray(array, dtype="<f4").tobytes())
    return sha.hexdigest()


def _uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Zero mean, standard deviation 1 after the factor sqrt(3)."""
    return 2.0 * rng.random(shape) - 1.0


def _shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape, in the order in which the recipe draws."""
    width, patch, classes = config["dim"], config["patch"], config["classes"]
    hidden = int(width * config["mlp_ratio"])
    num_tokens = 1 + (config["img_h"] // patch) * (config["img_w"] // patch)
    matrices = {"patch_embed.proj": (width, config["in_chans"], patch, patch)}
    for i in range(config["depth"]):
        layer = dict(norm1=(width,), qkv=(3 * width, width), proj=(width, width))
        layer |= dict(norm2=(width,), fc1=(hidden, width), fc2=(width, hidden))
        prefix = dict(qkv="attn.", proj="attn.", fc1="mlp.", fc2="mlp.")
        matrices |= {
            f"blocks.{i}.{prefix.get(name, '')}{name}": shape for name, shape in layer.items()
        }
    matrices |= {"norm": (width,), "head": (classes, width)}
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, num_tokens, width)}
    for name, shape in matrices.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def _std(name: str, shape: tuple[int, ...]) -> float:
    if name in ("cls_token", "pos_embed"):
        return {"cls_token": 0.5, "pos_embed": 0.3}[name]
    if len(shape) == 1:
        return 0.1
    gain = 1.5 if "qkv" in name else 1.0
    return gain / math.prod(shape[1:]) ** 0.5


def recipe_params(config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Float32 weights that float16 holds exactly; where the recipe says so, channel 0 is built to
    carry the gate.
    """
    recipe, scale, center = config["recipe"], config["gate_scale"], config["gate_center"]
    rng = np.random.Generator(np.random.PCG64(recipe["seed"]))
    params = {}
    for name, shape in _shapes(config).items():
        is_norm_scale = "norm" in name and name.endswith("weight")
        params[name] = _uniform(rng, shape) * (3.0**0.5 * _std(name, shape)) + is_norm_scale
    if recipe["gate_design"]:
        # Times zero, which keeps the sign: the check sum tells -0 from 0.
        params["cls_token"][..., 0] *= 0.0
        gate = params["pos_embed"][0, :, 0]
        gate *= recipe["spread"] / (0.3 * scale)
        gate[0] = 0.0
        gate += (
            center + np.where(np.arange(len(gate)) == 0, recipe["u0_cls"], recipe["u0_tok"])
        ) / scale
        params["patch_embed.proj.weight"][0] *= recipe["kpatch"] / scale
        params["patch_embed.proj.bias"][0] *= 0.0
        for i in range(config["depth"]):
            for module in ("attn.proj", "mlp.fc2"):
                params[f"blocks.{i}.{module}.weight"][0] *= recipe["kappa"] / scale
            params[f"blocks.{i}.attn.proj.bias"][0] *= 0.0
            params[f"blocks.{i}.mlp.fc2.bias"][0] = recipe["drift"] / scale
    return {name: array.astype(np.float16).astype(np.float32) for name, array in params.items()}


def recipe_images(config: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Images NCHW (noise of its own contrast, an offset and a slope per channel) and labels."""
    batch, channels, height, width = (
        config[key] for key in ("batch", "in_chans", "img_h", "img_w")
    )
    rng = np.random.Generator(np.random.PCG64(config["recipe"]["seed"] + 1000003))
    root = 3.0**0.5
    noise = _uniform(rng, (batch, channels, height, width)) * root
    offset = _uniform(rng, (batch, channels, 1, 1)) * root
    contrast = 0.3 + 0.9 * rng.random((batch, 1, 1, 1))
    slope_y, slope_x = np.moveaxis(_uniform(rng, (batch, channels, 2)) * root, -1, 0)[
        ..., None, None
    ]
    y, x = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)
    images = contrast * noise * 0.6 + 0.7 * offset + 0.7 * (slope_y * y + slope_x * x)
    labels = np.floor(rng.random(batch) * config["classes"]).astype(np.int64)
    return images.astype(np.float16).astype(np.float32), labels
