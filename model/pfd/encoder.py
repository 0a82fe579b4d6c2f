"""Image → a class vector and a feature map, by DEIQT's ViT or EfficientNet-Lite. Images are RGB in [-1, 1]."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ViTConfig
from ..heads import Readout
from ..lite import LITE0, LITE2, Lite, moments
from ..vit import Block, PatchEmbedding
from .config import Backbone, PfdConfig

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's colours, which DEIQT's weights expect
VARIANTS = {Backbone.LITE0: LITE0, Backbone.LITE2: LITE2}


class ScaledBlock(Block):
    """A transformer block with LayerScale."""

    def __init__(self, c: ViTConfig) -> None:
        super().__init__(c)
        self.gamma_1 = nn.Parameter(torch.full((c.width,), 1e-4))
        self.gamma_2 = nn.Parameter(torch.full((c.width,), 1e-4))

    def forward(self, x: Tensor) -> Tensor:
        """(N, tokens, width) → the same shape."""
        x = x + self.gamma_1 * self.attn(self.norm1(x))
        out: Tensor = x + self.gamma_2 * self.mlp(self.norm2(x))
        return out


class VitEncoder(nn.Module):
    """DEIQT's ViT, under its names. The class token has no position."""

    def __init__(self, c: PfdConfig) -> None:
        super().__init__()
        self.grid = c.grid
        self.patch_embed = PatchEmbedding(c.vit)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, c.grid**2, c.width))
        self.blocks = nn.ModuleList(ScaledBlock(c.vit) for _ in range(c.blocks))
        self.norm = nn.LayerNorm(c.width, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, crop, crop) → class vector (N, width), features (N, width, grid, grid)."""
        mean, deviation = image.new_tensor(MEAN)[:, None, None], image.new_tensor(DEVIATION)[:, None, None]
        x = self.patch_embed((image / 2 + 0.5 - mean) / deviation) + self.pos_embed
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0], x[:, 1:].transpose(1, 2).reshape(x.shape[0], -1, self.grid, self.grid)


class LiteEncoder(nn.Module):
    """EfficientNet-Lite's maps at strides 4 to 32, brought to stride 16; moments of all maps are the class vector."""

    def __init__(self, c: PfdConfig) -> None:
        super().__init__()
        variant = VARIANTS[c.encoder]
        self.lite = Lite(variant)
        self.readout = Readout(variant.features, c.width, dropout=0.0)
        self.project = nn.Conv2d(sum(variant.channels), c.width, 1, bias=False)
        self.norm = nn.BatchNorm2d(c.width)  # the schedule's noise is for features of deviation 1

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, crop, crop) → class vector (N, width), features (N, width, grid, grid)."""
        stride4, stride8, stride16, stride32, _ = maps = self.lite.maps(image)
        coarse = F.interpolate(stride32, scale_factor=2, mode="nearest")
        at_grid = torch.cat([F.avg_pool2d(stride4, 4), F.avg_pool2d(stride8, 2), stride16, coarse], dim=1)
        return self.readout(moments(maps)), self.norm(self.project(at_grid))


def make_encoder(c: PfdConfig) -> VitEncoder | LiteEncoder:
    """Return the encoder that a configuration names."""
    return VitEncoder(c) if c.encoder is Backbone.VIT else LiteEncoder(c)
