"""Images from a bucket and shards in one, on a server of this machine that speaks S3."""

import json
import math
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from diffiqa.errors import OutputError
from diffiqa.shards import store as store_module
from diffiqa.shards.api import carry_out, read_scores, run_shards, status
from diffiqa.shards.sources import entries, read
from diffiqa.shards.store import LOCK, Bucket, open_store

from .kills import results
from .stub import Inline, names, work_in


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    for package in ("s3fs", "moto", "flask"):
        pytest.importorskip(package, reason=f"{package} is not installed; pip install s3fs 'moto[server]'")
    from moto.server import ThreadedMotoServer

    running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*running.get_host_and_port()))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield "s3://bucket"
    running.stop()


@pytest.fixture
def bucket(server: str) -> Any:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    if fs.exists("bucket"):
        fs.rm("bucket", recursive=True)
    fs.mkdir("bucket")
    return fs


def files(fs: Any, prefix: str) -> dict[str, bytes]:
    found = {path.rpartition("/")[2]: fs.cat_file(path) for path in fs.find(prefix)}
    kept = {"plan.json", "manifest.json"}
    return {name: data for name, data in found.items() if name.endswith(".jsonl") or name in kept}


def test_a_run_in_a_bucket_writes_what_a_run_in_a_folder_writes(bucket: Any, tmp_path: Path) -> None:
    for place in (tmp_path / "out", Bucket("s3://bucket/out")):
        work = work_in(place, inline=True)
        crew = Inline(work, {2})
        carry_out(work, names(10), crew, shard_size=4)
    assert files(bucket, "bucket/out") == results(tmp_path / "out")
    assert list(read_scores("s3://bucket/out/")) == list(read_scores(tmp_path / "out"))
    assert status("s3://bucket/out").finished
    assert not bucket.exists(f"bucket/out/{LOCK}")
    carry_out(work, names(10), crew, shard_size=4)


def test_a_late_attempt_does_not_replace_a_shard(bucket: Any) -> None:
    store = open_store("s3://bucket/out")
    store.create("part-000000.jsonl", b"first")
    store.create("part-000000.jsonl", b"first")
    with pytest.raises(OutputError, match=r"part-000000.jsonl is there with other bytes"):
        store.create("part-000000.jsonl", b"second")
    assert store.read("part-000000.jsonl") == b"first"
    assert store.read("part-000000.jsonl", 1, 3) == b"ir"
    assert store.read("none") is None
    assert store.names() == {"part-000000.jsonl"}


def test_a_bucket_is_held_by_one_run_and_taken_over_from_a_dead_one(
    bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(store_module, "DEAD_SECONDS", 1.0)
    store = open_store("s3://bucket/out")
    with store.held(), pytest.raises(OutputError, match="another run is writing s3://bucket/out"), store.held():
        pass
    for host, pid in [(socket.gethostname(), 2**22 + 1), ("another", os.getpid())]:
        bucket.pipe_file(f"bucket/out/{LOCK}", json.dumps({"owner": "x", "host": host, "pid": pid}).encode())
        begun = time.monotonic()
        with store.held():
            assert json.loads(store.read(LOCK) or b"")["pid"] == os.getpid()
        assert (time.monotonic() - begun >= 1.0) == (host == "another")


@pytest.mark.usefixtures("server")
def test_a_bucket_that_is_not_there_is_named() -> None:
    work = work_in(open_store("s3://nowhere/out"), inline=True)
    with pytest.raises(OutputError, match="cannot use s3://nowhere/out"):
        carry_out(work, names(3), Inline(work), shard_size=2)


@pytest.mark.parametrize("when", ["at the start", "after a shard"])
def test_a_bucket_without_rights_is_named_and_the_run_goes_on_once_there_are_some(
    bucket: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(store_module, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(store_module, "DEAD_SECONDS", 1.0)  # its lock stays, and this process lives

    def close(*_: object) -> None:
        monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)  # who asks is nobody it knows

    work = work_in(open_store("s3://bucket/out"), inline=True)
    if when == "at the start":
        close()
    with pytest.raises(OutputError, match=r"cannot use s3://bucket/out\S*: .*; mend this and give the command again"):
        carry_out(work, names(9), Inline(work), shard_size=2, watch=close)
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", math.inf)
    assert bool(bucket.glob("bucket/out/part-*.jsonl")) == (when == "after a shard")
    assert not bucket.exists("bucket/out/manifest.json")
    for place in (Bucket("s3://bucket/out"), tmp_path / "out"):
        work = work_in(place, inline=True)
        carry_out(work, names(9), Inline(work), shard_size=2)
    assert files(bucket, "bucket/out") == results(tmp_path / "out")


def test_images_of_a_bucket(bucket: Any, tiny_engine: Path, tmp_path: Path) -> None:
    import io
    import tarfile

    from PIL import Image

    from ..tiny import photo

    pictures = []
    for index in range(3):
        stream = io.BytesIO()
        Image.fromarray(photo(index, 40, 48)).save(stream, "PNG")
        pictures.append(stream.getvalue())
        bucket.pipe_file(f"bucket/in/{index}.png", pictures[-1])
        (tmp_path / f"{index}.png").write_bytes(pictures[-1])
    bucket.pipe_file("bucket/in/notes.md", b"no image")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        info = tarfile.TarInfo("x.png")
        info.size = len(pictures[2])
        tar.addfile(info, io.BytesIO(pictures[2]))
    bucket.pipe_file("bucket/in/a.tar", stream.getvalue())
    given = [
        "s3://bucket/in/",
        "s3://bucket/in/[02].png",
        "s3://bucket/in/a.tar",
        "s3://bucket/none/",
        "s3://bucket/x.png",
    ]
    found = [entry.name for entry in entries(given)]
    assert found == [
        *(f"s3://bucket/in/{index}.png" for index in (0, 1, 2, 0, 2)),
        "s3://bucket/in/a.tar#x.png",
        "s3://bucket/none/",
        "s3://bucket/x.png",
    ]
    assert read(next(entries(["s3://bucket/in/a.tar"]))) == pictures[2]
    done = run_shards(tiny_engine, given, "s3://bucket/out", shard_size=2)
    records = {record.image: record for record in read_scores("s3://bucket/out")}
    assert (done.records, done.failed, done.duplicates) == (6, 2, 2)
    run_shards(tiny_engine, tmp_path, tmp_path / "out")
    assert [record.score for record in read_scores(tmp_path / "out")] == [
        records[f"s3://bucket/in/{index}.png"].score for index in range(3)
    ]
    assert records["s3://bucket/in/a.tar#x.png"].score == records["s3://bucket/in/2.png"].score
    assert records["s3://bucket/x.png"].error == "s3://bucket/x.png: cannot be read (no such file)"
