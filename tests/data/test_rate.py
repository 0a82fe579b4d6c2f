"""A rated set made of photographs: what is in it, that nothing of the test part shapes its labels, same on each run."""

import csv
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffiqa.data.datasets import load_csv
from diffiqa.data.distortions import DISTORTIONS
from diffiqa.data.fullref import PseudoScale, measure
from diffiqa.data.rate import Amount, rate_photographs
from diffiqa.data.splits import Split
from diffiqa.engine.codec import decode
from diffiqa.errors import ConfigError, DatasetError, OutputError
from diffiqa.runtime.images import read_image

from .synthetic import picture

AMOUNTS = {"train": Amount(2, 1), "validation": Amount(1, 1), "test": Amount(1, 2)}


def photographs(folder: Path) -> dict[str, list[Path]]:
    """Write one photograph for each part."""
    folder.mkdir()
    parts = {}
    for index, part in enumerate(AMOUNTS):
        path = folder / f"photo_{part}.png"
        pixels = np.roll((picture(190, 210) * 255).round().astype(np.uint8), 30 * index, axis=1)
        Image.fromarray(pixels).save(path)
        parts[part] = [path]
    return parts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rated")
    assert rate_photographs(photographs(folder / "photos"), folder / "set", amounts=AMOUNTS, seed=4) == 12 + 6 + 11
    return folder


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four metrics of every picture take most of the time, and say nothing of which pictures there are."""
    monkeypatch.setattr("diffiqa.data.rate.measure", lambda one, other: np.full(4, np.abs(one - other).mean()))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_every_window_is_there_as_it_is_and_with_all_levels_of_its_distortions(made: Path) -> None:
    found = rows(made / "set")
    originals = [row for row in found if not row["distortion"]]
    assert len(originals) == 4
    assert all(float(row["score"]) == 1 for row in originals)
    of_test = [row for row in found if row["reference"] == "photo_test" and row["distortion"]]
    assert len({row["distortion"] for row in of_test}) == 2
    assert sorted(int(row["level"]) for row in of_test) == sorted([*range(1, 6)] * 2)
    assert {row["distortion"] for row in found} - {""} <= {kind.name for kind in DISTORTIONS.values()}


def test_no_distortion_of_a_photograph_is_in_two_windows(made: Path) -> None:
    found = [row for row in rows(made / "set") if row["reference"] == "photo_train" and row["distortion"]]
    windows = {
        row["distortion"]: {Path(r["image"]).name[0] for r in found if r["distortion"] == row["distortion"]}
        for row in found
    }
    assert len(windows) == 2
    assert all(len(places) == 1 for places in windows.values())


@pytest.mark.usefixtures("cheap")
def test_over_the_photographs_of_a_part_all_kinds_come_equally_often(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffiqa.data.rate.distort", lambda image, number, level, _: image * (1 - number * level / 999))
    monkeypatch.setattr("diffiqa.data.rate._save", lambda *_: None)
    count, each = 5, 10
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / "photos" / f"{index}.png" for index in range(count)]
    for index, path in enumerate(paths):
        Image.fromarray(np.roll((picture(176, 176) * 255).astype(np.uint8), 11 * index, axis=1)).save(path)
    amount = Amount(1, each)
    rate_photographs({"train": paths}, tmp_path / "set", amounts={"train": amount}, seed=8)
    kinds = Counter(row["distortion"] for row in rows(tmp_path / "set") if row["level"] == "1")
    assert len(kinds) == len(DISTORTIONS)
    assert set(kinds.values()) == {count * each // len(DISTORTIONS)}


def test_values_and_scores_are_those_of_the_files(made: Path) -> None:
    scale = decode(PseudoScale, json.loads((made / "set" / "scale.json").read_text()), "pseudo-score", DatasetError)
    for row in rows(made / "set")[::5]:
        image = made / "set" / row["image"]
        original = image.with_name(f"{image.name[0]}-original.png")
        planes = [read_image(path, min_side=1).pixels.astype(np.float32) / 255 for path in (original, image)]
        values = measure(planes[0], planes[1])
        stored = [float(row[name]) for name in ("haarpsi", "mdsi", "gmsd", "ms_ssim")]
        np.testing.assert_allclose(stored, values, atol=1e-6)
        assert float(row["score"]) == pytest.approx(scale.scores(values[None])[0], abs=1e-5)


def test_labels_and_split_are_what_training_reads(made: Path) -> None:
    data = load_csv(made / "set" / "labels.csv")
    split = Split.read(made / "set" / "split.json")
    assert {part: len(split.items(data, part)) for part in AMOUNTS} == {"train": 12, "validation": 6, "test": 11}
    assert data.higher_is_better
    assert {item.level for item in data.items} == {None, 1, 2, 3, 4, 5}


def test_the_same_seed_makes_the_same_bytes_and_another_does_not(made: Path, tmp_path: Path) -> None:
    parts = photographs(tmp_path / "photos")
    for seed, same in ((4, True), (5, False)):
        rate_photographs(parts, tmp_path / str(seed), amounts=AMOUNTS, seed=seed)
        assert (
            (tmp_path / str(seed) / "labels.csv").read_bytes() == (made / "set" / "labels.csv").read_bytes()
        ) is same
    for row in rows(made / "set"):
        assert (tmp_path / "4" / row["image"]).read_bytes() == (made / "set" / row["image"]).read_bytes()


def test_the_test_part_has_no_say_in_the_scale(made: Path, tmp_path: Path) -> None:
    parts = photographs(tmp_path / "photos")
    Image.fromarray(np.full((190, 210, 3), 90, np.uint8)).save(parts["test"][0])
    rate_photographs(parts, tmp_path / "set", amounts=AMOUNTS, seed=4)
    assert (tmp_path / "set" / "scale.json").read_bytes() == (made / "set" / "scale.json").read_bytes()


def test_a_used_folder_and_equal_names_are_refused(tmp_path: Path) -> None:
    """Labels of an older run beside pictures of a newer one would be wrong, and nothing would show it."""
    parts = photographs(tmp_path / "photos")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "labels.csv").touch()
    with pytest.raises(OutputError, match="is not empty"):
        rate_photographs(parts, tmp_path / "set", amounts=AMOUNTS, seed=4)
    parts["test"] = [parts["train"][0].with_suffix(".jpg")]
    with pytest.raises(DatasetError, match="two photographs are called photo_train"):
        rate_photographs(parts, tmp_path / "other", amounts=AMOUNTS, seed=4)


@pytest.mark.parametrize(("windows", "distortions"), [(0, 1), (1, 0), (13, 2), (1, 26)])
def test_amounts_that_repeat_a_distortion_are_refused(windows: int, distortions: int) -> None:
    with pytest.raises(ConfigError, match="at most 25 per photograph"):
        Amount(windows, distortions)


def test_windows_too_small_for_ms_ssim_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 161 pixels"):
        rate_photographs(photographs(tmp_path / "photos"), tmp_path / "set", amounts=AMOUNTS, seed=1, side=160)


@pytest.mark.usefixtures("cheap")
def test_with_one_level_every_kind_comes_once_before_any_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffiqa.data.rate._save", lambda *_: None)
    amounts = AMOUNTS | {"train": Amount(30, 1, one_level=True)}
    rate_photographs(photographs(tmp_path / "photos"), tmp_path / "set", amounts=amounts, seed=4, side=161)
    found = [row for row in rows(tmp_path / "set") if row["reference"] == "photo_train"]
    kinds = [row["distortion"] for row in sorted(found, key=lambda row: int(Path(row["image"]).name.split("-")[0]))]
    assert sorted(kinds[:26]) == sorted(["", *(kind.name for kind in DISTORTIONS.values())])
    assert len(set(kinds[26:])) == 4
    assert len({row["level"] for row in found if row["distortion"]}) > 2
    assert all(row["level"] == "" for row in found if not row["distortion"])


@pytest.mark.usefixtures("cheap")
def test_noise_differs_between_windows_of_a_photograph(tmp_path: Path) -> None:
    """The same noise in all of them would be something to recognise a distortion by."""
    path = tmp_path / "grey.png"
    Image.new("RGB", (200, 200), (128, 128, 128)).save(path)
    amounts = dict.fromkeys(AMOUNTS, Amount(60, 1, one_level=True))
    parts = {part: [path] for part in ("train",)}
    rate_photographs(parts, tmp_path / "set", amounts=amounts, seed=1, side=161)
    noisy = [row["image"] for row in rows(tmp_path / "set") if row["distortion"] == "white_noise"]
    first, second = (read_image(tmp_path / "set" / name).pixels.astype(float) - 128 for name in noisy[:2])
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.05
