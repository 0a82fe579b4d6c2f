"""`iqa-calibrate --steps`: what it writes is what scores show, and it refuses what cannot be fitted."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from diffiqa.calibration.cli import calibrate
from diffiqa.calibration.steps import LEAST_IMAGES, FittedSteps, _candidates, draw_steps, find_steps
from diffiqa.engine.agreement import srcc
from diffiqa.engine.manifest import MANIFEST, open_engine, read_manifest
from diffiqa.engine.sampling import Sampler, TapRule
from diffiqa.errors import UsageError
from diffiqa.runtime.results import Mode, Options
from diffiqa.runtime.scorer import load

from ..tiny import photo

OPTIONS = Options(crops=1, seed=3, mode=Mode.CROP)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("fitted")
    paths = [folder / f"{seed}.png" for seed in range(LEAST_IMAGES + 3)]
    for seed, path in enumerate(paths):
        PIL.Image.fromarray(photo(seed, 32, 40)).save(path)
    return paths


@pytest.fixture(scope="module")
def fitted(tiny_engine: Path, images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FittedSteps]:
    engine = Path(shutil.copytree(tiny_engine, tmp_path_factory.mktemp("fast") / "engine"))
    return engine, find_steps(engine, images, [4], seed=3)


def test_the_engine_gets_the_steps_and_stays_the_engine(tiny_engine: Path, fitted: tuple[Path, FittedSteps]) -> None:
    engine, found = fitted
    manifest, before = open_engine(engine).manifest, read_manifest(tiny_engine)
    assert found.fast == manifest.fast
    assert manifest.fast
    assert len(manifest.fast.sampling.steps) == 4
    assert manifest.engine_id == before.engine_id
    data, old = (json.loads((path / MANIFEST).read_text()) for path in (engine, tiny_engine))
    assert data.pop("fast")["images"] == LEAST_IMAGES + 3
    assert data == old


def test_the_figures_are_those_of_the_scores(images: list[Path], fitted: tuple[Path, FittedSteps]) -> None:
    engine, found = fitted
    (trial,), fast = found.trials, found.fast
    assert fast
    with load(engine) as scorer:
        every, other, corrected = (
            np.array([scorer.score(path, options).score for path in images])
            for options in (OPTIONS, dataclasses.replace(OPTIONS, seed=4), dataclasses.replace(OPTIONS, fast=True))
        )
    assert found.other_seed == pytest.approx(np.abs(other - every).mean(), abs=1e-9)
    shift = fast.correction.outputs[0] - fast.correction.inputs[0]  # few images have one knot
    plain = corrected - shift
    assert trial.drift == pytest.approx(np.abs(plain - every).mean(), abs=1e-9)
    assert trial.bias == pytest.approx((plain - every).mean(), abs=1e-9)
    assert (corrected - every).mean() == pytest.approx(0, abs=1e-9)
    assert trial.srcc == pytest.approx(srcc(plain, every))
    halves = [np.arange(len(images)) % 2 == part for part in (0, 1)]
    apart = [(plain - every)[halves[0]].mean(), (plain - every)[halves[1]].mean()]
    assert trial.corrected_bias == pytest.approx(abs(apart[0] - apart[1]), abs=1e-9)


def test_the_fewest_steps_that_keep_the_scores_are_taken_and_drawn(
    tiny_engine: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    monkeypatch.setattr("diffiqa.calibration.steps.StepsTrial.keeps", lambda trial, _: len(trial.sampling.steps) >= 4)
    arguments = ["--engine", str(engine), "--steps", "3..7", "--plot", str(tmp_path / "drift.png")]
    for path in images[:LEAST_IMAGES]:
        arguments += ["--calib", str(path)]
    result = CliRunner(env={"COLUMNS": "160"}).invoke(calibrate, arguments)
    assert result.exit_code == 0, result.output
    assert "left out: 7 steps are more than the 6" in result.stderr
    assert "fast takes 4 of 6 steps" in result.stdout
    assert "Another seed changes a score by" in " ".join(result.stdout.split())
    assert read_manifest(engine).fast
    with PIL.Image.open(tmp_path / "drift.png") as picture:
        assert picture.format == "PNG"


def test_where_nothing_keeps_the_scores_the_engine_stays_as_it_was(
    tiny_engine: Path, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    before = (engine / MANIFEST).read_bytes()
    monkeypatch.setattr("diffiqa.calibration.steps.LEAST_SRCC", 1.1)
    found = find_steps(engine, images[:LEAST_IMAGES], [3, 4])
    assert found.fast is None
    assert [len(trial.sampling.steps) for trial in found.trials] == [3, 4]
    assert (engine / MANIFEST).read_bytes() == before
    lines = draw_steps(found).axes[0].lines
    assert np.asarray(lines[0].get_ydata()).tolist() == [trial.drift for trial in found.trials]


def test_one_step_makes_its_taps_of_the_result(tiny_engine: Path, images: list[Path], tmp_path: Path) -> None:
    engine = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    found = find_steps(engine, images[:LEAST_IMAGES], [1])
    assert found.fast
    sampling = found.fast.sampling
    assert (len(sampling.steps), sampling.sampler, sampling.taps) == (1, Sampler.DDIM, TapRule.RENOISED)
    with load(engine) as scorer:
        assert "fast: 1 of 6 steps" in " ".join(scorer.score(images[0], Options(crops=1, fast=True)).notes)


def test_many_ways_are_tried_and_each_can_be_sampled(tiny_engine: Path) -> None:
    m = read_manifest(tiny_engine)
    groups, left_out = _candidates(m, [1, 2, 3, 5, 6, 7])
    assert list(left_out) == [7]
    assert [{len(way.steps) for way in group} for group in groups] == [{1}, {2}, {3}, {5}]
    assert {(way.sampler, way.taps) for way in groups[2]} == {
        (Sampler.ANCESTRAL, TapRule.STATE),
        (Sampler.DDIM, TapRule.RENOISED),
    }
    assert all(way.problem(m.schedule, m.taps, m.kinds) is None for group in groups for way in group)
    assert all(len(set(group)) == len(group) for group in groups)
    assert {way.steps for way in groups[0] if not way.from_image} == {(2,), (3,), (4,), (5,)}  # halfway and above
    assert {way.steps for way in groups[0] if way.from_image} == {(1,), (2,)}  # halfway and below


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--steps", "7"], "nothing to try: 7 steps are more than the 6"),
        (["--steps", "6"], "nothing to try: 6 are all steps"),
        (["--steps", "0..3"], "does not rise, or leaves 1 to 4000"),
        (["--steps", "5..3"], "does not rise"),
        (["--steps", "few"], "is no number of steps such as 5, 4,8 or 2..10"),
        (["--steps", "4", "-o", "stats"], "leave out -o and --fp16-plan"),
        (["--steps", "4", "--plot", "none/drift.png"], "there is no folder"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    tiny_engine: Path, images: list[Path], arguments: list[str], says: str
) -> None:
    result = CliRunner().invoke(calibrate, ["--engine", str(tiny_engine), "--calib", str(images[0].parent), *arguments])
    assert result.exit_code == 2, result.output
    assert says in " ".join(result.stderr.split())
    assert read_manifest(tiny_engine).fast is None


def test_it_wants_enough_images_of_the_users_own(tiny_engine: Path, images: list[Path]) -> None:
    with pytest.raises(UsageError, match="needs at least 8 different images, 7 can be used"):
        find_steps(tiny_engine, images[:7], [4])
    result = CliRunner().invoke(calibrate, ["--engine", str(tiny_engine), "--steps", "4"])
    assert result.exit_code == 2
    assert "give some with --calib" in result.stderr
