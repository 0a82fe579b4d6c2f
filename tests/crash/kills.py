"""Commands that are killed at random moments, by kill -9, and what is left then."""

import dataclasses
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import onnx

from diffiqa.engine.manifest import MANIFEST, check_file, open_engine, read_manifest
from diffiqa.export import engine as exporting
from diffiqa.model.checkpoint import Loaded
from diffiqa.model.network import build
from diffiqa.runtime.backends import OnnxRuntime
from diffiqa.runtime.command.api import Outputs, score_names
from diffiqa.runtime.command.recordfile import read_records
from diffiqa.runtime.command.records import Format
from diffiqa.runtime.results import Options
from diffiqa.runtime.scorer import load

from ..tiny import TINY

# A process that starts others by fork, with all this imported and without threads.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__])


@dataclass
class Kills:
    """What came of it."""

    kills: int = 0
    reported: int = 0  # records, or engines
    lost: int = 0  # of those that were reported
    half: int = 0  # files that were neither old nor new

    def __bool__(self) -> bool:
        """Whether nothing was lost or halved."""
        return not self.lost and not self.half


def _killed(target: Callable[..., None], arguments: tuple[Any, ...], after: float | None) -> tuple[bool, list[str]]:
    """Run a function in a process of its own, and kill it after so many seconds. Return whether, and what it sent."""
    here, there = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=target, args=(there, *arguments))
    process.start()
    there.close()
    told: list[str] = []
    due = None if after is None else time.monotonic() + after
    killed = False
    while True:
        try:
            if here.poll(None if due is None or killed else max(0.0, due - time.monotonic())):
                word = here.recv()
                if word == "begin" and after is not None:  # what comes before is Python
                    due = time.monotonic() + after
                else:
                    told.append(word)
            elif not killed and process.pid:
                os.kill(process.pid, signal.SIGKILL)
                killed = True
        except EOFError:
            break
    process.join()
    return process.exitcode == -signal.SIGKILL, told


def _run(pipe: Connection, engine: Path, images: list[str], file: Path) -> None:
    with load(engine, OnnxRuntime(threads=1)) as scorer:
        pipe.send("begin")
        outputs = Outputs(file=file, form=Format.JSONL, resume=True)
        score_names(scorer, images, Options(crops=1), outputs, watch=lambda record, _kept: pipe.send(record.image))


def kill_runs(engine: Path, images: list[str], work: Path, times: int, seed: int = 0) -> Kills:
    """Kill runs and continue them, so many times; what is left must hold all that was reported."""
    draw, found = random.Random(seed), Kills()  # noqa: S311 — not for secrets
    start = time.monotonic()
    _killed(_run, (engine, images, work / "whole.jsonl"), None)
    whole, length = _scores(work / "whole.jsonl"), time.monotonic() - start
    number = 0
    while found.kills < times:
        file = work / f"{number}.jsonl"
        number += 1
        done = False
        while not done:
            killed, told = _killed(_run, (engine, images, file), draw.uniform(0, length / 3))
            found.kills += killed
            found.reported += len(told)
            left = _scores(file) if file.exists() else {}
            found.lost += sum(left.get(name) != whole[name] for name in told)
            done = not killed
        found.half += left != whole
    return found


def _scores(file: Path) -> dict[str, tuple[float | None, str | None]]:
    return {record.image: (record.score, record.digest) for record in read_records(file, Format.JSONL)}


def _export(pipe: Connection, tiny: Path, target: Path, number: int) -> None:
    """Export, with stages that are copied and not converted: the time goes into files."""
    graphs = {stage.name: (tiny / stage.file.path).read_bytes() for stage in read_manifest(tiny).stages}

    def export_graph(plan: Any, path: Path, _alignment: int) -> onnx.ModelProto:
        path.write_bytes(graphs[plan.name])
        return onnx.ModelProto()

    changed: Any = exporting
    changed.export_graph, changed.count_macs = export_graph, lambda *_: 1
    changed.compare_with_pytorch = lambda *_, **__: ()
    changed.write_self_test = lambda *_: None
    loaded = Loaded(build(TINY, seed=1), (), (str(number),))
    pipe.send("begin")
    exporting.export_engine(loaded, target, force=True)
    pipe.send(str(number))


def kill_exports(tiny: Path, work: Path, times: int, seed: int = 0) -> Kills:
    """Kill exports over an engine, so many times; the old one or the new one must be there, whole."""
    draw = random.Random(seed)  # noqa: S311 — not for secrets
    found, target = Kills(), work / "engine"
    _killed(_export, (tiny, target, 0), None)
    start = time.monotonic()
    _killed(_export, (tiny, target, 1), None)
    length, last, number = time.monotonic() - start, 1, 1
    while found.kills < times:
        number += 1
        killed, told = _killed(_export, (tiny, target, number), draw.uniform(0, length / 2))
        found.kills += killed
        found.reported += len(told)
        if not (target / MANIFEST).exists():
            found.lost += 1
            continue
        try:
            directory = open_engine(target)
            for stage in directory.manifest.stages:
                check_file(target, stage.file)
            there = int(directory.manifest.provenance.notes[0])
        except Exception:
            found.half += 1
            continue
        found.lost += there < last or (bool(told) and there != number)
        last = there
    return found


def as_dict(found: Kills) -> dict[str, int]:
    """Return it as JSON values."""
    return dataclasses.asdict(found)
