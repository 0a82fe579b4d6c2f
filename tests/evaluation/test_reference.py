"""From scores and opinions to a reference, into an engine, and out again as percentile and opinion of each image."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from scipy.optimize import isotonic_regression

from diffiqa.cli import main
from diffiqa.data.datasets import Dataset, load_csv
from diffiqa.engine.manifest import MANIFEST, Manifest, read_manifest
from diffiqa.engine.reference import Reference, read_reference
from diffiqa.errors import DatasetError, UsageError
from diffiqa.evaluation.reference import FOLDS, IMAGES_PER_KNOT, SEED, Ends, held_out_error, make_reference
from diffiqa.export.api import Exported
from diffiqa.export.cli import print_exported
from diffiqa.export.engine import manifest_of
from diffiqa.model.bundle import save_bundle
from diffiqa.model.checkpoint import load
from diffiqa.model.network import DiffV2IQA, build
from diffiqa.tests.tiny import TINY, photo

COUNT = 120


def call(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, [*map(str, arguments)])


def rows_of(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def lines_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def labelled(folder: Path, labels: list[float], *, lower_better: bool = False) -> Dataset:
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "score"), *((f"{i}.png", label) for i, label in enumerate(labels))])
    return load_csv(folder / "labels.csv", lower_is_better=lower_better, need_files=False)


@pytest.mark.parametrize(("worst", "best"), [(0.0, 100.0), (100.0, 0.0)])
def test_opinions_run_from_1_to_5_between_the_ends(worst: float, best: float, tmp_path: Path) -> None:
    dataset = labelled(tmp_path, [25.0, 50.0, 75.0], lower_better=worst > best)
    opinions = Ends(dataset, worst, best).opinions(dataset.items)
    assert opinions.tolist() == ([2, 3, 4] if best > worst else [4, 3, 2])


@pytest.mark.parametrize(
    ("ends", "says"), [((5, 1), "better when higher"), ((1, 1), "better when higher"), ((1, 2), "run from 0 to 3")]
)
def test_ends_that_labels_contradict_are_refused(ends: tuple[float, float], says: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=says):
        Ends(labelled(tmp_path, [0, 1, 3]), *ends)


def test_the_error_is_that_of_images_the_map_has_not_seen() -> None:
    """Again with SciPy's isotonic regression over the means of groups."""
    random = np.random.default_rng(2)
    scores = random.random(230)
    opinions = 1 + 4 * scores**2 + random.normal(0, 0.3, 230)
    squares = []
    for fold in np.array_split(np.random.default_rng(SEED).permutation(230), FOLDS):
        rest = np.array([i for i in range(230) if i not in set(fold.tolist())])
        rest = rest[np.argsort(scores[rest])]
        groups = np.array_split(rest, len(rest) // IMAGES_PER_KNOT)
        x, y = ([values[group].mean() for group in groups] for values in (scores, opinions))
        fitted = isotonic_regression(y, weights=[len(group) for group in groups]).x
        squares += ((np.interp(scores[fold], x, fitted) - opinions[fold]) ** 2).tolist()
    assert held_out_error(scores, opinions) == pytest.approx(np.mean(squares) ** 0.5, rel=0.02)
    assert held_out_error(scores, random.permutation(opinions)) == pytest.approx(np.std(opinions), rel=0.1)


def test_too_few_images_or_equal_scores_make_no_reference(tiny_engine: Path) -> None:
    manifest, random = read_manifest(tiny_engine), np.random.default_rng(3)
    with pytest.raises(DatasetError, match="needs 100 images with a score at least, few has 99"):
        make_reference("few", manifest, random.random(99), random.random(99) + 2, crops=9, mode="whole")
    with pytest.raises(DatasetError, match="quantiles that are all equal"):
        make_reference("dull", manifest, np.ones(100), random.random(100) + 2, crops=9, mode="whole")


def test_lower_scores_may_be_the_better_ones(tiny_engine: Path) -> None:
    manifest: Manifest = read_manifest(tiny_engine)
    turned = dataclasses.replace(manifest, score=dataclasses.replace(manifest.score, higher_is_better=False))
    opinions = np.linspace(1, 5, 200)
    made = make_reference("a set", turned, 10 - opinions, opinions, crops=9, mode="whole")
    meaning = dataclasses.replace(turned.score, reference=made)
    assert (meaning.percentile(5.0), meaning.percentile(9.0)) == (100, 0)
    assert meaning.opinion(7.0) == pytest.approx(3, abs=0.02)


EVALUATED = ["eval", "--engine", "engine", "--labels", "labels.csv", "--crops", "1", "-o", "out", "-q"]


@pytest.fixture(scope="module")
def folder(tiny_engine: Path, tiny_model: DiffV2IQA, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that this module works in: weights, their engine, rated pictures and the reference made of them."""
    folder = tmp_path_factory.mktemp("rated")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_bundle(tiny_model, Path("tiny.safetensors"))
        shutil.copytree(tiny_engine, "engine")
        describe(manifest_of(load(Path("tiny.safetensors")), read_manifest(tiny_engine).stages))
        for index in range(COUNT):
            Image.fromarray(photo(index, 32, 32)).save(f"{index}.png")
        labelled(folder, np.random.default_rng(1).permutation(COUNT).tolist())
        assert call(*EVALUATED, "--reference", "r.json", "--opinions", "0", "200").exit_code == 0
        yield folder


def describe(manifest: Manifest) -> None:
    Path("engine", MANIFEST).write_text(manifest.to_json())


def test_a_reference_is_what_the_engine_scored(folder: Path) -> None:
    reference, records = read_reference(Path("r.json")), lines_of("out/scores.jsonl")
    scores = sorted(record["score"] for record in records)
    assert "percentile" not in records[0]
    assert (reference.name, reference.images, reference.crops, reference.mode) == ("labels", COUNT, 1, "whole")
    assert [reference.quantiles[i] for i in (0, 50, 100)] == pytest.approx([scores[0], np.median(scores), scores[-1]])
    assert 1 <= reference.opinions.outputs[0] <= reference.opinions.outputs[-1] <= 1 + 4 * COUNT / 200


def test_a_bundle_carries_it_to_the_engine_of_the_same_weights_and_steps(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("convert", "--ckpt", "tiny.safetensors", "--reference", "r.json", "-o", "known.pt").exit_code == 0
    known = load(Path("known.pt"))
    assert known.reference == read_reference(Path("r.json"))
    assert manifest_of(known, ()).score.reference == known.reference
    assert load(Path("known.pt"), unet=Path("tiny.safetensors")).reference is None
    fewer = DiffV2IQA(dataclasses.replace(TINY, schedule=dataclasses.replace(TINY.schedule, steps=5)))
    left_out = manifest_of(dataclasses.replace(known, model=fewer), ())
    assert left_out.score.reference is None
    assert "labels is left out" in left_out.provenance.notes[-1]
    print_exported(Path("engine"), dataclasses.replace(known, model=fewer), Exported(left_out, (), None))
    assert f"note: {left_out.provenance.notes[-1]}" in capsys.readouterr().out
    save_bundle(build(TINY, 9), Path("other.safetensors"))
    refused = call("convert", "--ckpt", "other.safetensors", "--reference", "r.json", "-o", "wrong.pt")
    assert (refused.exit_code, Path("wrong.pt").exists()) == (2, False)
    assert "is of an engine with other weights than other.safetensors" in refused.output


def test_without_one_a_scale_is_refused_before_anything_is_scored(folder: Path) -> None:
    for scale in ("percentile", "mos"):
        refused = call("run", "--engine", "engine", "0.png", "--scale", scale, "-o", "never.csv")
        assert (refused.exit_code, Path("never.csv").exists()) == (2, False)
        assert f"has no reference distribution, so its scores have no {scale}" in refused.output


@pytest.fixture
def knowing(folder: Path) -> Iterator[Reference]:
    """The reference, while the engine carries it."""
    before, reference = read_manifest(Path("engine")), read_reference(Path("r.json"))
    describe(dataclasses.replace(before, score=dataclasses.replace(before.score, reference=reference)))
    yield reference
    describe(before)


def test_scores_whose_lower_ones_are_better_are_turned_for_the_figures(folder: Path) -> None:
    before = read_manifest(Path("engine"))
    found = {}
    for higher in (True, False):
        describe(dataclasses.replace(before, score=dataclasses.replace(before.score, higher_is_better=higher)))
        assert call(*EVALUATED, "--resume").exit_code == 0
        found[higher] = json.loads(Path("out/evaluation.json").read_text())
    describe(before)
    up, down = (found[higher]["branches"][0]["correlation"]["srcc"] for higher in (True, False))
    assert up == -down != 0
    assert "turned" in found[False]["scores"]
    assert "turned" not in found[True]["scores"]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_records_have_percentile_and_opinion(knowing: Reference, form: str) -> None:
    scores = [record["score"] for record in lines_of("out/scores.jsonl")]
    run = ["run", "--engine", "engine", "0.png", "1.png", "-o", f"s.{form}", "--scale", "mos"]
    assert call(*run, "--crops", "1").exit_code == 0
    rows = rows_of("s.csv") if form == "csv" else lines_of("s.jsonl")
    for row in rows:
        score = float(row["score"])
        assert score in scores  # raw, whatever the scale
        assert float(row["percentile"]) == pytest.approx(np.mean(np.array(scores) < score) * 100, abs=1)
        assert float(row["opinion"]) == knowing.opinions(score)
        assert float(row["opinion_error"]) == knowing.error
        assert not row["notes"]
    assert call(*run, "--force").exit_code == 0  # with the crops of the engine
    assert "hold for --crops 1 --mode whole, not for --crops 9" in Path(f"s.{form}").read_text()


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_scores_of_an_engine_that_did_not_know_it_yet_get_it_too(folder: Path, form: str) -> None:
    run = ["run", "--engine", "engine", "-o", f"t.{form}", "--crops", "1"]
    others = ["run", "--engine", "engine", "-o", f"u.{form}", "0.png"]  # of nine crops, for which it does not hold
    read = rows_of if form == "csv" else lines_of
    before = read_manifest(Path("engine"))
    assert call(*run, "0.png").exit_code == call(*others).exit_code == 0
    assert not read(f"t.{form}")[0].get("percentile")
    reference = read_reference(Path("r.json"))
    describe(dataclasses.replace(before, score=dataclasses.replace(before.score, reference=reference)))
    assert call(*run, "0.png", "1.png", "--resume").exit_code == call(*others, "--resume").exit_code == 0
    describe(before)
    (other,) = read(f"u.{form}")
    assert float(other["percentile"]) == reference.percentile(float(other["score"]))
    assert "hold for --crops 1 --mode whole, not for --crops 9" in str(other["notes"])
    rows = read(f"t.{form}")
    assert [row["image"] for row in rows] == ["0.png", "1.png"]
    assert [float(row["opinion"]) for row in rows] == [reference.opinions(float(row["score"])) for row in rows]


@pytest.mark.parametrize(
    ("scale", "columns"),
    [
        ("raw", "score percentile opinion"),
        ("percentile", "percentile score opinion"),
        ("mos", "opinion score percentile"),
    ],
)
def test_table_and_report_show_the_scale_first(knowing: Reference, scale: str, columns: str) -> None:
    run = ["run", "--engine", "engine", "0.png", "gone.png", "--crops", "1", "--scale", scale]
    shown = call(*run, "--format", "table", "--report", "report.html").output
    head, _, row = (line.split() for line in shown.splitlines()[:3])
    assert head == ["image", *columns.split(), "VCG", "VDA", "size", "time"]
    assert f"of the {COUNT} images of labels that have a worse score" in shown
    (record,) = (record for record in lines_of("out/scores.jsonl") if record["image"] == "0.png")
    percent = f"{int(np.interp(record['score'], knowing.quantiles, range(101)))} %"
    opinion = f"{knowing.opinions(record['score']):.1f}"
    assert f"{percent}" in " ".join(row)
    assert opinion in row
    page = Path("report.html").read_text(encoding="utf-8")
    texts = {"raw": f"{record['score']:.4f}", "percentile": percent, "mos": f"{opinion} ± {knowing.error:.1f}"}
    headline = texts.pop(scale)
    assert f"<b>{headline}</b>" in page
    assert scale == "raw" or f"<dd>{headline}</dd>" not in page  # once is enough; a lone score is the median too
    assert all(f"<dd>{text}</dd>" in page for text in texts.values())
    assert f"root mean square error there is {knowing.error:.2f}" in page


def test_what_the_engine_says_is_compared_with_opinions(knowing: Reference) -> None:
    again = call(*EVALUATED, "--force", "--opinions", "0", "200")
    assert f"The engine states {knowing.error:.2f}" in again.output
    found = json.loads(Path("out/evaluation.json").read_text())["opinions"]
    labels = {row["image"]: float(row["score"]) for row in rows_of("labels.csv")}
    guesses = {record["image"]: record["opinion"] for record in lines_of("out/scores.jsonl")}
    errors = [guesses[image] - (1 + 4 * label / 200) for image, label in labels.items()]
    assert found["error"] == pytest.approx(np.mean(np.square(errors)) ** 0.5)
    assert found["percentile"] == pytest.approx(50, abs=1)
    assert (found["images"], found["worst"], found["best"]) == (COUNT, 0, 200)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("image,score\n1.png,\n2.png,3\n", "a number was expected, not ''"),
        ("image,score,,\n1.png,4,,\n2.png,3,,\n", "needs 100 images with a score at least, rated has 2"),
        ("image,mos\n1.png,4\n2.png,3\n", "no column 'score'"),
    ],
)
def test_labels_that_make_no_reference_are_refused_before_anything_is_scored(
    folder: Path, text: str, says: str
) -> None:
    Path("rated.csv").write_text(text)
    rated = ["eval", "--engine", "engine", "--labels", "rated.csv", "-o", "never", "--reference", "never.json"]
    refused = call(*rated)
    assert (refused.exit_code, Path("never").exists(), Path("never.json").exists()) == (2, False, False)
    assert says in refused.output


def test_a_reference_is_of_an_engine(tmp_path: Path) -> None:
    labelled(tmp_path, [1, 2, 3])
    refused = call("eval", "--scores", tmp_path / "s.csv", "--labels", tmp_path / "labels.csv", "--reference", "r.json")
    assert refused.exit_code == 2
    assert "--reference has no effect with --scores" in refused.output
