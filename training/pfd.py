"""Teaching PFD-IQA: a teacher on the score alone, then the student, which denoises the teacher's features.

Both learn from what the frozen blocks of EfficientNet-Lite see (`pfd_features.py`). The teacher begins as a ridge
regression on it, and the blocks after the frozen ones learn with it. The student has the teacher's weights; its prior
learns to name damage from pictures that were damaged here.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..data.distortions import DISTORTIONS
from ..data.draws import Purpose, generator
from ..errors import ConfigError, DatasetError
from ..model.bundle import save_bundle
from ..model.pfd.checkpoint import LoadedPfd, PfdBundle, begin
from ..model.pfd.config import Prompts
from ..model.pfd.encoder import LiteEncoder
from ..model.pfd.network import PfdIQA
from ..model.pfd.prompts import PromptSet
from ..model.pfd.training import Targets, Teacher, losses, soft_levels
from .config import PfdTrainConfig, digest, identity
from .loop import QUIETLY, Conduct, Machine, Result, Sample, Verdict, open_machine, picked, train
from .pfd_features import Picture, SeenPictures, encoded, finished, learning, turned
from .plot import write_plot
from .score import Rated, correlation, judged, lot, ranking_loss

# Which of LIQE's words stands for which of KADID-10k's 25 distortions: ours, where LIQE's words leave room.
WORDS = {
    "jpeg2000 compression": (9,),
    "jpeg compression": (10,),
    "noise": (11, 12, 13, 14),
    "blur": (1, 2, 3),
    "color": (4, 5, 7, 8),
    "contrast": (25,),
    "overexposure": (16,),
    "underexposure": (17,),
    "spatial": (19, 20, 21, 23),
    "quantization": (6, 22),
    "other": (15, 18, 24),
}
SEVERE = 3  # the level from which damage should be named
GOOD = 0.6  # quality from which a picture is damaged: below, it has damage of its own that would go unnamed
FIT = 500  # crops by which the features are brought to deviation 1


def word_of(kind: int) -> str:
    """Return the word for a distortion."""
    return next(word for word, kinds in WORDS.items() if kind in kinds)


def severity(picture: Picture) -> int:
    """Return how strong a picture's damage is, 0 to 5. Levels of two distortions go from one side to the other."""
    if not picture.kind or DISTORTIONS[picture.kind].ordered:
        return picture.level
    return 2 * abs(picture.level - 3)


def damaged(pictures: Sequence[Picture], count: int, seed: int, weakest: int = 1) -> list[Picture]:
    """Damage so many good pictures, drawn by lot: each once, by words in turn, at even levels from `weakest`."""
    good = [picture for picture in pictures if picture.quality >= GOOD]
    out = []
    for place, picture in enumerate(lot(good, min(count, len(good)))) if count else ():
        draw = generator(seed, Purpose.KINDS, place)
        kind = int(draw.choice(list(WORDS.values())[place % len(WORDS)]))
        levels = [
            level for level in range(weakest, 6) if severity(dataclasses.replace(picture, kind=kind, level=level))
        ]
        out.append(dataclasses.replace(picture, kind=kind, level=int(draw.choice(levels))))
    return out


@dataclass(frozen=True)
class Data:
    """Pictures to learn from and to validate with, as they are and damaged."""

    training: Sequence[Picture]
    damaged: Sequence[Picture]
    validation: Sequence[Picture]
    named: Sequence[Picture]  # severely damaged ones to validate with

    def __iter__(self) -> Iterator[Sequence[Picture]]:
        return iter((self.training, self.damaged, self.validation, self.named))


@dataclass(frozen=True)
class Judged:
    """What a model says of pictures, as it scores: their scores, and the probabilities of distortions and levels."""

    scores: npt.NDArray[np.float32]
    distortions: npt.NDArray[np.float32]
    levels: npt.NDArray[np.float32]


@torch.no_grad()
def judge(
    model: PfdIQA, seen: SeenPictures, pictures: Sequence[Picture], machine: Machine, *, denoised: bool = True
) -> Judged:
    """Return what a model says of pictures: the mean over the crops of the grid, with the noise that scoring has.

    Not `denoised`, the decoder reads the encoder's features, as the teacher's does.
    """
    noises: list[Tensor] = []
    said: list[list[Tensor]] = []
    for picture in pictures:
        rows = torch.from_numpy(seen(picture).astype(np.float32)).to(machine.device)
        noises += [model.noise(0, lane) for lane in range(len(noises), len(rows))]
        cls, features = encoded(lite_of(model), finished(lite_of(model), rows))
        prior = model.prior(features)
        if denoised:
            features = model.refine(prior, torch.cat(noises[: len(rows)]).to(features))
        said.append([part.mean(0).cpu() for part in (model.decoder(features, cls), prior.distortions, prior.levels)])
    return Judged(*(torch.stack(parts).numpy() for parts in zip(*said, strict=True)))


def named(model: PfdIQA, judged: Judged, pictures: Sequence[Picture]) -> npt.NDArray[np.bool_]:
    """Return of which damaged pictures the likeliest word is the right one."""
    words = [model.config.words.distortions[best] for best in judged.distortions.argmax(1)]
    return np.array([word == word_of(picture.kind) for word, picture in zip(words, pictures, strict=True)])


def lite_of(model: PfdIQA) -> LiteEncoder:
    """Return the encoder, of which `PfdTrainConfig` says that it is one of EfficientNet-Lite."""
    assert isinstance(model.encoder, LiteEncoder)  # noqa: S101 — tells the type checker
    return model.encoder


class TeacherTask:
    """Rows of crops, and the error of the teacher's scores."""

    kind = "pfd-teacher"
    denoised = False

    def __init__(self, config: PfdTrainConfig, model: PfdIQA, seen: SeenPictures, data: Data) -> None:
        self.config, self.model, self.seen, self.data = config, model, seen, data
        self.encoder = lite_of(model)
        self.network = self._network()
        self.network.requires_grad_(False)
        for _, parameters in self.groups():
            for parameter in parameters:
                parameter.requires_grad_(True)

    def _network(self) -> nn.Module:
        teacher = Teacher(self.model.config)
        teacher.encoder, teacher.decoder = self.model.encoder, self.model.decoder
        return teacher

    def fingerprint(self) -> str:
        """Return a digest of pictures and labels."""
        return digest({"parts": [[[self.seen.file(p).name, p.quality] for p in part] for part in self.data]})

    def groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Return what is trained already, or fitted, and the rest that the score needs."""
        encoder = self.encoder
        config, freely = self.config, [encoder.project, encoder.norm, self.model.decoder]
        rated = (config.encoder_rate, learning(encoder)), (config.readout_rate, [encoder.readout]), (1.0, freely)
        return _groups(*rated)

    def train_mode(self) -> None:
        """Statistics stay: they would be of other noise at each step of the loop. Only the masks are drawn."""
        self.network.eval()

    def sample(self, step: int, index: int) -> Sample:
        """Return rows of a picture, some of them mirrored, and its quality."""
        config = self.config
        picture = self._picked(self.data.training, step * config.optimisation.batch + index)
        draw, rows = generator(config.seed, Purpose.DATA, step, index), self.seen(picture)
        places = draw.permutation(config.crops)[: config.teacher_crops or config.crops]
        taken = turned(rows[places % len(rows)], self.encoder.lite.variant, draw)  # a small picture has fewer
        return Sample((taken, np.array(picture.quality, np.float32)), picture.name)

    def _picked(self, among: Sequence[Picture], place: int) -> Picture:
        return among[picked(self.config.seed, place, len(among))]

    def losses(self, _network: Callable[..., Any], batch: Sequence[Tensor]) -> Tensor:
        """Return each picture's squared error, and the terms of the batch."""
        rows, quality = batch
        cls, features = encoded(self.encoder, finished(self.encoder, rows.flatten(0, 1)))
        scores = self.model.decoder(features, cls).float().reshape(rows.shape[:2]).mean(1)
        losses: Tensor = (scores - quality).square() + self.terms(scores, quality)
        return losses

    def terms(self, scores: Tensor, quality: Tensor) -> Tensor:
        """Return what asks for the order of opinions."""
        config = self.config
        order = ranking_loss(scores, quality, 1.0)
        return config.ranking_weight * order + config.correlation_weight * (1 - correlation(scores, quality))

    def validate(self, machine: Machine) -> Verdict:
        """Score pictures as scoring does; better is a higher rank correlation."""
        pictures = self.data.validation
        found = judge(self.model, self.seen, pictures, machine, denoised=self.denoised)
        return judged(found.scores.tolist(), [p.quality for p in pictures])


class StudentTask(TeacherTask):
    """The same of the student: its score comes out of the whole loop."""

    kind = "pfd"
    denoised = True

    def __init__(
        self, config: PfdTrainConfig, model: PfdIQA, seen: SeenPictures, data: Data, teacher: dict[str, Tensor]
    ) -> None:
        super().__init__(config, model, seen, data)
        model.load_state_dict(teacher, strict=False)
        # The encoder learns no more, nor does what makes the class vector: so the teacher differs by these parts.
        parts = (self.encoder.project, self.encoder.norm, model.decoder)
        self.teacher = copy.deepcopy(nn.ModuleList(parts)).requires_grad_(False)

    def _network(self) -> nn.Module:
        return self.model

    def groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        """Return what is new, and the decoder; what makes the class vector stays the teacher's."""
        model, encoder = self.model, self.encoder
        new = [model.prior, model.denoiser, encoder.project, encoder.norm]
        return _groups((1.0, new), (self.config.decoder_rate, [model.decoder]))

    def train_mode(self) -> None:
        """Draw masks."""
        super().train_mode()
        for task in (self.model.prior.distortions, self.model.prior.levels):
            task.mask.train()

    def sample(self, step: int, index: int) -> Sample:
        """Return the row of a crop, and its quality, its word and the quality that its level stands for.

        The first places of a batch are for damaged pictures, whose quality is NaN; the word of others is -1.
        """
        config, share = self.config, self.config.damaged_places
        own = config.optimisation.batch - share
        if index < share:
            picture = self._picked(self.data.damaged, step * share + index)
        else:
            picture = self._picked(self.data.training, step * own + index - share)
        draw, rows = generator(config.seed, Purpose.DATA, step, index), self.seen(picture)
        row = turned(rows[draw.integers(len(rows), size=1)], self.encoder.lite.variant, draw)[0]
        word = self.model.config.words.distortions.index(word_of(picture.kind)) if picture.kind else -1
        quality = np.nan if picture.kind else picture.quality
        labels = (quality, word, picture.quality * (1 - severity(picture) / 6))
        return Sample((row, np.array(labels, np.float32)), picture.name)

    def losses(self, _network: Callable[..., Any], batch: Sequence[Tensor]) -> Tensor:
        """Return the weighted losses of each crop, and the terms of the batch.

        A crop's score should be the teacher's: what people think of a picture is not what they would of each crop. The
        order is people's.
        """
        config, words = self.config, self.model.config.words
        quality, word, level = batch[1].unbind(1)
        with torch.no_grad():
            of_maps, maps = finished(self.encoder, batch[0])
            project, norm, decoder = self.teacher.to(maps.device)
            teacher = norm(project(maps))
            wanted = decoder(teacher, self.encoder.readout(of_maps))
        known = torch.arange(len(words.distortions)).to(word) == word[:, None]
        targets = Targets(wanted, known.float(), soft_levels(level, len(words.levels)))
        found = losses(self.model, encoded(self.encoder, (of_maps, maps)), teacher, targets)
        alone = quality.isfinite()
        weighted = found.score + config.noise_weight * found.noise
        weighted = weighted + config.distortion_weight * found.distortions + config.level_weight * found.levels
        return weighted.float() + self.terms(found.scores[alone].float(), quality[alone])

    def validate(self, machine: Machine) -> Verdict:
        """Also say how often severe damage is named right. The last weights count: the first ones name nothing."""
        row = dict(super().validate(machine).row)
        if pictures := self.data.named:
            found = judge(self.model, self.seen, pictures, machine)
            row["named"] = float(named(self.model, found, pictures).mean())
        return Verdict(row)


def _groups(*rated: tuple[float, Sequence[nn.Module]]) -> list[tuple[float, list[nn.Parameter]]]:
    return [(rate, [p for part in parts for p in part.parameters()]) for rate, parts in rated if rate]


@torch.no_grad()
def begin_as_ridge(model: PfdIQA, seen: SeenPictures, pictures: Sequence[Picture], strength: float) -> None:
    """Let the score be a ridge regression on the mean moments of each picture's crops, and fit what scales features.

    One channel of the class vector is the guess. The decoder hands it on: what its layer adds begins at 0.
    """
    encoder, decoder = lite_of(model), model.decoder
    readout = encoder.readout
    means = np.stack(
        [seen(picture)[:, : encoder.lite.variant.features].astype(np.float32).mean(0) for picture in pictures]
    )
    readout.fit(torch.from_numpy(means))
    x = (torch.from_numpy(means) - readout.mean) / readout.deviation
    y = torch.tensor([picture.quality for picture in pictures])
    matrix = (x.T @ x / x.shape[1]).double() + strength * torch.eye(x.shape[1], dtype=torch.float64)
    readout.linear.weight[0] = torch.linalg.solve(matrix, (x.T @ (y - y.mean()) / x.shape[1]).double())
    readout.linear.bias[0] = y.mean()
    layer = decoder.layer
    for last in (layer.self_attn.out_proj, layer.multihead_attn.out_proj, layer.linear2):
        last.weight.zero_()
        last.bias.zero_()
    decoder.panels[..., 0] = 0
    decoder.head.weight.zero_()
    decoder.head.weight[0, 0] = 1
    # Each channel of the maps counts alike, and each channel of the features gets deviation 1.
    rows = np.stack([seen(picture)[0] for picture in pictures[:: max(1, len(pictures) // FIT)]])
    shown = torch.from_numpy(rows.astype(np.float32))
    maps = torch.cat([finished(encoder, shown[i : i + 64])[1][:, :, ::3, ::3] for i in range(0, len(shown), 64)])
    encoder.project.weight.div_(maps.std(dim=(0, 2, 3)).clamp(min=1e-3)[None, :, None, None])
    projected = encoder.project(maps)
    encoder.norm.running_mean.copy_(projected.mean(dim=(0, 2, 3)))  # type: ignore[union-attr]  # it keeps statistics
    encoder.norm.running_var.copy_(projected.var(dim=(0, 2, 3)))  # type: ignore[union-attr]


def run_pfd(
    config: PfdTrainConfig,
    parts: Mapping[str, Sequence[Rated]],
    folder: Path,
    *,
    lite: Path,
    prompts: PromptSet | None,
    cache: Path | None = None,
    conduct: Conduct = QUIETLY,
) -> Result:
    """Train the teacher in `folder`/teacher, then the student; write it to `model.safetensors`, and `plot.png`."""
    begun, seen, data = prepare(config, parts, cache or folder / "cache", lite, prompts, conduct.say)
    with open_machine(conduct.device, config.optimisation.precision) as machine:
        taught = teach(config, begun.model, seen, data, folder / "teacher", machine, conduct)
        return study(config, begun, seen, data, taught, folder, machine, conduct)


def teach(
    config: PfdTrainConfig,
    model: PfdIQA,
    seen: SeenPictures,
    data: Data,
    folder: Path,
    machine: Machine,
    conduct: Conduct,
) -> Result:
    """Train the teacher, which shares its encoder and decoder with the model that is given.

    Of what the run changes, a share is kept: on other photographs, weights between the first and the last do better.
    """
    if machine.world > 1:
        raise ConfigError("PFD-IQA is trained by one process, not under torchrun")
    conduct.say(f"the teacher, in {folder}")
    begin_as_ridge(model, seen, data.training, config.ridge)
    first = dataclasses.replace(config, optimisation=config.teacher, damaged_places=0)
    task = TeacherTask(first, model, seen, data)
    begun = {name: value.clone() for name, value in task.network.state_dict().items()}
    result = train(task, first, folder, machine, conduct)
    kept = {
        name: torch.lerp(begun[name], value.to(begun[name]), config.teacher_share)
        for name, value in result.weights.items()
        if value.is_floating_point()
    }
    return dataclasses.replace(result, weights=result.weights | kept)


def study(
    config: PfdTrainConfig,
    begun: LoadedPfd,
    seen: SeenPictures,
    data: Data,
    taught: Result,
    folder: Path,
    machine: Machine,
    conduct: Conduct,
) -> Result:
    """Train the student, and write it."""
    conduct.say(f"the student, in {folder}")
    model = begun.model
    result = train(StudentTask(config, model, seen, data, taught.weights), config, folder, machine, conduct)
    model.load_state_dict(result.weights)
    steps = f"a teacher of {taught.step} steps and {result.step} of its own"
    note = f"trained on {len(data.training)} pictures, {steps}, configuration {digest(identity(config))}"
    path = folder / "model.safetensors"
    save_bundle(model.cpu().eval(), path, kind=PfdBundle, sources=begun.sources, notes=[note])
    write_plot(folder)
    return result


def prepare(
    config: PfdTrainConfig,
    parts: Mapping[str, Sequence[Rated]],
    cache: Path,
    lite: Path,
    prompts: PromptSet | None,
    say: Callable[[str], None],
) -> tuple[LoadedPfd, SeenPictures, Data]:
    """Return the model to begin with, what sees pictures, and pictures that have been seen."""
    begun = begin_pfd(config, lite, prompts)
    seen = SeenPictures(lite_of(begun.model).lite, config.model, cache, crops=config.crops, seed=config.seed)
    train_part, validation = ([Picture(r.path, r.quality) for r in parts[name]] for name in ("train", "validation"))
    found = Data(
        lot(train_part, config.pictures),
        damaged(train_part, config.damaged, config.seed),
        lot(validation, config.validation_pictures),
        damaged(validation, config.validation_damaged, config.seed, SEVERE),
    )
    data = Data(*(seen.fill(part, say) for part in found))
    for name, part in (("training", data.training), ("validation", data.validation)):
        if len({picture.quality for picture in part}) < 2:
            raise DatasetError(f"the {name} part has {len(part)} pictures without different labels: no use")
    if config.damaged_places and not data.damaged:
        raise DatasetError(f"no picture to train on has a quality of {GOOD} or more: there is none to damage")
    return begun, seen, data


def begin_pfd(config: PfdTrainConfig, lite: Path, prompts: PromptSet | None) -> LoadedPfd:
    """Return the model to begin with. Raises ConfigError if prompts are missing, or lack a word for some damage."""
    constant = config.model.prompts is Prompts.CONSTANT
    if constant and prompts is None:
        raise ConfigError("the model's prompts are constant: give the file that iqa-prompts makes, with --prompts")
    begun = begin(config.model, config.seed, encoder=lite, prompts=prompts if constant else None)
    if missing := set(WORDS) - set(begun.model.config.words.distortions):
        raise ConfigError(
            f"training names damage by LIQE's words, and the prompts lack {', '.join(sorted(missing))}: make prompts "
            f"with iqa-prompts without --distortions"
        )
    return begun
