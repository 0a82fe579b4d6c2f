"""SR3's conditional U-Net: predicts the noise in `y`, given the image to restore and the noise level.

Module names are SR3's, so that its checkpoints load without renaming.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Norm, UNetConfig


class NoiseLevelEncoding(nn.Module):
    """Sinusoid of the continuous noise level: (B, 1) → (B, width), sines then cosines."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.waves = width // 2

    def forward(self, noise_level: Tensor) -> Tensor:
        """Encode levels of shape (B, 1)."""
        k = torch.arange(self.waves, dtype=noise_level.dtype, device=noise_level.device)
        angle = noise_level * torch.exp(-math.log(1e4) / self.waves * k)
        return torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1)


class Block(nn.Module):
    """norm → SiLU → dropout → 3×3 convolution."""

    def __init__(self, c: UNetConfig, inputs: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.block = nn.Sequential(
            norm(c, inputs), nn.SiLU(), nn.Dropout(dropout), nn.Conv2d(inputs, outputs, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H, W)."""
        out: Tensor = self.block(x)
        return out


class NoiseShift(nn.Module):
    """Adds a linear image of the noise embedding to every pixel."""

    def __init__(self, embedding: int, outputs: int) -> None:
        super().__init__()
        self.noise_func = nn.Sequential(nn.Linear(embedding, outputs))

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Shift (B, C, H, W) by an embedding of (B, width)."""
        shift: Tensor = self.noise_func(embedding)
        return x + shift[:, :, None, None]


class ResidualBlock(nn.Module):
    """Two blocks with the noise level added in between, and a skip."""

    def __init__(self, c: UNetConfig, inputs: int, outputs: int) -> None:
        super().__init__()
        self.noise_func = NoiseShift(c.width, outputs)
        self.block1 = Block(c, inputs, outputs)
        self.block2 = Block(c, outputs, outputs, c.dropout)
        self.res_conv = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H, W)."""
        h = self.block2(self.noise_func(self.block1(x), embedding))
        out: Tensor = h + self.res_conv(x)
        return out


class SelfAttention(nn.Module):
    """One-head attention over all pixels, scaled by 1/√channels, with a skip."""

    def __init__(self, c: UNetConfig, channels: int) -> None:
        super().__init__()
        self.norm = norm(c, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=False)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → the same shape."""
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).chunk(3, dim=-1)  # (B, HW, C) each
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(x.shape)) + x
        return out


class Stage(nn.Module):
    """A residual block, followed by attention where its level has it."""

    def __init__(self, c: UNetConfig, inputs: int, outputs: int, *, attention: bool) -> None:
        super().__init__()
        self.res_block = ResidualBlock(c, inputs, outputs)
        self.attn = SelfAttention(c, outputs) if attention else None

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H, W)."""
        x = self.res_block(x, embedding)
        return x if self.attn is None else self.attn(x)


class Downsample(nn.Module):
    """Halves both sides with a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, H/2, W/2)."""
        out: Tensor = self.conv(x)
        return out


class Upsample(nn.Module):
    """Doubles both sides: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C, 2H, 2W)."""
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class UNet(nn.Module):
    """The whole U-Net. `forward(y, condition, noise_level)` → noise; sides are multiples of `config.alignment`."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        c, levels = config, len(config.multipliers)
        widths = [c.width * m for m in c.multipliers]
        self.config = c
        self.noise_level_mlp = nn.Sequential(
            NoiseLevelEncoding(c.width), nn.Linear(c.width, 4 * c.width), nn.SiLU(), nn.Linear(4 * c.width, c.width)
        )
        channels, skips = c.width, [c.width]
        downs: list[nn.Module] = [nn.Conv2d(6, c.width, 3, padding=1)]
        for level, width in enumerate(widths):
            for _ in range(c.blocks):
                downs.append(Stage(c, channels, width, attention=level in c.attention_levels))
                channels = width
                skips.append(channels)
            if level < levels - 1:
                downs.append(Downsample(channels))
                skips.append(channels)
        self.downs = nn.ModuleList(downs)
        self.mid = nn.ModuleList(Stage(c, channels, channels, attention=attention) for attention in (True, False))
        ups: list[nn.Module] = []
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(c.blocks + 1):
                ups.append(Stage(c, channels + skips.pop(), width, attention=level in c.attention_levels))
                channels = width
            if level > 0:
                ups.append(Upsample(channels))
        self.ups = nn.ModuleList(ups)
        self.final_conv = Block(c, channels, 3)

    def forward(self, y: Tensor, condition: Tensor, noise_level: Tensor) -> Tensor:
        """Predict the noise in `y` (B, 3, H, W) for the image `condition` at `noise_level` (B, 1)."""
        embedding = self.noise_level_mlp(noise_level)
        x = torch.cat([condition, y], dim=1)
        skips = []
        for layer in self.downs:
            x = layer(x, embedding) if isinstance(layer, Stage) else layer(x)
            skips.append(x)
        for layer in self.mid:
            x = layer(x, embedding)
        for layer in self.ups:
            x = layer(torch.cat([x, skips.pop()], dim=1), embedding) if isinstance(layer, Stage) else layer(x)
        out: Tensor = self.final_conv(x)
        return out


def norm(c: UNetConfig, channels: int) -> nn.Module:
    """Return the U-Net's normalisation for `channels`."""
    return nn.BatchNorm2d(channels) if c.norm is Norm.BATCH else nn.GroupNorm(c.groups, channels)
