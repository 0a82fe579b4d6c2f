"""The part of a ViT that VCG reads: patch embedding and the blocks up to the last selected one. Names are timm's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ViTConfig


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) → the same shape."""
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(n, tokens, width))
        return out


class Mlp(nn.Module):
    """Linear → exact GELU → Linear, with dropout in training."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(…, width) → the same shape."""
        out: Tensor = self.drop(self.fc2(self.drop(F.gelu(self.fc1(x)))))
        return out


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(c.width, eps=1e-6)
        self.attn = Attention(c.width, c.heads)
        self.norm2 = nn.LayerNorm(c.width, eps=1e-6)
        self.mlp = Mlp(c.width, c.mlp)

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) → the same shape."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEmbedding(nn.Module):
    """Non-overlapping patches → tokens."""

    def __init__(self, c: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, c.width, c.patch, stride=c.patch)

    def forward(self, image: Tensor) -> Tensor:
        """(N, 3, H, W) → (N, tokens, width)."""
        out: Tensor = self.proj(image).flatten(2).transpose(1, 2)
        return out


class ViT(nn.Module):
    """`blocks` transformer blocks over an `image`-sized square. No final norm, no head: nothing here reads them."""

    def __init__(self, config: ViTConfig, *, image: int, blocks: int) -> None:
        super().__init__()
        tokens = (image // config.patch) ** 2
        self.patch_embed = PatchEmbedding(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + tokens, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(blocks))
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, image: Tensor, layers: tuple[int, ...]) -> Tensor:
        """(N, 3, H, W) → outputs of the blocks in `layers` without class token: (N, len(layers), tokens, width)."""
        x = self.patch_embed(image)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        maps = {}
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in layers:
                maps[index] = x[:, 1:]
        return torch.stack([maps[layer] for layer in layers], dim=1)
