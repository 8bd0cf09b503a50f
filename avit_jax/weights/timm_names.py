"""What the names of timm's vision transformers tell, such as `vit_base_patch32_clip_224.openai`.

Source: `timm.models.vision_transformer` and `timm.models.deit` of timm 1.0.31.
"""

import re
from typing import Any

# Networks that may be ours; the last two have no position embedding for the class token.
FAMILIES = ("vit_", "deit_", "test_vit", "eva_large", "eva_giant", "deit3_", "flexivit_")
NO_EMBED_CLASS = FAMILIES[-2:]
# With the rotary position embeddings of DINOv3.
_DINOV3 = re.compile(r"vit_.*_(dinov3|lingbot)(_.*|\..*)?")
_DINOV3_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 20, 1536: 24, 4096: 32}  # by width
# With other rotary position embeddings, or with grouped queries.
_OTHER_ROTARY = re.compile(r"(vit_(.*_rope_|pe_|.*_sapiens2)|eva02_).*")
# That average, besides those with "_gap" and "_dinov3" in their names.
_AVERAGE = ("eva_large", "eva_giant", "test_vit2", "test_vit4")
# Sizes -> width, number of layers, number of heads.
_VARIANTS = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
# (size, width) -> number of heads, for networks of other depths.
_HEADS = {
    **{(size, width): heads for size, (width, _, heads) in _VARIANTS.items()},
    **{("base", 896): 14, ("giant", 1408): 16, ("giant", 1536): 24, ("giantopt", 1536): 16},
    **{("gigantic", 1664): 16, ("intern300m", 1024): 16, ("so400m", 1152): 16},
    **{("so150m", 896): 14, ("so150m2", 832): 13, ("betwixt", 640): 10, ("medium", 512): 8},
    **{("mediumd", 512): 8, ("little", 320): 5, ("wee", 256): 4, ("xsmall", 256): 4},
}
_PLAIN = re.compile(
    r"(?:vit|deit)_(tiny|small|base|large|huge)(_distilled)?_patch(\d{1,3})_(\d{1,5})(\..*)?"
)
_TANH = re.compile(
    r"vit_(base_patch32|so400m_patch16|giantopt_patch16)_siglip.*|vit_large_patch16_siglip.*_512"
)


def sizes(architecture: str) -> dict[str, Any]:
    """Returns the sizes of a plain network under the keys of timm's arguments, and `distilled`."""
    parts = _PLAIN.fullmatch(architecture)
    if parts is None:
        return {}
    result = dict(zip(("embed_dim", "depth", "num_heads"), _VARIANTS[parts[1]], strict=True))
    result |= {"distilled": parts[2] is not None}
    return result | {"patch_size": int(parts[3]), "img_size": int(parts[4])}


def num_heads(architecture: str, width: int) -> int | None:
    """Returns the number of heads of a network of this name and width; None if unknown."""
    if _DINOV3.fullmatch(architecture):
        return _DINOV3_HEADS.get(width)
    if architecture.startswith("vit_base_patch16_gap"):
        return 16 if width == 768 else None
    if architecture.startswith("test_vit"):
        return 2 if width == 64 else None
    return _HEADS.get((architecture.partition("_")[2].partition("_")[0], width))


def norm_eps(architecture: str) -> float | None:
    """Returns the epsilon of the layer norms; None for timm's default, 1e-6."""
    is_clip = "_clip_" in architecture and not architecture.startswith("eva_giant")
    return 1e-5 if is_clip or _DINOV3.fullmatch(architecture) else None


def rotary(architecture: str) -> dict[str, Any]:
    """Returns the rotary position embeddings of a network under the keys of timm's arguments."""
    if not _DINOV3.fullmatch(architecture):
        return {}
    return {
        "use_rot_pos_emb": True,
        "use_abs_pos_emb": False,
        "rope_type": "dinov3",
        "rope_temperature": 100.0,
        "rope_rotate_half": True,
    }


def has_other_rotary(architecture: str) -> bool:
    """Returns whether the queries and keys of a network rotate in another way than DINOv3's."""
    return _OTHER_ROTARY.fullmatch(architecture) is not None


def is_post_norm(architecture: str) -> bool:
    """Returns whether the layer norms of a network come after its branches."""
    return "_rpn_" in architecture


def pools_prefix(architecture: str) -> bool:
    """Returns whether the pooling of a network reads its register tokens too."""
    return architecture.partition(".")[0] == "test_vit3"


def may_average_last(architecture: str) -> bool:
    """Returns whether a network may average its tokens after the last norm by default."""
    return "_gap" in architecture or "_dinov3" in architecture


def attributes(architecture: str) -> dict[str, Any]:
    """Returns attributes of `AViT` that the tensors do not show."""
    name = architecture.partition(".")[0]
    quick = "quickgelu" in name
    pooled = "_gap" in name or (name.startswith(_AVERAGE) and "_clip_" not in name)
    by_query = "_siglip" in name or "_map_" in name
    return {
        "mlp": "quick_gelu" if quick else "gelu_tanh" if _TANH.fullmatch(name) else "gelu",
        "pool": "avg" if pooled or "_dinov3" in name else "map" if by_query else "token",
        **({"position_class": False} if name.startswith(NO_EMBED_CLASS) else {}),
    }
