"""How far a candidate may be from its reference: limits by name, with defaults for each precision, and the verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..engine import agreement
from ..errors import DatasetError, UsageError
from .figures import Difference, Findings, ImageFigures, RunFigures

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8", "fast")  # fast: of float32 with fewer steps
Limits = Mapping[str, float | None]  # None: not judged


@dataclass(frozen=True)
class Rule:
    """A figure that has a limit. Errors are shares of the largest value; those of scores, of the range of scores."""

    about: str
    defaults: tuple[float, ...]  # for PRECISIONS
    floor: bool = False  # the limit is the least that is allowed, not the most


_STEP = "in one step, given the reference's inputs"

# The worst image and step count, unless the text says otherwise. The limits of scores are what a precision plan must
# hold; the others are wide enough for the rounding of the networks at hand: more than that has another cause.
RULES: dict[str, Rule] = {
    "unet-max": Rule(f"largest error of the noise {_STEP}", (1e-3, 0.05, 0.2, 0.5, 0.5, 1e-3)),
    "unet-mean": Rule(f"mean error of the noise {_STEP}", (1e-4, 0.005, 0.02, 0.05, 0.05, 1e-4)),
    "unet-cosine": Rule(
        f"cosine similarity of the noise {_STEP}", (0.99999, 0.9995, 0.99, 0.97, 0.97, 0.99999), floor=True
    ),
    "vit-mean": Rule("mean error of the ViT maps, given the reference's inputs", (1e-4, 0.005, 0.02, 0.02, 0.02, 1e-4)),
    "vit-cosine": Rule(
        "cosine similarity of the ViT maps, given the reference's inputs",
        (0.99999, 0.9999, 0.999, 0.99, 0.99, 0.99999),
        floor=True,
    ),
    "state-mean": Rule("mean error of the state of the loop, in a whole run", (1e-3, 0.01, 0.03, 0.05, 0.05, 0.05)),
    "tap-mean": Rule("mean error of the tapped images, in a whole run", (1e-3, 0.01, 0.03, 0.05, 0.05, 0.05)),
    "tap-psnr": Rule(
        "PSNR of the tapped images in dB, in a whole run", (60.0, 35.0, 25.0, 20.0, 20.0, 15.0), floor=True
    ),
    "maps-mean": Rule("mean error of the ViT maps, in a whole run", (1e-3, 0.01, 0.03, 0.05, 0.05, 0.05)),
    "branch": Rule("error of one branch's score", (1e-3, 0.01, 0.03, 0.05, 0.05, 0.05)),
    "score": Rule("error of the score", (1e-3, 0.01, 0.03, 0.05, 0.05, 0.05)),
    "score-mean": Rule("mean error of the score over all images", (1e-4, 0.002, 0.01, 0.01, 0.01, 0.01)),
    "spread": Rule(
        "mean error of the score over all images, as a multiple of the spread between seeds",
        (0.1, 1.0, 1.0, 1.0, 1.0, 1.0),
    ),
    "srcc": Rule(
        "rank correlation (SRCC) of the two score lists", (0.9999, 0.9995, 0.998, 0.995, 0.995, 0.99), floor=True
    ),
    "plcc": Rule(
        "linear correlation (PLCC) of the two score lists", (0.9999, 0.9995, 0.998, 0.995, 0.995, 0.99), floor=True
    ),
    "batch": Rule("largest difference between two inputs at once and each alone", (1e-4, 0.02, 0.1, 0.02, 0.02, 1e-4)),
    "repeat": Rule("1 if the same image, scored twice in a row, gives different results", (0.0,) * 6),
    "order": Rule("1 if the same image, scored before and after the others, gives different results", (0.0,) * 6),
    "graph": Rule("1 if the same image, with a CUDA graph and without, gives different results", (0.0,) * 6),
    "device": Rule(
        "error of the score computed all on the GPU, as iqa-run does it", (1e-3, 0.01, 0.03, 0.05, 0.05, 0.05)
    ),
}
CORRELATIONS = ("srcc", "plcc")
SLIGHT = 2e-3  # of the range of scores: a smaller spread between seeds is no yardstick


@dataclass(frozen=True)
class LimitCheck:
    """One limit beside the figure it is for. `value` None: there is no figure, and `where` says why."""

    name: str
    value: float | None
    limit: float | None
    within: bool
    where: str

    @property
    def excess(self) -> float:
        """How many times its limit the figure is; a floor is compared by the distance from 1."""
        if self.value is None or self.limit is None:
            return 0.0
        if not math.isfinite(self.value):
            return 0.0 if self.within else math.inf
        if not RULES[self.name].floor:
            return self.value / self.limit if self.limit else (math.inf if self.value else 0.0)
        if self.name == "tap-psnr":
            return 10 ** ((self.limit - self.value) / 20)
        return (1 - self.value) / (1 - self.limit) if self.limit < 1 else (math.inf if self.value < 1 else 0.0)


def parse_limit(text: str) -> tuple[str, float | None]:
    """Read one `--limit`, such as `score=0.01` or `srcc=none`. Raises UsageError."""
    name, _, value = text.partition("=")
    try:
        return name, None if value == "none" else float(value)
    except ValueError:
        raise UsageError(f"the limit {text!r} must be a number or none, such as {name}=0.01") from None


def make_limits(precision: str, changes: Limits, images: int) -> dict[str, float | None]:
    """Return the default limits of a precision for so many images, with some of them changed; None lifts a limit.

    The *default* SRCC lets one pair of neighbours in twenty images change places. On few images one such pair, equal to
    any eye, costs more than the whole allowance: 0.0015 with 20 images.

    Raises UsageError for a name that does not exist, and for NaN.
    """
    if precision not in PRECISIONS:
        raise UsageError(f"there are no limits for {precision!r}, only for {', '.join(PRECISIONS)}")
    limits: dict[str, float | None] = {name: rule.defaults[PRECISIONS.index(precision)] for name, rule in RULES.items()}
    default = limits["srcc"]
    if default is not None and images > 1:
        swaps = -(-images // 20)
        limits["srcc"] = min(default, 1 - 12 * swaps / (images * (images**2 - 1)))
    for name, value in changes.items():
        if name not in RULES:
            raise UsageError(f"there is no limit {name!r}; there are {', '.join(RULES)}")
        if math.isnan(value or 0.0):
            raise UsageError(f"the limit {name} must be a number or none, not NaN")
        limits[name] = value
    return limits


def check_image(figures: ImageFigures, limits: Limits, span: float) -> list[LimitCheck]:
    """Check one image; `span` is the range of scores. NaN and Inf are beyond any limit."""
    found = _Checks(limits)
    forced = _by_step(figures.forced)
    for name, differences, part in (
        ("unet-max", forced, "max"),
        ("unet-mean", forced, "mean"),
        ("unet-cosine", forced, "cosine"),
        ("vit-mean", _alone(figures.heads.get("vit")), "mean"),
        ("vit-cosine", _alone(figures.heads.get("vit")), "cosine"),
        ("state-mean", _by_step(figures.state), "mean"),
        ("tap-mean", figures.taps, "mean"),
        ("tap-psnr", figures.taps, "psnr"),
        ("maps-mean", _alone(figures.maps), "mean"),
    ):
        found.worst(name, {place: getattr(d, part) for place, d in differences.items()}, figures.name)
    errors = {name: abs(have - want) / span for name, (want, have) in figures.scores.items()}
    score = errors.pop("score")
    found.worst("branch", errors, figures.name)
    found.figure("score", score, figures.name)
    if what := _not_finite(figures):
        found.checks.append(
            LimitCheck("finite", None, None, within=False, where=f"{figures.name}: NaN or Inf in {what}")
        )
    return found.checks


def judge(findings: Findings, limits: Limits) -> tuple[LimitCheck, ...]:
    """Check a whole run: for each limit the worst image, then what takes all images."""
    if len(findings.images) < findings.asked:  # it ended early, and the images left out count in a correlation
        limits = {**limits, **dict.fromkeys(CORRELATIONS)}
    worst: dict[str, LimitCheck] = {}
    for figures in findings.images:
        for check in check_image(figures, limits, findings.span):
            known = worst.get(check.name)
            if known is None or (not check.within, check.excess) > (not known.within, known.excess):
                worst[check.name] = check
    found = _Checks(limits)
    found.checks += [worst[name] for name in ("finite", *RULES) if name in worst]
    pairs = [figures.scores["score"] for figures in findings.images]
    mean = math.fsum(abs(have - want) for want, have in pairs) / len(pairs)
    found.figure("score-mean", mean / findings.span, f"{len(pairs)} images")
    loop = findings.loop
    if loop.spread is None:
        found.missing("spread", "not measured: give --seeds 2")
    elif loop.spread < SLIGHT * findings.span:
        found.missing("spread", f"other seeds move the score by {loop.spread:.2g} only")
    else:
        where = f"spread {loop.spread:.2g}, from {loop.spread_seeds} seeds on {loop.spread_images} images"
        found.figure("spread", mean / loop.spread, where)
    _check_correlations(found, pairs)
    _check_invariance(found, loop)
    return tuple(found.checks)


def is_within(checks: Sequence[LimitCheck]) -> bool:
    """Whether no check fails."""
    return all(check.within for check in checks)


class _Checks:
    """Checks figures one by one; a limit of None is not checked."""

    def __init__(self, limits: Limits) -> None:
        self.checks: list[LimitCheck] = []
        self._limits = limits

    def figure(self, name: str, value: float, where: str) -> None:
        """Check a figure."""
        if (limit := self._limits[name]) is not None:
            within = value >= limit if RULES[name].floor else value <= limit  # NaN is neither
            self.checks.append(LimitCheck(name, value, limit, within, where))

    def worst(self, name: str, values: Mapping[str, float], of: str = "") -> None:
        """Check the worst of several figures, if there are any; NaN is worst."""
        sign = -1 if RULES[name].floor else 1
        if values:
            place = max(values, key=lambda key: math.inf if math.isnan(values[key]) else sign * values[key])
            self.figure(name, values[place], ", ".join(filter(None, (of, place))))

    def missing(self, name: str, why: str, *, within: bool = True) -> None:
        """Say why there is no figure."""
        if (limit := self._limits[name]) is not None:
            self.checks.append(LimitCheck(name, None, limit, within, why))


def _check_correlations(found: _Checks, pairs: Sequence[tuple[float, float]]) -> None:
    want, have = zip(*pairs, strict=True)
    for name in CORRELATIONS:
        if len(pairs) < 2:
            found.missing(name, "not measured: give two images")
            continue
        try:
            found.figure(name, getattr(agreement, name)(have, want), f"{len(pairs)} images")
        except DatasetError as exc:
            found.missing(name, f"{exc}; give images that differ, or --limit {name}=none", within=False)


def _check_invariance(found: _Checks, loop: RunFigures) -> None:
    found.worst("batch", loop.batch or {})
    same = [("repeat", loop.repeat, "not measured"), ("order", loop.order, "not measured: give two images")]
    if loop.device is not None:
        same.append(("graph", loop.graph, f"not measured: {loop.graph_note}"))
    for name, is_same, why in same:
        if is_same is None:
            found.missing(name, why)
        else:
            found.figure(name, float(not is_same), "the first image")
    if loop.device is not None:
        found.figure("device", loop.device, "the first image")


def _alone(difference: Difference | None) -> dict[str, Difference]:
    return {"": difference} if difference else {}


def _by_step(differences: Sequence[Difference]) -> dict[str, Difference]:
    return {f"step {len(differences) - 1 - index}": each for index, each in enumerate(differences)}


def _not_finite(figures: ImageFigures) -> str:
    """Return where a candidate first stops giving numbers."""
    places = {
        **{f"the noise of {step}": each for step, each in _by_step(figures.noise).items()},
        **{f"tap {kind}": each for kind, each in figures.taps.items()},
        **({"the ViT maps": figures.maps} if figures.maps else {}),
    }
    found = [place for place, each in places.items() if each.not_finite]
    found += [f"the {name}" for name, (_, have) in figures.scores.items() if not math.isfinite(have)]
    return found[0] if found else ""
