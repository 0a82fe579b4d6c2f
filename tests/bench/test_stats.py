"""Statistics, and when a median is not to be trusted."""

import numpy as np
import pytest

from diffiqa.bench.stats import judge, summarise


def test_a_summary_is_that_of_the_definitions() -> None:
    found = summarise([4, 1, 3, 2, 5])
    assert (found.count, found.minimum, found.mean, found.median) == (5, 1, 3, 3)
    assert found.cv == pytest.approx(np.sqrt(2.5) / 3)
    assert (found.p90, found.p95, found.p99) == pytest.approx((4.6, 4.8, 4.96))


def test_one_sample_has_a_summary_and_is_too_little_to_judge_by() -> None:
    assert summarise([2.0]).cv == 0
    (problem,) = judge([2.0]).problems
    assert "1 samples are too few" in problem


def test_quiet_samples_are_stable_and_say_how_well_they_repeat() -> None:
    found = judge((1 + 0.005 * np.random.default_rng(1).standard_normal(20)).tolist())
    assert found.problems == ()
    assert 0 < found.repeat < 0.01


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        (np.linspace(1, 1.1, 20), "the later half took +5.1%: the machine drifts"),
        ([1, 1.05] * 10, "every second sample took +5.0%"),
        (1 + 0.3 * np.random.default_rng(2).random(10), "the coefficient of variation is"),
        ([1, 1.2, 1, 1.2, 1, 1.2, 1.2], "another run's median may differ by"),
    ],
    ids=["drift", "alternating", "noise", "two levels"],
)
def test_samples_of_a_restless_machine_are_not_stable(samples: list[float], says: str) -> None:
    assert any(problem.startswith(says) for problem in judge(samples).problems), judge(samples).problems


def test_a_single_outlier_among_many_does_not_move_the_median() -> None:
    found = judge([1.0] * 40 + [1.2] + [1.0] * 40)
    assert found.problems == ()


@pytest.mark.parametrize("seed", range(2))
def test_the_promise_about_another_run_holds_for_runs_of_the_same_kind(seed: int) -> None:
    generator = np.random.default_rng(seed)
    runs = 1 + 0.02 * generator.standard_normal((200, 15))
    promised = np.median([judge(run).repeat for run in runs])
    differences = np.abs(np.median(runs[::2], axis=1) / np.median(runs[1::2], axis=1) - 1)
    # 19 times in 20, as far as 100 pairs can show it
    assert (differences <= promised).mean() > 0.85
