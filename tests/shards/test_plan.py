"""The plan: every name once, in order, in shards that can be read by themselves."""

import json
import random
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from diffiqa.errors import OutputError
from diffiqa.shards.part import Form
from diffiqa.shards.plan import NAMES, Entry, Plan, cut, read_entries, read_plan, write_plan
from diffiqa.shards.store import Folder


def planned(folder: Path, entries: list[Entry], shard_size: int) -> tuple[Folder, Plan]:
    store, scratch = Folder(folder), folder / "scratch"
    scratch.mkdir()
    names, file = cut(entries, shard_size, scratch)
    store.take(NAMES, file)
    plan = Plan(1, "e", "s", None, Form.JSONL, "b", names)
    write_plan(store, plan)
    return store, plan


@pytest.mark.parametrize("shard_size", [1, 7, 100, 1000])
def test_names_are_kept_once_in_their_order_whatever_they_are(tmp_path: Path, shard_size: int) -> None:
    generator = random.Random(shard_size)  # noqa: S311
    odd = ["a\nb.png", "\udcff.png", "ü.png", '"', "a#b", "[1]"]
    entries = [
        Entry(generator.choice([*odd, f"{generator.randrange(300)}.png"]), *generator.choice([(), (0, 5), (512, 9)]))
        for _ in range(700)
    ]
    first: dict[str, Entry] = {}
    for entry in entries:
        first.setdefault(entry.name, entry)
    expected = list(first.values())
    store, plan = planned(tmp_path, entries, shard_size)
    read = read_plan(store)
    assert read == plan
    assert plan.names.duplicates == 700 - len(expected) > 0
    shards = [read_entries(store, plan, index) for index in range(plan.names.shards)]
    assert [entry for shard in shards for entry in shard] == expected
    assert all(len(shard) == plan.names.in_shard(index) for index, shard in enumerate(shards))
    assert {len(shard) for shard in shards[:-1]} <= {shard_size}


def test_names_of_a_plan_that_were_changed_are_refused(tmp_path: Path) -> None:
    store, plan = planned(tmp_path, [Entry(f"{i}.png") for i in range(10)], 5)
    for damaged in (b"", b"[1, 2, 3, 4]\n" * 5, (tmp_path / NAMES).read_bytes()[:-4]):
        (tmp_path / NAMES).write_bytes(damaged)
        with pytest.raises(OutputError, match=r"names.jsonl was changed or is damaged \(shard 1\)"):
            read_entries(store, plan, 1)


@pytest.mark.parametrize("line", ["7", "null", '["1.png", "0", 5]', '["1.png", -1, 5]', '["1.png", 0]', "[" * 9999])
def test_names_that_are_none_are_refused(tmp_path: Path, line: str) -> None:
    store, plan = planned(tmp_path, [Entry("1.png")], 5)
    (tmp_path / NAMES).write_text(line + "\n")
    changed = replace(plan, names=replace(plan.names, starts=(0, len(line) + 1)))
    with pytest.raises(OutputError, match=r"names.jsonl was changed or is damaged \(shard 0\)"):
        read_entries(store, changed, 0)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 2}', "[" * 10_000])
def test_a_plan_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(OutputError, match=r"plan\.json is no plan of this version"):
        read_plan(Folder(tmp_path))


def test_memory_does_not_grow_with_the_names(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        folder = tmp_path / str(count)
        folder.mkdir()
        given: Iterator[Entry] = (Entry(f"photos/{number}.png") for number in range(count))
        tracemalloc.start()
        cut(given, 1000, folder)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    assert peak(40_000) < 1.5 * peak(10_000)


def test_plans_that_differ_say_in_what(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    _, plan = planned(tmp_path, [Entry("1.png"), Entry("2.png")], 5)
    _, other = planned(tmp_path / "a", [Entry("1.png")], 5)
    assert plan.difference(plan) == ""
    assert plan.difference(other) == "2 names, now 1 (or others)"
    assert plan.digest != other.digest
    assert json.loads((tmp_path / "plan.json").read_text())["names"]["count"] == 2
