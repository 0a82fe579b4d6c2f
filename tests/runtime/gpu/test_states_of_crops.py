"""PFD-IQA on the driver without a GPU: a loop over a state of each crop, in batches and graphs, beside the host's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffiqa.engine.manifest import EngineDirectory, Precision, StageName, open_engine
from diffiqa.engine.pixels import to_plane
from diffiqa.errors import EngineError
from diffiqa.runtime.executor import Outcome
from diffiqa.runtime.gpu import bindings as bindings_module
from diffiqa.runtime.gpu.executor import DeviceExecutor
from diffiqa.runtime.gpu.graphs import Form
from diffiqa.runtime.host.executor import HostExecutor
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.plan import make_plan
from diffiqa.runtime.results import Options

from ...fake_device import FakeLayer, fake_stages
from ...fakecuda.driver import Driver
from ...tiny import photo

CLOSE = {Precision.FP32: 5e-6, Precision.FP16: 2e-2}  # of scores and probabilities; fp16 rounds a state of up to 10


@pytest.fixture(scope="module")
def directory(pfd_engine: Path) -> EngineDirectory:
    return open_engine(pfd_engine)


@pytest.fixture(scope="module")
def host(directory: EngineDirectory) -> HostExecutor:
    return HostExecutor(directory.manifest, load_stages(directory, OnnxRuntime(threads=1)))


def device(
    layer: FakeLayer, directory: EngineDirectory, form: Form = Form.LOOP, together: int = 1, **profiles: Any
) -> DeviceExecutor:
    return DeviceExecutor(
        directory.manifest, layer, fake_stages(layer, directory, **profiles), form=form, together=together
    )


def numbers(outcome: Outcome) -> np.ndarray[Any, Any]:
    """Scores and probabilities, a row for each crop."""
    assert all(v.vcg is v.vda is None for v in outcome.verdicts)
    return np.array([[v.score, *np.concatenate(v.probabilities)] for v in outcome.verdicts])


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.FP16])
@pytest.mark.parametrize(("together", "crops", "steps"), [(1, 1, None), (1, 5, 3), (2, 3, None)])
def test_every_form_of_graph_gives_the_bits_of_none_and_the_hosts_scores(
    directory: EngineDirectory,
    host: HostExecutor,
    driver: Driver,
    precision: Precision,
    together: int,
    crops: int,
    steps: int | None,
) -> None:
    """Batches of 1 to 4: five crops make one that is not full, six of two images make two."""
    tasks = [(photo(seed, 90, 118), 2**33 + seed) for seed in range(together)]
    plan = make_plan(90, 118, directory.manifest, Options(crops=crops, steps=steps))
    expected = [numbers(host.run(to_plane(pixels), plan, seed)) for pixels, seed in tasks]
    first: list[Any] = []
    for form in Form:
        executor = device(layer := FakeLayer(driver), directory, form, together, precision=precision)
        for _ in range(3):  # without a graph, captured, replayed
            found = [numbers(outcome) for outcome in executor.run_together(tasks, plan)]
            first = first or found
            np.testing.assert_array_equal(found, first)
        assert (executor.graphs.captures > 0) is (form is not Form.NONE)
        executor.close()
        assert layer.left == 0
    np.testing.assert_allclose(first, expected, rtol=0, atol=CLOSE[precision])
    assert np.ptp(np.concatenate(expected)[:, 0]) > 10 * CLOSE[Precision.FP32] or crops == 1


def test_a_score_does_not_depend_on_what_shares_its_batch(directory: EngineDirectory, layer: FakeLayer) -> None:
    executor = device(layer, directory, together=4)
    plan = make_plan(90, 118, directory.manifest, Options(crops=2))
    mine, others = (photo(1, 90, 118), 7), [(photo(seed, 90, 118), seed) for seed in (2, 3, 4)]
    (alone,) = executor.run_together([mine], plan)
    for place in range(4):
        tasks = [*others[:place], mine, *others[place:]]
        np.testing.assert_array_equal(numbers(executor.run_together(tasks, plan)[place]), numbers(alone))
    (again,) = executor.run_together([(mine[0], 8)], plan)
    assert not np.array_equal(numbers(again), numbers(alone))  # another seed is other noise


def test_a_crop_is_launched_as_a_loop_and_once_by_one_graph(directory: EngineDirectory, layer: FakeLayer) -> None:
    pixels = photo(5, 64, 64)
    executor = device(layer, directory)
    plan = make_plan(64, 64, directory.manifest, Options(crops=1, steps=3))
    logs = []
    for _ in range(3):
        before = len(layer.log)
        executor.run(pixels, plan, 0)
        logs.append(layer.log[before:])
    step = [StageName.DENOISER, "sampler_step_f32"]
    begin = [StageName.ENCODER, StageName.PRIOR, "noise_init_f32"]
    gathers = ["gather_crops_f32", "gather_crops_f32"]
    assert logs[0] == ["normalise_pad_f32", *gathers, *begin, *step * 3, StageName.DECODER]
    assert logs[1] == logs[2] == ["normalise_pad_f32", *gathers, "graph"]
    assert executor.graphs.captures == 1


@pytest.mark.parametrize("form", [Form.STEP, Form.LOOP])
def test_batches_and_numbers_of_steps_take_turns(
    directory: EngineDirectory, layer: FakeLayer, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bindings_module, "MAX_LOOPS", 3)
    executor, pixels = device(layer, directory, form), photo(5, 90, 118)
    plans = [
        make_plan(90, 118, directory.manifest, Options(crops=crops, steps=steps))
        for crops, steps in ((1, 5), (4, 5), (1, 2), (4, 1))
    ]
    plain = [numbers(device(FakeLayer(layer.driver), directory, Form.NONE).run(pixels, plan, 3)) for plan in plans]
    for plan, wanted in zip(plans * 3, plain * 3, strict=True):
        for _ in range(2):  # the second by a graph, which the fourth plan drops for the first
            np.testing.assert_array_equal(numbers(executor.run(pixels, plan, 3)), wanted)
        assert layer.contexts <= 3 * len(directory.manifest.stages)
    allocations = layer.allocations
    executor.run(pixels, plans[0], 3)
    assert layer.allocations == allocations


def test_too_little_memory_for_a_batch_makes_smaller_ones(directory: EngineDirectory, driver: Driver) -> None:
    pixels = photo(5, 90, 118)
    plan = make_plan(90, 118, directory.manifest, Options(crops=4))
    roomy = device(layer := FakeLayer(driver), directory, batches=("1", "4"))
    wanted, needed = numbers(roomy.run(pixels, plan, 3)), layer.held
    roomy.close()
    executor = device(FakeLayer(driver, capacity=needed - 60_000), directory, batches=("1", "4"))
    found = executor.run(pixels, plan, 3)
    assert any("no memory for 4 crops at a time" in note for note in found.notes)
    np.testing.assert_allclose(numbers(found), wanted, rtol=0, atol=CLOSE[Precision.FP32])
    executor.close()


def test_stages_that_cannot_share_memory_are_refused(directory: EngineDirectory, layer: FakeLayer) -> None:
    typed, plain = (fake_stages(layer, directory, precision=p) for p in (Precision.FP16, Precision.FP32))
    for name in StageName.PRIOR, StageName.DENOISER, StageName.DECODER:
        with pytest.raises(EngineError, match="do not agree on their types"):
            DeviceExecutor(directory.manifest, layer, {**plain, name: typed[name]})
