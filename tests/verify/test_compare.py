"""Comparing: what must not change a result is seen when it does, and the spread is that of the reference's seeds."""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from diffiqa.engine.manifest import StageName, open_engine
from diffiqa.runtime.executor import Call, FloatArray, StageRunner
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.results import Options
from diffiqa.runtime.scorer import Scorer
from diffiqa.verify import compare
from diffiqa.verify.compare import Choices, Subject, compare_sides, read_subjects
from diffiqa.verify.sides import Given, Side, reference_side

from .verify_engines import pictures

CHOICES = Choices(Options(crops=1), forced=0)


class Moody:
    """A stage whose answers are multiplied by what `factor` makes of the inputs."""

    def __init__(self, stage: StageRunner, factor: Callable[[Mapping[str, FloatArray]], float]) -> None:
        self._stage, self._factor = stage, factor

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        call = self._stage.bind(inputs, outputs)

        def run() -> None:
            call()
            factor = np.float32(self._factor(inputs))
            for output in outputs.values():
                output *= factor

        return run


@pytest.fixture(scope="module")
def sound(tiny_engine: Path) -> Side:
    return reference_side(Given(tiny_engine), open_engine(tiny_engine), OnnxRuntime(threads=1))


@pytest.fixture(scope="module")
def subjects(sound: Side, tmp_path_factory: pytest.TempPathFactory) -> list[Subject]:
    images = pictures(tmp_path_factory.mktemp("pictures") / "in", 3)
    return read_subjects(sorted(images.iterdir()), sound.manifest, CHOICES.options)


def moody(side: Side, name: StageName, factor: Callable[[Mapping[str, FloatArray]], float]) -> Side:
    return dataclasses.replace(side, stages={**side.stages, name: Moody(side.stages[name], factor)})


def test_a_stage_that_changes_from_call_to_call_repeats_nothing(sound: Side, subjects: list[Subject]) -> None:
    calls: list[int] = []

    def more_each_time(inputs: Mapping[str, FloatArray]) -> float:
        calls.append(1)
        return 1 + 1e-3 * len(calls)

    loop = compare_sides(sound, moody(sound, StageName.VDA, more_each_time), subjects, CHOICES).loop
    assert (loop.repeat, loop.order) == (False, False)


def test_a_stage_that_remembers_other_images_depends_on_the_order(sound: Side, subjects: list[Subject]) -> None:
    seen: set[bytes] = set()

    def more_with_every_image(inputs: Mapping[str, FloatArray]) -> float:
        seen.add(inputs["images"].tobytes())
        return 1 + 1e-3 * len(seen)

    loop = compare_sides(sound, moody(sound, StageName.VDA, more_with_every_image), subjects, CHOICES).loop
    assert (loop.repeat, loop.order) == (True, False)


def test_a_stage_whose_answers_depend_on_the_batch_is_named(sound: Side, subjects: list[Subject]) -> None:
    def more_for_two(inputs: Mapping[str, FloatArray]) -> float:
        return 1 + 1e-3 * (len(inputs["y"]) - 1)

    loop = compare_sides(sound, moody(sound, StageName.UNET, more_for_two), subjects, CHOICES).loop
    assert (loop.repeat, loop.order) == (True, True)
    assert loop.batch
    assert loop.batch["unet"] == pytest.approx(1e-3, rel=0.01)
    assert loop.batch["vit"] < 1e-5


def test_the_spread_is_that_of_the_references_scores_between_seeds(
    sound: Side, subjects: list[Subject], scorer: Scorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "SPREAD_IMAGES", 2)
    seeds = Choices(Options(crops=1, seed=5, seeds=3), forced=0)
    loop = compare_sides(sound, moody(sound, StageName.VDA, lambda inputs: 2.0), subjects, seeds).loop
    scores = [
        [scorer.score(subject.name, Options(crops=1, seed=seed)).score for seed in (5, 6, 7)]
        for subject in subjects[:2]
    ]
    assert loop.spread == pytest.approx(statistics.fmean(map(statistics.variance, scores)) ** 0.5, rel=1e-6)
    assert (loop.spread_seeds, loop.spread_images) == (3, 2)


def test_stages_run_on_the_references_inputs_for_as_many_images_as_asked(sound: Side, subjects: list[Subject]) -> None:
    off = moody(sound, StageName.UNET, lambda inputs: 1.001)
    found = compare_sides(sound, off, subjects, dataclasses.replace(CHOICES, forced=1))
    first, *others = found.images
    assert not any(image.forced or image.heads for image in others)
    assert [step.max for step in first.forced] == pytest.approx([1e-3] * len(first.forced), rel=0.01)


def test_a_run_ends_with_the_first_image_after_which_it_must_not_go_on(sound: Side, subjects: list[Subject]) -> None:
    found = compare_sides(sound, sound, subjects, CHOICES, goes_on=lambda image: image.name != subjects[1].name)
    assert (len(found.images), found.asked, found.loop.order) == (2, 3, None)
