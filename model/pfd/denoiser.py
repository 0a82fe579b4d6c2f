"""One step of the denoiser: features and prompts → the noise in them. Its bottlenecks serve the noise adapter too."""

import torch
from torch import Tensor, nn

from ..config import Norm
from .config import PfdConfig


class Bottleneck(nn.Module):
    """1×1 down → 3×3 → 1×1 up, each normalised, ReLU between them, and a skip."""

    def __init__(self, c: PfdConfig, reduction: int) -> None:
        super().__init__()
        inner = c.width // reduction
        self.down = nn.Conv2d(c.width, inner, 1, bias=False)
        self.norm1 = _norm(c, inner)
        self.mix = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.norm2 = _norm(c, inner)
        self.up = nn.Conv2d(inner, c.width, 1, bias=False)
        self.norm3 = _norm(c, c.width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, grid, grid) → the same shape."""
        h = torch.relu(self.norm1(self.down(x)))
        h = torch.relu(self.norm2(self.mix(h)))
        out: Tensor = x + self.norm3(self.up(h))
        return out


class CrossAttention(nn.Module):
    """Every place of a map asks the two prompts, and adds what it hears."""

    def __init__(self, c: PfdConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        self.attend = nn.MultiheadAttention(c.width, c.heads, batch_first=True)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """Map (N, width, grid, grid), condition (N, 2, width) → a map."""
        places = x.flatten(2).transpose(1, 2)
        heard, _ = self.attend(self.norm(places), condition, condition, need_weights=False)
        out: Tensor = x + heard.transpose(1, 2).reshape(x.shape)
        return out


class Denoiser(nn.Module):
    """Noisy features, condition and timestep → the noise."""

    def __init__(self, c: PfdConfig) -> None:
        super().__init__()
        self.time = nn.Embedding(c.schedule.train_steps, c.width)
        self.before = Bottleneck(c, c.reduction)
        self.cross = CrossAttention(c) if c.cross_attention else None
        self.after = Bottleneck(c, c.reduction)
        self.out = nn.Conv2d(c.width, c.width, 1)

    def forward(self, y: Tensor, condition: Tensor, timestep: Tensor) -> Tensor:
        """State (N, width, grid, grid), condition (N, 2, width), timestep (N,) in whole numbers → noise like y."""
        x = self.before(y + self.time(timestep.long())[:, :, None, None])
        if self.cross:
            x = self.cross(x, condition)
        out: Tensor = self.out(self.after(x))
        return out


def _norm(c: PfdConfig, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if c.norm is Norm.BATCH else nn.GroupNorm(c.groups, channels)
