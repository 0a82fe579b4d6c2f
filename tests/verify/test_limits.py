"""Limits and the verdict: the worst image and step are named, and nothing passes because it could not be measured."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import click
import pytest

from diffiqa.engine.agreement import srcc
from diffiqa.errors import UsageError
from diffiqa.verify.cli import verify
from diffiqa.verify.figures import Difference, Findings, ImageFigures, RunFigures
from diffiqa.verify.limits import PRECISIONS, RULES, LimitCheck, Limits, check_image, judge, make_limits, parse_limit
from diffiqa.verify.sides import Party

GOOD = Difference(
    max=1e-4, mean=1e-5, median=1e-5, quantile=5e-5, cosine=0.999999, psnr=80.0, largest=1.0, not_finite=0
)
LOOP = RunFigures(
    spread=0.01, spread_seeds=3, spread_images=2, repeat=True, order=True, batch={"unet": 0.0}, graph=True, device=1e-7
)
LIFTED: dict[str, float | None] = dict.fromkeys(RULES)


def figures(name: str, want: float = 0.5, have: float = 0.5001, **changed: object) -> ImageFigures:
    base = ImageFigures(
        name=name,
        scores={"score": (want, have), "vcg": (want / 2, have / 2), "vda": (want / 2, have / 2)},
        noise=(GOOD,) * 4,
        state=(GOOD,) * 4,
        forced=(GOOD,) * 4,
        taps={"y0": GOOD, "t1": GOOD},
        maps=GOOD,
        heads={"vit": GOOD, "vcg": GOOD},
    )
    return dataclasses.replace(base, **changed)  # type: ignore[arg-type]


def findings(images: Sequence[ImageFigures], loop: RunFigures = LOOP, span: float = 1.0) -> Findings:
    party = Party("engine", "id", "fp32")
    return Findings(party, party, "tiny", True, span, 0.99, 0, tuple(images), len(images), loop)


def judged(images: Sequence[ImageFigures], limits: Limits, loop: RunFigures = LOOP) -> dict[str, LimitCheck]:
    return named(judge(findings(images, loop), limits))


def named(checks: Sequence[LimitCheck]) -> dict[str, LimitCheck]:
    return {check.name: check for check in checks}


def fp16(images: int = 2, changes: Limits = MappingProxyType({})) -> dict[str, float | None]:
    return make_limits("fp16", changes, images)


def with_one(field: str, part: str, place: str = "") -> tuple[str, Callable[[float], dict[str, Any]]]:
    """Return where one tensor of an image is, and the image's figures with a value planted in that tensor alone."""

    def planted(value: float) -> dict[str, Any]:
        changed: dict[str, Any] = {part: value}
        bad = dataclasses.replace(GOOD, **changed)
        if field == "maps":
            return {"maps": bad}
        if field in {"taps", "heads"}:
            return {field: {**getattr(figures("a"), field), place: bad}}
        return {field: (GOOD, GOOD, bad, GOOD)}

    return f", {place}" if place and field != "heads" else "", planted


IN_AN_IMAGE = {
    "unet-max": with_one("forced", "max", "step 1"),
    "unet-mean": with_one("forced", "mean", "step 1"),
    "unet-cosine": with_one("forced", "cosine", "step 1"),
    "vit-mean": with_one("heads", "mean", "vit"),
    "vit-cosine": with_one("heads", "cosine", "vit"),
    "state-mean": with_one("state", "mean", "step 1"),
    "tap-mean": with_one("taps", "mean", "t1"),
    "tap-psnr": with_one("taps", "psnr", "t1"),
    "maps-mean": with_one("maps", "mean"),
    "branch": (", vda", lambda error: {"scores": {"score": (0, 9), "vcg": (1, 1), "vda": (1, 1 - 4 * error)}}),
    "score": ("", lambda error: {"scores": {"score": (1, 1 - 4 * error), "vcg": (0, 9), "vda": (0, 9)}}),
}


def test_every_rule_has_a_default_for_every_precision_and_a_place_in_the_help() -> None:
    text = verify.get_help(click.Context(verify))
    for name, rule in RULES.items():
        assert len(rule.defaults) == len(PRECISIONS), name
        assert name in text.split()
    # Lower precisions are allowed more, never less.
    for name, rule in RULES.items():
        allowed = rule.defaults[:3]
        assert list(allowed) == sorted(allowed, reverse=rule.floor), name


def test_every_limit_can_be_changed_or_lifted() -> None:
    for name in RULES:
        assert make_limits("fp16", dict([parse_limit(f"{name}=0.25")]), 2)[name] == 0.25
        assert make_limits("fp16", dict([parse_limit(f"{name}=none")]), 2)[name] is None


@pytest.mark.parametrize(("change", "says"), [("sroc=1", "srcc"), ("score=low", "number"), ("score=nan", "number")])
def test_a_limit_that_is_none_is_refused(change: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make_limits("fp16", dict([parse_limit(change)]), 2)


def test_limits_of_a_precision_or_a_name_that_is_none_are_refused() -> None:
    with pytest.raises(UsageError, match="fp16"):
        make_limits("fp17", {}, 2)
    with pytest.raises(UsageError, match="srcc"):
        make_limits("fp16", {"sroc": 1.0}, 2)


@pytest.mark.parametrize("name", IN_AN_IMAGE)
def test_the_worst_image_and_step_are_named_and_held_against_their_limit(name: str) -> None:
    """One image of three is off, in one place; errors of scores are a quarter of a range of 4."""
    suffix, planted = IN_AN_IMAGE[name]
    at = 30.0 if name == "tap-psnr" else 0.25
    worse, far = (-1, 0.5) if RULES[name].floor else (1, 2.0)
    for value, within in ((at, True), (at + worse * 2**-20, False)):
        images = [figures("a", 1, 1), figures("b", **planted(value)), figures("c", 1, 1)]
        if name in {"branch", "score"}:
            images[0] = images[2] = figures("a", scores={"score": (1, 1), "vcg": (1, 1), "vda": (1, 1)})
        (check,) = judge(findings(images, span=4.0), {**LIFTED, name: at})
        assert (check.name, check.value, check.limit, check.within) == (name, value, at, within)
        assert check.where == f"b{suffix}"
    # Of two that are beyond, the one that is further beyond.
    two = [figures("near", **planted(at + worse * 2**-20)), figures("far", **planted(at * far))]
    for images in (two, two[::-1]):
        (check,) = judge(findings(images, span=4.0), {**LIFTED, name: at})
        assert check.where.startswith("far")


@pytest.mark.parametrize(
    ("name", "images", "loop"),
    [
        # Mean errors of 1 of a range of 4: a quarter of it, and a quarter of a spread of 4.
        ("score-mean", [figures("a", 1, 2.5), figures("b", 1, 0.5)], LOOP),
        ("spread", [figures("a", 1, 2.5), figures("b", 1, 0.5)], dataclasses.replace(LOOP, spread=4.0)),
        ("batch", [figures("a")], dataclasses.replace(LOOP, batch={"unet": 0.0, "vit": 0.25, "vda": 0.125})),
        ("device", [figures("a")], dataclasses.replace(LOOP, device=0.25)),
        ("repeat", [figures("a")], dataclasses.replace(LOOP, repeat=False)),
        ("order", [figures("a")], dataclasses.replace(LOOP, order=False)),
        ("graph", [figures("a")], dataclasses.replace(LOOP, graph=False)),
        ("srcc", [figures("a", 1, 1), figures("b", 2, 4), figures("c", 4, 2)], LOOP),
        ("plcc", [figures("a", 1, 1), figures("b", 2, 4), figures("c", 4, 2)], LOOP),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_takes_more_than_an_image_is_held_against_its_limit(
    name: str, images: list[ImageFigures], loop: RunFigures
) -> None:
    value = {"srcc": 0.5, "plcc": 1 / 7, "repeat": 1.0, "order": 1.0, "graph": 1.0}.get(name, 0.25)
    found = findings(images, loop, span=4.0)
    (check,) = judge(found, {**LIFTED, name: 0.0})
    assert check.value == pytest.approx(value, rel=1e-12)
    assert check.value is not None
    worse = math.inf if RULES[name].floor else -math.inf
    for limit, within in ((check.value, True), (math.nextafter(check.value, worse), False)):
        (check,) = judge(found, {**LIFTED, name: limit})
        assert (check.name, check.within) == (name, within)
    assert name != "batch" or check.where == "vit"


def test_every_limit_is_held_to() -> None:
    tested = {*IN_AN_IMAGE, "score-mean", "spread", "batch", "device", "repeat", "order", "graph", "srcc", "plcc"}
    assert tested == set(RULES)


def test_a_good_run_is_within_all_limits() -> None:
    checks = judged([figures("a", 0.2, 0.2001), figures("b", 0.8, 0.8001)], fp16())
    assert set(checks) == set(RULES)
    assert all(check.within for check in checks.values())


def test_nan_is_beyond_whatever_the_limits() -> None:
    broken = dataclasses.replace(GOOD, max=math.inf, mean=math.inf, cosine=0.0, psnr=-math.inf, not_finite=3)
    assert check_image(figures("a"), LIFTED, 1.0) == []
    (check,) = check_image(figures("a", noise=(GOOD, broken, GOOD, GOOD)), LIFTED, 1.0)
    assert (check.name, check.within) == ("finite", False)
    assert "noise of step 2" in check.where
    (check,) = check_image(figures("a", taps={"y0": GOOD, "t1": broken}), LIFTED, 1.0)
    assert "tap t1" in check.where
    (check,) = check_image(figures("a", maps=broken), LIFTED, 1.0)
    assert "ViT maps" in check.where
    for bad in (math.nan, math.inf):
        (check,) = check_image(figures("a", have=bad), LIFTED, 1.0)
        assert "score" in check.where
    checks = judged([figures("a", have=math.nan), figures("b", 0.7)], fp16())
    assert not any(checks[name].within for name in ("finite", "score", "score-mean", "srcc", "plcc", "spread"))
    assert not judged([figures("a")], fp16(1), dataclasses.replace(LOOP, batch={"unet": 0, "vit": math.nan}))[
        "batch"
    ].within


def test_equal_scores_cannot_be_correlated_and_do_not_pass() -> None:
    found = judged([figures("a"), figures("b")], fp16())
    assert (found["srcc"].value, found["srcc"].within) == (None, False)
    assert "--limit srcc=none" in found["srcc"].where


def test_a_run_that_ended_early_has_no_correlations_to_judge() -> None:
    found = findings([figures("a", 0.2, 0.2), figures("b", 0.8, 0.8)])
    assert set(RULES) - set(named(judge(dataclasses.replace(found, asked=3), fp16()))) == {"srcc", "plcc"}


def test_what_was_not_measured_says_so() -> None:
    bare = [figures("a", forced=(), heads={})]
    found = judged(bare, fp16(), RunFigures(repeat=True))
    assert found["spread"].value is None
    assert "two images" in found["srcc"].where
    assert "two images" in found["plcc"].where
    assert "--seeds 2" in found["spread"].where
    assert "two images" in found["order"].where
    assert "unet-max" not in found
    assert all(check.within for check in found.values())
    found = judged(bare, fp16(), RunFigures(spread=0.0, device=0.0, graph_note="no graph today"))
    assert "move the score by 0 only" in found["spread"].where
    assert "no graph today" in found["graph"].where
    assert found["device"].value == 0


def test_a_spread_of_next_to_nothing_is_no_yardstick() -> None:
    one = [figures("a", forced=(), heads={})]
    slight, enough = (judged(one, fp16(), RunFigures(spread=spread))["spread"] for spread in (1.9e-3, 2.1e-3))
    assert (slight.value is None, slight.within) == (True, True)
    assert enough.value is not None


def test_the_default_srcc_forgives_one_swap_of_neighbours_in_twenty_images() -> None:
    for count in (10, 20):
        scores = [float(i) for i in range(count)]
        swapped = [*scores[:8], scores[9], scores[8], *scores[10:]]
        twice = [scores[1], scores[0], *swapped[2:]]
        allowed = fp16(count)["srcc"]
        assert allowed is not None
        assert srcc(twice, scores) < allowed <= srcc(swapped, scores) + 1e-12
    assert fp16(20, {"srcc": 0.9995})["srcc"] == 0.9995
    assert fp16(2000)["srcc"] == 0.9995
