"""Makes the files in weights/: random models of timm and transformers, with their own logits.

python tests/data/make_weights.py, with torch, timm, transformers and safetensors installed.
"""

import argparse
import pathlib

import numpy as np
import safetensors.torch
import timm
import torch
import transformers

FOLDER = pathlib.Path(__file__).parent / "weights"
SIZES = {
    "img_size": 16,
    "patch_size": 8,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 3,
    "num_classes": 5,
}


def _randomised(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def main() -> None:
    """Writes all files."""
    torch.manual_seed(0)
    FOLDER.mkdir(exist_ok=True)
    images = torch.randn(2, 3, 16, 16)
    logits = {}

    plain = _randomised(timm.models.VisionTransformer(**SIZES))
    logits["timm"] = plain(images)
    state = plain.state_dict()
    torch.save(
        {
            "model": state,
            "args": argparse.Namespace(lr=1.0),
            "epoch": 3,
            "optimizer": {"state": {0: {"m": torch.ones(2)}}},
        },
        FOLDER / "tiny-10-30.pth",
    )
    torch.save({"model": state}, FOLDER / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save({name: x.bfloat16() for name, x in state.items()}, FOLDER / "bfloat16.pth")
    safetensors.torch.save_file(state, FOLDER / "timm.safetensors")

    distilled = _randomised(timm.models.deit.VisionTransformerDistilled(**SIZES))
    logits["distilled"] = distilled(images)  # the mean of the two heads
    torch.save(distilled.state_dict(), FOLDER / "distilled.pth")

    sizes = {
        "image_size": 16,
        "patch_size": 8,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
    }
    sizes |= {"intermediate_size": 48, "num_labels": 5}
    vit = _randomised(transformers.ViTForImageClassification(transformers.ViTConfig(**sizes)))
    logits["vit"] = vit(images).logits
    vit.save_pretrained(FOLDER / "vit")
    deit = _randomised(
        transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**sizes))
    )
    logits["deit"] = deit(images).logits
    deit.save_pretrained(FOLDER / "deit")

    larger = timm.models.VisionTransformer(**SIZES | {"img_size": (24, 40)}).eval()
    patches = state["pos_embed"][:, 1:].reshape(1, 2, 2, 12).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(
        patches, size=(3, 5), mode="bicubic", align_corners=False
    )
    positions = torch.cat(
        [state["pos_embed"][:, :1], patches.permute(0, 2, 3, 1).reshape(1, 15, 12)], dim=1
    )
    larger.load_state_dict(state | {"pos_embed": positions})
    large_images = torch.randn(2, 3, 24, 40)
    logits["larger"] = larger(large_images)

    arrays = {name: x.detach().numpy() for name, x in logits.items()}
    channels_last = {"images": images, "large_images": large_images}
    arrays |= {name: x.numpy().transpose(0, 2, 3, 1) for name, x in channels_last.items()}
    np.savez(FOLDER / "expected.npz", **arrays)


if __name__ == "__main__":
    main()
