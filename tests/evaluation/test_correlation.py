import math
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize

from diffiqa.engine.agreement import plcc, srcc
from diffiqa.errors import DatasetError
from diffiqa.evaluation.correlation import correlate, fit_logistic, krcc, per_group, rmse
from diffiqa.evaluation.gmad import gmad_pairs
from diffiqa.evaluation.scores import read_scores
from diffiqa.runtime.command.recordfile import RecordFile
from diffiqa.runtime.command.records import Format, Record, RunSettings, Status
from diffiqa.runtime.results import Mode

Array = np.ndarray


def sample(seed: int, images: int, *, ties: bool = False, sign: float = 1) -> tuple[Array, Array]:
    """Return scores and labels that a noisy S-curve connects."""
    rng = np.random.default_rng(seed)
    labels = rng.uniform(1, 5, images)
    scores = sign * np.log(labels / (5.3 - labels)) * 7 + 40 + rng.normal(0, 3, images)
    return (np.round(scores), np.round(labels)) if ties else (scores, labels)


def test_rank_correlations_of_known_orders() -> None:
    assert srcc([1, 2, 3], [10, 200, 3000]) == 1
    assert srcc([1, 2, 3], [3, 2, 1]) == -1
    assert krcc([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert rmse([1, 2], [2, 4]) == pytest.approx(math.sqrt(2.5))


def curve(x: Array, b1: float, b2: float, b3: float, b4: float) -> Array:
    return (b1 - b2) / (1 + np.exp(-(x - b3) / b4)) + b2


@pytest.mark.parametrize("sign", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("images", [8, 60, 3000])
@pytest.mark.parametrize("seed", range(2))
def test_logistic_is_the_least_squares_fit_of_scipy(seed: int, images: int, sign: float) -> None:
    scores, labels = sample(seed, images, sign=sign)
    fitted = fit_logistic(scores, labels)
    start = [labels.max(), labels.min(), scores.mean(), scores.std() / 4]
    best = optimize.curve_fit(curve, scores, labels, start, maxfev=20_000, ftol=1e-14, xtol=1e-14)[0]
    ours, theirs = (float(np.sum((labels - values) ** 2)) for values in (fitted(scores), curve(scores, *best)))
    # The best curve of few points may lie at infinity, where both stop somewhere.
    assert ours <= theirs * (1 + (1e-8 if images > 8 else 1e-3))
    assert correlate(scores, labels).plcc_logistic == pytest.approx(
        plcc(curve(scores, *best), labels), abs=1e-6 if images > 8 else 1e-3
    )


def test_logistic_of_few_points_is_the_best_of_several_starts() -> None:
    """From rising starts alone, the descent on these eight points ends at 0.0613."""
    scores, labels = sample(27, 8)
    error = (fit_logistic(scores, labels)(scores) - labels) / np.ptp(labels)
    assert np.sum(error**2) < 0.059


def test_logistic_recovers_a_curve_without_noise() -> None:
    x = np.linspace(-30, 90, 200)
    fitted = fit_logistic(x, curve(x, 88, 12, 31, 9.5))
    assert (fitted.b1, fitted.b2, fitted.b3, fitted.b4) == pytest.approx((88, 12, 31, 9.5), rel=1e-6)
    assert correlate(x, curve(x, 88, 12, 31, 9.5)).plcc_logistic == pytest.approx(1)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_logistic_does_not_depend_on_units(scale: float) -> None:
    scores, labels = sample(5, 300)
    expected = correlate(scores, labels).plcc_logistic
    assert correlate(scores * scale, labels / scale).plcc_logistic == pytest.approx(expected, abs=1e-9)


def test_logistic_of_a_step_and_of_noise_ends_with_finite_numbers() -> None:
    x = np.arange(20.0)
    assert correlate(x, (x > 9).astype(float)).plcc_logistic == pytest.approx(1, abs=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, labels = rng.normal(size=(2, 12))
        assert (correlate(scores, labels).plcc_logistic or 0) >= abs(plcc(scores, labels)) - 0.05


def test_correlate_gives_every_figure_and_no_logistic_below_five_images() -> None:
    scores, labels = sample(1, 50)
    figures = correlate(scores, labels)
    assert figures.images == 50
    assert figures.plcc == plcc(scores, labels)
    assert figures.plcc_logistic is not None
    assert figures.plcc_logistic > figures.plcc
    assert figures.rmse_logistic == pytest.approx(rmse(fit_logistic(scores, labels)(scores), labels))
    few = correlate(scores[:4], labels[:4])
    assert few.plcc_logistic is few.rmse_logistic is None


def test_kendall_is_corrected_for_equal_values() -> None:
    assert krcc([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / math.sqrt(5 * 6))
    with pytest.raises(DatasetError, match="all 3 scores are 4"):
        krcc([4, 4, 4], [1, 2, 3])


def test_groups_have_their_own_figures_or_a_reason() -> None:
    scores, labels = sample(2, 90)
    groups = ["blur", "noise", "jpeg"] * 29 + ["alone", "even", "even"]
    labels[-2:] = 3
    rows = {row.group: row for row in per_group(scores, labels, groups)}
    assert list(rows) == ["alone", "blur", "even", "jpeg", "noise"]
    assert rows["blur"].correlation == correlate(scores[0:87:3], labels[0:87:3])
    assert rows["alone"].correlation is None
    assert "two images" in str(rows["alone"].reason)
    assert "all 2 labels are 3" in str(rows["even"].reason)
    with pytest.raises(DatasetError, match="90 scores have 2 group names"):
        per_group(scores, labels, ["a", "b"])
    with pytest.raises(DatasetError, match="NaN"):
        per_group([1.0, math.nan], [1.0, 2.0], ["a", "b"])


def test_gmad_finds_the_pair_on_which_the_other_model_differs_most() -> None:
    images = [f"{index:03}.png" for index in range(100)]
    fixed = {image: float(index) for index, image in enumerate(images)}
    other = {image: 0.001 * (hash_like(index) % 7) for index, image in enumerate(images)}
    other["024.png"], other["026.png"], other["074.png"], other["076.png"] = 9.0, -9.0, -5.0, 5.0
    low, high = gmad_pairs(fixed, other, 2, window=0.06)
    assert (low.level, low.better, low.worse) == (0.25, "024.png", "026.png")
    assert (high.better, high.worse) == ("076.png", "074.png")
    assert low.fixed == (24.0, 26.0)
    assert high.other == (5.0, -5.0)
    assert len(gmad_pairs(fixed, fixed, 50)) == 50


def hash_like(index: int) -> int:
    return index * 2654435761 % 2**32


def test_gmad_refuses_files_that_do_not_match() -> None:
    scores = {"a": 1.0, "b": 2.0}
    with pytest.raises(DatasetError, match="2 images have a score in one file only: b, c"):
        gmad_pairs(scores, {"a": 1.0, "c": 2.0}, 1)
    with pytest.raises(DatasetError, match="room for 1 to 1 levels"):
        gmad_pairs(scores, scores, 2)
    with pytest.raises(DatasetError, match="one score to all 2"):
        gmad_pairs(scores, {"a": 1.0, "b": 1.0}, 1)
    with pytest.raises(DatasetError, match="NaN"):
        gmad_pairs(scores, {"a": math.nan, "b": 1.0}, 1)


def test_reads_scores_from_every_format(tmp_path: Path) -> None:
    settings = RunSettings("engine", 4, 0, 1, Mode.WHOLE, 1000)
    good = {"a, b.png": 0.5, "ü.png": 0.25}
    for form in (Format.JSONL, Format.CSV, Format.JSON):
        path = tmp_path / f"scores.{form.value}"
        with RecordFile(path, form, settings) as file:
            for image, score in good.items():
                file.write(Record(image=image, status=Status.OK, score=score, engine="e", settings="s"))
            file.write(Record(image="bad.png", status=Status.ERROR, engine="e", settings="s", error="broken"))
            file.finish()
        assert read_scores(path) == good
    (tmp_path / "own.csv").write_text("score,image,opinion\n3,x.png,good\n")  # others' columns are theirs
    assert read_scores(tmp_path / "own.csv") == {"x.png": 3}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "image,score\na,1\na,2\n", "1 images twice"),
        ("a.csv", "image,mos\na,1\n", "no column 'score'"),
        ("a.csv", "image,score\na,good\n", "cannot be read: .*good"),
        ("a.jsonl", "{}\n", "cannot be read"),
        ("a.txt", "", "must be called .jsonl, .json or .csv"),
    ],
    ids=["twice", "column", "text", "foreign", "suffix"],
)
def test_says_why_scores_cannot_be_read(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_scores(tmp_path / name)
    with pytest.raises(DatasetError, match="cannot be read"):
        read_scores(tmp_path / "none.csv")


def test_a_whole_data_set_takes_a_moment() -> None:
    scores, labels = sample(0, 23_200)
    begin = time.perf_counter()
    correlate(scores, labels)
    assert time.perf_counter() - begin < 5  # 0.2 s here; an n² Kendall takes minutes
