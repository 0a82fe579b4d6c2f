"""What a Diff-V²-IQA network is made of, as plain data: sizes, variants and the paper's ablations. No torch here.

A configuration is stored in our checkpoints and in every engine's manifest; `PRESETS` names the ones people use.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..engine.codec import LATER
from ..engine.crops import CropPlaces
from ..engine.pixels import ImageForm, Preparation, Sides, TapForm
from ..engine.schedule import Kind, Schedule, Taps
from ..errors import ConfigError


class Norm(enum.StrEnum):
    """What normalises inside the U-Net: the paper's BatchNorm or SR3's GroupNorm."""

    BATCH = "batch"
    GROUP = "group"


@dataclass(frozen=True)
class UNetConfig:
    """SR3's U-Net. Level k works at 1/2^k of the image size with `width * multipliers[k]` channels."""

    width: int = 64
    multipliers: tuple[int, ...] = (1, 2, 4, 8, 8)
    blocks: int = 2  # residual blocks per level going down; going up there is one more
    attention_levels: tuple[int, ...] = (3,)
    norm: Norm = Norm.BATCH
    groups: int = 32  # of GroupNorm
    dropout: float = 0.2

    @property
    def alignment(self) -> int:
        """Image sides must be multiples of this: each level halves them, and noise comes in blocks of 4 pixels."""
        return int(max(4, 2 ** (len(self.multipliers) - 1)))


@dataclass(frozen=True)
class ViTConfig:
    """A timm-style ViT of which only the blocks up to the last selected one are built."""

    patch: int = 8
    width: int = 768
    heads: int = 12
    mlp: int = 3072


@dataclass(frozen=True)
class SwinConfig:
    """MANIQA's Swin stages, used twice: at the squeezed width and at half of it."""

    layers: int = 2
    blocks: int = 2
    heads: int = 4
    window: int = 4
    mlp: int = 768
    scale: float = 0.8  # x ← scale·layer(x) + x; one public MANIQA checkpoint wants 0.13


@dataclass(frozen=True)
class VCGConfig:
    """Visual compensation guidance: ViT maps of the four images → noise codes → TAB → Swin → score."""

    vit: ViTConfig = field(default_factory=ViTConfig)
    selection: dict[Kind, tuple[int, ...]] = field(
        default_factory=lambda: {Kind.DIS: (6, 7, 8, 9), Kind.Y0: (6, 7), Kind.T1: (8,), Kind.T2: (9,)}
    )
    noise_code: int = 192  # channels of the learned code of each kind; 0 leaves codes out (MANIQA)
    squeeze: tuple[int, ...] = (2304, 768)  # widths after the chain of 1×1 convolutions
    swin: SwinConfig = field(default_factory=SwinConfig)

    @property
    def layers(self) -> tuple[int, ...]:
        """ViT blocks whose outputs are read by any kind, ascending."""
        return tuple(sorted({layer for layers in self.selection.values() for layer in layers}))

    @property
    def channels(self) -> int:
        """Channels of the concatenated map Z."""
        return sum(len(layers) * self.vit.width + self.noise_code for layers in self.selection.values())


class Encoder(enum.StrEnum):
    """What VDA sees the images with: a ResNet, or EfficientNet-Lite0, which comes with ImageNet's weights."""

    RESNET = "resnet"
    LITE0 = "lite0"


@dataclass(frozen=True)
class VDAConfig:
    """Visual difference analysis: outputs of an encoder for the four images → RTAB → score.

    A ResNet's outputs are its classes. Lite0's are linear in the means and deviations of its maps at five depths.
    """

    resnet_width: int = 64
    resnet_blocks: tuple[int, ...] = (3, 4, 6, 3)
    classes: int = 1000  # outputs of the encoder
    encoder: Encoder = Encoder.RESNET
    query: Kind = Kind.Y0
    key: Kind = Kind.T1
    value: Kind = Kind.T2
    width: int = 32


class Better(enum.StrEnum):
    """Which scores are the better ones."""

    HIGHER = "higher"
    LOWER = "lower"


@dataclass(frozen=True)
class Labels:
    """The labels that the network was trained on, and whose scale its scores are on."""

    minimum: float = 0.0
    maximum: float = 1.0
    better: Better = Better.HIGHER


@dataclass(frozen=True)
class Pixels:
    """What the scoring networks see of pixels between 0 and 1: `(pixel − mean) / std`, for red, green and blue.

    The U-Net always sees pixels from −1 to 1.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class ModelConfig:
    """A whole Diff-V²-IQA network. `None` for a part is the paper's ablation without it.

    Without branches that look at restored images there is no U-Net either: VCG over `{dis: 6, 7, 8, 9}` alone, with
    no noise code, is MANIQA.
    """

    name: str
    unet: UNetConfig | None = field(default_factory=UNetConfig)
    schedule: Schedule = field(default_factory=Schedule)
    taps: Taps = field(default_factory=Taps)
    crop: int = 224
    tabs: int = 2  # transposed attention blocks per stage; those of stage 1 serve both branches
    vcg: VCGConfig | None = field(default_factory=VCGConfig)
    vda: VDAConfig | None = field(default_factory=VDAConfig)
    vcg_weight: float = 1.0
    vda_weight: float = 1.0
    grid: int = 28  # the heads' map is grid × grid tokens
    dropout: float = 0.1  # of the heads, in training
    labels: Labels = field(default=Labels(), metadata=LATER)
    pixels: Pixels = field(default=Pixels(), metadata=LATER)
    # How images were prepared when the heads were trained.
    tap_form: TapForm = field(default=TapForm.FLOAT, metadata=LATER)
    sides: Sides = field(default=Sides.PADDED, metadata=LATER)
    image_form: ImageForm = field(default=ImageForm.AS_IS, metadata=LATER)
    crop_places: CropPlaces = field(default=CropPlaces.GRID, metadata=LATER)
    crop_count: int = field(default=9, metadata=LATER)  # unless the user says otherwise; 9 are 3×3 on a square image

    def __post_init__(self) -> None:
        """Refuse what cannot be built, before anything is allocated."""
        rules = _common_rules(self)
        rules |= _unet_rules(self.unet) if self.unet else {}
        rules |= _vcg_rules(self, self.vcg) if self.vcg else {}
        rules |= _vda_rules(self.vda) if self.vda else {}
        refuse(f"model configuration {self.name!r}", rules)

    @property
    def alignment(self) -> int:
        """Image sides must be multiples of this, as `sides` says how."""
        return self.unet.alignment if self.unet else 1

    @property
    def preparation(self) -> Preparation:
        """How images are prepared."""
        return Preparation(self.sides, self.image_form, self.alignment, self.crop)

    @property
    def as_trained(self) -> dict[str, str]:
        """How taps and images are prepared, as far as it is not the default: for keys of what depends on it."""
        names = ("tap_form", "sides", "image_form", "crop_places")
        return {name: str(value) for name in names if (value := getattr(self, name)) != getattr(ModelConfig, name)}

    @property
    def tokens(self) -> int:
        """Tokens of the heads' map."""
        return self.grid * self.grid

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The images that are looked at, in the order of every array over kinds. The distorted one always is."""
        used = {Kind.DIS}
        if self.vcg:
            used |= set(self.vcg.selection)
        if self.vda:
            used |= {self.vda.query, self.vda.key, self.vda.value}
        return tuple(kind for kind in Kind if kind in used)


def refuse(what: str, rules: Mapping[str, bool]) -> None:
    """Raise ConfigError with the first rule that does not hold."""
    for problem, holds in rules.items():
        if not holds:
            raise ConfigError(f"{what}: {problem}")


def _common_rules(c: ModelConfig) -> dict[str, bool]:
    restored = [kind for kind in c.kinds if kind is not Kind.DIS]
    return {
        "needs at least one branch (vcg or vda)": c.vcg is not None or c.vda is not None,
        f"looks at {', '.join(restored)} but has no U-Net to restore them": c.unet is not None or not restored,
        "has a U-Net that no branch looks at": c.unet is None or bool(restored),
        "steps must be between 2 and 4000": 2 <= c.schedule.steps <= 4000,
        "schedule offset must lie between 0 and 1, max_beta between 0.1 and 1": 0 < c.schedule.offset < 1
        and 0.1 <= c.schedule.max_beta < 1,
        "taps must be different step indices below the number of steps, y0 at 0": (
            c.taps.y0 == 0 < c.taps.t1 < c.schedule.steps
            and 0 < c.taps.t2 < c.schedule.steps
            and c.taps.t1 != c.taps.t2
        ),
        "tabs must be between 0 and 8": 0 <= c.tabs <= 8,
        "crop must be a multiple of 16 between 32 and 1024": 32 <= c.crop <= 1024 and c.crop % 16 == 0,
        "image_form squashed needs tap_form png8: restorations are squashed as files of 8 bits are": not restored
        or c.image_form is ImageForm.AS_IS
        or c.tap_form is TapForm.PNG8,
        "crop_count must be between 1 and 10000": 1 <= c.crop_count <= 10_000,
        "grid must be between 1 and 128": 1 <= c.grid <= 128,
        "dropout must be in [0, 1)": 0 <= c.dropout < 1,
        "branch weights must not be negative": min(c.vcg_weight, c.vda_weight) >= 0,
        "labels.minimum must be below labels.maximum": c.labels.minimum < c.labels.maximum,
        "pixels.mean and pixels.std must be three numbers, std above 0": (
            len(c.pixels.mean) == len(c.pixels.std) == 3 and min(c.pixels.std) > 0
        ),
        "name must be 1 to 64 letters, digits, '-', '_' or '.'": (
            0 < len(c.name) <= 64 and all(ch.isalnum() or ch in "-_." for ch in c.name)
        ),
    }


def _unet_rules(u: UNetConfig) -> dict[str, bool]:
    levels = len(u.multipliers)
    widths = [u.width * m for m in u.multipliers]
    return {
        "unet.width must be an even number between 4 and 1024": 4 <= u.width <= 1024 and u.width % 2 == 0,
        "unet.multipliers must be 2 to 5 numbers between 1 and 16 (sides are aligned to 16)": (
            2 <= levels <= 5 and all(1 <= m <= 16 for m in u.multipliers)
        ),
        "unet.blocks must be between 1 and 8": 1 <= u.blocks <= 8,
        "unet.attention_levels must name levels of the U-Net": all(0 <= k < levels for k in u.attention_levels),
        "unet.groups must divide the width of every level": (
            u.groups >= 1 and (u.norm is Norm.BATCH or all(w % u.groups == 0 for w in [u.width, *widths]))
        ),
        "unet.dropout must be in [0, 1)": 0 <= u.dropout < 1,
    }


def _vcg_rules(c: ModelConfig, v: VCGConfig) -> dict[str, bool]:
    vit, swin = v.vit, v.swin
    sizes = (
        vit.patch,
        vit.width,
        vit.heads,
        vit.mlp,
        swin.window,
        swin.mlp,
        swin.heads,
        swin.layers,
        swin.blocks,
        *v.squeeze,
    )
    if min(sizes) < 1 or max(*sizes, v.noise_code) > 16384 or not v.squeeze:
        return {"vcg sizes must be between 1 and 16384": False}
    return {
        f"vcg: crop {c.crop} / patch {vit.patch} must give the grid of {c.grid}": c.crop == c.grid * vit.patch,
        "vcg.vit.width must be a multiple of heads": vit.width % vit.heads == 0,
        "vcg.selection must include dis and name each kind with at least one block": (
            Kind.DIS in v.selection and all(v.selection.values())
        ),
        "vcg.selection must name ViT blocks between 0 and 63": all(0 <= layer < 64 for layer in v.layers),
        "vcg.noise_code must not be negative": v.noise_code >= 0,
        "vcg.swin: grid must be a multiple of window": c.grid % swin.window == 0,
        "vcg.swin: half of the last squeeze width must be a multiple of heads": v.squeeze[-1] % (2 * swin.heads) == 0,
        "vcg.swin.layers and blocks must be at most 16": swin.layers <= 16 and swin.blocks <= 16,
    }


def _vda_rules(v: VDAConfig) -> dict[str, bool]:
    return {
        "vda.resnet_width must be between 4 and 1024": 4 <= v.resnet_width <= 1024,
        "vda.resnet_blocks must be four numbers between 1 and 64": (
            len(v.resnet_blocks) == 4 and all(1 <= n <= 64 for n in v.resnet_blocks)
        ),
        "vda.classes must be between 1 and 16384": 1 <= v.classes <= 16384,
        "vda.width must be between 1 and 4096": 1 <= v.width <= 4096,
        "vda query, key and value must be restored kinds": Kind.DIS not in {v.query, v.key, v.value},
    }


PAPER = ModelConfig(name="paper")

PRESETS: dict[str, ModelConfig] = {
    # The paper's text: BatchNorm in the U-Net.
    "paper": PAPER,
    # The authors' code: SR3's GroupNorm, restorations in PNG files, and one random crop of each image.
    "authors": replace(
        PAPER,
        name="authors",
        unet=UNetConfig(norm=Norm.GROUP),
        tap_form=TapForm.PNG8,
        sides=Sides.RESIZED,
        crop_places=CropPlaces.RANDOM,
        crop_count=1,
    ),
    # The special case without restoration, for MANIQA's own weights. Its program takes 20 random crops.
    "maniqa": replace(
        PAPER,
        name="maniqa",
        unet=None,
        vda=None,
        vcg=VCGConfig(selection={Kind.DIS: (6, 7, 8, 9)}, noise_code=0, squeeze=(768,)),
        crop_places=CropPlaces.RANDOM,
        crop_count=20,
    ),
    # The same stages, small: two CPU cores restore a 224×224 image in a few seconds, and train it in hours.
    "mini": ModelConfig(
        name="mini",
        unet=UNetConfig(width=16, multipliers=(1, 2, 4, 4, 4), blocks=1, dropout=0.0),
        crop=112,
        grid=14,
        vcg=VCGConfig(
            vit=ViTConfig(patch=8, width=96, heads=4, mlp=192),
            selection={Kind.DIS: (2, 3, 4, 5), Kind.Y0: (2, 3), Kind.T1: (4,), Kind.T2: (5,)},
            noise_code=24,
            squeeze=(192, 96),
            swin=SwinConfig(window=7, mlp=96),
        ),
        vda=VDAConfig(resnet_width=16, resnet_blocks=(1, 1, 1, 1), classes=128),
    ),
}


def preset(name: str) -> ModelConfig:
    """Return a configuration by name; raises ConfigError that lists the names there are."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"there is no preset {name!r}; choose from {', '.join(PRESETS)}") from None
