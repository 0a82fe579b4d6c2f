"""What weights cannot tell, as options: a table of names, and values from the command line, a program or a TOML file.

Each value takes the place of an entry of the configuration. Its type is that of the entry.
"""

import difflib
import enum
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from ..engine.codec import shown
from ..errors import ConfigError
from .config import PAPER, ModelConfig, Norm

MAX_BYTES = 2**16  # of a file with options
Values = tuple[Any, ...]


@dataclass(frozen=True)
class Option:
    """`--name` on the command line, `name` in a file. `places` are entries of ModelConfig, as `part.entry`."""

    name: str
    places: tuple[str, ...]
    metavar: str
    help: str
    concerns: Callable[[ModelConfig], object] = bool  # whether a model has a use for it

    def values(self, config: ModelConfig) -> Values:
        """Return what a configuration has in these places."""
        found = [reduce(getattr, place.split("."), config) for place in self.places]
        return tuple(found[0]) if isinstance(found[0], tuple) else tuple(found)

    def parse(self, value: object) -> Values:
        """Return the values that a text such as "1,5", a number or a list stands for. Raises ConfigError."""
        if isinstance(value, str):
            items: list[Any] = [item.strip() for item in value.split(",")]
        else:
            items = list(value) if isinstance(value, list | tuple) else [value]
        kinds = [type(known) for known in self.values(PAPER)]
        if len(self.places) < len(kinds) and len(items) == 1:  # one number for red, green and blue
            items *= len(kinds)
        parsed = [_typed(kind, item) for kind, item in zip(kinds, items, strict=False)]
        if len(items) != len(kinds) or None in parsed:
            raise ConfigError(f"{self.name} must be {self.metavar}, not {shown(value)}")
        return tuple(parsed)


OPTIONS = (
    Option(
        "swin-scale",
        ("vcg.swin.scale",),
        "SCALE",
        "How much of a Swin layer is added to its input: 0.8 in MANIQA's code, 0.13 before April 2022.",
        lambda c: c.vcg,
    ),
    Option(
        "branch-weights",
        ("vcg_weight", "vda_weight"),
        "VCG,VDA",
        "How the two scores add up: 1,1 in the paper; 0,1 and 1,5 occur in the authors' code.",
        lambda c: c.vcg and c.vda,
    ),
    Option("steps", ("schedule.steps",), "N", "Steps of the restoration.", lambda c: c.unet),
    Option(
        "taps",
        ("taps.t1", "taps.t2"),
        "T1,T2",
        "After which steps the two noisy images are taken; the last step is 0.",
        lambda c: c.unet,
    ),
    Option(
        "norm-groups",
        ("unet.groups",),
        "N",
        "Groups of the U-Net's GroupNorm: norm_groups in SR3's configuration.",
        lambda c: c.unet and c.unet.norm is Norm.GROUP,
    ),
    Option(
        "score-range",
        ("labels.minimum", "labels.maximum"),
        "MIN,MAX",
        "The worst and the best label of training, as the network was given them. The smaller number comes first.",
    ),
    Option(
        "tap-form",
        ("tap_form",),
        "float|clamped|png8",
        "How the heads saw restored images: as the sampler leaves them, within −1 to 1, or read from 8-bit PNG files.",
        lambda c: c.unet,
    ),
    Option("sides", ("sides",), "padded|resized", "How sides become what the U-Net needs.", lambda c: c.unet),
    Option("image-form", ("image_form",), "as-is|squashed", "Whether whole images were squashed into one crop."),
    Option("crop-places", ("crop_places",), "grid|random", "Where the crops of an image lie."),
    Option("crop-count", ("crop_count",), "N", "How many crops an image has, unless iqa-run is told otherwise."),
    Option("better", ("labels.better",), "higher|lower", "Which of these labels are better: higher or lower ones."),
    Option(
        "mean",
        ("pixels.mean",),
        "R,G,B",
        "What the scoring networks want subtracted from pixels between 0 and 1; one number stands for all three.",
    ),
    Option("std", ("pixels.std",), "R,G,B", "What they want the difference divided by."),
)
_BY_NAME = {option.name: option for option in OPTIONS}


def parse_options(given: Mapping[str, object], where: str = "") -> dict[str, Values]:
    """Return the values of options by name. Raises ConfigError, for an unknown name with the nearest one."""
    found = {}
    for name, value in given.items():
        if name not in _BY_NAME:
            nearest = difflib.get_close_matches(name, _BY_NAME, n=1, cutoff=0)[0]
            raise ConfigError(f"{where}there is no option {shown(name)}; the nearest is {nearest}")
        try:
            found[name] = _BY_NAME[name].parse(value)
        except ConfigError as exc:
            raise ConfigError(f"{where}{exc}") from None
    return found


def read_options(path: Path) -> dict[str, Values]:
    """Return the options in a TOML file, by name. Raises ConfigError."""
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{path} has more than {MAX_BYTES} bytes, which no file of options needs")
        return parse_options(tomllib.loads(data.decode("utf-8")), f"{path}: ")
    except (OSError, ValueError, RecursionError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else shown(str(exc))
        raise ConfigError(f"cannot read the options in {path}: {reason}") from exc


def apply(config: ModelConfig, options: Mapping[str, Values]) -> ModelConfig:
    """Return the configuration with these options. Raises ConfigError if the model has no use for one."""
    tree: dict[str, Any] = {}
    for name, values in options.items():
        option = _BY_NAME[name]
        if not option.concerns(config):
            raise ConfigError(f"model {config.name!r} has no use for {name}; leave it out")
        entries = values if len(option.places) == len(values) else (values,)
        for place, value in zip(option.places, entries, strict=True):
            *parts, last = place.split(".")
            reduce(lambda branch, part: branch.setdefault(part, {}), parts, tree)[last] = value
    changed: ModelConfig = _replaced(config, tree)  # all at once: fewer steps may need other taps
    return changed


def as_text(values: Values) -> str:
    """Return values as they are written on a command line."""
    return ",".join(str(value).removesuffix(".0") for value in values)


def _typed(kind: Any, item: Any) -> Any:
    """Return an item as a float, a whole number or a member of an enumeration; None if it is none."""
    if isinstance(item, bool) or not isinstance(item, str | int | float) or (kind is int and isinstance(item, float)):
        return None
    try:
        value = kind(item)
    except (ValueError, OverflowError):
        return None
    return value if issubclass(kind, enum.Enum) or abs(value) <= 1e300 else None  # NaN is not below it either


def _replaced(config: Any, tree: dict[str, Any]) -> Any:
    return replace(
        config,
        **{
            name: _replaced(getattr(config, name), value) if isinstance(value, dict) else value
            for name, value in tree.items()
        },
    )
