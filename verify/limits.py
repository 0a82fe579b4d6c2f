"""How much a candidate may drift: limits by name with defaults for each precision, and the verdict over them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import DatasetError, UsageError
from .figures import Drift, ImageFigures

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "fp8")
Limits = Mapping[str, float | None]  # None: not judged


@dataclass(frozen=True)
class Rule:
    """A figure that is judged. Errors are shares of the largest value, those of scores shares of the score's range."""

    about: str
    defaults: tuple[float, ...]  # for PRECISIONS
    floor: bool = False  # the figure must be at least the limit, not at most


# Where nothing else is said, the worst image and step count. Limits of scores are what a plan is asked to hold; the
# others are wide enough for rounding in the networks at hand: what exceeds them is more than that.
RULES: dict[str, Rule] = {
    "unet-max": Rule("noise of one step, on the reference's inputs: largest error", (1e-3, 0.05, 0.2, 0.5, 0.5)),
    "unet-mean": Rule("… mean error", (1e-4, 0.005, 0.02, 0.05, 0.05)),
    "unet-cosine": Rule("… cosine", (0.99999, 0.9995, 0.99, 0.97, 0.97), floor=True),
    "vit-mean": Rule("ViT maps, on the reference's inputs: mean error", (1e-4, 0.005, 0.02, 0.02, 0.02)),
    "vit-cosine": Rule("… cosine", (0.99999, 0.9999, 0.999, 0.99, 0.99), floor=True),
    "state-mean": Rule("state of the loop, freely run: mean error", (1e-3, 0.01, 0.03, 0.05, 0.05)),
    "tap-mean": Rule("tapped images: mean error", (1e-3, 0.01, 0.03, 0.05, 0.05)),
    "tap-psnr": Rule("tapped images: PSNR, dB", (60.0, 35.0, 25.0, 20.0, 20.0), floor=True),
    "maps-mean": Rule("ViT maps, freely run: mean error", (1e-3, 0.01, 0.03, 0.05, 0.05)),
    "branch": Rule("score of a branch", (1e-3, 0.01, 0.03, 0.05, 0.05)),
    "score": Rule("score", (1e-3, 0.01, 0.03, 0.05, 0.05)),
    "score-mean": Rule("score, mean over the images", (1e-4, 0.002, 0.01, 0.01, 0.01)),
    "spread": Rule("score, mean over the images, of the spread between seeds", (0.1, 1.0, 1.0, 1.0, 1.0)),
    "srcc": Rule("SRCC of the two score lists", (0.9999, 0.9995, 0.998, 0.995, 0.995), floor=True),
    "plcc": Rule("PLCC of the two score lists", (0.9999, 0.9995, 0.998, 0.995, 0.995), floor=True),
    "batch": Rule("two inputs at once against each alone: largest error", (1e-4, 0.02, 0.1, 0.02, 0.02)),
    "repeat": Rule("the same image again: images whose results differ", (0.0,) * 5),
    "order": Rule("the same image after the others: images whose results differ", (0.0,) * 5),
    "graph": Rule("the same image by a CUDA graph: images whose results differ", (0.0,) * 5),
    "device": Rule("score of the same image as iqa-run computes it, all on the GPU", (1e-3, 0.01, 0.03, 0.05, 0.05)),
}
CORRELATIONS = ("srcc", "plcc")


@dataclass(frozen=True)
class Check:
    """One rule applied. `value` None: it could not be measured, and `where` says why."""

    name: str
    value: float | None
    limit: float | None
    within: bool
    where: str

    @property
    def excess(self) -> float:
        """How many times the limit the figure reaches; for floors, in terms of the distance from 1."""
        if self.value is None or self.limit is None:
            return 0.0
        if not math.isfinite(self.value):
            return 0.0 if self.within else math.inf
        if not RULES[self.name].floor:
            return self.value / self.limit if self.limit else (math.inf if self.value else 0.0)
        if self.name == "tap-psnr":
            return 10 ** ((self.limit - self.value) / 20)
        return (1 - self.value) / (1 - self.limit) if self.limit < 1 else (math.inf if self.value < 1 else 0.0)


@dataclass(frozen=True)
class Loop:
    """What is known beyond single images. None: not measured."""

    spread: float | None = None  # standard deviation of the reference's scores between seeds
    spread_seeds: int = 0
    spread_images: int = 0
    repeat: bool | None = None  # whether the same image came out the same at once …
    order: bool | None = None  # … and after all others
    batch: dict[str, float] | None = None  # by stage
    graph: bool | None = None  # whether a CUDA graph changes nothing
    graph_note: str = ""  # why there was none
    device: float | None = None  # how far the score is from that of the stages run one by one; None: not on a device


def make_limits(precision: str, changes: Iterable[str]) -> dict[str, float | None]:
    """Return the limits of a precision with changes such as `score=0.01` or `srcc=none`. Raises UsageError."""
    limits: dict[str, float | None] = {name: rule.defaults[PRECISIONS.index(precision)] for name, rule in RULES.items()}
    for change in changes:
        name, _, text = change.partition("=")
        if name not in RULES:
            raise UsageError(f"there is no limit {name!r}; there are {', '.join(RULES)}")
        try:
            limits[name] = None if text == "none" else float(text)
        except ValueError:
            raise UsageError(f"the limit {change!r} must be a number or none, such as {name}=0.01") from None
        if math.isnan(limits[name] or 0.0):
            raise UsageError(f"the limit {change!r} must be a number or none, such as {name}=0.01")
    return limits


def few_images(limits: dict[str, float | None], changes: Iterable[str], images: int) -> dict[str, float | None]:
    """Return limits whose *default* SRCC allows one pair of neighbours in twenty to change places.

    On few images such a pair, equal to any eye, costs more than the whole allowance: 0.0015 of 20 images.
    """
    named = {change.partition("=")[0] for change in changes}
    default = limits["srcc"]
    if "srcc" in named or default is None or images < 2:
        return limits
    swaps = -(-images // 20)
    return {**limits, "srcc": min(default, 1 - 12 * swaps / (images * (images**2 - 1)))}


def check_image(figures: ImageFigures, limits: Limits, span: float) -> list[Check]:
    """Judge one image; `span` is the range of scores. NaN and Inf fail whatever the limits."""
    found: list[Check] = []

    def worst(name: str, drifts: Mapping[str, Drift], pick: Callable[[Drift], float]) -> None:
        limit = limits[name]
        if not drifts or limit is None:
            return
        floor = RULES[name].floor
        place = (min if floor else max)(drifts, key=lambda key: pick(drifts[key]))
        found.append(_check(name, pick(drifts[place]), limit, f"{figures.name}{place and ', '}{place}"))

    forced = _by_step(figures.forced)
    worst("unet-max", forced, lambda d: d.max)
    worst("unet-mean", forced, lambda d: d.mean)
    worst("unet-cosine", forced, lambda d: d.cosine)
    vit = {"": figures.heads["vit"]} if "vit" in figures.heads else {}
    worst("vit-mean", vit, lambda d: d.mean)
    worst("vit-cosine", vit, lambda d: d.cosine)
    worst("state-mean", _by_step(figures.state), lambda d: d.mean)
    worst("tap-mean", figures.taps, lambda d: d.mean)
    worst("tap-psnr", figures.taps, lambda d: d.psnr)
    worst("maps-mean", {"": figures.maps} if figures.maps else {}, lambda d: d.mean)
    errors = {name: abs(have - want) / span for name, (want, have) in figures.scores.items()}
    for name, wanted in (("branch", [n for n in errors if n != "score"]), ("score", ["score"])):
        limit = limits[name]
        if limit is not None and wanted:
            place = max(wanted, key=lambda n: math.inf if math.isnan(errors[n]) else errors[n])
            found.append(_check(name, errors[place], limit, figures.name + (f", {place}" if name == "branch" else "")))
    if what := _not_finite(figures):
        found.append(Check("finite", None, None, within=False, where=f"{figures.name}: NaN or Inf in {what}"))
    return found


def judge(images: Sequence[ImageFigures], loop: Loop, limits: Limits, span: float) -> tuple[Check, ...]:
    """Judge a whole run: for every rule the worst image, then what takes all images."""
    worst: dict[str, Check] = {}
    for figures in images:
        for check in check_image(figures, limits, span):
            known = worst.get(check.name)
            if known is None or (not check.within, check.excess) > (not known.within, known.excess):
                worst[check.name] = check
    pairs = [figures.scores["score"] for figures in images]
    mean = math.fsum(abs(have - want) for want, have in pairs) / len(pairs)
    checks = [worst.pop(name) for name in ("finite", *RULES) if name in worst]
    everything = f"{len(images)} images"
    if (limit := limits["score-mean"]) is not None:
        checks.append(_check("score-mean", mean / span, limit, everything))
    checks += _check_spread(mean, loop, limits["spread"])
    checks += _check_correlations(pairs, limits)
    checks += _check_invariance(loop, limits)
    return tuple(checks)


def _check(name: str, value: float, limit: float, where: str) -> Check:
    within = value >= limit if RULES[name].floor else value <= limit  # NaN is neither
    return Check(name, value, limit, within, where)


def _check_spread(mean: float, loop: Loop, limit: float | None) -> list[Check]:
    if limit is None:
        return []
    if not loop.spread:
        why = "seeds make no difference" if loop.spread == 0 else "not measured: it takes --seeds 2"
        return [Check("spread", None, limit, within=True, where=why)]
    where = f"spread {loop.spread:.2g}: {loop.spread_seeds} seeds, {loop.spread_images} images"
    return [_check("spread", mean / loop.spread, limit, where)]


def _check_correlations(pairs: list[tuple[float, float]], limits: Limits) -> list[Check]:
    from ..engine import agreement

    checks = []
    for name in CORRELATIONS:
        limit = limits[name]
        if limit is None:
            continue
        want, have = zip(*pairs, strict=True)
        try:
            value = getattr(agreement, name)(have, want)
            checks.append(_check(name, value, limit, f"{len(pairs)} images"))
        except DatasetError as exc:
            where = f"{exc}; give images that differ, or --limit {name}=none"
            checks.append(Check(name, None, limit, within=False, where=where))
    return checks


def _check_invariance(loop: Loop, limits: Limits) -> list[Check]:
    checks = []
    batch, limit = loop.batch, limits["batch"]
    if limit is not None and batch:
        stage = max(batch, key=lambda name: math.inf if math.isnan(batch[name]) else batch[name])
        checks.append(_check("batch", batch[stage], limit, stage))
    invariants = [("repeat", loop.repeat, ""), ("order", loop.order, ": it takes two images")]
    if loop.device is not None:
        invariants.append(("graph", loop.graph, f": {loop.graph_note}"))
    for name, same, missing in invariants:
        limit = limits[name]
        if limit is None:
            continue
        if same is None:
            why = f"not measured{missing}"
            checks.append(Check(name, None, limit, within=True, where=why))
        else:
            checks.append(_check(name, float(not same), limit, "the first image"))
    if loop.device is not None and (limit := limits["device"]) is not None:
        checks.append(_check("device", loop.device, limit, "the first image"))
    return checks


def _by_step(drifts: Sequence[Drift]) -> dict[str, Drift]:
    return {f"step {len(drifts) - 1 - index}": drift for index, drift in enumerate(drifts)}


def _not_finite(figures: ImageFigures) -> str:
    """Return where a candidate first stops giving numbers."""
    places = {
        **{f"the noise of {step}": drift for step, drift in _by_step(figures.noise).items()},
        **{f"tap {kind}": drift for kind, drift in figures.taps.items()},
        **({"the ViT maps": figures.maps} if figures.maps else {}),
    }
    found = [place for place, drift in places.items() if drift.not_finite]
    found += [f"the {name}" for name, (_, have) in figures.scores.items() if not math.isfinite(have)]
    return found[0] if found else ""
