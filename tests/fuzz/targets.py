"""What is fuzzed: readers of untrusted files. `python -m diffiqa.tests.fuzz.targets NAME SECONDS FOLDER` fuzzes one.

An input is bytes. A reader may return, or raise an error of ours; anything else is a find, and so is an input that
takes more than a few seconds. FOLDER gets one file for each kind of find. A find is fixed, and gets a test beside the
reader's others.
"""

import contextlib
import functools
import hashlib
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from diffiqa.errors import DiffiqaError

from .seeds import SEEDS

SLOW = 5.0  # seconds that no input may take
Reader = Callable[[bytes, Path], object]  # bytes, and a file to put them into where the reader wants one


def _image(data: bytes, _file: Path) -> None:
    from diffiqa.runtime.images import read_image

    read_image(data, min_side=1, max_pixels=1_000_000)


def _manifest(data: bytes, file: Path) -> None:
    from diffiqa.engine.manifest import MANIFEST, read_manifest

    file.with_name(MANIFEST).write_bytes(data)
    read_manifest(file.parent)


def _self_test(data: bytes, _file: Path) -> None:
    from diffiqa.runtime.selftest import parse_self_test

    parse_self_test(data, Path("self-test.json"))


def _plan(data: bytes, file: Path) -> None:
    from diffiqa.export.precision import read_plan

    file.write_bytes(data)
    read_plan(file)


def _labels(data: bytes, file: Path) -> None:
    from diffiqa.data.datasets import load_csv

    file.write_bytes(data)
    load_csv(file, need_files=False)


def _weights(data: bytes, file: Path) -> None:
    from diffiqa.model.weightfile import read

    file.write_bytes(data)
    read(file)


def _pickle(data: bytes, file: Path) -> None:
    """A file of torch around a pickle: its checksum would stop what is changed inside."""
    from diffiqa.model.weightfile import read

    with zipfile.ZipFile(file, "w") as archive:
        for name, content in {
            "data.pkl": data,
            "byteorder": b"little",
            "version": b"3\n",
            "data/0": bytes(64),
            "data/1": bytes(64),
        }.items():
            archive.writestr(f"a/{name}", content)
    read(file)


def _shards_index(data: bytes, file: Path) -> None:
    from diffiqa.model.weightfile import read_index

    file.write_bytes(data)
    read_index(file)


def _options(data: bytes, file: Path) -> None:
    from diffiqa.model.options import read_options

    file.write_bytes(data)
    read_options(file)


def _prompts(data: bytes, file: Path) -> None:
    from diffiqa.model.pfd.prompts import read_prompts

    file = file.with_suffix(".npy")
    file.write_bytes(data)
    read_prompts(file)


def _statistics(data: bytes, file: Path) -> None:
    """The first line is the header, beside arrays that fit the seed's; or all is the file."""
    from diffiqa.calibration.statistics import NAME, read
    from diffiqa.engine.manifest import StageName

    file = file.with_name(f"{NAME}.npz")
    if data.startswith(b"{"):
        arrays = {f"{StageName.UNET}.{name}": array for name, array in _arrays().items()}
        np.savez(file, header=np.frombuffer(data, np.uint8), **arrays)
    else:
        file.write_bytes(data)
    read(file.parent)


@functools.cache
def _arrays() -> dict[str, Any]:
    from diffiqa.calibration.statistics import StageStatistics

    return {name: array for name, array in vars(StageStatistics.empty(("a",), 1)).items() if name != "tensors"}


def _records(data: bytes, file: Path) -> None:
    """A file, or the journal beside it, that a run goes on with: what it leaves holds what it found."""
    from diffiqa.runtime.command.recordfile import RecordFile, read_records
    from diffiqa.runtime.command.records import Format
    from diffiqa.tests.runtime.command.test_recordfile import SETTINGS

    form, suffix = [
        (Format.JSONL, ""),
        (Format.CSV, ""),
        (Format.JSON, ""),
        (Format.CSV, ".partial"),
        (Format.JSON, ".partial"),
    ][data[0] % 5 if data else 0]
    for old in file.parent.iterdir():
        old.unlink()
    file.with_name(file.name + suffix).write_bytes(data[1:])
    with RecordFile(file, form, SETTINGS, resume=True) as resumed:
        resumed.finish()
    left = {record.image: record.score for record in read_records(file, form)}
    assert left == {name: record.score for name, record in resumed.done.items()}


def _shard_plan(data: bytes, file: Path) -> None:
    """The first line is the plan, the rest are the names."""
    from diffiqa.shards.api import status
    from diffiqa.shards.driver import find_done
    from diffiqa.shards.plan import NAMES, PLAN, read_entries, read_plan
    from diffiqa.shards.store import Folder

    plan_text, _, names = data.partition(b"\n")
    store = Folder(file.parent)
    for name, content in {PLAN: plan_text, NAMES: names, "progress.json": names, "part-000000.json": names}.items():
        (file.parent / name).write_bytes(content)
    status(file.parent)
    plan = read_plan(store)
    assert plan is not None
    find_done(store, plan, lambda _: None)
    for shard in range(min(plan.names.shards, 9)):
        for entry in read_entries(store, plan, shard):
            assert isinstance(entry.name, str)
            assert {type(entry.start), type(entry.size)} <= {int, type(None)}


def _shard(data: bytes, file: Path) -> None:
    """A shard whose hash is right."""
    from diffiqa.shards.part import Shard, read_shard
    from diffiqa.shards.store import Folder

    name = "part-000000." + ("parquet" if data.startswith(b"PAR1") else "jsonl")
    (file.parent / name).write_bytes(data)
    read_shard(Folder(file.parent), Shard(name, hashlib.sha256(data).hexdigest(), 1, 0))


def _request(data: bytes, _file: Path) -> None:
    _site().answer(data)


@functools.cache
def _site() -> Any:
    from diffiqa.tests.fuzz.site import Site

    return Site()


TARGETS: dict[str, Reader] = {
    "image": _image,
    "manifest": _manifest,
    "self-test": _self_test,
    "plan": _plan,
    "labels": _labels,
    "weights": _weights,
    "pickle": _pickle,
    "index of shards": _shards_index,
    "options": _options,
    "prompts": _prompts,
    "statistics": _statistics,
    "records": _records,
    "shard plan": _shard_plan,
    "shard": _shard,
    "request": _request,
}


def tried(read: Reader, data: bytes, file: Path, finds: Path) -> None:
    """Give a reader an input; write down what should not be."""
    start = time.monotonic()
    kind = text = ""
    try:
        read(data, file)
    except DiffiqaError as exc:
        kind = "" if str(exc).strip() else "silent"
    except Exception as exc:
        place = traceback.extract_tb(exc.__traceback__)[-1]
        kind, text = f"{type(exc).__name__} {place.filename}:{place.lineno}", traceback.format_exc()
    if not kind and time.monotonic() - start > SLOW:
        kind = "slow"
    found = finds / f"{'slow' if kind == 'slow' else 'traceback'}-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
    if kind and not found.with_suffix(".txt").exists():
        found.with_suffix(".txt").write_text(f"{kind}\n{text}", encoding="utf-8")
        found.with_suffix(".bin").write_bytes(data)


def main() -> None:
    """Fuzz one target."""
    import atheris

    name, seconds, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    finds, corpus = folder / "finds", folder / "corpus"
    for needed in (finds, corpus):
        needed.mkdir(parents=True, exist_ok=True)
    read = TARGETS[name]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as work:  # noqa: S108
        file = Path(work) / "input"
        if name == "pickle":
            from torch._weights_only_unpickler import Unpickler

            atheris.instrument_func(Unpickler.load)
        with atheris.instrument_imports(include=["diffiqa"]), contextlib.suppress(DiffiqaError):
            read(b"", file)  # imports what it needs
        for number, seed in enumerate(SEEDS[name]()):
            (corpus / str(number)).write_bytes(seed)
        options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-timeout=60", "-rss_limit_mb=4096"]
        options += ["-max_len=20000", f"-artifact_prefix={finds}/", "-verbosity=1"]
        atheris.Setup([sys.argv[0], str(corpus), *options], lambda data: tried(read, data, file, finds))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
