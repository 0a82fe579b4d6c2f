"""What a PFD-IQA network is made of, as plain data. No torch here.

The paper's code is not public. So every choice says where it comes from, in a comment on its line: `known` if a
summary of the paper says so, `inferred` if it is ours. docs/pfdiqa.md has its table from these comments.
"""

import enum
from dataclasses import dataclass, field, replace

from ...engine.schedule import Ddim
from ...errors import ConfigError
from ..config import Norm, ViTConfig, refuse

MAX_SIZE, MAX_WORDS, MAX_WORD = 4096, 64, 100


class Backbone(enum.StrEnum):
    """The network whose features are refined."""

    VIT = "vit"
    LITE0 = "lite0"
    LITE2 = "lite2"


class Prompts(enum.StrEnum):
    """Where the vectors of the distortions and levels come from."""

    CONSTANT = "constant"  # a text encoder made them; they do not learn
    LEARNED = "learned"  # they begin at random: what the words must beat


class Fusion(enum.StrEnum):
    """How the two auxiliary features join the encoder's."""

    SUM = "sum"
    CONCAT = "concat"  # a 1×1 convolution of the three


@dataclass(frozen=True)
class Words:
    """What is told apart: kinds of distortion, and levels of quality from worst to best. The defaults are LIQE's."""

    distortions: tuple[str, ...] = (
        "jpeg2000 compression",
        "jpeg compression",
        "noise",
        "blur",
        "color",
        "contrast",
        "overexposure",
        "underexposure",
        "spatial",
        "quantization",
        "other",
    )
    levels: tuple[str, ...] = ("bad", "poor", "fair", "good", "perfect")

    def __post_init__(self) -> None:
        """Refuse lists that are empty or have a word twice. Raises ConfigError."""
        for what, words in (("distortions", self.distortions), ("levels", self.levels)):
            alike = [" ".join(word.lower().split()) for word in words]
            broken = [word for word in words if not word.strip() or not word.isprintable() or len(word) > MAX_WORD]
            twice = [word for word, same in zip(words, alike, strict=True) if alike.count(same) > 1]
            rules = {
                f"there must be 2 to {MAX_WORDS} of them, not {len(words)}": 2 <= len(words) <= MAX_WORDS,
                f"a word must be text of 1 to {MAX_WORD} letters, not {next(iter(broken), '')!r}": not broken,
                f"{next(iter(twice), '')!r} is there twice": not twice,
            }
            refuse(what, rules)


@dataclass(frozen=True)
class PfdConfig:
    """A whole PFD-IQA network. A feature map has `width` channels and `grid`×`grid` places."""

    name: str
    encoder: Backbone = Backbone.VIT  # inferred: DEIQT's ViT-S/16 with LayerScale; Lite0 and Lite2 are ours, for CPUs
    width: int = 384  # inferred: ViT-S; 128 for a CPU, whose goal is 20 images of 4 crops a second
    crop: int = 224  # inferred: DEIQT
    patch: int = 16  # inferred: DEIQT; so the map is 14×14, and Lite's maps are brought to that
    blocks: int = 12  # inferred: DEIQT; of the ViT
    heads: int = 6  # inferred: DEIQT; of every attention
    mlp_ratio: int = 4  # inferred: DEIQT; of the ViT and the decoder
    words: Words = Words()  # inferred: LIQE's eleven distortions and five levels
    prompts: Prompts = Prompts.CONSTANT  # known: prompts are text
    prompt_width: int = 512  # inferred: CLIP ViT-B/32, which LIQE uses; MiniLM has 384
    temperature: float = 100.0  # inferred: CLIP's; MiniLM's words have cosines up to .96, which less would not part
    mask_ratio: float = 0.5  # inferred: that channels are masked is known; masked feature generation drops .5 to .65
    fusion: Fusion = Fusion.SUM  # inferred: it needs no weights
    alignment: bool = True  # known: γ fits the noise to the schedule; without it the start is the fused features
    adapter_reduction: int = 8  # inferred: DiffKD's noise adapter
    cross_attention: bool = True  # known: the aggregated prompts condition the denoiser by it
    reduction: int = 4  # inferred: DiffKD's two bottlenecks
    norm: Norm = Norm.BATCH  # inferred: DiffKD's; it folds into the convolutions
    groups: int = 8  # inferred: of GroupNorm, where that is chosen
    schedule: Ddim = field(default_factory=Ddim)  # inferred: five steps are known; the rest is DiffKD's
    panels: int = 6  # inferred: one decoder layer is known; DEIQT has six panels
    decoder_eps: float = 1e-5  # inferred: DEIQT keeps PyTorch's default there; other LayerNorms have 1e-6

    def __post_init__(self) -> None:
        """Refuse what cannot be built, before anything is allocated."""
        refuse(f"model configuration {self.name!r}", _rules(self))

    @property
    def grid(self) -> int:
        """Places along a side of the feature map."""
        return self.crop // self.patch

    @property
    def vit(self) -> ViTConfig:
        """The ViT's sizes."""
        return ViTConfig(self.patch, self.width, self.heads, self.mlp_ratio * self.width)


def _rules(c: PfdConfig) -> dict[str, bool]:
    sizes = (c.width, c.heads, c.mlp_ratio, c.patch, c.prompt_width, c.panels, c.groups, c.reduction)
    if min(*sizes, c.adapter_reduction) < 1 or max(sizes) > MAX_SIZE:
        return {f"sizes must be between 1 and {MAX_SIZE}": False}
    return {
        "crop must be a multiple of patch between 32 and 1024": 32 <= c.crop <= 1024 and c.crop % c.patch == 0,
        "patch must be 16, the stride of Lite's map": c.encoder is Backbone.VIT or c.patch == 16,
        "crop must be a multiple of 32 for Lite": c.encoder is Backbone.VIT or c.crop % 32 == 0,
        "grid must be at most 128": c.grid <= 128,
        "blocks must be between 1 and 64": 1 <= c.blocks <= 64,
        "width must be a multiple of 4, heads, reduction and adapter_reduction": (
            not any(c.width % n for n in (4, c.heads, c.reduction, c.adapter_reduction))
        ),
        "groups must divide width and the bottlenecks' inner widths": c.norm is Norm.BATCH
        or not any(n % c.groups for n in (c.width, c.width // c.reduction, c.width // c.adapter_reduction)),
        "temperature must be between 0.1 and 1000": 0.1 <= c.temperature <= 1000,
        "mask_ratio must be in [0, 1)": 0 <= c.mask_ratio < 1,
        **{f"schedule.{text}": holds for text, holds in c.schedule.rules.items()},
        "decoder_eps must be between 1e-12 and 1e-3": 1e-12 <= c.decoder_eps <= 1e-3,
        "name must be 1 to 64 letters, digits, '-', '_' or '.'": (
            0 < len(c.name) <= 64 and all(ch.isalnum() or ch in "-_." for ch in c.name)
        ),
    }


PFD_PAPER = PfdConfig(name="pfd-paper")

PFD_PRESETS: dict[str, PfdConfig] = {
    # The paper's size, as far as it is known.
    "pfd-paper": PFD_PAPER,
    # EfficientNet-Lite0 instead of the ViT, and prompts of an encoder that can be installed: for a CPU.
    "pfd-mini": replace(PFD_PAPER, name="pfd-mini", encoder=Backbone.LITE0, width=128, heads=4, prompt_width=384),
}


def pfd_preset(name: str) -> PfdConfig:
    """Return a configuration by name; raises ConfigError that lists the names there are."""
    try:
        return PFD_PRESETS[name]
    except KeyError:
        raise ConfigError(f"there is no PFD-IQA preset {name!r}; choose from {', '.join(PFD_PRESETS)}") from None
