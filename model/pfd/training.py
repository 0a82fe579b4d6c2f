"""What trains PFD-IQA: a teacher, whose features are what the denoiser should arrive at, and the losses."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import PfdConfig
from .decoder import Decoder
from .encoder import make_encoder
from .network import PfdIQA


class Teacher(nn.Module):
    """The student's encoder and decoder without a denoiser between them, trained before it on the score alone."""

    def __init__(self, config: PfdConfig) -> None:
        super().__init__()
        self.encoder = make_encoder(config)
        self.decoder = Decoder(config)

    def forward(self, crops: Tensor) -> tuple[Tensor, Tensor]:
        """Crops (N, 3, crop, crop) → scores (N,), features."""
        cls, features = self.encoder(crops)
        return self.decoder(features, cls), features


@dataclass(frozen=True)
class Targets:
    """What N crops should be: quality in [0, 1] (N,), and soft labels whose rows sum to 1; None if not known."""

    quality: Tensor
    distortions: Tensor | None = None
    levels: Tensor | None = None


@dataclass(frozen=True)
class Losses:
    """Mean losses over crops. The prompts' are 0 without labels."""

    score: Tensor  # SmoothL1
    noise: Tensor  # MSE of ε
    distortions: Tensor  # cross-entropy with soft labels
    levels: Tensor


def losses(model: PfdIQA, crops: Tensor, teacher: Tensor, targets: Targets, generator: torch.Generator) -> Losses:
    """Return the losses of crops (N, 3, crop, crop), given the teacher's features of them.

    The score is that of the whole loop. The denoiser learns on the teacher's features, noisy as the schedule has it at
    timesteps drawn evenly. Masks come from PyTorch's global random numbers, as dropout does.
    """
    schedule = model.config.schedule
    cls, features = model.encoder(crops)
    prior = model.prior(features)
    drawn = torch.randn(2, *features.shape, generator=generator).to(features)
    refined = model.refine(prior, drawn[0])
    timestep = torch.randint(schedule.train_steps, (len(crops),), generator=generator)
    bar = torch.from_numpy(schedule.alpha_bar)[timestep].to(features)[:, None, None, None]
    noisy = bar.sqrt() * teacher.detach() + (1 - bar).sqrt() * drawn[1]
    return Losses(
        score=F.smooth_l1_loss(model.decoder(refined, cls), targets.quality),
        noise=F.mse_loss(model.denoiser(noisy, prior.condition, timestep.to(features)), drawn[1]),
        distortions=soft_cross_entropy(prior.distortions, targets.distortions),
        levels=soft_cross_entropy(prior.levels, targets.levels),
    )


def soft_cross_entropy(probabilities: Tensor, target: Tensor | None) -> Tensor:
    """Return the mean of −Σ target · log(probability) over rows; 0 without a target."""
    if target is None:
        return probabilities.new_zeros(())
    return -(target * probabilities.clamp(min=1e-12).log()).sum(dim=1).mean()


def soft_levels(quality: Tensor, count: int) -> Tensor:
    """Quality in [0, 1] (N,) → labels (N, count): shared by the two levels around it, level k being at k/(count−1)."""
    place = quality.clamp(0, 1)[:, None] * (count - 1)
    return (1 - (place - torch.arange(count).to(place)).abs()).clamp(min=0)
