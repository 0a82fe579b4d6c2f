"""Recording: a trace holds what scoring computes, and answers are those of each stage by itself."""

from pathlib import Path

import numpy as np
import pytest

from diffiqa.engine.manifest import StageName, open_engine
from diffiqa.engine.pixels import to_plane
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.plan import Plan, make_plan
from diffiqa.runtime.results import Mode, Options
from diffiqa.runtime.scorer import Scorer
from diffiqa.verify.figures import image_figures, total_score
from diffiqa.verify.trace import HEAD_CALLS, Pipeline

from ..tiny import photo
from .verify_engines import edited, scale_weights

PIXELS = photo(3, 44, 60)


def pipeline(engine: Path) -> Pipeline:
    directory = open_engine(engine)
    return Pipeline(directory.manifest, load_stages(directory, OnnxRuntime(threads=1)))


@pytest.fixture(scope="module")
def tiny(tiny_engine: Path) -> Pipeline:
    return pipeline(tiny_engine)


def plan_of(tiny: Pipeline, mode: Mode = Mode.WHOLE) -> Plan:
    return make_plan(PIXELS.shape[0], PIXELS.shape[1], tiny.manifest, Options(mode=mode))


def test_scores_are_those_of_the_scorer(tiny: Pipeline, scorer: Scorer) -> None:
    trace = tiny.trace(to_plane(PIXELS), plan_of(tiny), 5)
    want = scorer.score(PIXELS, Options(seed=5))
    assert total_score(tiny.manifest, trace.vcg, trace.vda) == pytest.approx(want.score, rel=1e-12)
    vcg, vda, _ = tiny.scores(to_plane(PIXELS), plan_of(tiny), 5)
    np.testing.assert_array_equal(vcg, trace.vcg)
    np.testing.assert_array_equal(vda, trace.vda)


@pytest.mark.parametrize("mode", Mode)
def test_a_trace_holds_every_step_of_the_first_window_and_the_first_maps(tiny: Pipeline, mode: Mode) -> None:
    plan = plan_of(tiny, mode)
    trace = tiny.trace(to_plane(PIXELS), plan, 0)
    steps, window = tiny.manifest.schedule.steps, plan.windows[0]
    assert trace.state.shape == trace.noise.shape == (steps, 3, window.height, window.width)
    assert trace.condition.shape == (3, window.height, window.width)
    assert trace.crops.shape[:2] == (len(plan.crops), len(tiny.manifest.kinds))
    assert len(trace.maps) == min(HEAD_CALLS, len(plan.crops))
    assert len(trace.vcg) == len(trace.vda) == len(plan.crops)
    assert not np.array_equal(trace.state[0], trace.state[1])


def test_an_engine_answers_its_own_trace_with_the_same(tiny: Pipeline) -> None:
    plan = plan_of(tiny)
    trace = tiny.trace(to_plane(PIXELS), plan, 0)
    answers = tiny.answer(trace, plan)
    np.testing.assert_array_equal(answers.noise, trace.noise)
    np.testing.assert_array_equal(answers.maps, trace.maps)
    np.testing.assert_array_equal(answers.vcg, trace.vcg[:HEAD_CALLS])
    np.testing.assert_array_equal(answers.vda, trace.vda[:HEAD_CALLS])
    assert trace.equals(tiny.trace(to_plane(PIXELS), plan_of(tiny), 0))
    assert not trace.equals(tiny.trace(to_plane(PIXELS), plan_of(tiny), 1))


def test_what_is_wrong_in_one_stage_shows_there_alone(tiny: Pipeline, tiny_engine: Path, tmp_path: Path) -> None:
    wrong = pipeline(edited(tiny_engine, tmp_path / "e", StageName.VDA, scale_weights))
    plan, plane = plan_of(tiny), to_plane(PIXELS)
    want = tiny.trace(plane, plan, 0)
    figures = image_figures(tiny.manifest, "a", want, wrong.trace(plane, plan, 0), wrong.answer(want, plan), 0.99)
    assert figures.heads["vda"].max > 1e-4
    assert figures.heads["vcg"].max == figures.heads["vit"].max == figures.forced[-1].max == 0
    assert figures.taps["y0"].max == 0
    assert figures.scores["vcg"][0] == figures.scores["vcg"][1]
    assert figures.scores["vda"][0] != figures.scores["vda"][1]


def test_errors_of_the_unet_add_up_when_it_runs_freely(tiny: Pipeline, tiny_engine: Path, tmp_path: Path) -> None:
    wrong = pipeline(edited(tiny_engine, tmp_path / "e", StageName.UNET, scale_weights))
    plan, plane = plan_of(tiny), to_plane(PIXELS)
    want = tiny.trace(plane, plan, 0)
    figures = image_figures(tiny.manifest, "a", want, wrong.trace(plane, plan, 0), wrong.answer(want, plan), 0.99)
    assert figures.state[0].max == 0  # both start from the same noise
    assert 0 < figures.state[1].mean < figures.state[-1].mean
    assert figures.forced[0] == figures.noise[0]
    assert figures.forced[-1] != figures.noise[-1]
    assert figures.heads["vit"].max == 0


def test_two_inputs_at_once_give_what_each_gives_alone(tiny: Pipeline) -> None:
    plan = plan_of(tiny)
    trace = tiny.trace(to_plane(PIXELS), plan, 0)
    assert set(tiny.batch_difference(trace, plan)) == {"unet", "vit", "vcg", "vda"}
    assert max(tiny.batch_difference(trace, plan).values()) < 1e-5
