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
    """What N crops should be: quality in [0, 1] (N,), and soft labels whose rows sum to 1, or 0 if not known."""

    quality: Tensor
    distortions: Tensor
    levels: Tensor


@dataclass(frozen=True)
class Losses:
    """The losses of each crop (N,), 0 without a label; and its score."""

    score: Tensor  # SmoothL1
    noise: Tensor  # MSE of ε
    distortions: Tensor  # cross-entropy with soft labels
    levels: Tensor
    scores: Tensor


def losses(
    model: PfdIQA,
    seen: tuple[Tensor, Tensor],
    teacher: Tensor,
    targets: Targets,
    generator: torch.Generator | None = None,
) -> Losses:
    """Return the losses of N crops, given what the encoder returned and the teacher's features of them.

    The score is that of the whole loop. The denoiser learns on the teacher's features, noisy as the schedule has it at
    timesteps drawn evenly. Masks come from PyTorch's global random numbers, as dropout does; so does the noise without
    a generator.
    """
    schedule = model.config.schedule
    cls, features = seen
    prior = model.prior(features)
    drawn = torch.randn(2, *features.shape, generator=generator).to(features)
    scores = model.decoder(model.refine(prior, drawn[0]), cls)
    timestep = torch.randint(schedule.train_steps, (len(cls),), generator=generator)
    bar = torch.from_numpy(schedule.alpha_bar)[timestep].to(features)[:, None, None, None]
    noisy = bar.sqrt() * teacher.detach() + (1 - bar).sqrt() * drawn[1]
    eps = model.denoiser(noisy, prior.condition, timestep.to(features))
    return Losses(
        score=F.smooth_l1_loss(scores, targets.quality, reduction="none"),
        noise=(eps - drawn[1]).square().mean(dim=(1, 2, 3)),
        distortions=soft_cross_entropy(prior.distortions, targets.distortions),
        levels=soft_cross_entropy(prior.levels, targets.levels),
        scores=scores,
    )


def soft_cross_entropy(probabilities: Tensor, target: Tensor) -> Tensor:
    """Return −Σ target · log(probability) of each row."""
    return -(target * probabilities.clamp(min=1e-12).log()).sum(dim=1)


def soft_levels(quality: Tensor, count: int) -> Tensor:
    """Quality in [0, 1] (N,) → labels (N, count): shared by the two levels around it, level k being at k/(count−1)."""
    place = quality.clamp(0, 1)[:, None] * (count - 1)
    return (1 - (place - torch.arange(count).to(place)).abs()).clamp(min=0)
