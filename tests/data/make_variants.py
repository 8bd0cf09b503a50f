"""Makes random networks of timm and transformers, with their own outputs.

weights/dinov3.npz holds those with rotary position embeddings, weights/variants.npz the others.

python tests/data/make_variants.py, with torch, timm 1.0.31 and transformers 5.24 installed.

The names are NAME/images, NAME/expected, NAME/config (the text of config.json), NAME/shapes (the
text of a dictionary of tensors) and NAME/data (the numbers of all tensors). A name with "memory"
has the tensors' names of transformers 5 in memory.
"""

import functools
import json
import pathlib
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "weights"
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
# Of timm's class Eva.
DINOV3 = {"use_rot_pos_emb": True, "use_abs_pos_emb": False, "rope_type": "dinov3"}
DINOV3 |= {"rope_temperature": 100.0, "rope_rotate_half": True, "init_values": 1e-5}
DINOV3 |= {"use_fc_norm": False, "norm_layer": functools.partial(torch.nn.LayerNorm, eps=1e-5)}
EVA = {
    "dinov3": {"num_reg_tokens": 4, "qkv_bias": False, "global_pool": "token"},
    "dinov3_wide": {"img_size": (8, 16), "global_pool": "avg"},
    "dinov3_gated": {"swiglu_mlp": True, "swiglu_align_to": 8, "rope_temperature": 30.0}
    | {"global_pool": "avg", "num_reg_tokens": 1, "num_classes": 0},
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


def _dinov3() -> dict[str, tuple[torch.nn.Module, str]]:
    sizes = HUGGING_FACE | WIDTH | {"hidden_size": 16}
    kinds = {
        "DINOv3": {"num_register_tokens": 4},
        "DINOv3_wide": {"image_size": [8, 16], "key_bias": True, "rope_theta": 30.0},
        "DINOv3_gated": {"use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 1}
        | {"query_bias": False, "value_bias": False},
    }
    t = transformers
    return {
        name: (t.DINOv3ViTModel(t.DINOv3ViTConfig(**sizes | changes)), "pooler_output")
        for name, changes in kinds.items()
    }


def _add(
    arrays: dict[str, np.ndarray], name: str, config: str, state: dict, **more: object
) -> None:
    arrays[f"{name}/config"] = np.array(config)
    arrays[f"{name}/shapes"] = np.array(json.dumps({key: [*x.shape] for key, x in state.items()}))
    arrays[f"{name}/data"] = np.concatenate([x.numpy().ravel() for x in state.values()])
    arrays |= {f"{name}/{key}": value.detach().numpy() for key, value in more.items()}


def _write(file: pathlib.Path, kind: Any, variants: dict, hugging_face: Any) -> None:
    """Writes networks of a class of timm, and networks of transformers."""
    torch.manual_seed(0)
    arrays: dict[str, np.ndarray] = {}
    for name, changes in variants.items():
        sizes = TIMM | changes
        model = _random(kind(**sizes))
        images = torch.randn(2, 1, *model.patch_embed.img_size)
        known = {key: value for key, value in sizes.items() if not callable(value)}
        known |= {"norm_eps": 1e-5} if "norm_layer" in changes else {}
        config = {"num_classes": sizes["num_classes"], "model_args": known}
        config["global_pool"] = sizes.get("global_pool", "token")
        found = {"images": images.permute(0, 2, 3, 1), "expected": model(images)}
        _add(arrays, name, json.dumps(config), model.state_dict(), **found)
    for name, (model, output) in hugging_face().items():
        size = model.config.image_size if "wide" in name else (8, 8)
        images = torch.randn(2, 1, *size)
        result = _random(model)(pixel_values=images)
        found = {"images": images.permute(0, 2, 3, 1), "expected": result[output]}
        folder = FOLDER / "new"
        model.save_pretrained(folder)
        config = (folder / "config.json").read_text()
        state = safetensors.torch.load_file(folder / "model.safetensors")
        _add(arrays, name, config, state, **found)
        if name.lower().startswith("dino") or name in ("CLIPVision", "SigLIPVision"):
            _add(arrays, f"{name}_memory", config, model.state_dict(), **found)
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    np.savez_compressed(file, **arrays)


def main() -> None:
    """Writes the files."""
    _write(FOLDER / "variants.npz", timm.models.VisionTransformer, VARIANTS, _hugging_face)
    eva = {name: DINOV3 | {"embed_dim": 16} | changes for name, changes in EVA.items()}
    _write(FOLDER / "dinov3.npz", timm.models.Eva, eva, _dinov3)


if __name__ == "__main__":
    main()
