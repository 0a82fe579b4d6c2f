"""A run to its end, whatever workers do: one file for each shard, the same bytes, and one manifest."""

import hashlib
import json
import resource
import threading
from pathlib import Path
from typing import Any

import pytest

from diffiqa.errors import BackendError, OutputError, UsageError
from diffiqa.runtime.command.records import Record, Status
from diffiqa.shards.api import MANIFEST, Manifest, carry_out, read_scores, status
from diffiqa.shards.part import Form, Shard, from_bytes, read_shard, to_bytes
from diffiqa.shards.store import Folder

from .stub import Inline, names, work_in


def run(out: Path, entries: Any, kill: Any = (), **options: Any) -> tuple[Manifest, Inline]:
    rules = {name: options.pop(name) for name in list(options) if name in RULES}
    crew = Inline(work_in(out, inline=True, **options), kill)
    return carry_out(crew._work, entries, crew, shard_size=4, **rules), crew


RULES = ("form", "max_failure_rate", "retry_failed", "watch", "say", "max_pixels")


def files(out: Path) -> dict[str, bytes]:
    """The results: no side files, no progress."""
    shown = (*out.glob("part-*l"), *out.glob("part-*.parquet"), out / MANIFEST, out / "names.jsonl", out / "plan.json")
    return {path.name: path.read_bytes() for path in shown}


@pytest.mark.parametrize("form", list(Form))
def test_a_run_scores_every_name_and_reads_back_in_order(tmp_path: Path, form: Form) -> None:
    if form is Form.PARQUET:
        pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    done, _ = run(tmp_path / "out", names(10), form=form)
    records = list(read_scores(tmp_path / "out"))
    assert [record.image for record in records] == [entry.name for entry in names(10)]
    assert all(0 <= (record.score or -1) <= 1 and record.status is Status.OK for record in records)
    assert {(record.backend, record.seconds) for record in records} == {("stub 1", None)}
    assert (done.records, done.failed, [shard.records for shard in done.shards]) == (10, 0, [4, 4, 2])
    assert b"stub 1" not in b"".join(data for name, data in files(tmp_path / "out").items() if name.startswith("part"))


@pytest.mark.parametrize("form", list(Form))
def test_a_shard_gives_back_words_notes_and_errors(form: Form) -> None:
    if form is Form.PARQUET:
        pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    same: dict[str, Any] = {"engine": "e", "settings": "crops=4"}
    words = {"distortions": {"blur": 0.25, "größe": 0.75}, "levels": {"bad": 1.0}}
    records = [
        Record(image="a.png", status=Status.OK, score=0.5, notes=("one", "two"), probabilities=words, **same),
        Record(image="b.png", status=Status.ERROR, error="an empty file", **same),
    ]
    assert from_bytes(to_bytes(records, form), form) == records


def test_the_second_run_does_nothing_and_changes_nothing(tmp_path: Path) -> None:
    run(tmp_path, names(10))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != "progress.json"}
    _, crew = run(tmp_path, names(10))
    assert crew.asked == []
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("kill", [{1}, {1, 2, 3}, {2, 4, 6}, {3, 4}, {2, 3, 4, 6, 7}])
def test_workers_that_die_change_nothing(tmp_path: Path, kill: set[int]) -> None:
    run(tmp_path / "whole", names(10))
    run(tmp_path / "killed", names(10), kill)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_an_image_that_kills_three_workers_is_a_failure_and_the_others_are_scored(tmp_path: Path) -> None:
    run(tmp_path / "whole", names(10))
    done, crew = run(tmp_path / "out", names(10, lethal=5))
    whole, records = list(read_scores(tmp_path / "whole")), list(read_scores(tmp_path / "out"))
    assert records[5].image == "00005-lethal.png"
    assert records[5].error == "00005-lethal.png: 3 workers died while they scored it"
    assert records[:5] + records[6:] == whole[:5] + whole[6:]
    assert done.failed == 1
    assert crew.asked.count(("one", 1, 1)) == 3


def test_workers_that_always_die_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="6 workers died one after the other"):
        run(tmp_path, names(10), range(100))
    assert not (tmp_path / MANIFEST).exists()


def test_failed_images_are_tried_again_alone(tmp_path: Path) -> None:
    out, broken = tmp_path / "out", tmp_path / "broken"
    broken.touch()
    done, _ = run(out, names(10, bad=6), broken=broken)
    first = files(out)
    assert done.failed == 1
    broken.unlink()
    assert run(out, names(10, bad=6), broken=broken)[0] == done  # not without being asked
    again, crew = run(out, names(10, bad=6), broken=broken, retry_failed=True)
    assert [asked[:2] for asked in crew.asked] == [("shard", 1)]
    assert again.failed == 0
    assert again.shards[1].file == "part-000001.1.jsonl"
    assert {name: data for name, data in files(out).items() if name in first and name != MANIFEST} == {
        name: data for name, data in first.items() if name != MANIFEST
    }
    run(tmp_path / "whole", names(10, bad=6))
    assert list(read_scores(out)) == list(read_scores(tmp_path / "whole"))


def test_a_death_while_failures_are_tried_again_keeps_the_scores(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    run(tmp_path / "out", names(10, bad=6), broken=broken)
    broken.unlink()
    done, crew = run(tmp_path / "out", names(10, bad=6), {1, 3}, broken=broken, retry_failed=True)
    assert done.failed == 0
    assert crew.asked[-1][0] == "commit"
    run(tmp_path / "whole", names(10, bad=6))
    assert list(read_scores(tmp_path / "out")) == list(read_scores(tmp_path / "whole"))


def test_too_many_failures_end_the_run_without_a_manifest(tmp_path: Path) -> None:
    out, broken = tmp_path / "out", tmp_path / "broken"
    broken.touch()
    with pytest.raises(OutputError, match=r"1 of 10 images failed, more than --max-failure-rate 0.05 allows.*part-0"):
        run(out, names(10, bad=1), broken=broken, max_failure_rate=0.05)
    with pytest.raises(OutputError, match="the run is not finished"):
        read_scores(out)
    broken.unlink()
    assert run(out, names(10, bad=1), broken=broken, retry_failed=True, max_failure_rate=0.05)[0].failed == 0


def test_names_that_come_again_are_scored_once_and_counted(tmp_path: Path) -> None:
    said: list[str] = []
    done, _ = run(tmp_path, [*names(5), *names(3)], say=said.append)
    assert (done.records, done.duplicates) == (5, 3)
    assert said == ["3 names were given more than once: each is scored once"]


def test_another_plan_is_refused_and_the_difference_named(tmp_path: Path) -> None:
    run(tmp_path, names(10), max_pixels=5)
    with pytest.raises(OutputError, match=r"was begun with 10 names, now 9 \(or others\); use those again"):
        run(tmp_path, names(9), max_pixels=5)
    with pytest.raises(OutputError, match="was begun with max pixels 5, now 6"):
        run(tmp_path, names(10), max_pixels=6)
    crew = Inline(work_in(tmp_path, inline=True))
    with pytest.raises(OutputError, match="was begun with shards of 4, now of 5"):
        carry_out(crew._work, names(10), crew, shard_size=5, max_pixels=5)
    with pytest.raises(UsageError, match="no images found"):
        run(tmp_path / "empty", [])


def test_a_worker_with_another_backend_is_refused(tmp_path: Path) -> None:
    run(tmp_path, names(10))
    (tmp_path / "part-000001.jsonl").unlink()
    plan = json.loads((tmp_path / "plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps(plan | {"backend": "stub 0"}))
    with pytest.raises(BackendError, match="a worker runs stub 1, but the plan was begun with stub 0"):
        run(tmp_path, names(10))


def test_a_shard_that_was_changed_is_refused_by_readers_and_scored_again_by_the_next_run(tmp_path: Path) -> None:
    run(tmp_path, names(10))
    whole, file = list(read_scores(tmp_path)), tmp_path / "part-000001.jsonl"
    file.write_bytes(file.read_bytes().replace(b"00006", b"00007"))
    with pytest.raises(OutputError, match=r"part-000001.jsonl was changed since it was written"):
        list(read_scores(tmp_path))
    said: list[str] = []
    run(tmp_path, names(10), say=said.append)
    assert said == ["part-000001.jsonl was changed since it was written: not used"]
    assert list(read_scores(tmp_path)) == whole
    (tmp_path / "part-000002.jsonl").unlink()
    with pytest.raises(OutputError, match=r"part-000002.jsonl is missing"):
        list(read_scores(tmp_path))


def test_a_shard_of_no_records_is_refused(tmp_path: Path) -> None:
    store = Folder(tmp_path)
    for data in (b"{}\n", b"[" * 9999 + b"\n", b"\xff\n"):
        store.write("part-000000.jsonl", data)
        with pytest.raises(OutputError, match=r"part-000000.jsonl holds no records of diffiqa"):
            read_shard(store, Shard("part-000000.jsonl", hashlib.sha256(data).hexdigest(), 1, 0))


def test_shards_that_are_done_are_read_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a bucket a request takes long, and there may be a hundred thousand."""
    run(tmp_path, names(8))
    both, alone = threading.Barrier(2), Folder.read

    def slow(self: Folder, name: str, start: int = 0, end: int | None = None) -> bytes | None:
        if name.startswith("part-") and name.endswith(".jsonl"):
            both.wait(10)
        return alone(self, name, start, end)

    monkeypatch.setattr(Folder, "read", slow)
    _, crew = run(tmp_path, names(8))
    assert crew.asked == []


def test_files_of_late_attempts_are_not_read(tmp_path: Path) -> None:
    run(tmp_path, names(10))
    whole = list(read_scores(tmp_path))
    for name in ("part-000003.jsonl", "part-000001.7.jsonl", "part-x.jsonl"):
        (tmp_path / name).write_text("late")
    assert list(read_scores(tmp_path)) == whole
    run(tmp_path, names(10))
    assert list(read_scores(tmp_path)) == whole


def test_status_tells_what_is_done_at_any_time(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="has no plan"):
        status(tmp_path)
    seen = []

    def watch(_: object) -> None:
        seen.append(status(tmp_path))

    broken = tmp_path / "broken"
    broken.touch()
    run(tmp_path, names(10, bad=1), watch=watch, broken=broken)
    assert not seen[0].finished
    after = status(tmp_path)
    assert (after.total, after.done, after.failed, after.left, after.finished) == (10, 10, 1, 0, True)


@pytest.mark.parametrize("limit", [100, 1200], ids=["while names are found", "in a shard"])
def test_a_disk_that_is_full_ends_the_run_and_the_next_one_goes_on(tmp_path: Path, limit: int) -> None:
    out, limits = tmp_path / "out", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot use .*: File too large; mend this and give the command again"):
            run(out, names(10))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = {path.name for path in out.iterdir()}
    assert ("plan.json" in left) == (limit == 1200)
    assert not left & {MANIFEST, "part-000000.jsonl"}
    assert not [name for name in left if name.startswith(".")]
    run(out, names(10))
    run(tmp_path / "whole", names(10))
    assert files(out) == files(tmp_path / "whole")


def test_an_error_of_who_watches_is_not_the_folders(tmp_path: Path) -> None:
    """Such as a pipe that nobody reads any more: `iqa-run` then ends quietly."""

    def watch(_: object) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(tmp_path, names(10), watch=watch)


def test_only_one_run_at_a_time(tmp_path: Path) -> None:
    refused = []

    def watch(_: object) -> None:
        with pytest.raises(OutputError, match="another run is writing") as caught:
            run(tmp_path, names(10))
        refused.append(str(caught.value))

    run(tmp_path, names(10), watch=watch)
    assert refused
