"""The two scoring branches: visual compensation guidance (VCG) and visual difference analysis (VDA)."""

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .attention import ResidualTransposedAttention, TransposedAttention
from .config import Encoder, ModelConfig, Pixels, VCGConfig, VDAConfig
from .lite import LITE0, Lite
from .resnet import ResNet
from .swin import Swin
from .vit import ViT

SEEN = 3  # dimensions of what an encoder saw: images, kinds, features


class BranchScore(NamedTuple):
    """A branch's verdict on B crops: `score` (B,) is the mean of `score_map` weighted by `weight_map`, (B, g, g)."""

    score: Tensor
    score_map: Tensor
    weight_map: Tensor


class Normalisation(nn.Module):
    """Pixels from −1 to 1 → the range that an encoder was trained on."""

    def __init__(self, c: Pixels) -> None:
        super().__init__()
        mean, std = np.array(c.mean), np.array(c.std)
        # from_numpy, so that these are real even in a model built on the meta device
        self.factor: Tensor
        self.offset: Tensor
        self.register_buffer("factor", _channels(0.5 / std), persistent=False)
        self.register_buffer("offset", _channels((0.5 - mean) / std), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) → the same shape."""
        return images * self.factor + self.offset


def normalisation(c: Pixels) -> nn.Module:
    """Return what stands before an encoder: nothing where it sees what the U-Net sees."""
    return nn.Identity() if c == Pixels() else Normalisation(c)


def _channels(values: npt.NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32).reshape(3, 1, 1))


class VCG(nn.Module):
    """ViT maps of the crop and its restorations → noise codes → TAB → Swin → TAB → Swin → score."""

    def __init__(self, config: ModelConfig, c: VCGConfig) -> None:
        super().__init__()
        width = c.squeeze[-1]
        self.config, self.kinds, self.grid = c, config.kinds, config.grid
        self.normalise = normalisation(config.pixels)
        self.vit = ViT(c.vit, image=config.crop, blocks=max(c.layers) + 1)
        self.noise_codes = nn.Parameter(torch.zeros(len(c.selection), c.noise_code)) if c.noise_code else None
        widths = [c.channels, *c.squeeze]
        self.squeeze = nn.ModuleList(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths))
        self.swin1 = Swin(c.swin, width, config.grid, config.dropout)
        self.tabs2 = nn.ModuleList(TransposedAttention(config.tokens, config.dropout) for _ in range(config.tabs))
        self.halve = nn.Conv2d(width, width // 2, 1)
        self.swin2 = Swin(c.swin, width // 2, config.grid, config.dropout)
        self.score = head(width // 2, nn.ReLU(), config.dropout)
        self.weight = head(width // 2, nn.Sigmoid(), config.dropout)

    def maps(self, images: Tensor) -> Tensor:
        """Images (N, 3, crop, crop) → the ViT maps VCG reads (N, layers, tokens, width)."""
        out: Tensor = self.vit(self.normalise(images), self.config.layers)
        return out

    def forward(self, maps: Tensor, tabs: nn.ModuleList) -> BranchScore:
        """Score ViT maps (B, kinds, layers, tokens, width); `tabs` are the stage-1 TABs shared with VDA."""
        x = self._gather(maps)
        for tab in tabs:
            x = tab(x)
        x = x.reshape(x.shape[0], x.shape[1], self.grid, self.grid)
        for conv in self.squeeze:
            x = conv(x)
        x = self.swin1(x.flatten(2).transpose(1, 2)).transpose(1, 2)
        for tab in self.tabs2:
            x = tab(x)
        x = self.halve(x.reshape(x.shape[0], x.shape[1], self.grid, self.grid))
        x = self.swin2(x.flatten(2).transpose(1, 2))
        return weighted_mean(self.score(x), self.weight(x), self.grid)

    def _gather(self, maps: Tensor) -> Tensor:
        """Select and concatenate: per kind its blocks' maps, then its noise code. → Z (B, channels, tokens)."""
        parts = []
        for row, kind in enumerate(kind for kind in self.kinds if kind in self.config.selection):
            of_kind = maps[:, self.kinds.index(kind)]
            parts += [of_kind[:, self.config.layers.index(layer)] for layer in self.config.selection[kind]]
            if self.noise_codes is not None:
                parts.append(self.noise_codes[row].expand(maps.shape[0], maps.shape[3], -1))
        return torch.cat(parts, dim=2).transpose(1, 2)


class Readout(nn.Module):
    """Features of a frozen encoder, brought to mean 0 and deviation 1 by numbers that do not learn → linear outputs."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.drop = nn.Dropout(dropout)
        self.linear = nn.Linear(features, outputs)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Take mean and deviation from examples (N, features)."""
        self.mean.copy_(features.mean(0))
        self.deviation.copy_(features.std(0).clamp(min=1e-3))

    def forward(self, features: Tensor) -> Tensor:
        """(…, features) → (…, outputs)."""
        out: Tensor = self.linear(self.drop((features - self.mean) / self.deviation))
        return out


class VDA(nn.Module):
    """Encoder outputs of the crop and its restorations → RTAB over their differences → TAB → score."""

    def __init__(self, config: ModelConfig, c: VDAConfig) -> None:
        super().__init__()
        self.config, self.kinds, self.grid = c, config.kinds, config.grid
        self.normalise = normalisation(config.pixels)
        if c.encoder is Encoder.LITE0:
            self.lite0 = Lite(LITE0)
            self.readout = Readout(LITE0.features, c.classes, config.dropout)
        else:
            self.resnet = ResNet(c.resnet_width, c.resnet_blocks, c.classes)
        self.rtab = ResidualTransposedAttention(c.classes, config.tokens, config.dropout)
        self.widen = nn.Conv2d(1, c.width, 1)
        self.score = head(c.width, nn.ReLU(), config.dropout)
        self.weight = head(c.width, nn.Sigmoid(), config.dropout)

    def forward(self, images: Tensor, tabs: nn.ModuleList) -> BranchScore:
        """Score images (B, kinds, 3, crop, crop), or what `encode` returned for them.

        `tabs` are the stage-1 TABs shared with VCG.
        """
        features = images if images.ndim == SEEN else self.encode(images)
        if self.config.encoder is Encoder.LITE0:
            features = self.readout(features)
        if features.shape[1] == 1:  # one image stands for all kinds
            features = features.expand(-1, len(self.kinds), -1)
        of = {kind: features[:, index] for index, kind in enumerate(self.kinds)}
        c = self.config
        x = self.rtab(features[:, 0], of[c.query], of[c.key], of[c.value])[:, None]  # (B, 1, tokens)
        for tab in tabs:
            x = tab(x)
        x = self.widen(x.reshape(x.shape[0], 1, self.grid, self.grid)).flatten(2).transpose(1, 2)
        return weighted_mean(self.score(x), self.weight(x), self.grid)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, kinds, 3, crop, crop) → what the encoder sees (B, kinds, classes, of Lite0 its features)."""
        encoder = self.lite0 if self.config.encoder is Encoder.LITE0 else self.resnet
        seen: Tensor = encoder(self.normalise(images.flatten(0, 1)))
        return seen.reshape(*images.shape[:2], -1)


def head(width: int, last: nn.Module, dropout: float) -> nn.Sequential:
    """Return the small MLP that gives every token its score or weight."""
    out = nn.Linear(width, 1)
    if isinstance(last, nn.ReLU):
        # Both branches together begin in the middle of the label range [0, 1]. From 0.5 each, their sum had so far to
        # fall that one of them fell below 0, where its ReLU never learns again.
        nn.init.constant_(out.bias, 0.25)
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), out, last)


def weighted_mean(scores: Tensor, weights: Tensor, grid: int) -> BranchScore:
    """Reduce per-token scores and weights (B, tokens, 1) to a branch score."""
    total = (scores * weights).sum(dim=(1, 2)) / weights.sum(dim=(1, 2))
    return BranchScore(total, scores.reshape(-1, grid, grid), weights.reshape(-1, grid, grid))
