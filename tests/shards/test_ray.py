"""Workers on a Ray cluster: those of a made-up one always, those of a real one where Ray is installed."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import diffiqa
from diffiqa.cli import main
from diffiqa.errors import BackendError, OutputError, UsageError
from diffiqa.shards.api import carry_out
from diffiqa.shards.on_ray import Actors

from ..tiny import photo
from .kills import results
from .stub import Inline, Killed, names, work_in


class GoneError(Exception):
    """What Ray raises for a call to an actor that is gone."""


class MadeUpRay:
    """As much of Ray as we call. Calls run at once; `deaths` says which find their actor gone."""

    def __init__(self, deaths: set[int], **resources: float) -> None:
        self.exceptions = SimpleNamespace(RayActorError=GoneError, RayTaskError=GoneError, ObjectLostError=GoneError)
        self.deaths, self.resources, self.calls, self.alive = deaths, resources, 0, 0
        self.needs: dict[str, Any] = {}
        self.answers: dict[int, Any] = {}

    def is_initialized(self) -> bool:
        return False

    def init(self, **given: Any) -> None:
        self.given = given

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def remote(self, kind: type) -> Any:
        def options(**needs: Any) -> Any:
            self.needs = needs
            return SimpleNamespace(remote=make)

        def make(*arguments: Any) -> Any:
            self.alive += 1
            actor = kind(*arguments)
            return SimpleNamespace(**{name: self._method(getattr(actor, name)) for name in ("open", "call")})

        return SimpleNamespace(options=options)

    def _method(self, method: Any) -> Any:
        def call(*arguments: Any) -> int:
            self.calls += 1
            try:
                self.answers[self.calls] = GoneError() if self.calls in self.deaths else method(*arguments)
            except Killed:
                self.answers[self.calls] = GoneError()
            return self.calls

        return SimpleNamespace(remote=call)

    def wait(self, refs: list[int], timeout: float) -> tuple[list[int], list[int]]:
        assert refs
        assert timeout > 0
        if -1 in self.deaths:
            raise ConnectionError("the head is gone")
        return refs[:1], refs[1:]

    def get(self, ref: int) -> Any:
        answer = self.answers.pop(ref)
        if isinstance(answer, GoneError):
            raise answer
        return answer

    def kill(self, _: Any) -> None:
        self.alive -= 1

    def shutdown(self) -> None:
        self.ended = True


def made_up(monkeypatch: pytest.MonkeyPatch, deaths: set[int], **resources: float) -> MadeUpRay:
    ray = MadeUpRay(deaths, **resources)
    monkeypatch.setitem(sys.modules, "ray", ray)
    return ray


@pytest.mark.parametrize("deaths", [set[int](), {1, 2}, {3}, {3, 5, 9, 12}])
def test_actors_that_die_change_nothing(deaths: set[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = made_up(monkeypatch, deaths, CPU=4.0)
    for place, kind in ((tmp_path / "ray", Actors), (tmp_path / "here", Inline)):
        work = work_in(place, inline=True)
        crew: Any = Actors(work, 2, "local") if kind is Actors else Inline(work)
        carry_out(work, names(30, lethal=7), crew, shard_size=4)
    assert results(tmp_path / "ray") == results(tmp_path / "here")
    assert ray.ended
    assert ray.given["object_store_memory"] == 100 * 2**20
    assert ray.alive == 0
    assert ray.needs == {"num_cpus": 2, "max_restarts": 0, "max_task_retries": 0}


def test_a_gpu_for_each_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = made_up(monkeypatch, set(), CPU=32.0, GPU=4.0)
    assert Actors(work_in(tmp_path), None, "auto").slots == 4
    assert (ray.needs["num_gpus"], ray.given["address"]) == (1.0, "auto")
    assert Actors(work_in(tmp_path), 8, "auto").slots == 8
    assert ray.needs["num_gpus"] == 0.5


def test_errors_of_workers_and_of_the_cluster_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_up(monkeypatch, {-1}, CPU=1.0)
    work = work_in(tmp_path / "a", inline=True)
    with pytest.raises(BackendError, match="the Ray cluster is gone; give the command again once it is back"):
        carry_out(work, names(5), Actors(work, 1, "local"), shard_size=4)
    made_up(monkeypatch, set(), CPU=1.0)

    monkeypatch.setattr("diffiqa.shards.worker.read_entries", _damaged)
    with pytest.raises(OutputError, match="the names were changed"):
        carry_out(work, names(5), Actors(work, 1, "local"), shard_size=4)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"--ray needs a package: pip install 'diffiqa\[ray\]'"):
        Actors(work, 1, "local")


def _damaged(*_: Any) -> None:
    raise OutputError("the names were changed")


def test_the_class_for_pipelines_scores_names_bytes_and_arrays(
    tiny_engine: Path, tmp_path: Path, scorer: diffiqa.Scorer
) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(photo(1, 40, 48)).save(path)
    expected = scorer.score(path).score
    score = diffiqa.ray.Scorer(tiny_engine, diffiqa.OnnxRuntime())
    given = np.array([str(path), "none.png", path.read_bytes(), photo(1, 40, 48), "ftp://a/b.png", None], object)
    out = score({"image": given, "id": np.arange(6)})
    assert out["score"][[0, 2, 3]].tolist() == [expected] * 3
    assert np.isnan(out["score"][[1, 4, 5]]).all()
    assert [bool(error) for error in out["error"]] == [False, True, False, False, True, True]
    assert out["id"].tolist() == [0, 1, 2, 3, 4, 5]


real = pytest.mark.minutes  # one cluster for all of these


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A small cluster of this machine, as another program would find it by its address."""
    ray: Any = pytest.importorskip("ray", reason="the extra ray is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        settings = {"object_store_memory": 100 * 2**20, "include_dashboard": False, "logging_level": "ERROR"}
        try:
            ray.init(num_cpus=2, **settings)
        except Exception:  # it waits for its node 30 s, and the first one on a machine may take longer
            ray.shutdown()
            ray.init(num_cpus=2, **settings)
        yield ray
        ray.shutdown()


def without_ray(out: Path, count: int) -> dict[str, bytes]:
    work = work_in(out, inline=True)
    carry_out(work, names(count), Inline(work), shard_size=50)
    return results(out)


@real
def test_an_actor_that_is_killed_changes_nothing(cluster: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    work = work_in(out, seconds=0.01)
    with ThreadPoolExecutor() as pool:
        killed = pool.submit(kill_an_actor_of, out)
        carry_out(work, names(400), Actors(work, 2, "local"), shard_size=50)
    assert killed.result()
    assert cluster.is_initialized()  # it was there before
    assert results(out) == without_ray(tmp_path / "here", 400)


def kill_an_actor_of(out: Path) -> bool:
    """Kill an actor once two shards are done."""
    wait_for_shards(out, 2)
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # processes come and go
            if file.read_bytes().startswith(b"ray::_Actor"):
                os.kill(int(file.parent.name), signal.SIGKILL)
                return True
    return False


def wait_for_shards(out: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(list(out.glob("part-*.jsonl"))) < count and time.monotonic() < deadline:
        time.sleep(0.02)


@real
def test_a_driver_that_is_killed_goes_on_where_it_was(cluster: Any, tmp_path: Path) -> None:
    out, address = tmp_path / "out", cluster.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "diffiqa.tests.shards.kills", out, "400", "0.01", "--ray", address]
    driver = subprocess.Popen(command)
    wait_for_shards(out, 3)
    driver.kill()
    driver.wait()
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*.jsonl")}
    assert 3 <= len(before) < 8
    assert not (out / "manifest.json").exists()
    subprocess.run(command, check=True)
    assert results(out) == without_ray(tmp_path / "here", 400)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # only the others were scored


@real
@pytest.mark.usefixtures("cluster")
def test_iqa_run_on_ray_scores_as_without(tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for index in range(5):
        Image.fromarray(photo(index, 40, 48)).save(f"{index}.png")
    for out, more in (("ray", ["--ray", "local", "--workers", "2"]), ("here", [])):
        run = CliRunner().invoke(
            main, ["run", "--engine", str(tiny_engine), ".", "--shards", out, "--shard-size", "2", *more]
        )
        assert run.exit_code == 0, run.output
    assert results(Path("ray")) == results(Path("here"))


@real
@pytest.mark.usefixtures("cluster")
def test_an_engine_that_no_actor_can_open_ends_the_run_with_the_reason(tiny_engine: Path, tmp_path: Path) -> None:
    """An actor whose constructor fails would end the job without one."""
    Image.fromarray(photo(1, 40, 48)).save(tmp_path / "a.png")
    with pytest.raises(BackendError, match=r"no NVIDIA GPU|needs a package"):
        diffiqa.run_shards(tiny_engine, tmp_path, tmp_path / "out", diffiqa.TensorRt(), ray="local")


@real
@pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
def test_a_pipeline_of_ray_data_scores_names_and_bytes(cluster: Any, tiny_engine: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(photo(1, 40, 48)).save(path)
    given = [{"image": str(path)}, {"image": str(tmp_path / "none.png")}, {"image": str(path)}]
    found = cluster.data.from_items(given).map_batches(
        diffiqa.ray.Scorer,
        fn_constructor_args=(str(tiny_engine),),
        compute=cluster.data.ActorPoolStrategy(size=1),
        batch_size=2,
    )
    rows = sorted(found.take_all(), key=lambda row: str(row["error"]))
    assert [row["score"] for row in rows[:2]] == [diffiqa.score(tiny_engine, path).records[0].score] * 2
    assert np.isnan(rows[2]["score"])
    assert rows[2]["error"] == f"{tmp_path}/none.png: no such file"
