"""Tensor names of other programs: recognises whose network a file holds, and translates the names into ours."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from .weightfile import listed, shown


@dataclass(frozen=True)
class Format:
    """A way of naming tensors. `part` is the prefix of ours when the network is only a part of the whole model."""

    words: str
    role: str
    part: str = ""
    renames: tuple[tuple[str, str], ...] = ()  # patterns for the start of a name, first match wins
    swin_scale: float | None = None  # where the code that has these names knows no other


BUNDLE = Format("diffiqa bundle", "bundle")
PLAIN = Format("diffiqa weights without configuration", "bundle")
MANIQA = Format(
    "MANIQA",
    "iqa",
    renames=(
        (r"vit\.", "vcg.vit."),
        (r"(?:tablock|channel_attn)1\.(\d+)\.c_([qkv])\.", r"tabs.\1.\2."),
        (r"(?:tablock|channel_attn)2\.(\d+)\.c_([qkv])\.", r"vcg.tabs2.\1.\2."),
        (r"conv1\.", "vcg.squeeze.0."),
        (r"swintransformer([12])\.", r"vcg.swin\1."),
        (r"conv2\.", "vcg.halve."),
        (r"fc_(score|weight)\.", r"vcg.\1."),
    ),
)
EARLY_MANIQA = Format("MANIQA before April 2022", "iqa", renames=MANIQA.renames, swin_scale=0.13)
IQA = Format(
    "Diff-V²-IQA authors' network",
    "iqa",
    renames=(
        *MANIQA.renames,
        (r"noise_levels$", "vcg.noise_codes"),
        (r"conv3\.", "vcg.squeeze.1."),
        (r"res\.", "vda.resnet."),
        (r"qa\.x_linear\.", "vda.rtab.residual."),
        (r"qa\.c_([qkv])\.", r"vda.rtab.\1."),
        (r"conv_s1\.", "vda.widen."),
        (r"fc_(score|weight)1\.", r"vda.\1."),
    ),
)
SR3 = Format(
    "SR3 U-Net",
    "unet",
    part="unet.",
    renames=((r"denoise_fn\.", "unet."), (r"(noise_level_mlp|downs|mid|ups|final_conv)\.", r"unet.\1.")),
)
DDPM = Format("U-Net of SR3's DDPM variant", "unet", part="unet.")
VIT = Format("timm ViT", "vit", part="vcg.vit.", renames=((r"", "vcg.vit."),))
LITE0 = Format("efficientnet-lite-pytorch", "lite0", part="vda.lite0.", renames=((r"", "vda.lite0."),))
# Its ViT may come alone, as DeiT-III. It is no part of Diff-V²-IQA: see pfd/checkpoint.py.
DEIQT = Format(
    "DEIQT",
    "deiqt",
    renames=(
        (r"head\.bunch_decoder\.layers\.0\.", "decoder.layer."),
        (r"head\.bunch_embedding$", "decoder.panels"),
        (r"head\.heads\.", "decoder.head."),
        (r"", "encoder."),
    ),
)
RESNET = Format("torchvision ResNet", "resnet", part="vda.resnet.", renames=((r"", "vda.resnet."),))

MAX_PREFIX = 3  # names before those of the network: `state.ema.model.`

# Tensors of other programs that this model does not use, by name after renaming. Any other tensor that does not fit is
# an error: an unexpected tensor usually means another network, whose score would be wrong.
UNUSED = (
    (r"vcg\.vit\.(norm|head|pre_logits|fc_norm)\.", "the ViT's final norm and head, which nothing reads"),
    (r"vcg\.swin[12]\.(.+\.)?downsample\.", "strided convolutions of the Swin stages, which nothing calls"),
    (r"vcg\.swin[12]\..+\.(relative_position_index|attn_mask)$", "index and mask tables of Swin, computed here"),
    (r"vda\.lite0\._fc\.", "the classifier of EfficientNet-Lite"),
    (r"encoder\.(head|fc_norm)\.", "the classifier of DeiT"),
    (r"(noise_embedding|bn1|rq_score)\.", "layers the authors left in and never call"),
    (
        r"(betas|((log|sqrt)_(one_minus_|recip_|recipm1_)?)?alphas_cumprod(_prev)?"
        r"|posterior_(variance|log_variance_clipped|mean_coef[12]))$",
        "the diffusion schedule of training, as ours is configured",
    ),
)


def recognise(names: Collection[str]) -> Format | None:
    """Return whose naming this is, or None."""

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if has("fc_score.") and has("tablock1."):
        return IQA if has("noise_levels") or has("res.") else MANIQA
    if has("fc_score.") and has("channel_attn1."):
        return EARLY_MANIQA
    if any(has(f"{prefix}time_mlp.") and has(f"{prefix}downs.1.res_block.mlp.") for prefix in ("", "denoise_fn.")):
        return DDPM
    if has("denoise_fn.") or (has("noise_level_mlp.") and has("downs.")):
        return SR3
    if has("patch_embed.") and has("blocks.0.attn."):
        return DEIQT if has("blocks.0.gamma_1") else VIT
    if has("_conv_stem.") and has("_blocks.0._depthwise_conv."):
        return LITE0
    if has("layer1.0.conv1.") and has("fc."):
        return RESNET
    if has("unet.") or has("vcg.") or has("vda."):
        return PLAIN
    return None


def find(path: Path, names: Collection[str], *, parts: bool) -> tuple[Format, str]:
    """Return whose naming a file has, and the prefix that a program put before it, or "".

    A moving average of the weights (`ema.`) comes before the weights themselves, a short prefix before a long one.
    `parts`: networks that are only a part of the model count under a prefix too, as in `backbone.layer1`. Raises
    CheckpointError if it is nobody's, or there are several.
    """
    below: dict[str, list[str]] = {}
    for name in names:
        pieces = name.split(".")
        for depth in range(min(len(pieces), MAX_PREFIX + 1)):
            prefix = "".join(f"{piece}." for piece in pieces[:depth])
            below.setdefault(prefix, []).append(name.removeprefix(prefix))
    found = {prefix: form for prefix, rest in below.items() if (form := recognise(rest))}
    found = {prefix: form for prefix, form in found.items() if parts or not prefix or not form.part}
    averages = {prefix: form for prefix, form in found.items() if is_average(prefix)}
    chosen = averages or found
    outermost = [prefix for prefix in chosen if not any(prefix != p and prefix.startswith(p) for p in chosen)]
    if len(outermost) > 1:
        raise CheckpointError(f"{path} holds several networks, under {listed(outermost)}: save one of them alone")
    if not outermost:
        raise CheckpointError(f"{path} holds the weights of some other network: {listed(list(names))}")
    return chosen[outermost[0]], outermost[0]


def is_average(prefix: str) -> bool:
    """Whether a key or prefix names a moving average of weights."""
    return re.search(r"(^|[._])ema([._]|$)", prefix) is not None


def adapt(form: Format, weights: Mapping[str, Tensor], vit_blocks: int) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors under our names, for a model with `vit_blocks` ViT blocks, and notes on those left out."""
    if not form.renames:
        return dict(weights), []
    ours: dict[str, Tensor] = {}
    left_out: dict[str, list[Tensor]] = {}
    for name, tensor in weights.items():
        new = _rename(form, name)
        if new in ours:
            raise CheckpointError(f"{shown(name)} is there twice, under two names for {shown(new)}")
        if why := _unused(new, vit_blocks):
            left_out.setdefault(why, []).append(tensor)
        elif new == "vcg.noise_codes" and tensor.ndim == 3 and tensor.shape[0] == 1:
            ours[new] = tensor[0]
        else:
            ours[new] = tensor
    return ours, [
        f"not used: {why} (tensors: {len(tensors)}, numbers: {sum(t.numel() for t in tensors):,})"
        for why, tensors in left_out.items()
    ]


def _rename(form: Format, name: str) -> str:
    for pattern, ours in form.renames:
        if match := re.match(pattern, name):
            return match.expand(ours) + name[match.end() :]
    return name


def _unused(name: str, vit_blocks: int) -> str | None:
    """Return why this model does not use a tensor; None if it does, or if the tensor is unknown."""
    block = re.match(r"vcg\.vit\.blocks\.(\d+)\.", name)
    if block and int(block[1]) >= vit_blocks:
        return f"ViT blocks from {vit_blocks} on, after the last one that is read"
    return next((why for pattern, why in UNUSED if re.match(pattern, name)), None)
