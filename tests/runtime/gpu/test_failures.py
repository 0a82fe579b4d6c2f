"""What the device's executor does when something fails: memory, a capture, the context, or the user's patience.

Each failure comes at every place in turn where it can come: the driver of the tests fails where it is asked to.
"""

import gc
import itertools
import linecache
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from diffiqa.engine.manifest import EngineDirectory, open_engine
from diffiqa.engine.sampling import Sampling
from diffiqa.errors import BackendError
from diffiqa.runtime.executor import Outcome
from diffiqa.runtime.gpu import executor as executor_module
from diffiqa.runtime.gpu.bindings import Heads, Loop
from diffiqa.runtime.gpu.executor import DeviceExecutor
from diffiqa.runtime.gpu.graphs import Form
from diffiqa.runtime.gpu.layer import DeviceMemoryError
from diffiqa.runtime.plan import Plan
from diffiqa.runtime.results import Mode

from ...fake_device import FakeLayer
from ...fakecuda.driver import NOT_SUPPORTED, Driver
from ...tiny import photo
from .test_executor import device, planned, same

PIXELS = photo(17, 48, 64)
STATIC = ("1", "2", "4")
FOUR_CROPS: dict[str, Any] = {"mode": Mode.CROP, "crops": 4, "steps": 3}  # memory does not depend on how many steps


@pytest.fixture(scope="module")
def directory(tiny_engine: Path) -> EngineDirectory:
    return open_engine(tiny_engine)


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.fixture
def expected(directory: EngineDirectory, driver: Driver) -> dict[int, Outcome]:
    """What four crops are scored as, by the most that run at once: batches of other sizes give other last bits."""
    plan, found = planned(directory, PIXELS, **FOUR_CROPS), {}
    for limit in (1, 2, 4):
        executor = device(FakeLayer(driver), directory, batches=tuple(b for b in STATIC if int(b) <= limit))
        found[limit] = executor.run(PIXELS, plan, 5)
        executor.close()
    return found


def check_right(outcome: Outcome, expected: dict[int, Outcome]) -> None:
    """The bits of the batches that its note names."""
    (note,) = outcome.notes or ("at most 4 ran",)
    limit = int(note.partition("at most ")[2].split()[0])
    assert same(outcome, expected[limit]), note


def score_somehow(executor: DeviceExecutor, plan: Plan, expected: dict[int, Outcome]) -> str:
    """Return how a score ended in little memory: as "", a note, or an error."""
    try:
        outcome = executor.run(PIXELS, plan, 5)
    except DeviceMemoryError:
        return "error"
    check_right(outcome, expected)
    return "".join(outcome.notes)


@pytest.mark.parametrize(("times", "ends"), [(1, 1), (4, 3)])
@pytest.mark.parametrize("what", ["device memory", "pinned memory"])
def test_memory_that_runs_out_at_any_allocation_costs_bits_that_are_noted_or_an_error(
    directory: EngineDirectory, driver: Driver, expected: dict[int, Outcome], what: str, times: int, ends: int
) -> None:
    """Once: all is given up and allocated anew. Four times in a row: smaller batches, or none."""
    plan, found = planned(directory, PIXELS, **FOUR_CROPS), set()
    for nth in itertools.count(1):
        executor = device(layer := FakeLayer(driver), directory, batches=STATIC)
        before = driver.count(what)
        driver.fail(what, nth, times=times)
        found.add(score_somehow(executor, plan, expected))
        needed = driver.count(what) - before
        driver.fail("nothing", 0)
        check_right(executor.run(PIXELS, plan, 5), expected)
        executor.close()
        assert layer.left == 0
        if needed < nth:
            break
    assert nth > 5
    assert len(found) == ends


def test_a_device_of_any_size_scores_in_batches_that_fit_it(
    directory: EngineDirectory, driver: Driver, expected: dict[int, Outcome]
) -> None:
    plan, found = planned(directory, PIXELS, **FOUR_CROPS), []
    enough = device(layer := FakeLayer(driver), directory, batches=STATIC)
    enough.run(PIXELS, plan, 5)
    needed = layer.held
    enough.close()
    for eighths in range(9):
        executor = device(layer := FakeLayer(driver, capacity=needed * eighths // 8 + 1), directory, batches=STATIC)
        found += [score_somehow(executor, plan, expected) for _ in range(2)]
        assert driver.held <= layer.capacity
        layer.capacity = needed
        check_right(executor.run(PIXELS, plan, 5), expected)
        executor.close()
        assert layer.left == 0
    assert found[0] == "error"
    assert found[-1] == ""
    assert len(set(found)) == 4


@pytest.mark.parametrize("part", ["heads", "loop", "states of crops"])
def test_what_lost_its_memory_to_a_failure_is_bound_anew(
    directory: EngineDirectory, driver: Driver, layer: FakeLayer, part: str, pfd_engine: Path
) -> None:
    """Also where nobody gives up the rest, as Ctrl-C does not."""
    directory = open_engine(pfd_engine) if part == "states of crops" else directory
    bindings = device(layer, directory, batches=("1", "4"))._bindings
    ask: Callable[..., Loop | Heads] = partial(
        bindings.loop if part == "loop" else bindings.heads, sampling=Sampling.trained(directory.manifest.schedule)
    )
    small, large = ((1, 32, 32), (1, 64, 64)) if part == "loop" else ((1,), (4,))
    for nth in itertools.count(1):
        bindings.release()
        ask(*small)
        driver.fail("device memory", nth)
        try:
            ask(*large)
        except DeviceMemoryError:
            ask(*small).work.enqueue()  # on freed memory it would lose the context
            layer.synchronise()
        else:
            break
    assert nth > 3


def test_three_threads_score_at_once_while_memory_runs_out(directory: EngineDirectory, driver: Driver) -> None:
    """One executor, images of three sizes; whoever finds no memory left waits for the others and tries again."""
    pictures = [photo(i, 32 + 16 * (i % 3), 48) for i in range(9)]
    plans = [planned(directory, picture, crops=3) for picture in pictures]
    executor = device(layer := FakeLayer(driver), directory)
    alone = [executor.run(picture, plan, i) for i, (picture, plan) in enumerate(zip(pictures, plans, strict=True))]
    for nth in (0, 1, 2, 3, 5, 8):
        executor._release()
        driver.fail("device memory", nth, times=int(nth > 0))
        with ThreadPoolExecutor(3) as threads:
            found = list(threads.map(executor.run, pictures, plans, range(9)))
        assert all(map(same, found, alone))
        assert all(outcome.notes == () for outcome in found)
    executor.close()
    assert layer.left == 0


# ------------------------------------------------------------------------------------------------------- interruptions


def lets_signals_in(frame: FrameType) -> bool:
    """Whether Python may raise KeyboardInterrupt here: not where `with` lets go of a lock, nor at a bare `try`."""
    return not {"with", "try:"} & set(linecache.getline(frame.f_code.co_filename, frame.f_lineno).split())


@pytest.mark.parametrize("runs_before", [0, 1, 2], ids=["memory moves", "capture", "replay"])
def test_ctrl_c_at_any_line_leaves_a_device_that_works(
    directory: EngineDirectory, driver: Driver, runs_before: int
) -> None:
    """Python raises KeyboardInterrupt between any two lines of ours, in the driver's calls as well."""
    folder, small = str(Path(executor_module.__file__).parent), photo(18, 32, 32)
    plan, small_plan = (planned(directory, picture, crops=1) for picture in (PIXELS, small))
    executor = device(layer := FakeLayer(driver), directory)
    expected, small_expected = executor.run(PIXELS, plan, 1), executor.run(small, small_plan, 1)
    met: list[tuple[str, int]] = []  # lines of ours, in the order of their first turn
    target: tuple[str, int] | None = None

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(folder):
            return None
        here = Path(frame.f_code.co_filename).name, frame.f_lineno
        if event == "line" and here not in met and lets_signals_in(frame):
            met.append(here)
            if here == target:
                raise KeyboardInterrupt
        return trace

    def run_interrupted() -> None:
        met.clear()
        sys.settrace(trace)
        try:
            executor.run(PIXELS, plan, 1)
        except KeyboardInterrupt:
            assert target
        finally:
            sys.settrace(None)

    def prepare() -> None:
        executor._release()
        for _ in range(2):  # its graph holds addresses that a larger image moves
            executor.run(small, small_plan, 1)
        for _ in range(runs_before):
            executor.run(PIXELS, plan, 1)

    prepare()
    run_interrupted()
    every = int(os.environ.get("EVERY_LINE", "24"))  # with 1, once: every line
    for target in met[runs_before * every // 3 :: every]:
        prepare()
        run_interrupted()
        assert not driver.capturing, target
        assert not executor._lock.locked(), target
        assert same(executor.run(small, small_plan, 1), small_expected), target
        assert same(executor.run(PIXELS, plan, 1), expected), target
    executor.close()
    gc.collect()
    assert layer.alive <= 1  # a graph, if the line was the one that frees it


def test_a_larger_image_after_an_interrupted_one_finds_its_memory_free(
    directory: EngineDirectory, layer: FakeLayer
) -> None:
    """It moves what the interrupted work still reads, on another stream."""
    large = photo(19, 120, 128)
    plan, large_plan = (planned(directory, picture, crops=1) for picture in (PIXELS, large))
    executor = device(layer, directory)

    def interrupt(launches: int) -> None:
        if launches == 1:
            raise KeyboardInterrupt

    layer.watch = interrupt
    with pytest.raises(KeyboardInterrupt):
        executor.run(PIXELS, plan, 1)
    layer.watch = lambda launches: None
    assert executor.run(large, large_plan, 1).verdicts


@pytest.mark.parametrize("call", ["cuLaunchKernelEx", "cuFakeStage", "capture", "cuGraphInstantiateWithFlags"])
def test_an_error_in_the_middle_of_a_capture_costs_a_note(
    directory: EngineDirectory, driver: Driver, layer: FakeLayer, call: str
) -> None:
    plan = planned(directory, PIXELS, crops=1)
    for nth in (1, 2, 3, 5):
        executor = device(layer.open(), directory)
        expected = executor.run(PIXELS, plan, 1)
        begin = layer.begin_capture

        def begin_capture(begin: Callable[[], None] = begin, nth: int = nth) -> None:
            layer.begin_capture = begin  # type: ignore[method-assign]
            begin()
            driver.fail(call, nth, NOT_SUPPORTED)

        layer.begin_capture = begin_capture  # type: ignore[method-assign]
        for _ in range(2):
            outcome = executor.run(PIXELS, plan, 1)
            assert same(outcome, expected)
            assert not driver.capturing
        assert "CUDA graph" in "".join(outcome.notes) or nth > 2
        executor.close()
        assert layer.left == 0


# ------------------------------------------------------------------------------------------------------ a lost context


@pytest.mark.parametrize("form", Form)
def test_a_context_that_is_lost_is_told_and_nothing_hangs(
    directory: EngineDirectory, driver: Driver, form: Form
) -> None:
    plan = planned(directory, PIXELS, crops=1)
    for after in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55):
        executor = device(FakeLayer(driver), directory, form)
        executor.run(PIXELS, plan, 1)

        def repeat(times: int, executor: DeviceExecutor = executor) -> None:
            for _ in range(times):
                executor.run(PIXELS, plan, 1)

        driver.lose_context(after)
        for _ in range(2):
            with pytest.raises(BackendError, match=r"fake GPU.*ILLEGAL_ADDRESS"):
                repeat(20)
        executor.close()
        driver.plug_in()
