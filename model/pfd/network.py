"""The whole PFD-IQA network, and `score`: the plain PyTorch reference that an engine must agree with."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...engine.crops import crop_grid
from ...engine.noise import NoiseField
from .config import PfdConfig
from .decoder import Decoder
from .denoiser import Denoiser
from .encoder import make_encoder
from .prior import Prior, PriorOut


class PfdScores(NamedTuple):
    """Scores of B images (B,), and what they suffer from: probabilities (B, distortions) and (B, levels)."""

    score: Tensor
    distortions: Tensor
    levels: Tensor


class PfdIQA(nn.Module):
    """Four stages: encoder, prior, a denoiser that runs at every step, decoder."""

    def __init__(self, config: PfdConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = make_encoder(config)
        self.prior = Prior(config)
        self.denoiser = Denoiser(config)
        self.decoder = Decoder(config)

    def forward(self, crops: Tensor, noise: Tensor) -> PfdScores:
        """Score crops (N, 3, crop, crop) that start from `noise`, which is like their features."""
        cls, features = self.encoder(crops)
        prior = self.prior(features)
        refined = self.refine(prior, noise)
        return PfdScores(self.decoder(refined, cls), prior.distortions, prior.levels)

    def refine(self, prior: PriorOut, noise: Tensor) -> Tensor:
        """Mix the start with noise as γ says, and denoise it along the schedule. No step adds noise or clips."""
        table = self.config.schedule.coefficients
        gamma = prior.gamma[:, :, None, None]
        y = gamma * prior.start + (1 - gamma) * noise
        for i in reversed(range(len(table.noise_level))):
            timestep = torch.full((len(y),), float(table.noise_level[i])).to(y)
            eps = self.denoiser(y, prior.condition, timestep)
            x0 = y * float(table.y_to_x0[i]) - eps * float(table.noise_to_x0[i])
            y = x0 * float(table.x0_to_mean[i]) + y * float(table.y_to_mean[i])
        return y

    @torch.no_grad()
    def score(self, images: Tensor, seed: int = 0, crops: int = 4) -> PfdScores:
        """Score whole images (B, 3, H, W) in [-1, 1]: the mean over crops. Crop k has the seed's noise in lane k."""
        size = self.config.crop
        places = crop_grid(images.shape[2], images.shape[3], size, crops)
        of_crops = [
            self(images[..., c.top : c.top + size, c.left : c.left + size], self.noise(seed, lane).to(images))
            for lane, c in enumerate(places)
        ]
        return PfdScores(*(torch.stack(parts).mean(0) for parts in zip(*of_crops, strict=True)))

    def noise(self, seed: int, lane: int) -> Tensor:
        """Return the noise that a crop starts from (1, width, grid, grid): whose it is depends on seed and lane."""
        c = self.config
        shape = (1, c.width, c.grid, c.grid)
        out = np.empty(shape, np.float32)
        field = NoiseField(seed, (1, math.prod(shape)), lane=lane, planes=1)
        field.fill(len(c.schedule.timesteps), out)
        return torch.from_numpy(out)


def build(config: PfdConfig, seed: int) -> PfdIQA:
    """Return the model with seeded initial weights, in eval mode. The global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return PfdIQA(config).eval()
