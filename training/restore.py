"""Teaching the U-Net to restore (the paper's Algorithm 1): from a distorted photograph and noise to the photograph.

Symbols: x0 is the *reference*, the condition is its distorted version; level = sqrt(ᾱ) at a continuous time;
y = level·x0 + sqrt(1 − level²)·ε; the U-Net is asked for ε.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import numpy.typing as npt
import PIL.Image
import torch
from torch import Tensor, nn

from ..data.distortions import DISTORTIONS, LEVELS, compose
from ..data.draws import Purpose, generator
from ..data.outputs import to_csv, write_file
from ..data.pictures import Pictures
from ..engine.pixels import to_plane
from ..engine.schedule import Kind, Schedule
from ..errors import ConfigError
from ..model.network import DiffV2IQA
from .config import Loss, RestoreConfig, digest, identity
from .loop import QUIETLY, Conduct, Machine, Result, Sample, Verdict, open_machine, train
from .start import begin

LONG_WAVE = 16  # pixels: what white noise has too little of to hide, at the least
# What the project promises to improve: blur, JPEG and noise, at these levels.
PROMISED, PROMISED_LEVELS = (1, 2, 3, 10, 11, 12, 13, 14), (3, 4, 5)
Steps = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Gain:
    """Mean PSNR of held-out crops of one distortion, before and after restoring, in dB.

    Number and level 0 are crops that were not distorted. Crops equal to their originals have no `before_db`, no gain.
    """

    number: int
    name: str
    level: int
    before_db: float | None
    after_db: float

    @property
    def gain_db(self) -> float | None:
        """How much nearer to the reference the restored crops are."""
        return None if self.before_db is None else self.after_db - self.before_db


class RestoreTask:
    """Crops of photographs, distorted on the fly, and the loss of Algorithm 1 on them."""

    kind = "restore"

    def __init__(
        self, config: RestoreConfig, model: DiffV2IQA, photos: Pictures, held_out: Pictures | None = None
    ) -> None:
        if model.unet is None:
            raise ConfigError(f"model {config.model.name!r} has no U-Net to train")
        self.config, self.model, self.photos, self.held_out = config, model, photos, held_out
        # Channels last: convolutions in bfloat16 take 0.7 of the time on a CPU, and suit tensor cores.
        self.network: nn.Module = model.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.gains: tuple[Gain, ...] = ()  # of the last validation
        # sqrt(ᾱ) at the borders of the T intervals that noise levels are drawn from, from 1 down to almost 0.
        schedule = dataclasses.replace(config.model.schedule, steps=config.diffusion_steps)
        self._borders = level_borders(schedule)

    def fingerprint(self) -> str:
        """Return a digest of the photographs, the held-out ones included."""
        held_out = self.held_out.fingerprint() if self.held_out else ""
        return digest({"training": self.photos.fingerprint(), "held_out": held_out})

    def groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Return the U-Net's parameters."""
        return [(1.0, list(self.network.parameters()))]

    def train_mode(self) -> None:
        """Turn dropout on, and batch statistics unless they are fixed."""
        self.network.train()
        if self.config.fixed_statistics:
            for module in self.network.modules():
                if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
                    module.eval()

    def sample(self, step: int, index: int) -> Sample:
        """Return the condition, x0, ε (3, crop, crop) and the noise level (1,) of one element of a batch."""
        draw = generator(self.config.seed, Purpose.DATA, step, index)
        number = int(draw.integers(len(self.photos)))
        photo, side = self.photos[number], self.config.crop
        top, left = (int(draw.integers(length - side + 1)) for length in photo.shape[:2])
        steps = _draw_distortions(draw, self.config)
        condition, reference = distorted_crop(photo, top, left, side, self.config.margin, steps, draw)
        noise = draw.standard_normal(reference.shape, np.float32)
        if self.config.drift:
            noise += drifting(side, self.config.drift * draw.random(), draw)
        level = draw_level(draw, self._borders)
        name = f"{self.photos.paths[number]} at row {top}, column {left}, distortions {list(steps) or 'none'}"
        return Sample((condition, reference, noise, np.array([level], np.float32)), name)

    def losses(self, network: Callable[..., Tensor], batch: Sequence[Tensor]) -> Tensor:
        """Return for each element how far the predicted noise is from the noise that was added."""
        condition, reference, noise, level = batch
        share = level[:, :, None, None]
        noisy = share * reference + (1 - share * share).sqrt() * noise
        difference = network(noisy, condition, level).float() - noise
        per_pixel = difference.abs() if self.config.loss is Loss.L1 else difference.square()
        return per_pixel.mean(dim=(1, 2, 3))

    def validate(self, machine: Machine) -> Verdict | None:
        """Restore held-out crops of every distortion and level with the whole sampling loop."""
        if self.held_out is None:
            return None
        self.gains = restoration_gains(self.model, self.held_out, self.config, machine.device)
        return Verdict(_summary(self.gains))


def level_borders(schedule: Schedule) -> npt.NDArray[np.float64]:
    """Return sqrt(ᾱ_t) for t = 0 … T, with ᾱ_0 = 1."""
    borders: npt.NDArray[np.float64] = np.sqrt(np.concatenate([[1.0], schedule.alpha_bar]))
    return borders


def draw_level(draw: np.random.Generator, borders: npt.NDArray[np.float64]) -> float:
    """Return a continuous noise level: t uniform in 1 … T, the level uniform between sqrt(ᾱ_t) and sqrt(ᾱ_{t−1})."""
    t = int(draw.integers(1, len(borders)))
    return float(draw.uniform(borders[t], borders[t - 1]))


def drifting(side: int, strength: float, draw: np.random.Generator) -> npt.NDArray[np.float32]:
    """Return a smooth random error (3, side, side) of about that standard deviation.

    It is a sum of waves: one value for the crop, for each half, each quarter, and so on down to 16 to 32 pixels.
    (With halves and quarters alone, crops of 160×160 left out the waves that crops of 64×64 had taught.)

    Why: white noise has nearly no long waves. So a U-Net reads the long waves of x0 off y. But the first steps of
    sampling put wrong ones there, because they hardly know x0: colours drift, and stay. If the noise has long waves of
    its own, only the condition tells what x0 is like, and later steps correct the colours.
    """
    planes = np.zeros((3, side, side), np.float32)
    scales = [2**power for power in range(max(3, int(math.log2(side / LONG_WAVE)) + 1))]
    for cells in scales:
        for plane, coarse in zip(planes, draw.standard_normal((3, cells, cells), np.float32), strict=True):
            picture = PIL.Image.fromarray(coarse).resize((side, side), PIL.Image.Resampling.BICUBIC)
            plane += np.asarray(picture) * np.float32(strength / math.sqrt(len(scales)))
    return planes


def _draw_distortions(draw: np.random.Generator, config: RestoreConfig) -> Steps:
    """Return none, one or two distortions with their levels."""
    chance = draw.random()
    count = 0 if chance < config.clean else 2 if chance < config.clean + config.composed else 1
    numbers = draw.choice(list(DISTORTIONS), size=count, replace=False)
    return tuple((int(number), int(draw.choice(list(LEVELS)))) for number in numbers)


def distorted_crop(
    photo: npt.NDArray[np.uint8],
    top: int,
    left: int,
    side: int,
    margin: int,
    steps: Steps,
    draw: np.random.Generator,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return a crop distorted and as it is, both (3, side, side) in [-1, 1] and on 8-bit values.

    It is distorted with what lies up to `margin` pixels around it, where the photograph has that.
    """
    height, width = photo.shape[:2]
    above, before = min(margin, top), min(margin, left)
    window = photo[
        top - above : min(height, top + side + margin),
        left - before : min(width, left + side + margin),
    ]
    inside = slice(above, above + side), slice(before, before + side)
    reference = to_plane(window[inside])
    if not steps:
        return reference.copy(), reference
    distorted = compose(window.astype(np.float32) / np.float32(255), steps, draw)
    # Scoring reads files of 8 bits, so that is what the U-Net learns from.
    return to_plane(np.rint(distorted[inside] * 255).astype(np.uint8)), reference


def restoration_gains(
    model: DiffV2IQA, photos: Pictures, config: RestoreConfig, device: torch.device
) -> tuple[Gain, ...]:
    """Restore the same crops after each distortion at each level; the first row is of the crops as they are."""
    model.to(device)
    places = []  # photograph, top and left of each crop; they go round all photographs
    for k in range(config.validation_crops):
        draw = generator(config.seed, Purpose.VALIDATION, k)
        photo = photos[k % len(photos)]
        top, left = (int(draw.integers(length - config.crop + 1)) for length in photo.shape[:2])
        places.append((photo, top, left))
    cases: list[tuple[str, Steps]] = [("none", ())]
    cases += [(kind.name, ((number, level),)) for number, kind in DISTORTIONS.items() for level in LEVELS]
    rows = []
    for name, steps in cases:
        number, level = steps[0] if steps else (0, 0)
        draws = [generator(config.seed, Purpose.VALIDATION, k, 1) for k in range(len(places))]
        pairs = [
            distorted_crop(photo, top, left, config.crop, config.margin, steps, draw)
            for draw, (photo, top, left) in zip(draws, places, strict=True)
        ]
        conditions, references = (torch.from_numpy(np.stack(images)).to(device) for images in zip(*pairs, strict=True))
        restored = model.restore(conditions)[Kind.Y0].clamp(-1, 1)
        before, after = _psnr_db(conditions, references), _psnr_db(restored, references)
        mean = float(before.mean())
        rows.append(Gain(number, name, level, mean if math.isfinite(mean) else None, float(after.mean())))
    return tuple(rows)


def _psnr_db(images: Tensor, references: Tensor) -> Tensor:
    """Return the PSNR of each image in [-1, 1]: infinite where equal."""
    mean_square: Tensor = ((images - references) / 2).double().square().mean(dim=(1, 2, 3))
    return -10 * mean_square.log10()


def _summary(gains: Sequence[Gain]) -> dict[str, float]:
    changed = [(g, g.gain_db) for g in gains if g.gain_db is not None]
    promised = [gain for g, gain in changed if g.number in PROMISED and g.level in PROMISED_LEVELS]
    return {
        "mean_gain_db": fmean(gain for _, gain in changed) if changed else math.nan,
        "promised_gain_db": fmean(promised) if promised else math.nan,
        "pristine_db": gains[0].after_db,
    }


def write_gains(path: Path, gains: Sequence[Gain]) -> None:
    """Write the table of gains as CSV; raises OutputError."""
    rows: list[list[object]] = [["number", "distortion", "level", "before_db", "after_db", "gain_db"]]
    for gain in gains:
        figures = (gain.before_db, gain.after_db, gain.gain_db)
        rows.append([gain.number, gain.name, gain.level, *("" if v is None else f"{v:.3f}" for v in figures)])
    write_file(path, to_csv(rows))


def run_restore(
    config: RestoreConfig,
    photos: Sequence[Path],
    held_out: Sequence[Path],
    folder: Path,
    *,
    start: Path | None = None,
    conduct: Conduct = QUIETLY,
) -> Result:
    """Train a U-Net; write `model.safetensors` (heads untrained), `plot.png`, and `gains.csv` of held-out photos."""
    if config.fixed_statistics and not start:
        raise ConfigError("fixed_statistics are those a run begins with: give weights with --start, or set it to false")
    begun = begin(config.model, config.seed, {start: ("unet",)} if start else {})
    with open_machine(conduct.device, config.optimisation.precision) as machine:
        usable = functools.partial(
            Pictures, cache=folder / "cache", min_side=config.crop, longest_side=config.longest_side
        )
        training, validation = usable(photos), usable(held_out) if held_out else None
        for text in (*training.skipped, *(validation.skipped if validation else ())):
            conduct.say(f"left out: {text}")
        task = RestoreTask(config, begun.model, training, validation)
        result = train(task, config, folder, machine, conduct)
        if machine.leads:
            task.network.load_state_dict(result.weights)
            begun.trained("unet", f"diffiqa training, {result.step} steps, configuration {digest(identity(config))}")
            note = f"U-Net trained for {result.step} steps on {len(training)} photographs"
            if task.gains:
                write_gains(folder / "gains.csv", task.gains)
            begun.save(folder, note)
    return result
