"""The configuration of a training run, read from TOML: all that shapes its result, and how often it reports.

    preset = "mini"        # the model; [model] overrides single entries of it (`vda = false` leaves a part out)
    seed = 1

    [optimisation]
    steps = 20000
    batch = 16

Every entry but `preset` is a field of `RestoreConfig`, `PretrainConfig` or `ScoreConfig`, where defaults are.
"""

import enum
import hashlib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ..engine.codec import decode, encode
from ..errors import ConfigError
from ..model.config import Encoder, ModelConfig, preset, refuse
from ..model.pfd.config import Backbone, PfdConfig, pfd_preset

C = TypeVar("C", "RestoreConfig", "PretrainConfig", "ScoreConfig", "PfdTrainConfig")
VERSIONS = 6  # of a window: as it is, and at five levels of one distortion
OPTIONAL_PARTS = ("unet", "vcg", "vda")  # TOML has no null: `false` leaves these out
UNMERGED = ("selection",)  # a table that replaces the preset's as a whole: its keys are data, not fields


class Precision(enum.StrEnum):
    """What the forward pass computes in. Weights, gradients and losses stay float32."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Loss(enum.StrEnum):
    """How far the predicted noise is from the true one: mean of absolute or of squared differences."""

    L1 = "l1"
    L2 = "l2"


@dataclass(frozen=True)
class Optimisation:
    """Adam on a learning rate that warms up linearly and then follows half a cosine down to `final_fraction` of it."""

    steps: int
    batch: int  # of all processes together
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    final_fraction: float = 0.0
    weight_decay: float = 0.0  # decoupled, as in AdamW
    clip_norm: float = 0.0  # of all gradients together; 0: not clipped
    ema_decay: float = 0.999  # of the averaged weights, which are the result; 0: no averaging
    precision: Precision = Precision.FP32


@dataclass(frozen=True)
class Reporting:
    """How often things are written, in steps. Changes nothing in the result, and may change when a run is resumed."""

    log_every: int = 50
    checkpoint_every: int = 500


@dataclass(frozen=True)
class RestoreConfig:
    """Teaching the U-Net to restore: Algorithm 1 on crops of pristine photographs, distorted on the fly."""

    model: ModelConfig
    seed: int
    optimisation: Optimisation
    loss: Loss = Loss.L1
    diffusion_steps: int = 50  # T of training: 50 in the paper, 2000 in the authors' code
    drift: float = 0.0  # largest strength of the smooth error in the noise, see `drifting`; 0 in the paper
    fixed_statistics: bool = False  # of batch norm: those a run begins with, in training as in sampling
    crop: int = 128
    margin: int = 16  # pixels around a crop that are distorted with it: blur needs to see past the border
    longest_side: int = 0  # photographs are scaled down to this; 0: as they are
    clean: float = 0.05  # share of crops that are not distorted
    composed: float = 0.1  # share of crops with two distortions, one after the other
    validate_every: int = 0  # steps; 0: only at the end
    validation_crops: int = 4  # held-out crops restored from each distortion and level
    reporting: Reporting = field(default_factory=Reporting)

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before data is read."""
        unet = self.model.unet
        alignment = unet.alignment if unet else 1
        _refuse(
            "restore configuration",
            {
                f"model {self.model.name!r} has no U-Net to train": unet is not None,
                f"crop must be a multiple of {alignment}, the U-Net's alignment": (
                    0 < self.crop <= 4096 and self.crop % alignment == 0
                ),
                "margin must be between 0 and 512": 0 <= self.margin <= 512,
                "diffusion_steps must be between 2 and 4000": 2 <= self.diffusion_steps <= 4000,
                "longest_side must be 0 or at least crop": self.longest_side == 0 or self.longest_side >= self.crop,
                "clean and composed are shares: not negative, at most 1 together": (
                    min(self.clean, self.composed) >= 0 and self.clean + self.composed <= 1
                ),
                "drift must be between 0 and 1": 0 <= self.drift <= 1,
                "validate_every must not be negative": self.validate_every >= 0,
                "validation_crops must be at least 1": self.validation_crops >= 1,
            },
            self,
        )


@dataclass(frozen=True)
class PretrainConfig:
    """Teaching the backbones: crops of distorted pictures, their scores and how they were distorted."""

    model: ModelConfig
    seed: int
    optimisation: Optimisation
    vit: bool = True
    resnet: bool = True
    distortion_weight: float = 0.05  # of telling distortions apart, beside the squared error of the score
    validate_every: int = 500  # steps
    validation_crops: int = 4  # per image, on the grid that scoring uses
    reporting: Reporting = field(default_factory=Reporting)

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before data is read."""
        _refuse(
            "pretraining configuration",
            {
                "vit or resnet must be true": self.vit or self.resnet,
                "distortion_weight must not be negative": self.distortion_weight >= 0,
                "validate_every must be at least 1": self.validate_every >= 1,
                "validation_crops must be between 1 and 1000": 1 <= self.validation_crops <= 1000,
            },
            self,
        )


@dataclass(frozen=True)
class Rates:
    """The learning rate of each part, as a multiple of the run's; 0 freezes the part, its statistics included."""

    vit: float = 1.0
    resnet: float = 1.0
    heads: float = 1.0
    lite0: float = 1.0
    tabs: float = 1.0  # the attention blocks that both branches share, as a multiple of `heads`
    vda: float = 1.0  # VDA's head, as a multiple of `heads`

    def of(self, part: str) -> float:
        """Return the rate of a part of the model."""
        if part in {"tabs", "vcg", "vda"}:
            return self.heads * {"tabs": self.tabs, "vda": self.vda}.get(part, 1.0)
        rate: float = getattr(self, part)
        return rate


@dataclass(frozen=True)
class ScoreConfig:
    """Teaching both branches to score: crops at the same place of an image and its restorations."""

    model: ModelConfig
    seed: int
    optimisation: Optimisation
    rates: Rates = field(default_factory=Rates)
    branch_weight: float = 0.0  # of each branch's own squared error: without it one may do all the work, the other die
    ranking_weight: float = 0.0  # of the pairwise term beside the squared error
    ranking_margin: float = 1.0  # of a pair's difference in labels that its scores must reach
    correlation_weight: float = 0.0  # of 1 - the batch's linear correlation between scores and labels
    ordered: int = 0  # places in a batch for versions of one window, side by side, of which the order alone is learned
    ordered_weight: float = 1.0  # of their pairwise term
    features: bool = False  # of a frozen Lite0: computed once, for the crops of the grid of `validation_crops`
    ridge: float = 0.0  # with `features`: begin as the ridge regression of this strength on them; 0: at random
    pictures: int = 0  # to learn from, by lot; 0: all
    validation_pictures: int = 0
    window: int = 0  # side of the window in the middle of each picture that stands for it; 0: the whole picture
    flip: bool = True  # mirror half of the crops
    restored: bool = True  # false: the picture itself stands for its restorations, to learn from many before from few
    restore_seed: int = 0  # of the restorations' noise; scoring uses 0, too
    validate_every: int = 500  # steps
    validation_crops: int = 4  # per image, on the grid that scoring uses
    reporting: Reporting = field(default_factory=Reporting)

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before data is read."""
        given = [getattr(self.rates, field.name) for field in fields(Rates)]
        encoder = "lite0" if self.model.vda and self.model.vda.encoder is Encoder.LITE0 else "resnet"
        rates = [self.rates.of(part) for part in ("vit", encoder, "tabs", "vcg", "vda")]
        vda, lite0 = self.model.vda, self.rates.lite0
        _refuse(
            "score configuration",
            {
                "rates must not be negative, and not all 0": min(given) >= 0 and max(rates) > 0,
                "branch_weight, ranking_weight, correlation_weight and ordered_weight must not be negative": (
                    min(self.branch_weight, self.ranking_weight, self.correlation_weight, self.ordered_weight) >= 0
                ),
                f"ordered must be a multiple of {VERSIONS} below optimisation.batch": (
                    0 <= self.ordered < self.optimisation.batch and self.ordered % VERSIONS == 0
                ),
                "features need a model without vcg, whose vda has the encoder lite0, at the rate 0": not self.features
                or (self.model.vcg is None and vda is not None and vda.encoder is Encoder.LITE0 and not lite0),
                "ranking_margin must be between 0 and 1": 0 <= self.ranking_margin <= 1,
                "pictures and validation_pictures must not be negative": min(self.pictures, self.validation_pictures)
                >= 0,
                "ridge must not be negative, and needs features": self.ridge >= 0 and (self.features or not self.ridge),
                "window must be 0 or at least the model's crop": self.window == 0 or self.window >= self.model.crop,
                "restore_seed must be between 0 and 2⁶³ − 1": 0 <= self.restore_seed < 2**63,
                "validate_every must be at least 1": self.validate_every >= 1,
                "validation_crops must be between 1 and 1000": 1 <= self.validation_crops <= 1000,
            },
            self,
        )


@dataclass(frozen=True)
class PfdTrainConfig:
    """Teaching PFD-IQA: a teacher on opinions, then the student with its prior and its denoiser."""

    model: PfdConfig
    seed: int
    teacher: Optimisation
    optimisation: Optimisation  # of the student
    crops: int = 4  # of each picture, on the grid that scoring uses
    teacher_crops: int = 0  # of these, by lot, in one step of the teacher; 0: all
    ridge: float = 1.0  # the strength of the ridge regression that the teacher begins as
    encoder_rate: float = 0.5  # of the encoder's last blocks in the teacher's run, as a multiple of the learning rate
    readout_rate: float = 0.1  # of the regression
    teacher_share: float = 1.0  # of what the teacher's run changed in its weights, that is kept
    decoder_rate: float = 0.1  # of the decoder in the student's run
    ranking_weight: float = 0.3  # of the pairwise term beside the error
    correlation_weight: float = 0.3  # of 1 - the batch's linear correlation between scores and labels
    noise_weight: float = 0.1  # of the denoiser's own loss
    distortion_weight: float = 0.1  # of naming damage
    level_weight: float = 0.05
    pictures: int = 0  # to learn from, by lot; 0: all
    damaged: int = 3000  # pictures to damage and to learn to name, by lot
    damaged_places: int = 0  # of the student's batch
    validation_pictures: int = 0
    validation_damaged: int = 0
    validate_every: int = 100  # steps
    reporting: Reporting = field(default_factory=Reporting)

    def __post_init__(self) -> None:
        """Refuse what cannot be run, before data is read."""
        weights = (self.ranking_weight, self.correlation_weight, self.noise_weight, self.distortion_weight)
        counts = (self.pictures, self.damaged, self.validation_pictures, self.validation_damaged)
        _refuse(
            "PFD-IQA training configuration",
            {
                "model.encoder must be lite0 or lite2: what its frozen blocks see is kept": self.model.encoder
                is not Backbone.VIT,
                "crops must be between 1 and 100": 1 <= self.crops <= 100,
                "teacher_crops must be between 0 and crops": 0 <= self.teacher_crops <= self.crops,
                "ridge must be above 0": self.ridge > 0,
                "teacher_share must be between 0 and 1": 0 <= self.teacher_share <= 1,
                "rates must not be negative": min(self.encoder_rate, self.readout_rate, self.decoder_rate) >= 0,
                "weights must not be negative": min(*weights, self.level_weight) >= 0,
                "numbers of pictures must not be negative": min(counts) >= 0,
                "damaged_places must be below optimisation.batch, and need damaged": (
                    0 <= self.damaged_places < self.optimisation.batch and bool(self.damaged or not self.damaged_places)
                ),
                "validate_every must be at least 1": self.validate_every >= 1,
            },
            self,
        )


RunConfig = RestoreConfig | PretrainConfig | ScoreConfig | PfdTrainConfig


def read_config(cls: type[C], path: Path, changes: Path | None = None) -> C:
    """Read a run's configuration from a TOML file; raises ConfigError that names the file and the entry.

    `changes` is another file, whose entries take the place of those of the first.
    """
    data: dict[str, Any] = {}
    for source in (path, changes) if changes else (path,):
        try:
            with source.open("rb") as file:
                data = _merged(data, tomllib.load(file))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as exc:
            raise ConfigError(f"cannot read the configuration {source}: {exc}") from exc
    try:
        return parse_config(cls, data)
    except ConfigError as exc:
        raise ConfigError(f"{changes or path}: {exc}") from exc


def parse_config(cls: type[C], data: Mapping[str, Any]) -> C:
    """Build a run's configuration from TOML values; raises ConfigError."""
    entries = dict(data)
    name, changes = entries.pop("preset", None), entries.get("model", {})
    if not isinstance(changes, dict):
        raise ConfigError("model must be a table; name a preset with preset = …")
    if name is not None and not isinstance(name, str):
        raise ConfigError("preset must be a name")
    if name is None and "model" not in entries:
        raise ConfigError("name a model with preset = …, or describe one under [model]")
    changes = {key: None if value is False and key in OPTIONAL_PARTS else value for key, value in changes.items()}
    named = pfd_preset if cls is PfdTrainConfig else preset
    entries["model"] = changes if name is None else _merged(encode(named(name)), changes)
    return decode(cls, entries, "configuration", ConfigError)


def identity(config: RunConfig) -> dict[str, Any]:
    """Return all that shapes the result, as plain values: what a run that is resumed must share."""
    return {name: value for name, value in encode(config).items() if name != "reporting"}


def digest(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of plain values, independent of their order."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def differences(was: Any, now: Any, place: str = "") -> list[str]:
    """Return in words where two sets of plain values differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [*was, *(key for key in now if key not in was)]
        return [
            line
            for key in keys
            for line in differences(was.get(key, "(nothing)"), now.get(key, "(nothing)"), f"{place}.{key}".lstrip("."))
        ]
    if isinstance(was, tuple):
        was = list(was)
    return [] if was == now else [f"{place} was {_shown(was)}, is {_shown(now)}"]


def _merged(base: Any, changes: Any) -> Any:
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    return base | {key: value if key in UNMERGED else _merged(base.get(key), value) for key, value in changes.items()}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:39] + "…"


def _refuse(what: str, rules: dict[str, bool], config: RunConfig) -> None:
    """Raise ConfigError with the first rule that does not hold."""
    o, reporting = config.optimisation, config.reporting
    shared = {
        "seed must be between 0 and 2⁶³ − 1": 0 <= config.seed < 2**63,
        "optimisation.steps must be between 1 and 10⁹": 1 <= o.steps <= 10**9,
        "optimisation.batch must be between 1 and 65536": 1 <= o.batch <= 65536,
        "optimisation.learning_rate must be between 0 and 1": 0 < o.learning_rate <= 1,
        "optimisation.warmup_steps must be between 0 and steps": 0 <= o.warmup_steps <= o.steps,
        "optimisation.final_fraction must be between 0 and 1": 0 <= o.final_fraction <= 1,
        "optimisation.weight_decay and clip_norm must not be negative": min(o.weight_decay, o.clip_norm) >= 0,
        "optimisation.ema_decay must be at least 0 and below 1": 0 <= o.ema_decay < 1,
        "reporting.log_every and checkpoint_every must be at least 1": (
            min(reporting.log_every, reporting.checkpoint_every) >= 1
        ),
    }
    refuse(what, rules | shared)
