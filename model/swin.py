"""MANIQA's Swin stage: windowed attention on a square map, no patch merging, scaled residual layers."""

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import SwinConfig
from .vit import Mlp

MASKED = -100.0  # what Swin adds to the logits of tokens from different sides of the border


class WindowAttention(nn.Module):
    """Attention inside windows, with a learned bias per relative position and head."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        # from_numpy, so that the table is real even in a model built on the meta device
        self.index: Tensor
        self.register_buffer("index", torch.from_numpy(relative_position_index(window)), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(B, windows, tokens, width) → the same shape; `mask` is (windows, tokens, tokens), added to the logits."""
        b, windows, tokens, width = x.shape
        qkv = self.qkv(x).reshape(b, windows, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # (B, windows, heads, tokens, width / heads) each
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)[None]  # (1, heads, tokens, tokens)
        if mask is not None:
            bias = bias + mask[:, None]
        logits = (q * (width // self.heads) ** -0.5) @ k.transpose(-2, -1) + bias
        mixed = torch.softmax(logits, dim=-1) @ v
        out: Tensor = self.proj(mixed.transpose(2, 3).reshape(b, windows, tokens, width))
        return out


class SwinBlock(nn.Module):
    """Pre-norm window attention, shifted or not, and an MLP."""

    def __init__(self, c: SwinConfig, width: int, grid: int, shift: int) -> None:
        super().__init__()
        self.grid, self.window, self.shift = grid, c.window, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, c.heads, c.window)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, c.mlp)
        mask = torch.from_numpy(shift_mask(grid, c.window, shift)) if shift else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, grid², width) → the same shape."""
        b, _, width = x.shape
        g, n = self.grid, self.grid // self.window
        h = self.norm1(x).reshape(b, g, g, width)
        h = torch.roll(h, (-self.shift, -self.shift), (1, 2)) if self.shift else h
        h = h.reshape(b, n, self.window, n, self.window, width).transpose(2, 3)
        h = self.attn(h.reshape(b, n * n, self.window**2, width), self.mask)
        h = h.reshape(b, n, n, self.window, self.window, width).transpose(2, 3).reshape(b, g, g, width)
        h = torch.roll(h, (self.shift, self.shift), (1, 2)) if self.shift else h
        x = x + h.reshape(b, g * g, width)
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class SwinLayer(nn.Module):
    """Blocks with alternating shift, then a 3×3 convolution and ReLU on the map."""

    def __init__(self, c: SwinConfig, width: int, grid: int) -> None:
        super().__init__()
        self.grid = grid
        # A window that fills the map leaves nothing to shift against.
        shift = c.window // 2 if grid > c.window else 0
        self.blocks = nn.ModuleList(SwinBlock(c, width, grid, shift if i % 2 else 0) for i in range(c.blocks))
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, grid², width) → the same shape."""
        for block in self.blocks:
            x = block(x)
        h = x.transpose(1, 2).reshape(x.shape[0], x.shape[2], self.grid, self.grid)
        return F.relu(self.conv(h)).flatten(2).transpose(1, 2)


class Swin(nn.Module):
    """Layers with scaled residuals: x ← scale·layer(x) + x."""

    def __init__(self, c: SwinConfig, width: int, grid: int, dropout: float) -> None:
        super().__init__()
        self.scale = c.scale
        self.drop = nn.Dropout(dropout)
        self.layers = nn.ModuleList(SwinLayer(c, width, grid) for _ in range(c.layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, grid², width) → the same shape."""
        x = self.drop(x)
        for layer in self.layers:
            x = self.scale * layer(x) + x
        return x


def relative_position_index(window: int) -> npt.NDArray[np.int64]:
    """Return, for each pair of tokens in a window, the row of the bias table: (window², window²)."""
    y, x = np.divmod(np.arange(window**2), window)
    dy, dx = y[:, None] - y + window - 1, x[:, None] - x + window - 1
    return np.asarray(dy * (2 * window - 1) + dx, np.int64)


def shift_mask(grid: int, window: int, shift: int) -> npt.NDArray[np.float32]:
    """Return (windows, window², window²): `MASKED` between tokens that only the cyclic shift made neighbours."""
    # After rolling by −shift, the last `shift` rows (and columns) came around from the other side.
    side = np.zeros(grid, np.int64)
    side[-window:] = 1
    side[-shift:] = 2
    region = side[:, None] * 3 + side
    n = grid // window
    tokens = region.reshape(n, window, n, window).transpose(0, 2, 1, 3).reshape(n * n, window**2)
    return np.where(tokens[:, :, None] == tokens[:, None], 0.0, MASKED).astype(np.float32)
