"""PFD-IQA's stages, and what a runtime must know of them: the manifest with its plan of stages."""

from typing import Any

import torch
from torch import Tensor, nn

from ..engine.manifest import CropPolicy, Flow, Loop, Manifest, Probabilities, ScoreMeaning, Shape, StageName
from ..engine.schedule import Kind, Schedule, Taps
from ..errors import ExportError
from ..model.pfd.config import PfdConfig
from ..model.pfd.denoiser import Denoiser
from ..model.pfd.network import PfdIQA
from .stages import Draw, StagePlan, fold, pictures

NAMES = (StageName.ENCODER, StageName.PRIOR, StageName.DENOISER, StageName.DECODER)
CROPS = 4  # of an image


class Step(nn.Module):
    """The denoiser with its timestep in a column, as a loop hands it over."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, y: Tensor, condition: Tensor, timestep: Tensor) -> Tensor:
        """State (B, width, grid, grid), condition (B, 2, width), timestep (B, 1) → noise like the state."""
        out: Tensor = self.denoiser(y, condition, timestep[:, 0])
        return out


def part_of(model: PfdIQA, name: StageName) -> nn.Module:
    """Return the network of a stage."""
    part: nn.Module = getattr(model, name)
    return Step(part) if isinstance(part, Denoiser) else part


def stage_plans(model: PfdIQA) -> list[StagePlan]:
    """Return the stages of a model in the order they run. Raises ExportError if there is no step to run."""
    c = model.config
    if not c.schedule.timesteps:
        raise ExportError(f"model {c.name!r} takes no steps: an engine has one at least")
    grid: Shape = ("B", c.width, c.grid, c.grid)
    crop: dict[str, Shape] = {"crop": ("B", 3, c.crop, c.crop)}
    cls: dict[str, Shape] = {"cls": ("B", c.width)}
    condition: dict[str, Shape] = {"condition": ("B", 2, c.width)}
    of_prior: dict[str, Shape] = {
        "distortions": ("B", len(c.words.distortions)),
        "levels": ("B", len(c.words.levels)),
        **condition,
        "start": grid,
        "gamma": ("B", 1),
    }
    signatures: tuple[tuple[dict[str, Shape], dict[str, Shape]], ...] = (
        (crop, {**cls, "features": grid}),
        ({"features": grid}, of_prior),
        ({"y": grid, **condition, "timestep": ("B", 1)}, {"noise": grid}),
        ({"refined": grid, **cls}, {"score": ("B",)}),
    )
    return [
        StagePlan(name, fold(part_of(model, name)), inputs, outputs, _draw(model, name))
        for name, (inputs, outputs) in zip(NAMES, signatures, strict=True)
    ]


def manifest(c: PfdConfig, score: ScoreMeaning, common: dict[str, Any]) -> Manifest:
    """Return the manifest of a model, whose scores mean this. `common` are the fields that all models have."""
    words = {"distortions": c.words.distortions, "levels": c.words.levels}
    return Manifest(
        schedule=Schedule(len(c.schedule.timesteps), linear=c.schedule, clip=False),
        taps=Taps(),  # of a model that restores images
        kinds=(Kind.DIS,),
        alignment=1,
        crop=CropPolicy(c.crop, CROPS),
        score=score,
        flow=Flow(
            Loop(StageName.DENOISER, "timestep", start="start", share="gamma", result="refined"),
            StageName.DECODER,
            tuple(Probabilities(StageName.PRIOR, name, found) for name, found in words.items()),
        ),
        **common,
    )


def _draw(model: PfdIQA, name: StageName) -> Draw:
    """Draw what a stage gets in the real loop: pictures, and what the stages before it make of them."""
    c = model.config

    @torch.no_grad()
    def draw(batch: int, _size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        crops = pictures(batch, (c.crop, c.crop), generator)
        if name is StageName.ENCODER:
            return (crops,)
        cls, features = model.encoder(crops)
        if name is StageName.PRIOR:
            return (features,)
        prior = model.prior(features)
        noise = torch.randn(features.shape, generator=generator)
        if name is StageName.DECODER:
            return model.refine(prior, noise), cls
        drawn = torch.randint(len(c.schedule.timesteps), (batch,), generator=generator)
        steps = torch.tensor(c.schedule.timesteps)[drawn]
        bar = torch.from_numpy(c.schedule.alpha_bar).float()[steps][:, None, None, None]
        return bar.sqrt() * prior.start + (1 - bar).sqrt() * noise, prior.condition, steps.float()[:, None]

    return draw
