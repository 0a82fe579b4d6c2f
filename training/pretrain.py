"""Teaching the two backbones what distortions look like, before the heads learn. The paper's come from ImageNet.

The ViT and the ResNet see crops of distorted pictures. Each has two small heads, which are thrown away at the end: one
says how the picture was distorted, the other how good it is. Nothing is restored, so there is time for many pictures.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.draws import Purpose, generator
from ..data.pictures import Pictures
from ..engine.crops import crop_grid
from ..engine.pixels import to_plane
from ..errors import ConfigError, DatasetError
from ..model.network import DiffV2IQA
from .config import PretrainConfig, digest, identity
from .loop import QUIETLY, Conduct, Machine, Result, Sample, Verdict, open_machine, picked, train
from .score import Rated, judged, prepared
from .start import begin

HIDDEN = 64  # width of the head that says how good a picture is


class Taught(nn.Module):
    """A backbone's features of each crop → a score, and the logits of the distortions."""

    def __init__(self, backbone: nn.Module, layers: tuple[int, ...], width: int, classes: int) -> None:
        """`layers` are those of a ViT's blocks that VCG reads; none for a ResNet."""
        super().__init__()
        self.backbone, self.layers = backbone, layers
        self.score = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        self.distortion = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, crop, crop) → (B,) and (B, classes)."""
        maps = self.backbone(images, self.layers) if self.layers else self.backbone(images)
        features = maps.mean(dim=2).flatten(1) if self.layers else maps
        return self.score(features)[:, 0], self.distortion(features)


class Backbones(nn.Module):
    """The backbones of a model that are trained: its ViT, its ResNet, or both."""

    def __init__(self, model: DiffV2IQA, config: PretrainConfig, classes: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        vcg, vda = model.config.vcg, model.config.vda
        if config.vit and model.vcg and vcg:
            self.parts["vit"] = Taught(model.vcg.vit, vcg.layers, len(vcg.layers) * vcg.vit.width, classes)
        if config.resnet and model.vda and vda:
            self.parts["resnet"] = Taught(model.vda.resnet, (), vda.classes, classes)

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, 3, crop, crop) → score and logits of each backbone."""
        return [part(images) for part in self.parts.values()]


class PretrainTask:
    """Crops of distorted pictures, and the error of what the backbones say of them."""

    kind = "pretrain"

    def __init__(
        self,
        config: PretrainConfig,
        model: DiffV2IQA,
        training: tuple[Pictures, Sequence[Rated]],
        validation: tuple[Pictures, Sequence[Rated]],
    ) -> None:
        """Every set is pictures and what is known of each."""
        self.config, self.training, self.validation = config, training, validation
        names = sorted({item.distortion for item in training[1]})
        if len(names) < 2:
            raise DatasetError(
                "pretraining tells distortions apart: the labels need a column `distortion`, with several"
            )
        number = {name: index for index, name in enumerate(names)}
        self._classes = [number[item.distortion] for item in training[1]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.backbones = Backbones(model, config, len(names))
        self.network: nn.Module = self.backbones

    def fingerprint(self) -> str:
        """Return a digest of pictures, labels and distortions."""
        parts = [
            [pictures.fingerprint(), [[item.quality, item.distortion] for item in items]]
            for pictures, items in (self.training, self.validation)
        ]
        return digest({"parts": parts})

    def groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Return all parameters, at the run's own rate."""
        return [(1.0, list(self.network.parameters()))]

    def train_mode(self) -> None:
        """Turn dropout and batch statistics on."""
        self.network.train()

    def sample(self, step: int, index: int) -> Sample:
        """Return a crop (3, crop, crop), turned and mirrored at random, its score (1,) and its distortion (1,)."""
        config, (pictures, items) = self.config, self.training
        number = picked(config.seed, step * config.optimisation.batch + index, len(pictures))
        draw = generator(config.seed, Purpose.DATA, step, index)
        size, pixels = config.model.crop, pictures[number]
        top, left = (int(draw.integers(length - size + 1)) for length in pixels.shape[:2])
        crop = pixels[top : top + size, left : left + size]
        mirrored, upside_down, transposed = draw.random(3) < 0.5
        crop = crop[:: -1 if upside_down else 1, :: -1 if mirrored else 1]
        crop = crop.transpose(1, 0, 2) if transposed else crop
        label, kind = np.array([items[number].quality], np.float32), np.array([self._classes[number]], np.float32)
        return Sample((to_plane(crop), label, kind), f"{pictures.paths[number]} at row {top}, column {left}")

    def losses(self, network: Callable[..., object], batch: Sequence[Tensor]) -> Tensor:
        """Return each crop's squared error in score, and the cross-entropy of its distortion times its weight."""
        images, labels, kinds = batch[0].contiguous(memory_format=torch.channels_last), batch[1][:, 0], batch[2][:, 0]
        total = torch.zeros_like(labels)
        for score, logits in network(images):  # type: ignore[attr-defined]  # a list of pairs, maybe through DDP
            told = F.cross_entropy(logits.float(), kinds.long(), reduction="none")
            total = total + (score.float() - labels).square() + self.config.distortion_weight * told
        return total

    def validate(self, machine: Machine) -> Verdict:
        """Score the validation pictures on the grid of crops that scoring uses; better is a higher rank correlation."""
        pictures, items = self.validation
        scores = []
        for number in range(len(pictures)):
            pixels, size = pictures[number], self.config.model.crop
            height, width = pixels.shape[:2]
            grid = crop_grid(height, width, size, self.config.validation_crops)
            crops = [to_plane(pixels[c.top : c.top + size, c.left : c.left + size]) for c in grid]
            with machine.autocast():
                told = self.backbones(torch.from_numpy(np.stack(crops)).to(machine.device))
            scores.append(float(torch.stack([score.float() for score, _ in told]).mean()))
        return judged(scores, [item.quality for item in items])


def run_pretrain(
    config: PretrainConfig,
    training: Sequence[Rated],
    validation: Sequence[Rated],
    folder: Path,
    *,
    start: Path | None = None,
    cache: Path | None = None,
    conduct: Conduct = QUIETLY,
) -> Result:
    """Train the backbones; write `model.safetensors`, which `iqa-train score` takes them from, and `plot.png`.

    `start` is a bundle whose backbones are trained further. Their heads begin anew: no bundle keeps those.
    """
    asked = tuple(part for part, yes in (("vit", config.vit), ("resnet", config.resnet)) if yes)
    has = {"vit": config.model.vcg, "resnet": config.model.vda}
    if missing := [part for part in asked if not has[part]]:
        raise ConfigError(f"model {config.model.name!r} has no {missing[0]} to pretrain: say {missing[0]} = false")
    begun = begin(config.model, config.seed, {start: asked} if start else {})
    with open_machine(conduct.device, config.optimisation.precision) as machine:
        sets = [
            prepared(rated, (cache or folder / "cache") / "pictures", config.model.crop, conduct.say)
            for rated in (training, validation)
        ]
        task = PretrainTask(config, begun.model, sets[0], sets[1])
        result = train(task, config, folder, machine, conduct)
        if machine.leads:
            task.backbones.load_state_dict(result.weights)
            how = f"diffiqa pretraining, {result.step} steps, configuration {digest(identity(config))}"
            for part in task.backbones.parts:
                begun.trained(part, how)
            note = f"backbones pretrained on {len(sets[0][0])} images, the weights of step {result.step} were best"
            begun.save(folder, note)
    return result
