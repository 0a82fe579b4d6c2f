"""Your program's scores beside ours. Here it is the plain loop in PyTorch, which may prepare images otherwise."""

import csv
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from diffiqa.cli import main
from diffiqa.engine.manifest import MANIFEST, read_manifest
from diffiqa.engine.pixels import TapForm, to_plane
from diffiqa.errors import DatasetError, UsageError
from diffiqa.model.config import ModelConfig
from diffiqa.model.network import DiffV2IQA
from diffiqa.runtime.images import read_image
from diffiqa.runtime.results import Options
from diffiqa.runtime.scorer import Scorer
from diffiqa.verify import scores as module
from diffiqa.verify.api import verify
from diffiqa.verify.scores import IMAGENET, ScoresFound, compare_scores, is_scores

from ..tiny import TINY
from .verify_engines import pictures

IMAGES = 7
Values = Mapping[Path, float]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return sorted(pictures(tmp_path_factory.mktemp("scores") / "images", IMAGES).iterdir())


@pytest.fixture(scope="module")
def ours(scorer: Scorer, images: list[Path]) -> dict[Path, Any]:
    return {path: scorer.score(path) for path in images}


def saved(path: Path, values: Values, header: str = "name") -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["epoch", header, "score"])
        writer.writerows([3, image.name if header == "name" else image, value] for image, value in values.items())
    return path


def program(model: DiffV2IQA, config: ModelConfig, images: list[Path], crops: int = 9) -> Values:
    """Score images with the weights of a model, in PyTorch, under another configuration."""
    other = DiffV2IQA(config).eval()
    other.load_state_dict(model.state_dict())
    planes = {path: torch.from_numpy(to_plane(read_image(path, min_side=32).pixels))[None] for path in images}
    return {path: float(other.score(plane, seed=0, crops=crops).total) for path, plane in planes.items()}


def compared(engine: Path, images: list[Path], tmp_path: Path, values: Values, **options: Any) -> ScoresFound:
    return compare_scores(engine, images, saved(tmp_path / "scores.csv", values), options=Options(seeds=1), **options)


def test_a_program_that_says_the_same_is_within(
    tiny_engine: Path, tiny_model: DiffV2IQA, images: list[Path], tmp_path: Path
) -> None:
    found = compared(tiny_engine, images, tmp_path, program(tiny_model, TINY, images))
    assert found.within
    assert found.distance.largest < 1e-4
    assert found.distance.srcc == pytest.approx(1)
    assert (found.images, found.unused, found.explanations, found.tried_on) == (IMAGES, 0, (), 0)


PREPARED: dict[str, tuple[ModelConfig, int]] = {
    "--tap-form png8": (replace(TINY, tap_form=TapForm.PNG8), 9),
    "--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225": (replace(TINY, pixels=IMAGENET), 9),
    "--crop-count 1 --crop-places grid": (TINY, 1),
}


@pytest.mark.parametrize("option", PREPARED)
def test_images_that_were_prepared_in_another_way_are_told(
    tiny_engine: Path, tiny_model: DiffV2IQA, images: list[Path], tmp_path: Path, option: str
) -> None:
    config, crops = PREPARED[option]
    found = compared(tiny_engine, images, tmp_path, program(tiny_model, config, images, crops))
    assert not found.within
    best, second, *_ = [one for one in found.explanations if one.changes == 1 and "look like" not in one.what]
    assert best.option == option
    assert best.left < min(found.allowed, 0.2 * second.left)
    assert found.explanations[0] == best
    assert found.tried_on == IMAGES


CHANGES: dict[str, Callable[[Any], float]] = {
    "branch weights: your scores look like 1·VCG + 5·VDA": lambda score: score.vcg + 5 * score.vda,
    "branch weights: your scores look like 0·VCG + 1·VDA": lambda score: score.vda,
    "another scale: your scores look like 100·ours + 7.5": lambda score: 100 * score.score + 7.5,
    "another scale: your scores look like 5·ours": lambda score: 5 * score.score,
    "another scale: your scores look like -1·ours + 1": lambda score: 1 - score.score,
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_weights_of_the_branches_and_another_scale_are_told_without_scoring_again(
    tiny_engine: Path, images: list[Path], ours: dict[Path, Any], tmp_path: Path, what: str
) -> None:
    found = compared(tiny_engine, images, tmp_path, {path: CHANGES[what](score) for path, score in ours.items()})
    assert not found.within
    best = found.explanations[0]
    assert best.what.startswith(what)
    assert best.left < 1e-5
    assert (best.option == "--branch-weights 1,5") == ("5·VDA" in what)
    assert found.tried_on == 0


def test_a_preparation_and_another_scale_are_told_together(
    tiny_engine: Path, tiny_model: DiffV2IQA, images: list[Path], tmp_path: Path
) -> None:
    values = program(tiny_model, replace(TINY, pixels=IMAGENET), images)
    found = compared(tiny_engine, images, tmp_path, {path: 5 * value for path, value in values.items()})
    assert found.explanations[0].what.startswith("pixels by ImageNet's mean and deviation, and another scale: ")
    assert found.explanations[0].left < found.allowed


def test_what_nothing_explains_is_not_explained(tiny_engine: Path, images: list[Path], tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    result = call(
        tiny_engine, saved(tmp_path / "s.csv", {path: generator.random() for path in images}), images[0].parent
    )
    assert result.exit_code == 1
    assert "nothing that was tried explains the difference; not tried: other weights, swin-scale" in result.stdout
    assert "explained by" not in result.stdout


def test_noise_on_another_scale_is_allowed_as_much_as_on_ours(
    tiny_engine: Path, images: list[Path], ours: dict[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(4)
    values = {path: 100 * (score.score + 5e-5 * generator.standard_normal()) for path, score in ours.items()}
    best = compared(tiny_engine, images, tmp_path, values).explanations[0]
    assert best.what.startswith("another scale: your scores look like ")
    assert best.enough
    assert 1e-5 < best.left < 2e-4
    monkeypatch.setattr(module, "SHARE", 1e-5)  # of the range of scores, from 0 to 1
    assert not any(one.enough for one in compared(tiny_engine, images, tmp_path, values).explanations)


def test_the_spread_over_seeds_is_allowed(
    tiny_engine: Path, images: list[Path], ours: dict[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {path: score.score + 0.003 for path, score in ours.items()}
    file = saved(tmp_path / "s.csv", values)
    found = compare_scores(tiny_engine, images, file, options=Options(seeds=3))
    assert found.spread > 0
    assert found.allowed == max(1e-3, 3 * found.spread)
    monkeypatch.setattr(module, "SPREADS", 0)
    assert not compare_scores(tiny_engine, images, file, options=Options(seeds=3), trials=2).within


def test_the_noise_of_a_branch_that_an_engine_leaves_out_is_allowed(
    tiny_engine: Path, scorer: Scorer, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other weights are judged by the spread that scores would have with them: this engine's own is far smaller."""
    engine = tmp_path / "engine"
    shutil.copytree(tiny_engine, engine)
    manifest = read_manifest(engine)
    vda_alone = replace(manifest, score=replace(manifest.score, vcg_weight=1e-6))
    (engine / MANIFEST).write_text(vda_alone.to_json())
    other_noise: dict[Path, Any] = {path: scorer.score(path, Options(seed=7)) for path in images}
    file = saved(tmp_path / "s.csv", {path: 5 * score.vcg + score.vda for path, score in other_noise.items()})
    monkeypatch.setattr(module, "SHARE", 1e-6)
    found = compare_scores(engine, images, file, options=Options(seeds=3), trials=2)
    best = found.explanations[0]
    assert best.what.startswith("branch weights: ")
    assert best.enough
    assert best.left > found.allowed


def call(engine: Path, scores: Path, *arguments: str | Path) -> Result:
    given = ["verify", "--engine", engine, "--against", scores, "--seeds", "1", *arguments]
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, list(map(str, given)))


def test_the_command_prints_the_cause_and_writes_json(
    tiny_engine: Path, images: list[Path], ours: dict[Path, Any], tmp_path: Path
) -> None:
    scores = saved(tmp_path / "s.csv", {path: score.vcg + 5 * score.vda for path, score in ours.items()}, "path")
    result = call(tiny_engine, scores, images[0].parent, "--json", tmp_path / "found.json")
    assert result.exit_code == 1, result.output
    assert (
        "several causes would do, the likeliest is branch weights: your scores look like 1·VCG + 5·VDA" in result.stdout
    )
    data = json.loads((tmp_path / "found.json").read_text())
    assert (data["within"], data["explanations"][0]["option"]) == (False, "--branch-weights 1,5")
    same = saved(
        tmp_path / "same.csv", {path: score.score for path, score in ours.items()} | {Path("x.png"): 1.0}, "image"
    )
    result = call(tiny_engine, same, images[0].parent)
    assert result.exit_code == 0
    assert "the engine says what your program says" in result.stdout
    assert "scores of other images: 1" in result.stdout


def test_tables_that_cannot_be_compared_are_refused(
    tiny_engine: Path, images: list[Path], ours: dict[Path, Any], tmp_path: Path
) -> None:
    values = {path: score.score for path, score in ours.items()}
    with pytest.raises(DatasetError, match=rf"has no score of {images[-2]} and 1 more"):
        compared(tiny_engine, images, tmp_path, dict(list(values.items())[:-2]))
    with pytest.raises(DatasetError, match="NaN or infinite"):
        compared(tiny_engine, images, tmp_path, values | {images[2]: float("nan")})
    with pytest.raises(UsageError, match="two images and more, and there are 1"):
        compared(tiny_engine, images[:1], tmp_path, values)
    for text, why in (
        ("a,b\n1,2\n", "no column 'score'"),
        ("a,score\n1,2\n", "no column 'image'"),
        ("name,score\nx,high\n", "high"),
    ):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(DatasetError, match=why):
            compare_scores(tiny_engine, images, tmp_path / "t.csv")
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(UsageError, match="mend this image, or leave it out"):
        compared(tiny_engine, [*images, tmp_path / "bad.png"], tmp_path, values | {tmp_path / "bad.png": 1.0})


def test_options_about_tensors_are_refused(tiny_engine: Path, images: list[Path], tmp_path: Path) -> None:
    scores = saved(tmp_path / "s.csv", dict.fromkeys(images, 1.0))
    for option in (["--precision", "fp16"], ["--save", "kept"], ["--limit", "score=1"], ["--bisect", "b.json"]):
        result = call(tiny_engine, scores, images[0].parent, *option)
        assert result.exit_code == 2
        assert f"{option[0]} is about tensors, and {scores} has scores alone" in result.stderr
    with pytest.raises(UsageError, match="compare_scores"):
        verify(tiny_engine, images, against=scores)


def test_a_table_of_scores_is_told_from_engines_and_checkpoints(tmp_path: Path) -> None:
    assert is_scores(tmp_path / "scores.CSV")
    assert is_scores(tmp_path / "scores.jsonl")
    assert not is_scores(tmp_path / "model.safetensors")
    assert not is_scores(tmp_path / "model.safetensors.index.json")
    (tmp_path / "engine.json").mkdir()
    assert not is_scores(tmp_path / "engine.json")
