"""Workers that are processes: their number changes nothing, and neither does a kill -9 of any of them."""

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

import diffiqa
from diffiqa.cli import main
from diffiqa.runtime.selftest import SELF_TEST
from diffiqa.shards.api import carry_out
from diffiqa.shards.plan import Entry
from diffiqa.shards.processes import Processes, gpus

from ..tiny import photo
from .kills import kill_at_random, results, workers_of
from .stub import Inline, names, work_in


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(7):
        Image.fromarray(photo(index, 40, 48)).save(folder / f"{index}.png")
    (folder / "6.png").rename(folder / "6\n.png")
    (folder / "broken.jpg").write_bytes(b"no picture")
    return folder


def call(*arguments: str | Path, stdin: str = "") -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)


def test_scores_are_those_of_a_plain_run_for_any_number_of_workers(tiny_engine: Path, photos: Path) -> None:
    expected = diffiqa.score(tiny_engine, "photos", diffiqa.OnnxRuntime()).records
    done = diffiqa.run_shards(tiny_engine, "photos", "two", diffiqa.OnnxRuntime(), shard_size=3, workers=2)
    assert [replace(record, seconds=None) for record in expected] == list(diffiqa.read_scores("two"))
    run = call(
        "run", "--engine", tiny_engine, "photos", "--shards", "one", "--shard-size", "3", "--backend", "onnxruntime"
    )
    assert run.exit_code == 1  # as for a plain run: some failed
    assert "7 scored, 1 failed · 3 shards in one" in run.stderr
    assert results(Path("one")) == results(Path("two"))
    assert done.failed == 1
    status = call("status", "one")
    assert (status.exit_code, status.stdout) == (0, "8 of 8 done, 1 failed, 0 left\nfinished\n")


def test_a_list_on_standard_input_and_a_picture_that_vanishes(tiny_engine: Path, photos: Path) -> None:
    listed = "photos/1.png\nphotos/gone.png\nphotos/1.png\n"
    run = call("run", "--engine", tiny_engine, "-", "--shards", "out", stdin=listed)
    assert run.exit_code == 1
    assert "1 names were given more than once" in run.stderr
    there, gone = diffiqa.read_scores("out")
    assert there.score is not None
    assert gone.error == "photos/gone.png: no such file"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--shards", "out", "-o", "x.csv"], "--output is not for --shards"),
        (["--shards", "out", "--resume"], "--resume is not for --shards"),
        (["--shards", "out", "--device", "1"], "--device is not for --shards"),
        (["--retry-failed"], "--retry-failed is for --shards OUT"),
        (["--shards", "ftp://a/b"], "shards go to a folder or a bucket"),
        (["--shards", "no/such/place"], "cannot use no/such/place: No such file or directory"),
        (["--shards", "photos/0.png"], "cannot use photos/0.png: File exists"),
        (["--shards", "out", "https://example.com/a.png"], "allow such names with --http public"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    tiny_engine: Path, photos: Path, options: list[str], why: str
) -> None:
    run = call("run", "--engine", tiny_engine, "photos", *options)
    assert run.exit_code == 2
    assert why in run.stderr
    assert not Path("out/manifest.json").exists()


def test_an_engine_that_no_worker_can_open_ends_the_run(tiny_engine: Path, photos: Path) -> None:
    run = call("run", "--engine", tiny_engine, "photos", "--shards", "out", "--backend", "tensorrt")
    assert run.exit_code == 2
    assert run.stderr.startswith("error: ")
    assert "Traceback" not in run.stderr
    assert not Path("out/plan.json").exists()


def test_an_engine_that_fails_its_self_test_scores_nothing(tiny_engine: Path, photos: Path) -> None:
    file = Path(shutil.copytree(tiny_engine, "engine")) / SELF_TEST
    test = json.loads(file.read_text())
    test["pictures"][0]["answers"]["score"] += 1000
    file.write_text(json.dumps(test))
    arguments = "run", "--engine", "engine", "photos/0.png", "--shards", "out"
    run = call(*arguments)
    assert run.exit_code == 2
    assert "does not give the model's answers here" in run.stderr
    assert not Path("out/plan.json").exists()
    assert call(*arguments, "--no-self-test").exit_code == 0


def test_an_image_that_kills_processes_is_found(tmp_path: Path) -> None:
    work = work_in(tmp_path / "out")
    done = carry_out(work, names(6, lethal=4), Processes(work, 2), shard_size=3)
    errors = [record.error for record in diffiqa.read_scores(tmp_path / "out")]
    assert errors == [None] * 4 + ["00004-lethal.png: 3 workers died while they scored it", None]
    assert done.failed == 1


def test_random_kills_of_workers_and_driver_leave_the_same_files(tmp_path: Path) -> None:
    work = work_in(tmp_path / "whole", inline=True)
    carry_out(work, names(400), Inline(work), shard_size=50)
    hit = kill_at_random([tmp_path / "killed", "400", "0.02"], kills=4, longest=2.0, seed=3)
    assert hit["worker"]
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def test_workers_end_with_their_driver(tmp_path: Path) -> None:
    driver = subprocess.Popen([sys.executable, "-m", "diffiqa.tests.shards.kills", tmp_path / "out", "100000", "0.1"])
    while not (workers := workers_of(driver.pid)) or not (tmp_path / "out" / "plan.json").exists():
        time.sleep(0.05)
        assert driver.poll() is None
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)


def test_an_interrupted_run_ends_its_workers(tmp_path: Path) -> None:
    def interrupted() -> Iterator[Entry]:
        yield from names(3)
        raise KeyboardInterrupt

    work = work_in(tmp_path)
    crew = Processes(work, 2)
    with pytest.raises(KeyboardInterrupt):
        carry_out(work, interrupted(), crew, shard_size=5)
    assert multiprocessing.active_children() == []


def test_the_gpus_that_workers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5,")
    assert gpus() == ["2", "GPU-5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert gpus() == []
