"""What is recommended is the fastest that keeps scores; contenders here are made up, and so are their times."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffiqa.bench import recommend as module
from diffiqa.bench.cli import bench
from diffiqa.bench.contenders import Contender, Ground
from diffiqa.bench.peers import Answer, Out
from diffiqa.bench.recommend import Way, recommend
from diffiqa.engine.manifest import MANIFEST, Source, read_manifest
from diffiqa.engine.monotone import Monotone
from diffiqa.engine.sampling import Fast, Sampling
from diffiqa.errors import BackendError, UsageError
from diffiqa.runtime.backends import OnnxRuntime, OpenVino
from diffiqa.runtime.results import Options

FAST = Fast(Sampling((0, 2, 5)), Monotone((0.0,), (0.0,), slope_beyond=1), 40)


class Made:
    """Stands in for a process: OpenVINO halves the time; bf16 again, and moves scores further than a seed does."""

    cost = 1.0  # seconds of ONNX Runtime for a step

    def __init__(self, contender: Contender, log: Path, timeout: float) -> None:
        del contender, log, timeout

    def start(self, ground: Ground) -> None:
        if not isinstance(ground.backend, OnnxRuntime | OpenVino):
            raise Out("it is not here")
        self.backend = ground.backend

    def ask(self, _image: Path, options: Options) -> Answer:
        seconds, moved = (options.steps or 6) * self.cost, 0.0
        if isinstance(self.backend, OpenVino):
            seconds, moved = (seconds / 4, 0.1) if self.backend.precision == "bf16" else (seconds / 2, 1e-6)
        if (self.backend.threads or 4) < 4:
            seconds *= 2
        if options.fast:
            seconds, moved = seconds / 5, moved + 2e-3
        return Answer(0.5 + 0.01 * options.seed + moved, seconds, None)

    def leave(self) -> None: ...


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "Entrant", Made)
    monkeypatch.setattr(module, "available_cpus", lambda: 4)


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    """An engine with a fast sampling."""
    path = Path(shutil.copytree(tiny_engine, tmp_path / "an engine"))
    (path / MANIFEST).write_text(dataclasses.replace(read_manifest(path), fast=FAST).to_json())
    return path


def test_the_fastest_that_moves_scores_no_more_than_a_seed_is_recommended(engine: Path) -> None:
    found = recommend(engine, seconds=1e6)
    assert found.allowed == pytest.approx(0.01)
    assert found.best.way == Way(engine, OpenVino(), fast=True)
    assert found.best.way.line == f"iqa-run --engine '{engine}' --backend openvino --fast IMAGES"
    assert found.best.speed == pytest.approx(10)
    assert found.best.drift == pytest.approx(2e-3, rel=0.01)
    speeds = {trial.way.line: trial.speed for trial in found.trials}
    assert speeds[Way(engine, OnnxRuntime()).line] == 1
    assert speeds[Way(engine, OpenVino(precision="bf16")).line] == pytest.approx(4)  # shown, and not taken
    assert speeds[Way(engine, OpenVino(threads=2)).line] == pytest.approx(1)
    problems = {trial.way.backend.key: trial.problem for trial in found.trials if trial.problem}
    assert set(problems) == {"tensorrt", "inductor-gpu", "onnxruntime-gpu", "inductor"}
    assert set(problems.values()) == {"it is not here"}


def test_where_all_steps_take_too_long_few_are_compared_and_fast_sampling_counts_by_its_time(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Made, "cost", 1e6)
    found = recommend(engine, seconds=1e5)
    assert (found.steps, found.all_steps) == (3, 6)  # with fewer, two taps of the engine would be one
    assert found.best.way.fast
    assert found.best.speed == pytest.approx(10)
    assert found.best.drift is None


def test_forms_of_other_weights_and_a_reference_that_does_not_run_are_refused(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, m = tmp_path / "other", read_manifest(engine)
    shutil.copytree(engine, other)
    for path, digest in ((engine, "0"), (other, "1")):
        sources = (Source("model", "model.pt", 1, digest * 64, "a bundle"),)
        provenance = dataclasses.replace(m.provenance, sources=sources)
        (path / MANIFEST).write_text(dataclasses.replace(m, provenance=provenance).to_json())
    with pytest.raises(UsageError, match="other weights than"):
        recommend(engine, quantised=[other])

    def refuse(_self: Made, _ground: Ground) -> None:
        raise Out("it is not here")

    monkeypatch.setattr(Made, "start", refuse)
    with pytest.raises(BackendError, match="nothing to compare with: it is not here"):
        recommend(engine)


def test_the_command_prints_a_table_and_ends_in_the_line(engine: Path) -> None:
    done = CliRunner().invoke(bench, ["--engine", str(engine), "--recommend", "-q"])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == f"iqa-run --engine '{engine}' --backend openvino --fast IMAGES"
    assert "| 4.00× | 4.00–4.00 |" in done.stdout
    for options, message in (
        (["--recommend", "--rounds", "3"], "chooses by itself: leave out --rounds"),
        (["--quantised", "x"], "--quantised is for --recommend"),
    ):
        refused = CliRunner().invoke(bench, ["--engine", str(engine), *options])
        assert refused.exit_code == 2
        assert message in refused.stderr
