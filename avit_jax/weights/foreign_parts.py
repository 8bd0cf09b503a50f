"""Parts of a network that `AViT` lacks, as the names of tensors show them."""

import re
from collections.abc import Mapping

import numpy as np

from avit_jax.utils import errors
from avit_jax.weights import name_maps

# Names of tensors -> what they belong to; the first match counts.
_PARTS = {
    r".*(relative_position|rel_pos).*": "relative position biases",
    r".*\.attn\.(norm|inner_attn_ln|sub_norm)\..*": "a norm inside the attention",
    r".*\.mlp\.(norm|ffn_ln)\..*": "a norm inside the MLP",
    r".*\.attn\.lambda_.*": "differential attention",
    r".*\.attn\.proj_[lw]\..*": "talking heads in the attention",
    r".*\.attn\.(logit_scale|cpb_mlp.*)": "the cosine attention of Swin v2",
    r"blocks\.\d+\.attn\.[qkv]_proj\..*": "separate queries, keys and values, as in EVA-02",
    r"(.*\.)?(rope|rotary)[._].*": "rotary position embeddings other than DINOv3's",
    r"blocks\.\d+\.(attns|ffns|in_proj|attn_out_proj|mlp_out_proj)\..*": "parallel branches",
    r"blocks\.\d+\.(blocks|downsample)\..*|(layers\.\d+\.blocks|stages)\..*": "stages of layers",
    r"patch_embed\.(?!proj\.).*": "a patch embedding that is more than one convolution",
    r"norm\.(weight|bias)|fc_norm\..*": "a second norm after the last layer",
}


def problem(tensors: Mapping[str, np.ndarray]) -> str | None:
    """Returns why no `AViT` has these tensors, in timm's names; None if one may.

    Tensors that are missing by mistake are no such reason: `fitting.fit` names them.
    """
    missing, unexpected = name_maps.mismatches(tensors)
    for name in unexpected:
        for pattern, part in _PARTS.items():
            if re.fullmatch(pattern, name):
                return f"its {errors.printable(name)} belongs to {part}"
    if unexpected:
        return f"its {errors.printable(unexpected[0])} has no place in a plain vision transformer"
    if "blocks.*" in missing:
        return "it has no layers named blocks.*"
    for name in missing:
        module, _, kind = name.rpartition(".")
        if kind == "bias" and "norm" in module and f"{module}.weight" in tensors:
            return f"its {module} has no bias, as in RMSNorm"
        if name == "norm.weight" and "norm.bias" not in tensors:
            return "it has no norm after the last layer"
    kernel = np.shape(tensors.get("patch_embed.proj.weight", np.zeros((1, 1, 1, 1))))
    if len(kernel) != 4 or kernel[2] != kernel[3]:
        return f"its patch_embed.proj.weight is {kernel}, and not (D, channels, P, P)"
    return None
