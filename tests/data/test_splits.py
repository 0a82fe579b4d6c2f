import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from diffiqa.data.datasets import Dataset, Item
from diffiqa.data.splits import Split, split_by_content
from diffiqa.errors import DatasetError


def fake(contents: int, each: int = 4, *, references: bool = True) -> Dataset:
    items = tuple(
        Item(
            image=f"{content:03}_{index}.png",
            path=Path(f"{content:03}_{index}.png"),
            label=index,
            quality=index / each,
            reference=f"{content:03}.png" if references else None,
        )
        for content in range(contents)
        for index in range(each)
    )
    return Dataset("fake", Path("somewhere"), "labels.csv", 0, each, items)


@pytest.mark.parametrize(("contents", "seed"), [(3, 0), (25, 1)])
def test_no_reference_is_in_two_parts_and_no_image_is_lost(contents: int, seed: int) -> None:
    dataset = fake(contents)
    split = split_by_content(dataset, seed)
    parts = {part: split.items(dataset, part) for part in split.parts}
    assert list(parts) == ["train", "validation", "test"]
    for one, other in itertools.combinations(parts.values(), 2):
        assert {item.reference for item in one}.isdisjoint(item.reference for item in other)
    assert sorted(item.image for items in parts.values() for item in items) == [item.image for item in dataset.items]
    assert all(parts.values())


def test_shares_count_references() -> None:
    cases: list[tuple[int, dict[str, float], list[int]]] = [
        (81, {"train": 0.8, "test": 0.2}, [64, 17]),  # KADID-10k as in the literature
        (81, {"train": 0.7, "validation": 0.1, "test": 0.2}, [56, 8, 17]),
        (30, {"train": 0.7, "validation": 0.1, "test": 0.2}, [21, 3, 6]),  # 0.7 · 30 is 20.999… in floats
        (25, {"train": 0.8, "test": 0.2}, [20, 5]),
        (3, {"train": 0.7, "validation": 0.1, "test": 0.2}, [1, 1, 1]),
        (4, {"train": 0.1, "validation": 0.1, "test": 0.8}, [1, 1, 2]),
    ]
    for contents, ratios, sizes in cases:
        split = split_by_content(fake(contents), 0, ratios)
        assert [len(names) for names in split.parts.values()] == sizes


def test_the_same_seed_draws_the_same_split_whatever_the_order_of_images() -> None:
    dataset = fake(30)
    shuffled = dataclasses.replace(dataset, items=dataset.items[::-1])
    assert split_by_content(dataset, 1) == split_by_content(shuffled, 1)
    assert split_by_content(dataset, 1).parts != split_by_content(dataset, 2).parts
    # The draw is part of the format: another one would turn yesterday's test images into training images.
    assert split_by_content(fake(6), 0, {"a": 0.5, "b": 0.5}).parts["a"] == ("000.png", "001.png", "003.png")


def test_images_without_reference_are_split_one_by_one() -> None:
    dataset = fake(10, 1, references=False)
    split = split_by_content(dataset, 0)
    assert sorted(itertools.chain(*split.parts.values())) == [item.image for item in dataset.items]


def test_a_reference_that_is_scored_itself_goes_with_its_copies() -> None:
    dataset = fake(5)
    pristine = [dataclasses.replace(dataset.items[0], image=f"{i:03}.png", reference=None) for i in range(5)]
    dataset = dataclasses.replace(dataset, items=(*dataset.items, *pristine))
    split = split_by_content(dataset, 0, {"train": 0.6, "test": 0.4})
    for part in split.parts:
        names = {item.image for item in split.items(dataset, part)}
        assert all(f"{name[:3]}.png" in names for name in names)


def test_refuses_what_cannot_be_split() -> None:
    with pytest.raises(DatasetError, match="fake shows 1 different reference, too few for 3 parts"):
        split_by_content(fake(1), 0)
    with pytest.raises(DatasetError, match="shows 2 different references, too few for 3 parts"):
        split_by_content(fake(2), 0)


@pytest.mark.parametrize("ratios", [{}, {"train": 1.0}, {"a": 0.5, "b": 0.6}, {"a": 1.2, "b": -0.2}])
def test_refuses_shares_that_do_not_add_up(ratios: dict[str, float]) -> None:
    with pytest.raises(DatasetError, match="add up to 1"):
        split_by_content(fake(9), 0, ratios)


def test_a_split_survives_its_file(tmp_path: Path) -> None:
    split = split_by_content(fake(9), 7)
    split.write(tmp_path / "split.json")
    assert Split.read(tmp_path / "split.json") == split
    assert [path.name for path in tmp_path.iterdir()] == ["split.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": {"train": ["a", "b"], "test": ["b"]}}, "has b in 'train' and again in 'test'"),
        ({"parts": {"train": ["a", "a"]}}, "again in 'train'"),
        ({"parts": {"train": ["a"], "test": []}}, "nothing in part 'test'"),
        ({"parts": {"train": "abc"}}, "must be a list"),
        ({"schema_version": 2}, "format 2"),
        ({"extra": 1}, "unknown entries: 'extra'"),
    ],
    ids=["leak", "twice", "empty", "type", "version", "unknown"],
)
def test_refuses_a_damaged_split(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "split.json"
    split_by_content(fake(9), 7).write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DatasetError, match=message):
        Split.read(path)


def test_says_that_a_split_cannot_be_read_or_written(tmp_path: Path) -> None:
    (tmp_path / "split.json").write_text('{"data')
    with pytest.raises(DatasetError, match=r"split\.json cannot be read"):
        Split.read(tmp_path / "split.json")
    with pytest.raises(DatasetError, match=r"none\.json cannot be read"):
        Split.read(tmp_path / "none.json")
    with pytest.raises(DatasetError, match="cannot be written: No such file"):
        split_by_content(fake(9), 7).write(tmp_path / "missing/split.json")


def test_refuses_another_data_set() -> None:
    split = split_by_content(fake(9), 7)
    with pytest.raises(DatasetError, match=r"2 of its contents are new and 0 are gone, such as 009\.png"):
        split.items(fake(11), "train")
    with pytest.raises(DatasetError, match=r"0 of its contents are new and 1 are gone, such as 008\.png"):
        split.items(fake(8), "train")
    with pytest.raises(DatasetError, match="no part 'val', only train, validation, test"):
        split.items(fake(9), "val")


def test_refuses_a_split_that_leaks_and_names_the_pair() -> None:
    items = [
        dataclasses.replace(item, reference="scene") if index < 2 else item
        for index, item in enumerate(fake(4, 1).items)
    ]
    dataset = dataclasses.replace(fake(4, 1), items=tuple(items))
    leaking = Split("fake", None, {"train": ("000_0.png", "002.png"), "test": ("001_0.png", "003.png")})
    with pytest.raises(DatasetError, match=r"leaks: 000_0\.png in 'train' and 001_0\.png in 'test' show the same"):
        leaking.items(dataset, "train")
