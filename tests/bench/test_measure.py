"""Our own pipeline under a fake clock: what is counted where, and the verdict on a noisy machine."""

from pathlib import Path

import numpy as np
import pytest

from diffiqa import ImageError, UsageError
from diffiqa.bench.measure import Measurement, SoakRun
from diffiqa.bench.results import Case
from diffiqa.bench.running import HostRuntime
from diffiqa.bench.work import count_work
from diffiqa.bench.workload import Workload, generate, sort_by_size
from diffiqa.engine.manifest import EngineDirectory, StageName, open_engine
from diffiqa.runtime.backends import OnnxRuntime
from diffiqa.runtime.plan import make_plan
from diffiqa.runtime.results import Options


class FakeClock:
    """Goes on by `tick` whenever it is read; Ctrl-C comes at the read of number `ctrl_c`, from 1 on."""

    def __init__(self) -> None:
        self.now, self.tick, self.ctrl_c = 0.0, 1.0, 0

    def __call__(self) -> float:
        self.ctrl_c -= 1
        if self.ctrl_c == 0:
            raise KeyboardInterrupt
        self.now += self.tick
        return self.now


@pytest.fixture(scope="module")
def directory(tiny_engine: Path) -> EngineDirectory:
    return open_engine(tiny_engine)


def bench(directory: EngineDirectory, folder: Path, clock: FakeClock, *, steps: int = 6, crops: int = 2) -> Measurement:
    images = tuple(generate(folder, [(40, 48)], 2, seed=3).by_size[40, 48])
    workload = Workload(images, 40, 48, Options(crops=crops, steps=steps))
    return Measurement(directory, HostRuntime(directory, OnnxRuntime(1)), workload, clock)


def measured(directory: EngineDirectory, folder: Path, ticks: list[float]) -> Case:
    clock = FakeClock()
    run = bench(directory, folder, clock)
    run.warm_up()
    for tick in ticks:
        clock.tick = tick
        run.round()
    return run.case()


def test_every_call_is_timed_once_and_stages_add_up(directory: EngineDirectory, tmp_path: Path) -> None:
    case = measured(directory, tmp_path, [1.0, 1.0])
    calls = {"unet": 6, "vit": 2, "vcg": 2, "vda": 2}
    assert {name: set(parts) for name, parts in case.stages.items()} == {n: {float(c)} for n, c in calls.items()}
    assert len(case.compute) == 4
    assert len(case.end_to_end) == 2
    assert set(case.end_to_end) == {(1 + 2 * 2 * sum(calls.values())) / 2}  # per image: the second's calls count too
    assert set(case.compute) == {1.0 + 2 * sum(calls.values())}  # the clock is read twice a call, and at the end
    assert case.outside == pytest.approx(13 / 25)
    assert np.array(case.step_seconds).shape == (6, 4)
    assert case.step_ms == pytest.approx(1000)
    assert case.stability.drift == 0


def test_a_steady_clock_is_stable_and_a_noisy_one_is_not(directory: EngineDirectory, tmp_path: Path) -> None:
    steady = measured(directory, tmp_path, [1.0] * 6)
    noisy = measured(directory, tmp_path, (1 + np.random.default_rng(0).random(6)).tolist())
    loaded_later = measured(directory, tmp_path, [1.0] * 3 + [1.08] * 3)
    assert steady.stability.problems == ()
    assert any("coefficient of variation" in problem for problem in noisy.stability.problems)
    assert any("later half took +8.0%" in problem for problem in loaded_later.stability.problems)


def test_work_is_counted_from_the_graphs(directory: EngineDirectory) -> None:
    def flop(height: int, width: int, crops: int) -> dict[str, float]:
        work, why = count_work(directory, make_plan(height, width, directory.manifest, Options(crops=crops)))
        assert why is None
        return {name: 1e9 * found.gflop for name, found in work.items()}

    macs = {stage.name: stage.macs for stage in directory.manifest.stages}
    crop = flop(32, 32, 1)
    assert crop["unet"] == pytest.approx(2 * 6 * macs[StageName.UNET])
    assert crop["vit"] == pytest.approx(2 * 4 * macs[StageName.VIT])
    assert crop["vda"] == pytest.approx(2 * macs[StageName.VDA])
    larger = flop(64, 64, 4)
    assert larger["vcg"] == pytest.approx(4 * crop["vcg"])
    assert larger["unet"] > 4 * crop["unet"]  # attention grows with the square of the pixels


def test_fewer_steps_are_those_of_a_run(directory: EngineDirectory, tmp_path: Path) -> None:
    run = bench(directory, tmp_path, FakeClock(), steps=4)
    run.round()
    case = run.case()
    assert (case.steps, len(case.step_seconds)) == (4, 4)
    with pytest.raises(UsageError, match="2 of 6 steps cannot hold the noise levels"):
        bench(directory, tmp_path, FakeClock(), steps=2)


def test_generated_images_are_the_same_for_a_seed_and_differ_from_each_other(
    tmp_path: Path, directory: EngineDirectory
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    first, again = (generate(tmp_path / name, [(40, 48)], 2, seed=1).by_size[40, 48] for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert first[0].read_bytes() != first[1].read_bytes()
    assert sort_by_size(first, directory.manifest).by_size == {(40, 48): first}


def counts(case: Case) -> tuple[int, int]:
    """Return how many samples there are of either kind; those of computing must have all their parts."""
    parts = [*case.stages.values(), *case.step_seconds]
    assert {len(column) for column in parts} <= {len(case.compute)}
    return len(case.end_to_end), len(case.compute)


def test_a_sample_that_ctrl_c_breaks_off_is_not_kept(directory: EngineDirectory, tmp_path: Path) -> None:
    clock = FakeClock()
    run = bench(directory, tmp_path, clock)
    run.round()
    files, image = 50, 26  # reads of the clock for the files of a round, and for one of its two images alone
    for read in (1, 2, 30, files, files + 1, files + 9, files + image, files + image + 1, files + 2 * image):
        end_to_end, compute = counts(run.case())
        clock.ctrl_c = read
        with pytest.raises(KeyboardInterrupt):
            run.round()
        whole = (end_to_end, compute) if read <= files else (end_to_end + 1, compute + (read - files - 1) // image)
        assert counts(run.case()) == whole, read


def test_a_file_that_can_no_longer_be_read_ends_the_run_and_leaves_no_sample(
    directory: EngineDirectory, tmp_path: Path
) -> None:
    run = bench(directory, tmp_path, FakeClock())
    run.round()
    before, soak = run.case(), SoakRun(run, 4)
    run.workload.images[1].write_bytes(b"no image")
    for broken in (run.round, soak.run):
        with pytest.raises(ImageError, match=r"1\.png"):
            broken()
    assert run.case() == before
    assert soak.found.images == 1
