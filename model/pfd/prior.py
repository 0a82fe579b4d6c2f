"""What the features say about distortions and quality levels, and where the denoiser starts."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import Fusion, PfdConfig, Prompts
from .denoiser import Bottleneck


class PriorOut(NamedTuple):
    """What the prior makes of N feature maps."""

    distortions: Tensor  # probabilities (N, distortions)
    levels: Tensor  # probabilities (N, levels)
    condition: Tensor  # aggregated prompts (N, 2, width)
    start: Tensor  # fused features, like the features
    gamma: Tensor  # share of `start` in the state the denoiser starts from (N, 1)


class Auxiliary(nn.Module):
    """One auxiliary task: features → features of its own, and how well they match each of its prompts.

    In training, random channels are dropped and the rest is scaled up: the whole of them has the same mean.
    """

    prompts: Tensor

    def __init__(self, c: PfdConfig, count: int) -> None:
        super().__init__()
        self.temperature = c.temperature
        self.mask = nn.Dropout2d(c.mask_ratio)
        self.conv1 = nn.Conv2d(c.width, c.width, 3, padding=1)
        self.conv2 = nn.Conv2d(c.width, c.width, 3, padding=1)
        self.to_prompt = nn.Linear(c.width, c.prompt_width, bias=False)
        prompts = F.normalize(torch.randn(count, c.prompt_width), dim=1)
        if c.prompts is Prompts.LEARNED:
            self.prompts = nn.Parameter(prompts)
        else:
            self.register_buffer("prompts", prompts)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, width, grid, grid) → its own features, probabilities (N, count), aggregated prompt (N, prompt_width)."""
        own = self.conv2(torch.relu(self.conv1(self.mask(features))))
        prompts = F.normalize(self.prompts, dim=1)
        seen = F.normalize(self.to_prompt(own.mean(dim=(2, 3))), dim=1)
        probabilities = (self.temperature * seen @ prompts.T).softmax(dim=1)
        return own, probabilities, probabilities @ prompts


class NoiseAdapter(nn.Module):
    """Features → γ, the share of them in the state that the denoiser starts from."""

    def __init__(self, c: PfdConfig) -> None:
        super().__init__()
        self.block = Bottleneck(c, c.adapter_reduction)
        self.predict = nn.Linear(c.width, 2)

    def forward(self, features: Tensor) -> Tensor:
        """(N, width, grid, grid) → (N, 1)."""
        out: Tensor = self.predict(self.block(features).mean(dim=(2, 3))).softmax(dim=1)[:, :1]
        return out


class Prior(nn.Module):
    """Features → probabilities, condition, start and γ."""

    def __init__(self, c: PfdConfig) -> None:
        super().__init__()
        self.distortions = Auxiliary(c, len(c.words.distortions))
        self.levels = Auxiliary(c, len(c.words.levels))
        self.condition = nn.Linear(c.prompt_width, c.width)
        self.fuse = nn.Conv2d(3 * c.width, c.width, 1) if c.fusion is Fusion.CONCAT else None
        self.adapter = NoiseAdapter(c) if c.alignment else None

    def forward(self, features: Tensor) -> PriorOut:
        """(N, width, grid, grid) → what `PriorOut` says."""
        of_distortions, distortions, prompt_d = self.distortions(features)
        of_levels, levels, prompt_q = self.levels(features)
        condition = self.condition(torch.stack([prompt_d, prompt_q], dim=1))
        if self.fuse is None:
            start = features + of_distortions + of_levels
        else:
            start = self.fuse(torch.cat([features, of_distortions, of_levels], dim=1))
        gamma = features.new_ones(features.shape[0], 1) if self.adapter is None else self.adapter(start)
        return PriorOut(distortions, levels, condition, start, gamma)
