"""The loop: the same curve after a kill, checkpoints that appear whole, and what stops a run."""

import csv
import dataclasses
import math
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffiqa.data.draws import Purpose, generator
from diffiqa.errors import CheckpointError, ConfigError, OutputError, UsageError
from diffiqa.training.config import Optimisation, Precision, Reporting, differences, digest
from diffiqa.training.loop import (
    Average,
    Conduct,
    Sample,
    TrainingError,
    learning_rate,
    open_machine,
    read_checkpoint,
    save_checkpoint,
    train,
)
from diffiqa.training.restore import RestoreTask

from .runs import CPU, SEPARABLE, restore_config, run, task_of, write_photos

Curve = list[tuple[str, str, str]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_photos(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="module")
def whole(photos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    run(restore_config(), photos, folder)
    return folder


def curve(folder: Path) -> Curve:
    """Return the log without its column of seconds, as text: digits that differ would show."""
    with (folder / "log.csv").open() as file:
        return [(row["step"], row["loss"], row["learning_rate"]) for row in csv.DictReader(file)]


def same_end(one: Path, other: Path) -> bool:
    a, b = (read_checkpoint(folder / "checkpoint.pt") for folder in (one, other))
    tensors = [(a[part][name], b[part][name]) for part in ("network", "average") for name in a[part]]
    return all(torch.equal(x, y) for x, y in tensors)


def test_a_run_killed_at_any_step_goes_on_to_the_same_curve(photos: list[Path], whole: Path, tmp_path: Path) -> None:
    kill_after = random.Random(os.environ.get("DIFFIQA_KILL_SEED", "7")).randint(4, 10)  # noqa: S311
    command = [sys.executable, "-m", "diffiqa.tests.training.runs", str(tmp_path), str(photos[0].parent)]
    process = subprocess.Popen(command)
    log = tmp_path / "log.csv"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > kill_after):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    saved = read_checkpoint(tmp_path / "checkpoint.pt")["step"]
    steps: list[int] = []
    task = task_of(restore_config(), photos, tmp_path / "cache")
    train(task, restore_config(), tmp_path, CPU, Conduct(resume=True, progress=lambda step, *_: steps.append(step)))
    assert steps == list(range(saved + 1, 13))
    assert curve(tmp_path) == curve(whole)
    assert same_end(tmp_path, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_run_with_a_checkpoint_to_go_on_from(
    number: int, photos: list[Path], whole: Path, tmp_path: Path
) -> None:
    config = restore_config(reporting=Reporting(log_every=1, checkpoint_every=1000))
    task = task_of(config, photos, tmp_path / "cache")
    kill = Conduct(progress=lambda step, *_: os.kill(os.getpid(), number) if step == 5 else None)
    with pytest.raises(KeyboardInterrupt):
        train(task, config, tmp_path, CPU, kill)
    assert read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 6  # the step after the signal is finished
    run(config, photos, tmp_path, resume=True)
    assert curve(tmp_path) == curve(whole)


def test_means_of_the_log_survive_a_stop_between_its_rows(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = restore_config(reporting=Reporting(log_every=4, checkpoint_every=3))
    run(config, photos, tmp_path / "whole")
    task = task_of(config, photos, tmp_path / "cache")
    calls = iter(range(100))

    def broken(network: Callable[..., Tensor], batch: Sequence[Tensor]) -> Tensor:
        if next(calls) == 7:
            raise OSError("the disk is gone")
        return RestoreTask.losses(task, network, batch)

    monkeypatch.setattr(task, "losses", broken)
    with pytest.raises(OSError, match="disk is gone"):
        train(task, config, tmp_path / "cut", CPU)
    run(config, photos, tmp_path / "cut", resume=True)
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_loading_threads_change_nothing(photos: list[Path], whole: Path, tmp_path: Path) -> None:
    config = restore_config()
    train(task_of(config, photos, tmp_path / "cache"), config, tmp_path, CPU, Conduct(threads=5))
    assert curve(tmp_path) == curve(whole)


def test_resuming_a_finished_run_changes_nothing(photos: list[Path], whole: Path) -> None:
    before = (whole / "log.csv").read_bytes()
    result = run(restore_config(), photos, whole, resume=True)
    assert (whole / "log.csv").read_bytes() == before
    average = read_checkpoint(whole / "checkpoint.pt")["average"]
    assert all(torch.equal(result.weights[name], average[name]) for name in average)


def test_a_folder_that_holds_a_run_is_refused_without_resume(photos: list[Path], whole: Path) -> None:
    with pytest.raises(UsageError, match="--resume"):
        run(restore_config(), photos, whole)


def test_a_checkpoint_of_another_config_is_refused_saying_what_differs(photos: list[Path], whole: Path) -> None:
    other = restore_config(crop=32, optimisation=dataclasses.replace(restore_config().optimisation, learning_rate=0.5))
    with pytest.raises(CheckpointError) as caught:
        run(other, photos, whole, resume=True)
    assert "optimisation.learning_rate was 0.001, is 0.5" in str(caught.value)
    assert "crop was 16, is 32" in str(caught.value)


def test_a_checkpoint_of_other_data_is_refused(photos: list[Path], whole: Path) -> None:
    with pytest.raises(CheckpointError, match="the data are others"):
        run(restore_config(), photos[:2], whole, resume=True)


def test_reporting_may_change_when_a_run_is_resumed(photos: list[Path], whole: Path) -> None:
    run(restore_config(reporting=Reporting(log_every=5, checkpoint_every=7)), photos, whole, resume=True)


@pytest.mark.parametrize("content", [b"", b"PK nothing", b"\x80\x04K\x01."], ids=["empty", "no archive", "a pickle"])
def test_a_damaged_checkpoint_is_refused(content: bytes, photos: list[Path], tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a"):
        run(restore_config(), photos, tmp_path, resume=True)


class _Poisoned(RestoreTask):
    """A task with one crop, at step 8, whose reference is not a number."""

    def sample(self, step: int, index: int) -> Sample:
        out = super().sample(step, index)
        if (step, index) != (7, 1):
            return out
        condition, reference, noise, level = out.arrays
        return Sample((condition, reference, noise * np.float32(np.nan), level), out.name)


def test_a_loss_that_is_no_number_stops_and_names_the_crop(photos: list[Path], tmp_path: Path) -> None:
    config = restore_config(model=SEPARABLE)
    sane = task_of(config, photos, tmp_path / "cache")
    task = _Poisoned(config, sane.model, sane.photos)
    bad = task.sample(7, 1).name
    with pytest.raises(TrainingError) as caught:
        train(task, config, tmp_path, CPU)
    assert "step 8" in str(caught.value)
    assert f"1 of the batch's 2 crops: {bad}" in str(caught.value)
    checkpoint = read_checkpoint(tmp_path / "checkpoint.pt")
    assert checkpoint["step"] == 6
    assert all(torch.isfinite(tensor).all() for tensor in checkpoint["network"].values())


def test_gradients_that_are_not_finite_stop_before_the_weights_move(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = restore_config(model=SEPARABLE)
    task = task_of(config, photos, tmp_path / "cache")

    def steep(_network: Any, batch: Sequence[Tensor]) -> Tensor:
        weight = next(task.network.parameters())
        return (weight - weight.detach()).abs().sum().sqrt() + batch[0].mean(dim=(1, 2, 3))  # slope ∞ at 0

    monkeypatch.setattr(task, "losses", steep)
    with pytest.raises(TrainingError, match="gradients are not"):
        train(task, config, tmp_path, CPU)
    assert all(torch.isfinite(tensor).all() for tensor in task.network.state_dict().values())


def test_a_full_disk_is_an_error_and_keeps_the_previous_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {"format": 1, "step": 3})
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a file can grow no more, as on a full disk
    try:
        with pytest.raises(OutputError, match=r"the previous checkpoint.pt is as it was"):
            save_checkpoint(path, {"format": 1, "weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_the_average_is_the_weighted_mean_of_all_past_weights(decay: float) -> None:
    network = nn.BatchNorm1d(3)
    average = Average(network, decay)
    draw = torch.Generator().manual_seed(5)
    past = []
    for _ in range(20):
        with torch.no_grad():
            network.weight.copy_(torch.randn(3, generator=draw))
        past.append(network.weight.detach().double().clone())
        average.update(network)
    shares = [decay ** (19 - i) for i in range(20)]
    expected = sum(share * weights for share, weights in zip(shares, past, strict=True)) / math.fsum(shares)
    assert torch.allclose(average.values["weight"].double(), torch.as_tensor(expected), atol=1e-6)


def test_averaged_weights_are_only_lent() -> None:
    network = nn.Linear(2, 2)
    average = Average(network, 0.9)
    own = network.weight.detach().clone()
    average.values["weight"].zero_()
    with average.applied(network):
        assert not network.weight.any()
    assert torch.equal(network.weight, own)


def test_the_rate_warms_up_and_follows_a_cosine_to_its_end() -> None:
    plan = Optimisation(steps=110, batch=1, learning_rate=2.0, warmup_steps=10, final_fraction=0.1)
    assert [learning_rate(plan, step) for step in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    assert learning_rate(plan, 60) == pytest.approx(2.0 * 0.55)
    assert learning_rate(plan, 110) == pytest.approx(0.2)


def test_generators_differ_by_every_ingredient() -> None:
    one, other = Purpose.DATA, Purpose.DROPOUT
    places = [(1, one, 0, 0), (2, one, 0, 0), (1, other, 0, 0), (1, one, 1, 0), (1, one, 0, 1), (2**32 + 1, one, 0, 0)]
    assert len({int(generator(*place).integers(2**63)) for place in places}) == len(places)
    assert generator(1, one, 3, 4).random() == generator(1, one, 3, 4).random()


def test_digest_ignores_order_and_differences_name_places() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 0}) == [
        "a.c was 2, is 3",
        "d was '(nothing)', is 0",
    ]


def test_half_precision_without_a_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"), open_machine("cpu", Precision.FP16):
        pass


def test_bfloat16_trains_on_the_cpu(photos: list[Path], whole: Path, tmp_path: Path) -> None:
    config = restore_config()
    task = task_of(config, photos, tmp_path / "cache")
    train(task, config, tmp_path, dataclasses.replace(CPU, precision=Precision.BF16))
    for (_, rough, _), (_, exact, _) in zip(curve(tmp_path), curve(whole), strict=True):
        assert float(rough) == pytest.approx(float(exact), rel=0.05)  # bfloat16 has 8 bits


def test_a_batch_that_processes_cannot_share_is_refused(photos: list[Path], tmp_path: Path) -> None:
    config = restore_config()
    with pytest.raises(ConfigError, match="shared evenly by 3"):
        train(task_of(config, photos, tmp_path), config, tmp_path, dataclasses.replace(CPU, world=3))


PROCESS = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from diffiqa.data.draws import Purpose, generator
from diffiqa.training.config import Precision
from diffiqa.training.loop import open_machine, train
from diffiqa.tests.training.runs import separable_config, task_of
config = separable_config()
with open_machine("cpu", Precision.FP32) as machine:
    task = task_of(config, sorted(Path(sys.argv[2]).iterdir()), Path(sys.argv[1]) / "cache")
    train(task, config, Path(sys.argv[1]), machine)
"""


def test_two_processes_do_what_one_does_with_the_whole_batch(
    photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .runs import separable_config

    run(separable_config(), photos, tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-W", "ignore", "-c", PROCESS, str(tmp_path / "two"), str(photos[0].parent)]
    second = subprocess.Popen(command, env={**shared, "RANK": "1"})
    for name, value in {**shared, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with open_machine("cpu", Precision.FP32) as machine:  # waits for the second process
        train(
            task_of(separable_config(), photos, tmp_path / "two" / "cache"),
            separable_config(),
            tmp_path / "two",
            machine,
        )
    assert second.wait(timeout=120) == 0
    one, two = (read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    for name, tensor in one["network"].items():
        assert torch.allclose(tensor, two["network"][name], atol=2e-5), name  # sums in another order, through Adam
    losses = [[float(row[1]) for row in curve(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
