"""The whole Diff-V²-IQA network, and `score`: the plain PyTorch reference that every engine must agree with."""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..engine.crops import padded_size, place_crops
from ..engine.noise import NoiseField
from ..engine.pixels import ImageForm, Sides, TapForm, squash_planes
from ..engine.sampling import Sampling
from ..engine.schedule import Kind
from ..engine.score import weighted_sum
from .attention import TransposedAttention
from .config import ModelConfig
from .heads import VCG, VDA, BranchScore
from .unet import UNet

Branch = TypeVar("Branch", bound=nn.Module)


@dataclass(frozen=True)
class Scores:
    """Scores of B images, each (B,): the weighted sum of both branches, and the branches (None where absent)."""

    total: Tensor
    vcg: Tensor | None
    vda: Tensor | None


class DiffV2IQA(nn.Module):
    """A restoring U-Net and two scoring branches; parts the configuration leaves out are `None`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.unet = UNet(config.unet) if config.unet else None
        self.tabs = nn.ModuleList(TransposedAttention(config.tokens, config.dropout) for _ in range(config.tabs))
        self.vcg = VCG(config, config.vcg) if config.vcg else None
        self.vda = VDA(config, config.vda) if config.vda else None

    def vit_maps(self, images: Tensor) -> Tensor:
        """Crops (B, kinds, 3, crop, crop) → ViT maps (B, kinds, layers, tokens, width)."""
        maps = self._branch(self.vcg, "vcg").maps(images.flatten(0, 1))
        return maps.reshape(*images.shape[:2], *maps.shape[1:])

    def vcg_scores(self, maps: Tensor) -> BranchScore:
        """ViT maps (B, kinds, layers, tokens, width) → the VCG branch's verdict."""
        out: BranchScore = self._branch(self.vcg, "vcg")(maps, self.tabs)
        return out

    def vda_scores(self, images: Tensor) -> BranchScore:
        """Crops (B, kinds, 3, crop, crop) → the VDA branch's verdict."""
        out: BranchScore = self._branch(self.vda, "vda")(images, self.tabs)
        return out

    def forward(self, images: Tensor) -> Scores:
        """Score crops of all kinds, (B, kinds, 3, crop, crop); (B, 1, 3, crop, crop) stands for all of them."""
        vcg = None
        if self.vcg:
            maps = self.vit_maps(images)
            if images.shape[1] == 1:
                maps = maps.expand(-1, len(self.config.kinds), -1, -1, -1)
            vcg = self.vcg_scores(maps).score
        vda = self.vda_scores(images).score if self.vda else None
        return Scores(weighted_sum(self.config, vcg, vda), vcg, vda)

    @torch.no_grad()
    def restore(self, images: Tensor, seed: int = 0, sampling: Sampling | None = None) -> dict[Kind, Tensor]:
        """Run the sampling loop on whole images (B, 3, H, W) in [-1, 1]; sides must be aligned. The dict has no `dis`.

        Each image sees the noise of `seed` alone, whatever its neighbours in the batch. Without a `sampling` it takes
        all steps, as trained.
        """
        if self.unet is None:
            return {}
        config = self.config
        rows = (sampling or Sampling.trained(config.schedule)).rows(config.schedule, config.taps, config.kinds)
        table = rows.factors
        field = NoiseField(seed, (images.shape[2], images.shape[3]))

        def noise(step: int) -> Tensor:
            z = np.empty(field.shape, np.float32)
            field.fill(step, z)
            return torch.from_numpy(z).to(images).expand_as(images)

        y = noise(rows.start)
        if rows.image:
            y = y * rows.image[1] + images * rows.image[0]
        tapped = {}
        for i in reversed(range(len(rows.steps))):
            level = torch.full((images.shape[0], 1), float(table.noise_level[i])).to(images)
            eps = self.unet(y, images, level) if i >= rows.silent else torch.zeros_like(y)
            x0 = (y * float(table.y_to_x0[i]) - eps * float(table.noise_to_x0[i])).clamp(-1, 1)
            tapped[i] = x0 * float(table.x0_to_mean[i]) + y * float(table.y_to_mean[i])
            if table.sigma[i]:
                tapped[i] = tapped[i] + noise(rows.steps[i]) * float(table.sigma[i])
            y = tapped[i] if i >= rows.silent else y
        return {kind: tapped[row] for kind, row in rows.taps.items()}

    @torch.no_grad()
    def score(
        self, images: Tensor, seed: int = 0, crops: int | None = None, *, restored_from: Tensor | None = None
    ) -> Scores:
        """Score whole images (B, 3, H, W) in [-1, 1]: restore, cut the same crops from all kinds, mean over crops.

        A model that resizes or squashes images takes what the heads see, and what the U-Net restores beside it.
        """
        config, size = self.config, self.config.crop
        condition = images if restored_from is None else restored_from
        height, width = condition.shape[2:]
        rows, columns = padded_size(height, width, config.alignment)
        if config.sides is Sides.RESIZED and (rows, columns) != (height, width):
            raise ValueError(f"{config.name!r} takes images with sides that are multiples of {config.alignment}")
        padded = nn.functional.pad(condition, (0, columns - width, 0, rows - height), mode="reflect")
        restored = [as_tapped(x[..., :height, :width], config.tap_form) for x in self.restore(padded, seed).values()]
        if config.image_form is ImageForm.SQUASHED:
            restored = [torch.from_numpy(squash_planes(x.cpu().numpy(), size)).to(images) for x in restored]
        planes = torch.stack([images, *restored], dim=1)
        height, width = planes.shape[-2:]
        places = place_crops(config.crop_places, height, width, size, crops or config.crop_count, seed)
        of_crops = [self(planes[..., c.top : c.top + size, c.left : c.left + size]) for c in places]

        def mean(scores: list[Tensor | None]) -> Tensor | None:
            present = [score for score in scores if score is not None]
            return torch.stack(present).mean(0) if present else None

        total = torch.stack([s.total for s in of_crops]).mean(0)
        return Scores(total, mean([s.vcg for s in of_crops]), mean([s.vda for s in of_crops]))

    def _branch(self, branch: Branch | None, name: str) -> Branch:
        if branch is None:
            raise ValueError(f"model {self.config.name!r} has no {name} branch")
        return branch


def as_tapped(planes: Tensor, form: TapForm) -> Tensor:
    """Return restored planes in the form that the heads were trained on: `engine/pixels.py`, in PyTorch."""
    if form is TapForm.FLOAT:
        return planes
    planes = planes.clamp(-1, 1)
    if form is TapForm.CLAMPED:
        return planes
    # On a GPU PyTorch multiplies by the inverse of a number, and divides by a tensor.
    return (((planes + 1) * 127.5).round() / planes.new_full((), 255) - 0.5) / 0.5


def build(config: ModelConfig, seed: int) -> DiffV2IQA:
    """Return the model with seeded initial weights, in eval mode. The global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiffV2IQA(config).eval()


def count_parameters(module: nn.Module) -> int:
    """Return how many numbers are learned in `module`."""
    return sum(p.numel() for p in module.parameters())
