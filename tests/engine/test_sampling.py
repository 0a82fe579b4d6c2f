"""Samplings are data: which steps are taken, the table they make, and what is refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from diffiqa.engine.codec import encode
from diffiqa.engine.monotone import Monotone
from diffiqa.engine.sampling import Fast, Sampler, Sampling, TapRule, choose_sampling, parse_sampler
from diffiqa.engine.schedule import Ddim, Kind, Schedule, Taps
from diffiqa.errors import UsageError

KINDS = tuple(Kind)
PAPER, MINI = (Schedule(), Taps()), (Schedule(steps=10), Taps(t1=1, t2=2))
BACKWARDS = (Schedule(steps=6), Taps(t1=5, t2=1))


@pytest.mark.parametrize(("schedule", "taps"), [PAPER, MINI, BACKWARDS])
def test_all_steps_make_the_table_of_the_schedule_to_the_last_bit(schedule: Schedule, taps: Taps) -> None:
    rows = Sampling.trained(schedule).rows(schedule, taps, KINDS)
    for name, column in vars(schedule.coefficients).items():
        np.testing.assert_array_equal(vars(rows.factors)[name], column)
    assert rows.steps == tuple(range(schedule.steps))
    assert (rows.start, rows.calls) == (schedule.steps, schedule.steps)
    assert rows.taps == {Kind.Y0: 0, Kind.T1: taps.t1, Kind.T2: taps.t2}
    assert choose_sampling(schedule, taps, KINDS, schedule.steps, None) == Sampling.trained(schedule)
    assert choose_sampling(schedule, taps, KINDS, None, "ancestral") == Sampling.trained(schedule)


def test_a_number_of_steps_is_always_the_same_steps() -> None:
    """Records name steps by their number alone, and --resume goes on with the same ones."""
    cases: list[tuple[tuple[Schedule, Taps], int, str | None, tuple[int, ...]]] = [
        (PAPER, 3, None, (4, 9, 49)),
        (PAPER, 5, None, (4, 9, 22, 35, 49)),
        (PAPER, 10, None, (4, 9, 14, 19, 24, 29, 34, 39, 44, 49)),
        (PAPER, 5, "ddim:1", (4, 9, 22, 35, 49)),
        (PAPER, 5, "ddim", (9, 19, 29, 39, 49)),
        (PAPER, 1, "ddim", (49,)),
        (MINI, 4, None, (0, 1, 5, 9)),
        (MINI, 2, "ddim", (4, 9)),
        (PAPER, 3, "image+ancestral", (4, 9, 24)),
        (PAPER, 1, "image+ddim", (24,)),
        (PAPER, 40, "image+ddim", tuple(range(40))),
        (MINI, 3, "image+ancestral", (0, 1, 4)),
        (MINI, 8, "image+ddim:0.5", tuple(range(8))),
        (MINI, 10, "image+ancestral", tuple(range(10))),
        (BACKWARDS, 3, "image+ancestral", (0, 4, 5)),
    ]
    for model, count, sampler, steps in cases:
        assert choose_sampling(*model, KINDS, count, sampler).steps == steps


@pytest.mark.parametrize("model", [PAPER, MINI])
@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "ddim:0.3", "image+ancestral", "image+ddim"])
def test_every_number_of_steps_has_trained_levels_alone_and_taps_at_theirs(
    model: tuple[Schedule, Taps], sampler: str
) -> None:
    """So a build whose U-Net has a table of the trained levels runs them all."""
    schedule, taps = model
    bar = schedule.alpha_bar
    for count in range(3, schedule.steps + 1):
        sampling = choose_sampling(schedule, taps, KINDS, count, sampler)
        rows = sampling.rows(schedule, taps, KINDS)
        assert len(sampling.steps) == rows.calls == count
        assert set(rows.factors.noise_level) <= {0.0, *schedule.coefficients.noise_level}
        for kind, row in rows.taps.items():
            left = np.sqrt(1 - bar[taps.step_of(kind) - 1]) if kind is not Kind.Y0 else 0.0
            if sampling.taps is TapRule.RENOISED:
                assert rows.factors.sigma[row] == np.float32(left)
                assert kind is Kind.Y0 or rows.steps[row] == taps.step_of(kind)  # the counter of the trained step
            elif kind is not Kind.Y0:
                assert np.sqrt(1 - bar[sampling.steps[row - 1]]) == left


def test_ddim_with_all_of_the_noise_is_ancestral() -> None:
    ancestral, ddim = (choose_sampling(*PAPER, KINDS, 7, name).rows(*PAPER, KINDS) for name in ("ancestral", "ddim:1"))
    for name, column in vars(ancestral.factors).items():
        np.testing.assert_allclose(vars(ddim.factors)[name], column, rtol=1e-6, atol=1e-7)


def test_what_cannot_be_sampled_is_refused() -> None:
    cases: list[tuple[tuple[Schedule, Taps], tuple[Kind, ...], int, str | None, str]] = [
        (PAPER, KINDS, 51, None, "51 steps are more than the 50 that this engine was trained with"),
        (PAPER, KINDS, 1, None, "take 3 at least, or the sampler ddim"),
        (PAPER, KINDS, 2, "ddim:0.5", "take 3 at least"),
        (PAPER, KINDS, 2, "image+ancestral", "take 3 at least"),
        (PAPER, KINDS, 2, "image+", "a sampler is"),
        (PAPER, KINDS, 2, "image+image+ddim", "a sampler is"),
        (PAPER, KINDS, 5, "euler", "a sampler is ancestral, ddim or ddim:ETA, such as ddim:0.5; not 'euler'"),
        (PAPER, KINDS, 5, "ddim:", "a sampler is"),
        (PAPER, KINDS, 5, "ddim:nan", "eta must lie between 0 and 1, not nan"),
        (PAPER, KINDS, 5, "ddim:1.01", "eta must lie between 0 and 1, not 1.01"),
        (PAPER, KINDS, 5, "ddim:-0.1", "eta must lie between"),
        (PAPER, KINDS, 5, "ancestral:0.5", "ancestral takes no eta"),
        (PAPER, (Kind.DIS,), 5, None, "restores nothing, so it has no steps to choose"),
    ]
    for model, kinds, steps, sampler, says in cases:
        with pytest.raises(UsageError, match=says):
            choose_sampling(*model, kinds, steps, sampler)


def test_a_model_with_fewer_taps_takes_fewer_steps() -> None:
    kinds = (Kind.DIS, Kind.Y0)
    assert choose_sampling(*PAPER, kinds, 1, None).rows(*PAPER, kinds).taps == {Kind.Y0: 0}
    assert parse_sampler("ddim:0.25") == (Sampler.DDIM, 0.25, False)


def test_what_starts_from_the_image_has_the_level_of_its_first_step_and_says_so() -> None:
    sampling = choose_sampling(*PAPER, KINDS, 3, "image+ddim:0.5")
    assert sampling.name == "image+ddim:0.5"
    image = sampling.rows(*PAPER, KINDS).image
    assert image
    assert image[0] ** 2 == pytest.approx(PAPER[0].alpha_bar[sampling.steps[-1]])
    assert image[0] ** 2 + image[1] ** 2 == pytest.approx(1)
    features = Schedule(3, linear=Ddim((400, 100, 0)), clip=False)
    assert "does not start from an image" in (Sampling((0, 2), from_image=True).problem(features, Taps(), ()) or "")
    with pytest.raises(UsageError, match="leave out --sampler image"):
        choose_sampling(features, Taps(), (), 2, "image+ddim")


FAST = Fast(Sampling((4, 9, 29, 45)), Monotone((0.2, 0.6), (0.21, 0.6), slope_beyond=1), 48)


def test_a_file_with_steps_that_no_loop_can_take_is_told_so() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"steps": ()}, "must rise"),
        ({"steps": (9, 4, 45)}, "must rise"),
        ({"steps": (4, 9, 50)}, "within 0 to 49"),
        ({"steps": (-1, 4, 9, 45)}, "within 0 to 49"),
        ({"steps": (4, 45)}, "the tap t2 needs step 9"),
        ({"steps": (4, 9)}, "the tap t2 needs step 9, and one above it"),
        ({"eta": 0.5}, "eta must lie"),
        ({"eta": 1.5, "sampler": Sampler.DDIM}, "eta must lie"),
    ]
    for changes, says in cases:
        assert FAST.problem(*PAPER, KINDS) is None
        broken = dataclasses.replace(FAST, sampling=dataclasses.replace(FAST.sampling, **changes))
        assert says in (broken.problem(*PAPER, KINDS) or "")


def test_the_key_of_a_fast_sampling_follows_all_that_changes_a_score_and_nothing_else() -> None:
    others = (
        dataclasses.replace(FAST, sampling=Sampling((4, 9, 29, 44))),
        dataclasses.replace(FAST, correction=Monotone((0.2, 0.6), (0.21, 0.61), slope_beyond=1)),
        dataclasses.replace(FAST, sampling=dataclasses.replace(FAST.sampling, sampler=Sampler.DDIM)),
        dataclasses.replace(FAST, sampling=dataclasses.replace(FAST.sampling, from_image=True)),
    )
    assert len({FAST.key, *(other.key for other in others)}) == 5
    assert "from_image" not in encode(FAST.sampling)  # files and keys of before stay what they were
    assert dataclasses.replace(FAST, images=49).key == FAST.key
