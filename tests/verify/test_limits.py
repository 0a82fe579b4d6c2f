"""Limits and the verdict: the worst image and step are named, and nothing passes because it could not be measured."""

import dataclasses
import math

import click
import pytest

from diffiqa.errors import UsageError
from diffiqa.verify.cli import verify
from diffiqa.verify.figures import Drift, ImageFigures
from diffiqa.verify.limits import PRECISIONS, RULES, Check, Loop, check_image, few_images, judge, make_limits

GOOD = Drift(max=1e-4, mean=1e-5, median=1e-5, quantile=5e-5, cosine=0.999999, psnr=80.0, largest=1.0, not_finite=0)
LOOP = Loop(
    spread=0.01, spread_seeds=3, spread_images=2, repeat=True, order=True, batch={"unet": 0.0}, graph=True, device=1e-7
)


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


def named(checks: tuple[Check, ...] | list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


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
        assert make_limits("fp16", [f"{name}=0.25"])[name] == 0.25
        assert make_limits("fp16", [f"{name}=none"])[name] is None


@pytest.mark.parametrize(("change", "says"), [("sroc=1", "srcc"), ("score=low", "number"), ("score=nan", "number")])
def test_a_limit_that_is_none_is_refused(change: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make_limits("fp16", [change])


def test_a_good_run_is_within_all_limits() -> None:
    checks = judge([figures("a", 0.2, 0.2001), figures("b", 0.8, 0.8001)], LOOP, make_limits("fp16", []), 1.0)
    assert set(named(checks)) == set(RULES)
    assert all(check.within for check in checks)


def test_the_worst_image_and_step_are_named() -> None:
    bad = dataclasses.replace(GOOD, max=0.4)
    worse = figures("b", forced=(GOOD, GOOD, bad, GOOD), taps={"y0": GOOD, "t1": dataclasses.replace(GOOD, psnr=12.0)})
    found = named(judge([figures("a"), worse], LOOP, make_limits("fp16", ["srcc=none", "plcc=none"]), 1.0))
    assert (found["unet-max"].value, found["unet-max"].where) == (0.4, "b, step 1")
    assert (found["tap-psnr"].value, found["tap-psnr"].where) == (12.0, "b, t1")
    assert {name for name, check in found.items() if not check.within} == {"unet-max", "tap-psnr"}


def test_nan_is_beyond_whatever_the_limits() -> None:
    broken = dataclasses.replace(GOOD, max=math.inf, mean=math.inf, cosine=0.0, psnr=-math.inf, not_finite=3)
    lifted = make_limits("fp16", [f"{name}=none" for name in RULES])
    assert check_image(figures("a"), lifted, 1.0) == []
    (check,) = check_image(figures("a", noise=(GOOD, broken, GOOD, GOOD)), lifted, 1.0)
    assert (check.name, check.within) == ("finite", False)
    assert "noise of step 2" in check.where
    (check,) = check_image(figures("a", have=math.nan), lifted, 1.0)
    assert "score" in check.where
    checks = named(judge([figures("a", have=math.nan), figures("b", 0.7)], LOOP, make_limits("fp16", []), 1.0))
    assert not any(checks[name].within for name in ("finite", "score", "score-mean", "srcc", "plcc", "spread"))


def test_errors_of_scores_are_shares_of_their_range() -> None:
    limits = make_limits("fp16", [])
    assert not named(check_image(figures("a", 0.5, 0.52), limits, 1.0))["score"].within
    assert named(check_image(figures("a", 0.5, 0.52), limits, 10.0))["score"].within


def test_equal_scores_cannot_be_correlated_and_do_not_pass() -> None:
    found = named(judge([figures("a"), figures("b")], LOOP, make_limits("fp16", []), 1.0))
    assert (found["srcc"].value, found["srcc"].within) == (None, False)
    assert "--limit srcc=none" in found["srcc"].where


def test_what_was_not_measured_says_so() -> None:
    limits = make_limits("fp16", ["srcc=none", "plcc=none"])
    found = named(judge([figures("a", forced=(), heads={})], Loop(repeat=True), limits, 1.0))
    assert found["spread"].value is None
    assert "--seeds 2" in found["spread"].where
    assert "two images" in found["order"].where
    assert "unet-max" not in found


@pytest.mark.parametrize(
    ("name", "loop"),
    [
        ("repeat", dataclasses.replace(LOOP, repeat=False)),
        ("order", dataclasses.replace(LOOP, order=False)),
        ("graph", dataclasses.replace(LOOP, graph=False)),
        ("device", dataclasses.replace(LOOP, device=0.02)),
    ],
)
def test_results_that_change_with_what_must_not_matter_are_beyond(name: str, loop: Loop) -> None:
    images = [figures("a", 0.2, 0.2), figures("b", 0.8, 0.8)]
    found = named(judge(images, loop, make_limits("fp16", []), 1.0))
    assert [check.name for check in found.values() if not check.within] == [name]


def test_the_default_srcc_forgives_one_swap_of_neighbours_in_twenty_images() -> None:
    from diffiqa.engine.agreement import srcc

    limits = make_limits("fp16", [])
    scores = [float(i) for i in range(20)]
    swapped = [*scores[:8], scores[9], scores[8], *scores[10:]]
    twice = [*scores[:3], scores[4], scores[3], *scores[5:8], scores[9], scores[8], *scores[10:]]
    allowed = few_images(limits, [], 20)["srcc"]
    assert allowed is not None
    assert srcc(twice, scores) < allowed <= srcc(swapped, scores) + 1e-12
    assert few_images(limits, ["srcc=0.9995"], 20)["srcc"] == 0.9995
    assert few_images(limits, [], 2000)["srcc"] == 0.9995
