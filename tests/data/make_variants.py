"""Makes weights/variants.npz: random networks of timm and transformers, with their own outputs.

python tests/data/make_variants.py, with torch, timm 1.0.31 and transformers 5.24 installed.

The names are NAME/images, NAME/expected, NAME/config (the text of config.json), NAME/shapes (the
text of a dictionary of tensors) and NAME/data (the numbers of all tensors). A name with "memory"
has the tensors' names of transformers 5 in memory.
"""

import functools
import json
import pathlib

import numpy as np
import safetensors.torch
import timm
import torch
import transformers

FILE = pathlib.Path(__file__).parent / "weights/variants.npz"
TIMM = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 2, "num_heads": 2}
TIMM |= {"mlp_ratio": 2.0, "num_classes": 3}
GATED = functools.partial(timm.layers.GluMlp, act_layer=torch.nn.SiLU, gate_last=False)
VARIANTS = {
    "deit3": {"no_embed_class": True, "init_values": 1e-5},
    "dinov2": {"init_values": 1e-5, "num_classes": 0},
    "dinov2_registers": {"init_values": 1e-5, "reg_tokens": 4, "no_embed_class": True},
    "registers_with_positions": {"reg_tokens": 2},
    "gated": {"init_values": 1e-5, "mlp_layer": GATED, "act_layer": "silu"},
    "clip": {"pre_norm": True, "norm_layer": functools.partial(torch.nn.LayerNorm, eps=1e-5)},
    "quick_gelu": {"act_layer": "quick_gelu"},
    "siglip_gap": {"class_token": False, "global_pool": "avg", "fc_norm": False}
    | {"act_layer": "gelu_tanh"},
    "fc_norm": {"class_token": False, "global_pool": "avg"},
    "class_and_max": {"global_pool": "max", "fc_norm": False},
    "siglip": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
    "siglip_features": {"class_token": False, "global_pool": "map", "num_classes": 0},
    "registers_gap": {"class_token": False, "reg_tokens": 4, "no_embed_class": True}
    | {"global_pool": "avg", "init_values": 1e-5},
    "qk_norm": {"qk_norm": True, "qkv_bias": False},
    "wide": {"img_size": (8, 16), "no_embed_class": True},
}
HUGGING_FACE = {"image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 8}
HUGGING_FACE |= {"num_hidden_layers": 2, "num_attention_heads": 2}
WIDTH = {"intermediate_size": 16}


def _random(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def _hugging_face() -> dict[str, tuple[torch.nn.Module, str]]:
    """Returns name -> (model, its output that is expected)."""
    t, sizes = transformers, HUGGING_FACE | WIDTH
    dinov2 = {"mlp_ratio": 2}
    return {
        "Dinov2": (t.Dinov2Model(t.Dinov2Config(**HUGGING_FACE, **dinov2)), "pooler_output"),
        "Dinov2_gated": (
            t.Dinov2Model(t.Dinov2Config(**HUGGING_FACE, **dinov2, use_swiglu_ffn=True)),
            "pooler_output",
        ),
        "Dinov2WithRegisters": (
            t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**HUGGING_FACE, **dinov2)),
            "pooler_output",
        ),
        "CLIPVision": (t.CLIPVisionModel(t.CLIPVisionConfig(**sizes)), "pooler_output"),
        "CLIPVisionWithProjection": (
            t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**sizes, projection_dim=5)),
            "image_embeds",
        ),
        "SigLIPVision": (t.SiglipVisionModel(t.SiglipVisionConfig(**sizes)), "pooler_output"),
        "SigLIPClassifier": (
            t.SiglipForImageClassification(t.SiglipConfig(vision_config=sizes, num_labels=3)),
            "logits",
        ),
        "DeiTWithoutTeacher": (
            t.DeiTForImageClassification(t.DeiTConfig(**sizes, num_labels=3)),
            "logits",
        ),
        "IJepa": (t.IJepaForImageClassification(t.IJepaConfig(**sizes, num_labels=3)), "logits"),
    }


def _add(
    arrays: dict[str, np.ndarray], name: str, config: str, state: dict, **more: object
) -> None:
    arrays[f"{name}/config"] = np.array(config)
    arrays[f"{name}/shapes"] = np.array(json.dumps({key: [*x.shape] for key, x in state.items()}))
    arrays[f"{name}/data"] = np.concatenate([x.numpy().ravel() for x in state.values()])
    arrays |= {f"{name}/{key}": value.detach().numpy() for key, value in more.items()}


def main() -> None:
    """Writes the file."""
    torch.manual_seed(0)
    arrays: dict[str, np.ndarray] = {}
    for name, changes in VARIANTS.items():
        sizes = TIMM | changes
        model = _random(timm.models.VisionTransformer(**sizes))
        images = torch.randn(2, 1, *model.patch_embed.img_size)
        known = {key: value for key, value in sizes.items() if not callable(value)}
        known |= {"norm_eps": 1e-5} if "norm_layer" in changes else {}
        config = {"num_classes": sizes["num_classes"], "model_args": known}
        config["global_pool"] = sizes.get("global_pool", "token")
        found = {"images": images.permute(0, 2, 3, 1), "expected": model(images)}
        _add(arrays, name, json.dumps(config), model.state_dict(), **found)
    for name, (model, output) in _hugging_face().items():
        images = torch.randn(2, 1, 8, 8)
        result = _random(model)(pixel_values=images)
        found = {"images": images.permute(0, 2, 3, 1), "expected": result[output]}
        folder = FILE.with_name("new")
        model.save_pretrained(folder)
        config = (folder / "config.json").read_text()
        state = safetensors.torch.load_file(folder / "model.safetensors")
        _add(arrays, name, config, state, **found)
        if "Dinov2" in name or name in ("CLIPVision", "SigLIPVision"):
            _add(arrays, f"{name}_memory", config, model.state_dict(), **found)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
