"""A power cut at any moment: what was not synced may be lost, torn or in another order, and no score is ever wrong.

The run's own calls are recorded: which bytes were synced, which names were given and taken, which folders were synced.
A disk is then made as it may look after a cut between any two calls, and the run goes on there.
"""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from diffiqa.errors import OutputError
from diffiqa.shards.api import carry_out, read_scores

from .stub import Inline, names, work_in

ENTRIES = names(7)


Call = tuple[str, Any, Any]


@dataclass
class Disk:
    """The calls that decide what a power cut leaves."""

    root: Path
    calls: list[Call] = field(default_factory=list)

    def record(self, patch: pytest.MonkeyPatch) -> None:
        fsync, replace = os.fsync, Path.replace

        def synced(descriptor: int) -> None:
            fsync(descriptor)
            path = Path(f"/proc/self/fd/{descriptor}").readlink()
            if path.is_dir():
                self.calls.append(("sync folder", path, None))
            else:
                self.calls.append(("sync file", path, path.read_bytes()))

        def renamed(source: Path, target: Path) -> Path:
            self.calls.append(("rename", Path(source), Path(target)))
            return replace(source, target)

        patch.setattr(os, "fsync", synced)
        patch.setattr(Path, "replace", renamed)

    def after(self, count: int, generator: random.Random, target: Path) -> None:
        """Make the folder as it may be found after a cut behind so many calls."""
        durable: dict[Path, bytes] = {}  # by the name under which it was written
        lasting: dict[Path, Path] = {}  # names that are sure to be there, and what they name
        loose: list[tuple[Path, Path]] = []
        for kind, path, more in self.calls[:count]:
            if kind == "sync file":
                durable[path] = more
            elif kind == "rename":
                loose.append((more, path))
            elif path == self.root:
                lasting.update(loose)
                loose.clear()
        # Each of these names may have reached the disk or not, in any order.
        lasting.update((name, source) for name, source in loose if generator.random() < 0.5)
        for name, source in lasting.items():
            whole = durable.get(source)
            if whole is None:  # a file that was named before its bytes were synced
                whole = generator.choice([b"", b'{"image": "00'])
            (target / name.name).write_bytes(whole)


def score(out: Path) -> None:
    crew = Inline(work_in(out, inline=True))
    carry_out(crew._work, ENTRIES, crew, shard_size=3)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Disk:
    root = tmp_path_factory.mktemp("disk") / "out"
    disk = Disk(root)
    with pytest.MonkeyPatch.context() as patch:
        disk.record(patch)
        score(root)
    return disk


def scores(out: Path) -> list[tuple[str, float | None]]:
    return [(record.image, record.score) for record in read_scores(out)]


def problems(disk: Disk, tmp_path: Path, seeds: int = 2) -> Iterator[str]:
    """Yield what goes wrong after a cut: a wrong score that is read, or files that differ at the end."""
    whole = scores(disk.root)
    for count in range(len(disk.calls) + 1):
        for seed in range(seeds):
            out = tmp_path / f"{count}-{seed}"
            out.mkdir()
            disk.after(count, random.Random(seed * 1000 + count), out)  # noqa: S311
            try:
                if scores(out) != whole:
                    yield f"cut {count}: wrong scores"
            except OutputError as exc:
                if "is not finished" not in str(exc):
                    yield f"cut {count}: {exc}"
            try:
                score(out)
            except OutputError as exc:
                yield f"cut {count}: cannot go on: {exc}"
                continue
            if scores(out) != whole or {path.name: path.read_bytes() for path in disk.root.glob("*l")} != {
                path.name: path.read_bytes() for path in out.glob("*l")
            }:
                yield f"cut {count}: other files"
            shutil.rmtree(out)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.usefixtures("no_waiting")
def test_after_a_power_cut_no_score_is_wrong_and_the_run_goes_on(recorded: Disk, tmp_path: Path) -> None:
    assert len(recorded.calls) > 25  # eight files and more: each synced, named, and its folder synced
    assert list(problems(recorded, tmp_path)) == []


def manifest_first(calls: list[Call]) -> list[Call]:
    named = [call[2].name if call[0] == "rename" else "" for call in calls]
    part, manifest = named.index("part-000000.json") - 1, named.index("manifest.json") - 1
    return [*calls[:part], *calls[manifest : manifest + 3], *calls[part:manifest], *calls[manifest + 3 :]]


FAULTS: dict[str, Callable[[list[Call]], list[Call]]] = {
    "no sync of files": lambda calls: [call for call in calls if call[0] != "sync file"],
    "no sync of folders": lambda calls: [call for call in calls if call[0] != "sync folder"],
    "manifest before shards": manifest_first,
}


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_replay_notices_a_call_that_is_missing_or_too_early(fault: str, recorded: Disk, tmp_path: Path) -> None:
    assert next(problems(Disk(recorded.root, FAULTS[fault](recorded.calls)), tmp_path), None)
