"""The size of an SR3 U-Net, read from the names and shapes of its tensors."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from ..errors import CheckpointError
from .config import Norm, UNetConfig


def read_size(path: Path, weights: Mapping[str, Tensor], like: UNetConfig) -> UNetConfig | None:
    """Return `like` with the size and the norm of a file's tensors, under our names; None if they do not tell.

    Shapes say nothing of GroupNorm's groups: it has those of `like`, or the most of them that divide all widths. Raises
    CheckpointError where it is another kind of network.
    """

    def shape(name: str) -> tuple[int, ...]:
        return tuple(weights[name].shape) if name in weights else ()

    width, inputs = (*shape("unet.downs.0.weight"), 0, 0)[:2]
    levels: list[list[tuple[int, bool]]] = [[]]  # of each block: its channels, and whether it has attention
    for place in range(1, len(weights)):
        name = f"unet.downs.{place}"
        if convolution := shape(f"{name}.res_block.block1.block.3.weight"):
            levels[-1].append((convolution[0], f"{name}.attn.qkv.weight" in weights))
        elif f"{name}.conv.weight" in weights:
            levels.append([])
        else:
            break
    blocks = len(levels[0])
    alike = all(len(level) == blocks and len(set(level)) == 1 for level in levels)
    if not (width and blocks and alike and all(level[0][0] % width == 0 for level in levels)):
        return None
    if inputs != 6:
        raise CheckpointError(
            f"{path} is an SR3 U-Net with {inputs} input channels; one that restores has 6, the image to restore and y"
        )
    if shape("unet.downs.1.res_block.noise_func.noise_func.0.weight")[:1] == (2 * levels[0][0][0],):
        raise CheckpointError(
            f"{path} is an SR3 U-Net trained with use_affine_level, which is not supported: train without it"
        )
    widths = [level[0][0] for level in levels]
    return replace(
        like,
        width=width,
        multipliers=tuple(channels // width for channels in widths),
        blocks=blocks,
        attention_levels=tuple(index for index, level in enumerate(levels) if level[0][1]),
        groups=math.gcd(like.groups, width, *widths),
        norm=Norm.BATCH if "unet.downs.1.res_block.block1.block.0.running_mean" in weights else Norm.GROUP,
    )


def in_words(unet: UNetConfig) -> str:
    """Return the size of a U-Net as people say it."""
    attention = ", ".join(f"1/{2**level}" for level in unet.attention_levels)
    return (
        f"{unet.width} channels × {'-'.join(map(str, unet.multipliers))}, {unet.blocks} residual blocks a level, "
        f"attention at {attention or 'the lowest level alone'}"
    )
