"""`iqa-eval`: figures that scipy confirms, levels and originals by hand, and scores that no interruption loses."""

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from scipy import stats

from diffiqa.cli import main
from diffiqa.data.datasets import Dataset, load_csv
from diffiqa.engine.codec import decode
from diffiqa.errors import DatasetError, UsageError
from diffiqa.evaluation.api import evaluate
from diffiqa.evaluation.findings import Evaluation, Originals, compare
from diffiqa.evaluation.scores import pictures_of, read_branches
from diffiqa.evaluation.text import to_text
from diffiqa.tests.tiny import photo

KINDS = ("jpeg", "mean_shift", "lab_saturation")


def call(*arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["eval", *map(str, arguments)])


def write_csv(path: Path, rows: Sequence[Sequence[object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def made(folder: Path, *, references: int = 3, lower_better: bool = False) -> Dataset:
    """Return labelled versions of contents: an original and three distortions at five levels."""
    draw = np.random.default_rng(4)
    rows: list[tuple[object, ...]] = [("image", "score", "reference", "distortion", "level")]
    sign = -1 if lower_better else 1
    for r in range(references):
        rows.append((f"r{r}/original.png", sign * 5, f"r{r}", "", ""))
        rows += [
            (f"r{r}/{kind}-{level}.png", sign * (5 - level + draw.normal(0, 0.3)), f"r{r}", kind, level)
            for kind in KINDS
            for level in range(1, 6)
        ]
    path = write_csv(folder / "labels.csv", rows)
    return load_csv(path, lower_is_better=lower_better, need_files=False)


def scores_for(dataset: Dataset) -> dict[str, dict[str, float]]:
    draw = np.random.default_rng(5)
    total = {item.image: abs(item.label) ** 2 + draw.normal(0, 0.5) for item in dataset.items}
    if not dataset.higher_is_better:
        total = {image: -value for image, value in total.items()}
    return {"score": total, "vcg": {image: value / 2 for image, value in total.items()}, "vda": {}}


@pytest.mark.parametrize("lower_better", [False, True])
def test_figures_are_those_of_scipy(tmp_path: Path, lower_better: bool) -> None:
    dataset = made(tmp_path, lower_better=lower_better)
    branches = scores_for(dataset)
    found = compare(dataset, dataset.items, branches, scores="ours")
    x = [branches["score"][item.image] for item in dataset.items]
    y = [item.label * (-1 if lower_better else 1) for item in dataset.items]
    assert [row.group for row in found.branches] == ["total", "VCG alone"]
    total = found.branches[0].correlation
    assert total is not None
    assert total.srcc == pytest.approx(stats.spearmanr(x, y).statistic)
    assert total.krcc == pytest.approx(stats.kendalltau(x, y).statistic)
    assert total.plcc == pytest.approx(stats.pearsonr(x, y).statistic)
    jpeg = next(row for row in found.distortions if row.group == "jpeg")
    members = [(a, b) for a, b, item in zip(x, y, dataset.items, strict=True) if item.distortion == "jpeg"]
    assert jpeg.images == len(members) == 15
    assert jpeg.correlation is not None
    assert jpeg.correlation.srcc == pytest.approx(stats.spearmanr(members).statistic)


def test_levels_are_compared_within_a_reference_and_their_median_is_taken(tmp_path: Path) -> None:
    dataset = made(tmp_path)
    branches = scores_for(dataset)
    found = compare(dataset, dataset.items, branches, scores="ours")
    rows = {row.distortion: row for row in found.levels}
    for kind in KINDS:
        medians = [
            stats.spearmanr(
                range(1, 6), [branches["score"][f"r{r}/{kind}-{level}.png"] for level in range(1, 6)]
            ).statistic
            for r in range(3)
        ]
        assert rows[kind].median == pytest.approx(statistics.median(medians))
        assert rows[kind].references == 3
    assert [rows[kind].ordered for kind in KINDS] == [True, False, True]


def test_scores_that_do_not_tell_levels_apart_put_nothing_in_order(tmp_path: Path) -> None:
    dataset = made(tmp_path)
    total = {item.image: 1.0 if item.distortion == "jpeg" else item.label for item in dataset.items}
    found = compare(dataset, dataset.items, {"score": total}, scores="ours")
    assert next(row.median for row in found.levels if row.distortion == "jpeg") == 0
    assert found.put_in_order == (1, 2)
    jpeg = next(row for row in found.distortions if row.group == "jpeg")
    assert jpeg.correlation is None
    assert f"jpeg: {jpeg.reason}" in to_text(found)


def test_originals_are_compared_with_all_that_differs_from_them(tmp_path: Path) -> None:
    """Of 15 versions of a content, mean_shift at level 3 and lab_saturation at level 1 are the original itself."""
    dataset = made(tmp_path)
    total = {item.image: float(item.level is None) for item in dataset.items}
    total["r0/jpeg-1.png"], total["r1/jpeg-1.png"] = 1.0, 2.0
    found = compare(dataset, dataset.items, {"score": total}, scores="ours")
    assert found.originals == Originals(compared=3 * 13, higher=3 * 13 - 2, equal=1)


def test_a_reference_of_its_own_file_is_the_original(tmp_path: Path) -> None:
    rows = [
        ("image", "score", "reference", "distortion"),
        ("a.png", 1, "ref/a.png", "x"),
        ("b.png", 2, "ref/a.png", "y"),
    ]
    dataset = load_csv(write_csv(tmp_path / "labels.csv", rows), need_files=False)
    scores = write_csv(tmp_path / "s.csv", [("image", "score"), ("a.png", 1), ("b.png", 3), ("ref/a.png", 2)])
    branches = read_branches(scores, pictures_of(dataset.items))
    assert compare(dataset, dataset.items, branches, scores="s").originals == Originals(2, 1, 0)


def test_scores_are_found_by_their_ends_and_never_taken_twice(tmp_path: Path) -> None:
    pictures = {"a.png": Path("x/a.png"), "b/a.png": Path("x/b/a.png"), "c/d.png": Path("x/c/d.png")}
    scores = write_csv(tmp_path / "s.csv", [("image", "score"), ("/far/b/a.png", 1), ("d.png", 2)])
    assert read_branches(scores, pictures)["score"] == {"b/a.png": 1, "c/d.png": 2}
    write_csv(scores, [("image", "score"), ("/far/c/d.png", 1), ("/near/c/d.png", 2)])
    with pytest.raises(DatasetError, match=r"/far/c/d\.png and /near/c/d\.png, and either could be c/d\.png"):
        read_branches(scores, pictures)


def test_a_name_that_several_images_end_like_is_given_to_none_of_them(tmp_path: Path) -> None:
    pictures = {name: Path(name) for name in ("jpeg/img1.bmp", "jp2k/img1.bmp")}
    scores = write_csv(tmp_path / "s.csv", [("image", "score"), ("img1.bmp", 1)])
    with pytest.raises(DatasetError, match=r"has img1\.bmp, which could be jp2k/img1\.bmp or another image"):
        read_branches(scores, pictures)


def test_scores_of_other_images_are_refused_with_an_example(tmp_path: Path) -> None:
    made(tmp_path)
    scores = write_csv(tmp_path / "s.csv", [("image", "score"), ("x.png", 1)])
    result = call("--scores", scores, "--labels", tmp_path / "labels.csv")
    assert result.exit_code == 2
    assert "call an image r0/jpeg-1.png" in result.stderr


def test_existing_scores_are_evaluated_and_what_lacks_one_is_listed(tmp_path: Path) -> None:
    dataset = made(tmp_path)
    rows = [(f"/far/{image}", value) for image, value in scores_for(dataset)["score"].items()]
    scores = write_csv(tmp_path / "scores.csv", [("image", "score"), *rows[1:]])
    result = call("--scores", scores, "--labels", tmp_path / "labels.csv", "-o", tmp_path / "out")
    assert result.exit_code == 1, result.stderr
    found = decode(Evaluation, json.loads((tmp_path / "out" / "evaluation.json").read_text()), "", ValueError)
    assert found.missing == (dataset.items[0].image,)
    assert (found.images, found.branches[0].images) == (48, 47)
    assert (tmp_path / "out" / "evaluation.md").read_text() == result.stdout
    with Image.open(tmp_path / "out" / "scatter.png") as picture:
        assert picture.format == "PNG"


def test_the_function_returns_what_the_command_writes_and_prints_nothing(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    dataset = made(tmp_path, lower_better=True)
    rows = [("image", "score", "vcg"), *((image, value, 1) for image, value in scores_for(dataset)["score"].items())]
    scores, out = write_csv(tmp_path / "scores.csv", rows), tmp_path / "out"
    found = evaluate(tmp_path / "labels.csv", scores=scores, lower_better=True, output=out)
    assert decode(Evaluation, json.loads((out / "evaluation.json").read_text()), "", ValueError) == found
    assert found == compare(
        dataset, dataset.items, read_branches(scores, pictures_of(dataset.items)), scores="scores.csv"
    )
    assert capfd.readouterr() == ("", "")
    with pytest.raises(UsageError, match="either an engine or a file of scores"):
        evaluate(tmp_path / "labels.csv")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Four pictures of two contents with labels, one of which has no file; references in a folder of their own."""
    folder = tmp_path / "set"
    (folder / "ref").mkdir(parents=True)
    rows: list[tuple[object, ...]] = [("image", "score", "reference", "distortion")]
    for index, name in enumerate(["a.png", "b.png", "c.png", "gone.png"]):
        if name != "gone.png":
            Image.fromarray(photo(index, 40, 44)).save(folder / name)
        rows.append((name, index, f"ref/{index % 2}.png", "noise"))
    for index in range(2):
        Image.fromarray(photo(9 + index, 40, 44)).save(folder / "ref" / f"{index}.png")
    return write_csv(folder / "labels.csv", rows)


def test_an_engine_scores_images_and_their_references(tiny_engine: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = call("--engine", tiny_engine, "--labels", labelled, "-o", out, "--crops", "1")
    assert result.exit_code == 1, result.stderr
    records = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(records) == 6
    found = decode(Evaluation, json.loads((out / "evaluation.json").read_text()), "", ValueError)
    assert [row.group for row in found.branches] == ["total", "VCG alone", "VDA alone"]
    assert found.missing == ("gone.png",)
    assert found.originals is not None
    assert found.originals.compared == 3


def test_resuming_keeps_what_was_scored(tiny_engine: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--engine", tiny_engine, "--labels", labelled, "-o", out, "--crops", "1", "-q")
    whole = call(*arguments)
    kept = (out / "scores.jsonl").read_text().splitlines(keepends=True)[:2]
    (out / "scores.jsonl").write_text("".join(kept) + '{"image": "brok')  # as a kill leaves it
    again = call(*arguments)
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    resumed = call(*arguments, "--resume")
    assert (resumed.exit_code, resumed.stdout) == (1, whole.stdout)
    assert (out / "scores.jsonl").read_text().startswith("".join(kept))


def test_a_part_of_a_split_is_evaluated(labelled: Path, tmp_path: Path) -> None:
    parts = {"train": ["ref/0.png"], "test": ["ref/1.png"]}
    (tmp_path / "split.json").write_text(json.dumps({"dataset": "labels", "seed": None, "parts": parts}))
    rows = [("image", "score"), *((name, len(name)) for name in ("a.png", "b.png", "gone.png"))]
    scores = write_csv(tmp_path / "scores.csv", rows)
    result = call("--scores", scores, "--labels", labelled, "--split", tmp_path / "split.json")
    assert result.exit_code == 0, result.stderr
    assert "# scores.csv on labels, part test" in result.stdout
    assert "2 labelled images, 2 with a score" in result.stdout


def test_two_models_compete(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    names = [f"{k:02d}.png" for k in range(40)]
    for model in "ab":
        rows = [("image", "score"), *zip(names, draw.random(40).round(6), strict=True)]
        write_csv(tmp_path / f"{model}.csv", rows)
    result = call("--gmad", tmp_path / "a.csv", tmp_path / "b.csv", "-o", tmp_path / "out", "--levels", "3")
    assert result.exit_code == 0, result.stderr
    with (tmp_path / "out" / "gmad.csv").open(newline="") as file:
        pairs = list(csv.DictReader(file))
    assert [Path(pair["fixed"]).name for pair in pairs] == ["a.csv"] * 3 + ["b.csv"] * 3
    for pair in pairs:
        assert float(pair["other_better"]) > float(pair["other_worse"])
        assert pair["better"] in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "x.csv"], "give one of --engine, --scores and --gmad"),
        (["--scores", "s.csv", "--engine", "e", "--labels", "x.csv"], "give one of"),
        (["--scores", "s.csv"], "give the labels"),
        (["--engine", "e", "--labels", "x.csv"], "name a folder with -o"),
        (["--scores", "s.csv", "--data", "."], "say with --dataset"),
        (["--scores", "s.csv", "--labels", "none.csv"], "none.csv cannot be read"),
        (["--scores", "s.csv", "--data", ".", "--dataset", "imagenet"], "no data set 'imagenet'"),
    ],
    ids=["nothing", "two", "no labels", "no folder", "no name", "no file", "unknown"],
)
def test_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scores", "s.csv", "--labels", "x.csv", "--crops", "4"], "--crops has no effect with --scores"),
        (["--scores", "s.csv", "--labels", "x.csv", "--levels", "2"], "--levels has no effect with --scores"),
        (["--gmad", "a.csv", "b.csv", "--labels", "x.csv"], "--labels has no effect with --gmad"),
        (["--engine", "e", "--labels", "x.csv", "--levels", "2"], "--levels has no effect with --engine"),
    ],
    ids=["scoring", "levels of scores", "labels of gmad", "levels of an engine"],
)
def test_refuses_options_that_would_change_nothing(arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
