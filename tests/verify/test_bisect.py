"""Bisecting: the smallest set is found, also under a budget, and a planted culprit is named."""

import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from diffiqa import cli
from diffiqa.engine.manifest import Precision, StageName, open_engine, read_manifest
from diffiqa.errors import UsageError
from diffiqa.export.precision import MOVES, PrecisionPlan, cast, plan_stage, read_plan
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.results import Options
from diffiqa.verify.api import verify
from diffiqa.verify.bisect import (
    WHY,
    EmulatedStages,
    Group,
    limits_of_an_image,
    node_groups,
    smallest,
    with_returned,
    worst_image,
)
from diffiqa.verify.compare import read_subjects
from diffiqa.verify.figures import RunFigures
from diffiqa.verify.limits import RULES, make_limits

from ..tiny import STAGES
from .test_limits import figures, findings
from .verify_engines import PLANTED, edited, pictures, plant_large_range

GROUPS = [Group(StageName.UNET, ((f"n{i}", "Add"),)) for i in range(40)]
PARTS = [GROUPS[:25], GROUPS[25:33], [], GROUPS[33:]]


def counted(culprits: set[Group], budget: int = 10_000) -> tuple[Callable[[tuple[Group, ...]], bool | None], list[int]]:
    calls: list[int] = []

    def passes(groups: tuple[Group, ...]) -> bool | None:
        if len(calls) >= budget:
            return None
        calls.append(len(groups))
        return culprits <= set(groups)

    return passes, calls


@pytest.mark.parametrize("seed", range(4))
def test_exactly_the_culprits_are_found(seed: int) -> None:
    chosen = set(random.Random(seed).sample(GROUPS, 1 + seed % 4))  # noqa: S311 — no secret
    passes, calls = counted(chosen)
    found, minimal = smallest(PARTS, passes)
    assert (set(found), minimal) == (chosen, True)
    assert len(calls) < 150


def test_a_used_up_budget_leaves_a_set_that_passes() -> None:
    chosen = {GROUPS[3], GROUPS[30]}
    passes, calls = counted(chosen, budget=9)
    found, minimal = smallest(PARTS, passes)
    assert len(calls) == 9
    assert not minimal
    assert chosen <= set(found)
    assert len(found) < len(GROUPS)


def test_parts_stay_together_when_another_part_is_left_out() -> None:
    passes, calls = counted({GROUPS[2], GROUPS[4]})
    assert smallest([GROUPS[:2], GROUPS[2:4], GROUPS[4:8]], passes) == ((GROUPS[2], GROUPS[4]), True)
    assert calls[:6] == [2, 2, 4, 6, 2, 4]  # the three parts, all but the first, and of these each


def test_limits_of_means_become_limits_of_each_image() -> None:
    limits = make_limits("fp16", {"score": 0.01, "score-mean": 0.002, "spread": 0.5}, 2)
    found = findings([figures("a"), figures("b")], RunFigures(spread=0.004), span=2.0)
    for failed, score in (("score", 0.01), ("score-mean", 0.002), ("spread", 0.001), ("unet-max", 0.01)):
        assert limits_of_an_image({failed, "srcc"}, found, limits) == {**limits, "score": score}
    with pytest.raises(UsageError, match="order, srcc"):
        limits_of_an_image({"srcc", "order"}, found, limits)


def test_a_search_starts_with_the_image_that_is_furthest_beyond() -> None:
    limits = make_limits("fp16", {}, 3)
    images = [figures("a"), figures("b", 0.5, 0.6), figures("c", 0.5, 0.55)]
    assert worst_image(findings(images), limits) == 1
    broken = figures("d", have=math.nan)
    assert worst_image(findings([*images, broken]), limits) == 3


def test_one_group_is_minimal_by_itself() -> None:
    passes, calls = counted({GROUPS[0]})
    assert smallest([GROUPS[:1]], passes) == ((GROUPS[0],), True)
    assert calls == []


@pytest.mark.parametrize("name", STAGES)
def test_groups_hold_every_rounded_node_once_and_returned_ones_fit_the_graph(
    tiny_engine: Path, name: StageName
) -> None:
    stage = read_manifest(tiny_engine).stage(name)
    assert stage is not None
    model = onnx.load(tiny_engine / stage.file.path)
    plan = plan_stage(model, stage, Precision.FP16)
    groups = node_groups(model, plan)
    names = [node for group in groups for node, _ in group.nodes]
    assert len(names) == len(set(names))
    assert not {entry.node for entry in plan.float32} & set(names)
    assert all(op in MOVES for group in groups for _, op in group.nodes[1:])
    whole = with_returned(PrecisionPlan(1, Precision.FP16, (plan,)), groups)
    typed = cast(model, whole.stage(name), Precision.FP16)
    assert sum(node.op_type == "Conv" for node in typed.graph.node) == sum(
        op == "Conv" for g in groups for _, op in g.nodes
    )
    assert not [t.name for t in typed.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16]


def test_the_planted_culprit_is_named_and_the_plan_written_is_within_limits(tiny_engine: Path, tmp_path: Path) -> None:
    engine = edited(tiny_engine, tmp_path / "engine", StageName.UNET, plant_large_range)
    images = pictures(tmp_path / "in", 2)
    calm = ["--limit", "srcc=none", "--limit", "plcc=none", "--threads", "1", "--crops", "1", "--seeds", "1"]
    base = ["verify", "--engine", str(engine), str(images), *calm]
    plan = tmp_path / "plan.json"
    result = CliRunner().invoke(cli.main, [*base, "--precision", "fp16", "--bisect", str(plan)])
    assert result.exit_code == 1, result.output
    assert all(name in result.stdout for name in PLANTED)
    assert "within all limits" in result.stdout
    kept = {entry.node: entry.op for s in read_plan(plan).stages for entry in s.float32 if entry.why == WHY}
    # Beside the two: only what moves their result on, and would round it again.
    assert set(PLANTED) <= set(kept)
    assert all(op in MOVES for node, op in kept.items() if node not in PLANTED)
    assert json.loads(plan.read_text())["precision"] == "fp16"
    again = CliRunner().invoke(cli.main, [*base, "--plan", str(plan)])
    assert again.exit_code == 0, again.output


def test_nothing_is_bisected_where_all_is_well_or_nothing_would_help(tiny_engine: Path, tmp_path: Path) -> None:
    images, plan = pictures(tmp_path / "in", 2), tmp_path / "plan.json"
    base = ["verify", "--engine", str(tiny_engine), str(images), "--threads", "1", "--crops", "1", "--seeds", "1"]
    base += ["--precision", "fp16", "--bisect", str(plan), "--limit", "plcc=none"]
    good = CliRunner().invoke(cli.main, [*base, "--limit", "srcc=none"])
    assert good.exit_code == 0, good.output
    assert not plan.exists()
    hopeless = CliRunner().invoke(cli.main, [*base, "--limit", "srcc=none", "--limit", "tap-mean=0"])
    assert hopeless.exit_code == 2
    assert "tighter than the rounding" in hopeless.stderr
    order = CliRunner().invoke(cli.main, [*base, "--limit", "srcc=2"])
    assert order.exit_code == 2
    assert "shows in no single image" in order.stderr
    assert not plan.exists()


def test_a_search_runs_stages_on_the_references_inputs_where_those_are_beyond(
    tiny_engine: Path, tmp_path: Path
) -> None:
    images = [pictures(tmp_path / "in", 2)]
    lifted: dict[str, float | None] = dict.fromkeys(RULES)
    once = Options(crops=1, seeds=1)
    before = verify(tiny_engine, images, precision="fp16", limits=lifted, options=once, threads=1)
    largest = [max(step.max for step in image.forced) for image in before.findings.images]
    # One of the two images is beyond.
    limits = {**lifted, "unet-max": statistics.fmean(largest)}
    result = verify(
        tiny_engine, images, precision="fp16", limits=limits, options=once, threads=1, bisect=True, trials=6
    )
    assert not result.within
    assert result.culprits
    assert [(check.name, check.within) for check in result.culprits.checks] == [("unet-max", True)]


def test_a_loop_that_is_not_run_again_gives_the_same_numbers(tiny_engine: Path, tmp_path: Path) -> None:
    directory, options = open_engine(tiny_engine), Options(crops=1)
    made = (plan_stage(onnx.load(directory.file(s.file)), s, Precision.FP16) for s in directory.manifest.stages)
    plan = PrecisionPlan(1, Precision.FP16, tuple(made))
    (subject,) = read_subjects(sorted(pictures(tmp_path / "in", 1).iterdir()), directory.manifest, options)
    stages = EmulatedStages(directory, plan, OnnxRuntime(threads=1))
    (first, _), (again, _) = (stages.trace((), 0, subject, 0) for _ in range(2))
    assert first.equals(again)
