"""After a failure or power cut at any change of the disk, nothing is lost that was reported, and nothing is half.

`disk.py` is the disk. What computes is left out: stages are copied, scores are made up.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from diffiqa.calibration import quantise, statistics
from diffiqa.engine.manifest import (
    MANIFEST,
    Library,
    Manifest,
    Precision,
    StageName,
    check_file,
    open_engine,
    read_manifest,
)
from diffiqa.errors import DiffiqaError, EngineError
from diffiqa.export import builds
from diffiqa.export import engine as exporting
from diffiqa.export.stages import stage_plans
from diffiqa.model.checkpoint import Loaded
from diffiqa.runtime.command import recordfile
from diffiqa.runtime.command.api import Outputs, score_names
from diffiqa.runtime.command.records import Format, Record
from diffiqa.runtime.results import Mode, Options, Score
from diffiqa.runtime.scorer import Scorer
from diffiqa.training import loop
from diffiqa.training.config import Optimisation, Reporting, RestoreConfig

from ..runtime.command.test_recordfile import held
from ..runtime.fake_results import fake_manifest
from ..tiny import TINY
from .disk import Disk, cut_at

Act = Callable[[Path], object]
Check = Callable[[Path, bool], object]  # of a folder, and whether the command had ended
Everywhere = Callable[[Path, Act, Act, Check], int]


@pytest.fixture
def at_every_change(record_property: Callable[[str, object], None]) -> Everywhere:
    """`cut_and_fail`; the number of changes goes into the report that figures/crashes.py reads."""

    def run(work: Path, begin: Act, act: Act, check: Check) -> int:
        count = cut_and_fail(work, begin, act, check)
        record_property("changes", count)
        return count

    return run


def cut_and_fail(work: Path, begin: Act, act: Act, check: Check) -> int:
    """Cut the power at every change that `act` makes to a folder, and let every change fail; return how many.

    `check` gets every folder that may be left. It may change it, and so try what a user does next.
    """
    root = work / "root"

    def fresh() -> Path:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
        begin(root)
        return root

    whole = Disk(fresh())
    with whole:
        act(root)
    for _, folder in whole.survivors(work / "left"):
        check(folder, True)
    for n in range(1, whole.count + 1):
        disk = Disk(fresh(), n)
        with cut_at(disk):
            act(root)
        assert disk.count == n, f"ended before change {n} of {whole.log}"
        for form, folder in disk.survivors(work / "left"):
            try:
                check(folder, False)
            except BaseException as exc:
                raise AssertionError(f"power cut at change {n}, {disk.log[-1]!r}; {form} is left") from exc
        with Disk(fresh(), n, power_cut=False) as failing:
            try:
                act(root)
                ended = True
            except DiffiqaError:
                ended = False
        try:
            check(root, ended)
        except BaseException as exc:
            raise AssertionError(f"change {n}, {failing.log[n - 1]!r}, failed") from exc
    return whole.count


class Stub(Scorer):
    """A scorer whose scores are made up."""

    def __init__(self) -> None:
        super().__init__(fake_manifest(), {}, backend="stub")

    def stream(self, images: Any, *_: Any, **__: Any) -> Any:
        for image in images:
            made: dict[str, Any] = dict.fromkeys(["vcg", "vda", "spread"])
            made |= {"width": 8, "height": 8, "mode": Mode.WHOLE, "seeds": (0,), "crops": (), "notes": ()}
            made |= {"digest": "d", "engine": self.manifest.engine_id, "backend": "stub", "seconds": 1.0}
            yield Score(str(image), int(image.stem) / 8, **made)

    def digest(self, image: Any) -> str:
        return "d"


def score(folder: Path, form: Format, *, resume: bool, told: list[str] | None = None) -> None:
    """Score four images into a file; `told` receives the names that are reported."""
    outputs = Outputs(file=folder / "scores", form=form, resume=resume)

    def watch(record: Record, _kept: bool) -> None:
        if told is not None:
            told.append(record.image)

    with Stub() as scorer:
        score_names(scorer, [f"{i}.png" for i in range(4)], Options(), outputs, watch=watch)


@pytest.fixture(autouse=True)
def every_record_is_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is by policy, unless that takes over 2 % of the time."""
    monkeypatch.setattr(recordfile, "SYNC_PAUSE", 0)


@pytest.mark.parametrize("earlier", ["nothing", "half", "finished"])
@pytest.mark.parametrize("form", [Format.JSONL, Format.CSV, Format.JSON])
def test_run_and_resume(form: Format, earlier: str, tmp_path: Path, at_every_change: Everywhere) -> None:
    done = tmp_path / "done"
    done.mkdir()
    score(done, form, resume=False)
    expected = (done / "scores").read_bytes()
    told: list[str] = []

    def begin(root: Path) -> None:
        if earlier == "half":  # killed inside the third line
            lines = (done / "lines").read_bytes() if (done / "lines").exists() else b""
            name = "scores" if form is Format.JSONL else "scores.partial"
            (root / name).write_bytes(lines[: len(lines) * 5 // 8])
        if earlier == "finished":
            (root / "scores").write_bytes(expected)
        told[:] = {"nothing": [], "half": ["0.png", "1.png"], "finished": [f"{i}.png" for i in range(4)]}[earlier]

    def check(folder: Path, ended: bool) -> None:
        found = {record.image for record in held(folder / "scores", form)}
        assert found >= set(told)
        assert not ended or (folder / "scores").read_bytes() == expected
        score(folder, form, resume=True)
        assert (folder / "scores").read_bytes() == expected
        assert {path.name for path in folder.iterdir()} <= {"scores", "scores.new"}

    lines = tmp_path / "lines"
    lines.mkdir()
    score(lines, Format.JSONL, resume=False)
    shutil.copy(lines / "scores", done / "lines")
    count = at_every_change(
        tmp_path / "work", begin, lambda root: score(root, form, resume=earlier != "nothing", told=told), check
    )
    assert count >= 5 if earlier != "finished" else count >= 1


@pytest.fixture
def quick_export(
    tiny_engine: Path, tiny_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Path], tuple[Manifest, Any]]:
    """An export that copies its stages."""
    manifest = read_manifest(tiny_engine)
    graphs = {stage.name: (tiny_engine / stage.file.path).read_bytes() for stage in manifest.stages}

    def export_graph(plan: Any, path: Path, _alignment: int) -> onnx.ModelProto:
        path.write_bytes(graphs[plan.name])
        return onnx.ModelProto()

    plans = list(stage_plans(tiny_loaded.model))  # once: merging takes most of such an export's time
    monkeypatch.setattr(exporting, "stage_plans", lambda _model: plans)
    monkeypatch.setattr(exporting, "export_graph", export_graph)
    monkeypatch.setattr(exporting, "count_macs", lambda *_: 1)
    monkeypatch.setattr(exporting, "compare_with_pytorch", lambda *_, **__: ())
    monkeypatch.setattr(exporting, "write_self_test", lambda work, *_: (work / "self-test.json").write_text("{}"))
    return lambda root: exporting.export_engine(tiny_loaded, root / "engine", force=True)


def old_engine(tiny_engine: Path, root: Path) -> None:
    """Put an engine in place that can be told from a new one."""
    shutil.copytree(tiny_engine, root / "engine")
    manifest = read_manifest(root / "engine")
    provenance = dataclasses.replace(manifest.provenance, notes=("old",))
    (root / "engine" / MANIFEST).write_text(dataclasses.replace(manifest, provenance=provenance).to_json())


def is_old(engine: Path) -> bool:
    """Return which engine is there; raise if it is neither."""
    assert (engine / "self-test.json").stat().st_size > 0
    return open_engine(engine).manifest.provenance.notes[:1] == ("old",)


@pytest.mark.parametrize("replaces", [False, True])
def test_export(
    replaces: bool,
    quick_export: Callable[[Path], Any],
    tiny_engine: Path,
    tmp_path: Path,
    at_every_change: Everywhere,
) -> None:
    tries = itertools.count()

    def check(folder: Path, ended: bool) -> None:
        there = (folder / "engine").exists()
        assert there or not (replaces or ended)
        if there:
            old = is_old(folder / "engine")
            assert not (ended and old)
        if next(tries) % 7 == 0:
            quick_export(folder)
            assert not is_old(folder / "engine")
            assert [path.name for path in folder.iterdir()] == ["engine"]

    at_every_change(tmp_path, lambda root: old_engine(tiny_engine, root) if replaces else None, quick_export, check)


def test_export_where_names_cannot_change_places(
    quick_export: Callable[[Path], Any],
    tiny_engine: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at_every_change: Everywhere,
) -> None:
    """The old engine may then be away for a moment. The next export brings it back, or replaces it."""
    monkeypatch.setattr("diffiqa.tests.crash.disk._EXCHANGE", lambda *_: False)

    def check(folder: Path, ended: bool) -> None:
        places = [folder / name for name in ("engine", ".engine.previous")]
        old = is_old(next(place for place in places if place.exists()))
        assert not (ended and old)

    at_every_change(tmp_path, lambda root: old_engine(tiny_engine, root), quick_export, check)


def test_quantise_in_place(
    tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_every_change: Everywhere
) -> None:
    def write_stage(directory: Any, stage: Any, _statistics: Any, _recipe: Any, file: Path, _say: Any) -> Any:
        file.write_bytes(directory.file(stage.file).read_bytes())
        report = quantise.StageQuantisation(stage.name, stage.file.sha256, (), (), ())
        return quantise.QuantisedStage(stage, stage.file.bytes, report)

    found = SimpleNamespace(digest="0", samples=(), stages=dict.fromkeys(StageName))
    monkeypatch.setattr(quantise, "read_fitting", lambda *_: found)
    monkeypatch.setattr(quantise, "write_stage", write_stage)
    monkeypatch.setattr(quantise, "load_stages", lambda *_: {})
    monkeypatch.setattr(quantise, "write_self_test", lambda work, *_, **__: (work / "self-test.json").write_text("{}"))
    (tmp_path / f"{statistics.NAME}.npz").touch()

    def act(root: Path) -> None:
        quantise.quantise_engine(root / "engine", root / "engine", tmp_path, quantise.Recipe(), force=True)

    def check(folder: Path, ended: bool) -> None:
        is_old(folder / "engine")
        new = len(read_manifest(folder / "engine").provenance.notes) == 2
        assert new or not ended
        assert not new or (folder / "engine" / "calibration" / "quantisation.json").stat().st_size > 0

    at_every_change(tmp_path / "work", lambda root: old_engine(tiny_engine, root), act, check)


@pytest.mark.parametrize("again", [False, True])
def test_build(
    again: bool, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_every_change: Everywhere
) -> None:
    monkeypatch.setattr(builds, "cast", lambda model, *_: model)
    monkeypatch.setattr(builds, "compare_cast", lambda *_: ())
    options = builds.BuildOptions(Library.ONNXRUNTIME, Precision.FP16)
    ready = tmp_path / "ready"
    shutil.copytree(tiny_engine, ready)
    manifest = read_manifest(ready)
    small = tuple(stage for stage in manifest.stages if stage.name in {StageName.UNET, StageName.VDA})
    (ready / MANIFEST).write_text(dataclasses.replace(manifest, stages=small).to_json())
    for stage in manifest.stages:
        if stage not in small:  # two show what four do
            (ready / stage.file.path).unlink()
    if again:
        builds.build_engines(ready, options)

    def act(root: Path) -> None:
        builds.build_engines(root / "engine", options, force=True)

    def check(folder: Path, ended: bool) -> None:
        directory = open_engine(folder / "engine")
        listed = directory.manifest.builds
        assert listed or not (again or ended)
        try:
            for entry in (entry for build in listed for entry in build.files):
                check_file(directory.path, entry)
        except EngineError:  # one that is made again may be away: then it is refused, and a build mends it
            assert again
            assert not ended
        builds.build_engines(folder / "engine", options)
        (build,) = read_manifest(folder / "engine").builds
        for entry in build.files:
            check_file(directory.path, entry)

    at_every_change(tmp_path / "work", lambda root: shutil.copytree(ready, root / "engine"), act, check)


def test_calibrate(tmp_path: Path, at_every_change: Everywhere) -> None:
    def made(value: int) -> statistics.Statistics:
        stage = statistics.StageStatistics.empty(("a", "b"), 2)
        stage.histogram[...] = value
        return statistics.Statistics(f"{value:016}", (), {StageName.UNET: stage})

    def check(folder: Path, ended: bool) -> None:
        found = statistics.read(folder)
        number = int(found.engine)
        assert number in ({2} if ended else {1, 2})
        assert (found.stages[StageName.UNET].histogram == number).all()

    at_every_change(
        tmp_path, lambda root: statistics.write(made(1), root), lambda root: statistics.write(made(2), root), check
    )


class Line:
    """A task of two weights."""

    kind = "restore"

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network: nn.Module = nn.Linear(2, 1)

    def fingerprint(self) -> str:
        return "data"

    def groups(self) -> list[tuple[float, list[nn.Parameter]]]:
        return [(1.0, list(self.network.parameters()))]

    def train_mode(self) -> None:
        self.network.train()

    def sample(self, step: int, index: int) -> loop.Sample:
        return loop.Sample((np.array([step / 4, index + 1], np.float32),), f"{step}")

    def losses(self, network: Callable[..., Any], batch: Sequence[torch.Tensor]) -> torch.Tensor:
        (inputs,) = batch
        losses: torch.Tensor = (network(inputs)[:, 0] - 1).square()
        return losses

    def validate(self, _machine: loop.Machine) -> loop.Verdict:
        weight = float(self.network.weight[0, 0])  # type: ignore[index]
        return loop.Verdict({"weight": weight}, quality=weight)


def test_train(tmp_path: Path, at_every_change: Everywhere) -> None:
    plan = Optimisation(steps=3, batch=1, learning_rate=0.1)
    config = RestoreConfig(
        model=TINY, seed=1, optimisation=plan, reporting=Reporting(log_every=1, checkpoint_every=1), validate_every=2
    )
    machine = loop.Machine(torch.device("cpu"))

    def train(folder: Path) -> loop.Result:
        return loop.train(Line(), config, folder, machine, loop.Conduct(resume=True, threads=1))

    def rows(folder: Path, name: str) -> list[str]:
        lines = (folder / name).read_text().splitlines()
        return [line.rpartition(",")[0] if name == loop.LOG else line for line in lines]  # without the seconds

    expected = train(tmp_path / "done")

    def check(folder: Path, ended: bool) -> None:
        file = folder / loop.CHECKPOINT
        assert not ended or file.exists()
        if file.exists():
            assert loop.read_checkpoint(file)["step"] >= (3 if ended else 1)
        result = train(folder)
        assert all(torch.equal(result.weights[name], value) for name, value in expected.weights.items())
        for name in (loop.LOG, loop.VALIDATION):
            assert rows(folder, name) == rows(tmp_path / "done", name)

    at_every_change(tmp_path / "work", lambda _root: None, train, check)
