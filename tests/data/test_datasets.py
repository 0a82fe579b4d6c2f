import dataclasses
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from diffiqa.data import datasets, labelfiles, matfile
from diffiqa.data.datasets import PUBLISHED, Dataset, load, load_csv
from diffiqa.data.distortions import DISTORTIONS
from diffiqa.errors import DatasetError

from .fake_datasets import BIQ2021_COPIES, BUILDERS, LIVE_FOLDERS, touch


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, int]]:
    folder = tmp_path_factory.mktemp("originals")
    built = {}
    for name, build in BUILDERS.items():
        (folder / name).mkdir()
        built[name] = folder / name, build(folder / name)
    return built


@pytest.fixture
def fake(
    request: pytest.FixtureRequest,
    originals: dict[str, tuple[Path, int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """Return a copy that a test may spoil, and take its size for the published one."""
    source, count = originals[request.param]
    published = dataclasses.replace(PUBLISHED[request.param], images=count)
    monkeypatch.setitem(datasets.PUBLISHED, request.param, published)
    monkeypatch.setattr(datasets, "LIVE_FOLDERS", LIVE_FOLDERS)
    monkeypatch.setattr(datasets, "COPIES", tmp_path / "copies.txt")
    (tmp_path / "copies.txt").write_text("\n".join(BIQ2021_COPIES))
    # A process for each file would take most of the time; test_labelfiles looks at those.
    monkeypatch.setattr(labelfiles, "isolated", lambda path: matfile.read(str(path)))
    return Path(shutil.copytree(source, tmp_path / request.param))


def every(function: object) -> object:
    return pytest.mark.parametrize("fake", PUBLISHED, indirect=True)(function)


def only(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("fake", [name], indirect=True)


def item(dataset: Dataset, image: str) -> datasets.Item:
    return next(item for item in dataset.items if item.image == image)


@every
def test_reads_the_published_layout(fake: Path) -> None:
    dataset = load(fake.name, fake)
    assert len(dataset.items) == PUBLISHED[fake.name].images
    assert dataset.higher_is_better == PUBLISHED[fake.name].higher_is_better
    qualities = [item.quality for item in dataset.items]
    assert (min(qualities), max(qualities)) == (0, 1)
    best = max(dataset.items, key=lambda item: item.quality)
    labels = [item.label for item in dataset.items]
    assert best.label == dataset.best == (max(labels) if dataset.higher_is_better else min(labels))
    for entry in dataset.items:
        assert entry.path == fake / entry.image
        assert entry.path.is_file()
        assert entry.reference_path is None or entry.reference_path.is_file()
    has_references = fake.name not in {"clive", "biq2021", "koniq10k"}
    assert all((entry.reference_path is not None) == has_references for entry in dataset.items)


@every
def test_a_download_with_too_few_or_too_many_images_or_labels_is_refused_by_name(
    fake: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = [item.path for item in load(fake.name, fake).items[:5]]
    published = PUBLISHED[fake.name]
    with monkeypatch.context() as patch:
        patch.setitem(PUBLISHED, fake.name, dataclasses.replace(published, images=published.images + 1))
        with pytest.raises(DatasetError, match=f"published are {published.images + 1}: is it complete"):
            load(fake.name, fake)
    more = gone[0].with_stem(gone[0].stem + "_copy")
    touch(more)
    with pytest.raises(DatasetError, match=r"has no label for 1 images: .*_copy"):
        load(fake.name, fake)
    more.unlink()
    for path in gone[:4]:
        path.unlink()
    gone[4].write_bytes(b"")  # what a broken download leaves
    with pytest.raises(DatasetError, match=r"labels 5 images of \d+ that are missing or empty: .* …; is the download"):
        load(fake.name, fake)


@every
def test_says_that_a_file_or_folder_is_missing(fake: Path) -> None:
    for entry in sorted(fake.iterdir()):
        moved = entry.rename(fake.parent / "away")
        if entry.name in {"dmos.mat", "512x384", "koniq10k_distributions_sets.csv"}:
            load(fake.name, fake)
        elif entry.name not in {"dmos_realigned.mat", "1024x768", "koniq10k_scores_and_distributions.csv"}:
            with pytest.raises(DatasetError, match=f"{fake.name}.*(has no|folder)"):
                load(fake.name, fake)
        moved.rename(entry)


@every
def test_damaged_label_files_are_named(fake: Path) -> None:
    suffixes, unread = {".mat", ".csv", ".txt"}, {"dmos.mat", "info.txt", "koniq10k_distributions_sets.csv"}
    for path in [p for p in sorted(fake.rglob("*")) if p.suffix in suffixes and p.name not in unread]:
        whole = path.read_bytes()
        for damaged in (b"", b"\xff\xfe\x00nonsense", whole[: len(whole) // 2], whole[:-30]):
            path.write_bytes(damaged)
            with pytest.raises(DatasetError, match=fake.name):
                load(fake.name, fake)
        path.write_bytes(whole)
    load(fake.name, fake)


def test_published_sizes_and_directions_are_those_of_the_literature() -> None:
    assert {name: (facts.images, facts.higher_is_better) for name, facts in PUBLISHED.items()} == {
        "live": (779, False),
        "csiq": (866, False),
        "tid2013": (3000, True),
        "kadid10k": (10125, True),
        "clive": (1162, True),
        "biq2021": (12000, True),
        "koniq10k": (10073, True),
        "pipal": (23200, True),
    }
    assert datasets.LIVE_FOLDERS == {"jp2k": 227, "jpeg": 233, "wn": 174, "gblur": 174, "fastfading": 174}


@only("live")
def test_live_drops_pristine_images_and_prefers_realigned_labels(fake: Path) -> None:
    dataset = load("live", fake)
    assert dataset.label_file == "dmos_realigned.mat"
    assert not any(item.image == "jp2k/img20.bmp" for item in dataset.items)
    first = item(dataset, "jp2k/img21.bmp")
    assert (first.reference, first.distortion) == ("refimgs/ref20.bmp", "jp2k")
    assert Counter(item.distortion for item in dataset.items) == LIVE_FOLDERS | {"jp2k": 3}
    # Labels are in one row over all folders, in the order jp2k, jpeg, wn, gblur, fastfading.
    assert item(dataset, "jpeg/img1.bmp").label == pytest.approx(10 + 80 * 23 / 97)
    assert item(dataset, "fastfading/img17.bmp").quality == 0


@only("csiq")
def test_csiq_reads_the_image_called_1600_and_folders_of_any_case(fake: Path) -> None:
    dataset = load("csiq", fake)
    entry = item(dataset, "dst_imgs/AWGN/1600.AWGN.2.png")
    assert (entry.reference, entry.distortion, entry.level) == ("src_imgs/1600.png", "awgn", 2)
    assert entry.label == pytest.approx(0.44)
    assert {item.distortion for item in dataset.items} == {"awgn", "blur", "contrast", "fnoise", "jpeg", "jpeg2000"}


@only("csiq")
def test_csiq_says_how_to_save_its_spreadsheet(fake: Path) -> None:
    (fake / "csiq.DMOS.csv").rename(fake / "csiq.DMOS.xlsx")
    with pytest.raises(DatasetError, match=r"save its sheet all_by_image as csiq\.DMOS\.csv"):
        load("csiq", fake)


@only("tid2013")
def test_tid2013_matches_names_without_case(fake: Path) -> None:
    entry = item(load("tid2013", fake), "distorted_images/i02_08_5.bmp")
    assert (entry.reference, entry.distortion, entry.level) == ("reference_images/I02.BMP", "gaussian blur", 5)
    assert entry.label == 1.08


@only("kadid10k")
def test_kadid_dmos_is_better_when_higher_and_levels_are_as_published(fake: Path) -> None:
    dataset = load("kadid10k", fake)
    weak, strong = item(dataset, "images/I01_01_01.png"), item(dataset, "images/I01_01_05.png")
    assert (weak.quality, strong.quality) == (1, 0)
    assert (weak.level, weak.reference) == (1, "images/I01.png")
    assert weak.distortion == DISTORTIONS[1].name


@only("clive")
def test_clive_leaves_out_the_seven_practice_images(fake: Path) -> None:
    dataset = load("clive", fake)
    assert not any("training" in item.image for item in dataset.items)
    assert item(dataset, "Images/a9b.JPG").label == pytest.approx(92.4)
    assert item(dataset, "Images/3.bmp").label == pytest.approx(3.5 + 88.9 * 7 / 24)


@only("biq2021")
def test_biq2021_reads_both_label_files_with_their_empty_columns_and_other_case(fake: Path) -> None:
    dataset = load("biq2021", fake)
    assert item(dataset, "Images/ss01 (1).jpg").label == 0.1
    assert item(dataset, "Images/ss02 (7).JPG").label == pytest.approx(0.5)
    assert item(dataset, "Images/ss03 (10).jpg").quality == 1


@only("biq2021")
def test_biq2021_near_copies_share_a_reference(fake: Path) -> None:
    dataset = load("biq2021", fake)
    references = {item.image: item.reference for item in dataset.items if item.reference}
    assert references == {
        "Images/ss01 (1).jpg": "ss01 (1)",
        "Images/ss01 (2).jpg": "ss01 (1)",
        "Images/ss01 (9).jpg": "ss01 (9)",
        "Images/ss02 (3).jpg": "ss01 (9)",
        "Images/ss02 (4).jpg": "ss01 (9)",
    }


@only("biq2021")
def test_biq2021_with_a_label_that_is_missing_names_the_image(fake: Path) -> None:
    file = fake / "Test (Images and MOS).csv"
    file.write_text(file.read_text().replace("0.1250", ""))
    with pytest.raises(DatasetError, match=r"ss01 \(2\)\.jpg: a number was expected, not ''"):
        load("biq2021", fake)


def test_the_near_copies_of_biq2021_are_groups_of_different_images() -> None:
    groups = datasets.near_copies()
    names = [name for group in groups for name in group]
    assert len(groups) > 100
    assert min(map(len, groups)) > 1
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"ss0[123] \(\d+\)\.jpg", name) for name in names)


@only("koniq10k")
def test_koniq_says_which_labels_it_took(fake: Path) -> None:
    dataset = load("koniq10k", fake)
    entry = item(dataset, "1024x768/4.jpg")
    assert entry.label == pytest.approx(1.7)
    (fake / "koniq10k_scores_and_distributions.csv").unlink()
    shutil.rmtree(fake / "1024x768")
    dataset = load("koniq10k", fake)
    assert dataset.label_file == "koniq10k_distributions_sets.csv"
    assert item(dataset, "512x384/4.jpg").label == 20


@only("pipal")
def test_pipal_joins_its_folders_and_label_files(fake: Path) -> None:
    entry = item(load("pipal", fake), "Distortion_3/A0003_05_03.bmp")
    assert (entry.label, entry.reference, entry.distortion) == (1253, "Train_Ref/A0003.bmp", "05")
    assert entry.level is None


@only("tid2013")
def test_names_missing_references_and_wrong_names(fake: Path) -> None:
    (fake / "reference_images/I03.BMP").unlink()
    with pytest.raises(DatasetError, match=r"names 1 of 3 references that are missing or empty: i03\.bmp"):
        load("tid2013", fake)
    labels = fake / "mos_with_names.txt"
    labels.write_text(labels.read_text().replace("I01_01_1.bmp", "I01-01-1.bmp"))
    with pytest.raises(DatasetError, match=r"names 'i01-01-1\.bmp'"):
        load("tid2013", fake)
    labels.write_text("nan I01_01_1.bmp\n")
    with pytest.raises(DatasetError, match="a number was expected, not 'nan'"):
        load("tid2013", fake)


@only("kadid10k")
def test_refuses_labels_given_twice(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (fake / "dmos.csv").open("a") as stream:
        stream.write("I01_01_01.png,I01.png,3,0\n")
    monkeypatch.setitem(PUBLISHED, "kadid10k", dataclasses.replace(PUBLISHED["kadid10k"], images=376))
    with pytest.raises(DatasetError, match=r"labels some images twice: i01_01_01\.png"):
        load("kadid10k", fake)


def test_says_which_data_sets_there_are_and_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no data set 'imagenet'; known are live, csiq"):
        load("imagenet", tmp_path)
    with pytest.raises(DatasetError, match="nowhere is no folder"):
        load("live", tmp_path / "nowhere")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
@only("kadid10k")
def test_unreadable_folders_are_named(fake: Path) -> None:
    (fake / "images").chmod(0)
    with pytest.raises(DatasetError, match="images"):
        load("kadid10k", fake)


def own_csv(folder: Path, *lines: str) -> Path:
    for name in ("a.png", "b.png", "sub/c.png"):
        touch(folder / name)
    path = folder / "labels.csv"
    path.write_text("\n".join(lines), encoding="utf-8-sig")
    return path


def test_reads_any_csv(tmp_path: Path) -> None:
    path = own_csv(
        tmp_path,
        "image, score, reference, distortion, level",
        "./a.png, 1.5, sub/../b.png, blur, 2",
        "b.png, 9,,,",
        f'"{tmp_path}/sub/c.png", 4, content 7,,',
    )
    dataset = load_csv(path)
    assert [(item.image, item.quality, item.reference) for item in dataset.items] == [
        ("a.png", 0, "b.png"),
        ("b.png", 1, None),
        ("sub/c.png", pytest.approx(1 / 3), "content 7"),
    ]
    assert (dataset.items[0].distortion, dataset.items[0].level) == ("blur", 2)
    assert dataset.items[0].reference_path == tmp_path / "b.png"
    assert dataset.items[2].reference_path is None
    assert [item.quality for item in load_csv(path, lower_is_better=True).items] == pytest.approx([1, 0, 2 / 3])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image,mos", "a.png,1"], "no column 'score', only image, mos"),
        (["image,score", "a.png,1", "b.png"], "line 3 has 1 cells, the header has 2"),
        (["image,score", "a.png,good"], "image 1: a number was expected, not 'good'"),
        (["image,score", "a.png,nan"], "a number was expected"),
        (["image,score", "a.png,1", "d.png,2"], r"labels 1 images of 2 that are missing or empty: d\.png"),
        (
            ["image,score,reference", "a.png,1,e.png", "b.png,2,"],
            r"names 1 of 1 references that are missing or empty: e\.png",
        ),
        (["image,score", "a.png,1", f"{'long' * 999},2"], "image 2: File name too long"),
        (["image,score", "a.png,1", "./a.png,2"], r"twice: a\.png"),
        (["image,score", "a.png,1", "b.png,1"], "without any difference"),
        (["image,score"], "0 labels without any difference"),
        ([], "only nothing"),
    ],
    ids=["column", "cells", "text", "nan", "missing", "reference", "long", "twice", "constant", "empty", "nothing"],
)
def test_says_what_is_wrong_in_a_csv(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DatasetError, match=message):
        load_csv(own_csv(tmp_path, *lines))


def test_says_that_there_is_no_csv(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"nothing\.csv cannot be read: No such file"):
        load_csv(tmp_path / "nothing.csv")
