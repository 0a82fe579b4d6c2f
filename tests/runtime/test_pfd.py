"""PFD-IQA from an engine: scores and probabilities beside the float64 reference, and what such an engine refuses."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import PIL.Image
import pytest

from diffiqa.engine.crops import crop_grid
from diffiqa.engine.manifest import MANIFEST, Library, Manifest, Precision, StageName, open_engine, read_manifest
from diffiqa.engine.noise import NoiseField
from diffiqa.engine.pixels import to_plane
from diffiqa.errors import EngineError, UsageError
from diffiqa.export.builds import BuildOptions, build_engines
from diffiqa.export.precision import cast, element_types, resolve_plan
from diffiqa.runtime.backends import OnnxRuntime
from diffiqa.runtime.command import api
from diffiqa.runtime.command.recordfile import read_records
from diffiqa.runtime.command.records import Format, Record, RunSettings
from diffiqa.runtime.command.table import show_table
from diffiqa.runtime.report.page import Page
from diffiqa.runtime.report.writer import single_card
from diffiqa.runtime.results import Options, Score, words_text
from diffiqa.runtime.scorer import Scorer, load

from ..model.comparing import Weights
from ..model.pfd import reference as ref
from ..model.pfd.small import SMALL, random_small
from ..tiny import photo

PIXELS = photo(5, 90, 120)


@pytest.fixture(scope="module")
def pfd(pfd_engine: Path) -> Scorer:
    return load(pfd_engine, OnnxRuntime(threads=1))


def expected(timesteps: tuple[int, ...], seed: int, crops: int) -> tuple[npt.NDArray[Any], ...]:
    """Return scores and probabilities of every crop, in float64."""
    model = random_small().model.double()
    config = dataclasses.replace(SMALL, schedule=dataclasses.replace(SMALL.schedule, timesteps=timesteps))
    places = crop_grid(90, 120, SMALL.crop, crops)
    plane = to_plane(PIXELS).astype(np.float64)
    images = np.stack([plane[:, c.top : c.top + SMALL.crop, c.left : c.left + SMALL.crop] for c in places])
    noise = np.empty((len(places), SMALL.width, SMALL.grid, SMALL.grid), np.float32)
    for lane, out in enumerate(noise):
        NoiseField(seed, (1, out.size), lane=lane, planes=1).fill(len(SMALL.schedule.timesteps), out)
    return ref.whole(Weights(model), config, images, noise.astype(np.float64))


@pytest.mark.parametrize(("steps", "timesteps"), [(None, (400, 300, 200, 100, 0)), (3, (400, 200, 0)), (1, (400,))])
def test_scores_and_probabilities_are_those_of_the_reference(
    pfd: Scorer, steps: int | None, timesteps: tuple[int, ...]
) -> None:
    scores, distortions, levels = expected(timesteps, 9, 4)
    found = pfd.score(PIXELS, Options(seed=9, crops=4, steps=steps))
    np.testing.assert_allclose([crop.score for crop in found.crops], scores, rtol=0, atol=2e-5)
    assert found.score == pytest.approx(scores.mean(), abs=2e-5)
    assert np.ptp(scores) > 1e-2
    assert found.probabilities is not None
    for name, words, wanted in (
        ("distortions", SMALL.words.distortions, distortions),
        ("levels", SMALL.words.levels, levels),
    ):
        assert tuple(found.probabilities[name]) == words
        np.testing.assert_allclose(list(found.probabilities[name].values()), wanted.mean(0), rtol=0, atol=1e-5)
        for crop, row in zip(found.crops, wanted, strict=True):
            np.testing.assert_allclose(list(crop.probabilities[name].values()), row, rtol=0, atol=1e-5)


def test_a_score_depends_on_pixels_seed_and_options_alone(pfd: Scorer) -> None:
    def bits(score: Score) -> tuple[Any, ...]:
        return score.score, score.crops, score.probabilities

    alone, other = pfd.score(PIXELS), photo(6, 90, 120)
    again = [result for result in pfd.stream([other, PIXELS, other, PIXELS], workers=2) if isinstance(result, Score)]
    assert bits(again[1]) == bits(again[3]) == bits(alone) != bits(again[0])
    seeds = [pfd.score(PIXELS, Options(seed=seed)).score for seed in (0, 1)]
    assert seeds[0] == alone.score != seeds[1]
    both = pfd.score(PIXELS, Options(seeds=2))
    assert both.score == pytest.approx(np.mean(seeds), abs=1e-12)
    assert both.spread
    fewer = pfd.score(PIXELS, Options(crops=1))
    assert len(fewer.crops) == 1


def test_pictures_show_the_crops_on_the_image(pfd: Scorer) -> None:
    found = pfd.score(PIXELS, Options(crops=1), pictures=True)
    assert found.pictures
    (crop,) = found.crops
    card = single_card(Page(pfd.manifest, ""), found, 352)
    here = np.s_[crop.top : crop.top + SMALL.crop, crop.left : crop.left + SMALL.crop]
    for name, shown in found.pictures.words.items():
        probabilities = crop.probabilities[name]
        assert shown.word == max(probabilities, key=lambda word: probabilities[word])
        assert shown.values[here] == pytest.approx(probabilities[shown.word])
        assert f"{shown.word}, probability" in card
        assert np.isnan(shown.values).sum() == shown.values.size - SMALL.crop**2
    assert found.pictures.score_map[here] == pytest.approx(crop.score)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "tile"}, "restores no images"),
        ({"pixel_budget": 70000}, "restores no images"),
        ({"sampler": "ancestral"}, "leave out --sampler ancestral"),
        ({"sampler": "ddim:0.5"}, "leave out --sampler ddim:0.5"),
        ({"steps": 6}, "6 steps are more than the 5"),
        ({"fast": True}, "no fast sampling"),
    ],
)
def test_options_that_mean_nothing_are_refused(pfd: Scorer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pfd.score(PIXELS, Options(**options))


def test_lengths_stay_float32_and_a_table_of_steps_is_refused(pfd_engine: Path) -> None:
    """A length of 300 has a square that fp16 cannot hold, and 1e-12, which bounds it, is 0 there."""
    directory = open_engine(pfd_engine)
    stage = directory.manifest.stage(StageName.PRIOR)
    assert stage
    typed = cast(
        onnx.load(directory.file(stage.file)), resolve_plan(directory, Precision.FP16).stage(stage.name), Precision.FP16
    )
    types, found = element_types(typed), [node.op_type for node in typed.graph.node]
    assert found.count("ReduceL2") == 2
    for node in typed.graph.node:
        if node.op_type in {"ReduceL2", "Clip"}:
            assert [types[name] for name in (node.input[0], node.output[0])] == [onnx.TensorProto.FLOAT] * 2
    with pytest.raises(UsageError, match="leave --tabulate out"):
        build_engines(pfd_engine, BuildOptions(Library.ONNXRUNTIME, tabulate=True))


@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_typed_stages_of_a_build_stay_close(pfd_engine: Path, tmp_path: Path, precision: Precision) -> None:
    shutil.copytree(pfd_engine, tmp_path / "engine")
    build, made = build_engines(tmp_path / "engine", BuildOptions(Library.ONNXRUNTIME, precision))
    state = {spec.dtype for stage in build.stages for spec in stage.inputs if spec.name in {"y", "refined"}}
    assert state == {"float16" if precision is Precision.FP16 else "float32"}
    for stage in made:
        errors = [check.max_abs_error / check.max_abs_reference for check in stage.stage.drift]
        assert max(errors) < (0.02 if precision is Precision.FP16 else 0.1)
        assert stage.stage.name is StageName.DECODER or max(errors) > 1e-4  # it was rounded


def _flow(**changes: Any) -> Callable[[Manifest], Manifest]:
    return lambda m: dataclasses.replace(m, flow=dataclasses.replace(m.flow, **changes))


def _loop(**changes: Any) -> Callable[[Manifest], Manifest]:
    return lambda m: _flow(loop=dataclasses.replace(m.flow.loop, **changes))(m)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_loop(start="gamma"), "the denoiser stage reads"),
        (_loop(start="nothing"), "the denoiser stage reads"),
        (_loop(share="start"), "share must be one number"),
        (_loop(share="score"), "share must be one number"),
        (
            lambda m: _flow(probabilities=(dataclasses.replace(m.flow.probabilities[1], words=("a", "a")),))(m),
            "a word twice",
        ),
        (_loop(result="else"), "the decoder stage reads"),
        (_loop(scalar="noise_level"), "the denoiser stage reads"),
        (_flow(score=None), "neither a VCG nor a VDA"),
        (
            lambda m: _flow(probabilities=(dataclasses.replace(m.flow.probabilities[0], words=("blur",)),))(m),
            "distortions has no probability for each of 1 words",
        ),
        (
            lambda m: _flow(probabilities=(dataclasses.replace(m.flow.probabilities[1], words=("a\x1b", "b")),))(m),
            "not plain text",
        ),
        (lambda m: dataclasses.replace(m, schedule=dataclasses.replace(m.schedule, steps=4)), "as many timesteps"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(
    pfd_engine: Path, tmp_path: Path, change: Callable[[Manifest], Manifest], message: str
) -> None:
    (tmp_path / MANIFEST).write_text(change(read_manifest(pfd_engine)).to_json())
    with pytest.raises(EngineError, match=message):
        read_manifest(tmp_path)


def test_its_manifest_comes_back_as_it_was_written_and_its_plan_is_part_of_its_id(
    pfd_engine: Path, tmp_path: Path
) -> None:
    m = read_manifest(pfd_engine)
    assert json.loads(m.to_json()) == json.loads((pfd_engine / MANIFEST).read_text())
    words = dataclasses.replace(m.flow.probabilities[0], words=("blur", "noise", "smoke"))
    assert _flow(probabilities=(words,))(m).engine_id != m.engine_id
    shutil.copytree(pfd_engine, tmp_path / "copy")
    assert open_engine(tmp_path / "copy").manifest == m


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_records_carry_the_probabilities_and_a_run_goes_on_from_them(pfd: Scorer, tmp_path: Path, name: str) -> None:
    images = [str(tmp_path / f"{seed}.png") for seed in (1, 2)]
    for seed, image in enumerate(images, 1):
        PIL.Image.fromarray(photo(seed, 80, 70)).save(image)
    file, options = tmp_path / name, Options(crops=2)
    first = api.score(pfd, images[:1], output=file, options=options)
    again = api.score(pfd, images, output=file, options=options, resume=True, report=tmp_path / "report.html")
    assert again.kept == 1
    assert again.records[0] == first.records[0]
    assert list(again.records) == read_records(file, Format(file.suffix[1:]))
    for record, image in zip(again.records, images, strict=True):
        assert record.probabilities == pfd.score(image, options).probabilities
    page = (tmp_path / "report.html").read_text()
    for record in again.records:
        assert page.count(words_text(record.probabilities)) >= 2  # on its card and in the table of all
    assert page.count('data-kind="levels"') == 1  # the picture of the earlier run is not computed again
    assert "weight_map" not in page


def test_the_table_says_what_an_image_looks_like(pfd: Scorer, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    records = [Record.of(pfd.score(PIXELS), RunSettings.of(pfd.manifest, Options()))]
    show_table(records, pfd.info.score, "", sys.stdout)
    shown = capfdbinary.readouterr().out.decode()
    words = records[0].probabilities
    assert words
    for kind in words.values():
        word = max(kind, key=lambda each: kind[each])
        assert f"{word} {kind[word]:.2f}" in shown
    assert "add up" in " ".join(shown.split())
