"""The device's execution of plans, on a driver without a GPU: against the host's, and against itself.

The driver runs the kernels' own sources, and ONNX Runtime for engines. So what differs from the host is what these
tests are for: the order of launches, memory, tables, batches and graphs. test_failures.py is for what fails.
"""

import contextlib
import dataclasses
import itertools
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffiqa.engine.manifest import EngineDirectory, Precision, ShapeRange, StageName, open_engine
from diffiqa.engine.pixels import to_plane
from diffiqa.engine.schedule import Kind, Taps
from diffiqa.errors import BackendError, EngineError, UsageError
from diffiqa.runtime import plan as plan_module
from diffiqa.runtime.builds import choose_profile
from diffiqa.runtime.executor import Cancelled, Outcome
from diffiqa.runtime.gpu import bindings as bindings_module
from diffiqa.runtime.gpu.executor import DeviceExecutor
from diffiqa.runtime.gpu.graphs import Form
from diffiqa.runtime.gpu.layer import DeviceMemoryError
from diffiqa.runtime.host.executor import HostExecutor
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.plan import Plan, make_plan
from diffiqa.runtime.results import Mode, Options, Picture

from ...fake_device import FakeLayer, FakeStage, fake_stages
from ...fakecuda.driver import Driver
from ...tiny import photo

# The kernels' noise is that of NumPy but for the last bits of log, sine and cosine. The first steps divide by small √ᾱ,
# and six steps of a network with sums in another order for other batches follow: measured, 2e-5 in one pixel of 10,000.
PIXELS, SCORES = 1e-4, 4e-6


@pytest.fixture(scope="module")
def directory(tiny_engine: Path) -> EngineDirectory:
    return open_engine(tiny_engine)


@pytest.fixture
def bare(directory: EngineDirectory, tmp_path: Path) -> EngineDirectory:
    """A model that looks at the image as given alone: no U-Net, no VDA, and a head that takes means."""
    vit, vcg = (directory.manifest.stage(name) for name in (StageName.VIT, StageName.VCG))
    assert vit
    assert vcg
    shutil.copytree(directory.path / "onnx", tmp_path / "onnx")
    specs = (*(dataclasses.replace(s, shape=(s.shape[0], 1, *s.shape[2:])) for s in vcg.inputs), *vcg.outputs)
    maps, *outputs = (helper.make_tensor_value_info(s.name, TensorProto.FLOAT, s.shape) for s in specs)
    side = specs[-1].shape[-1]
    nodes = [
        helper.make_node("ReduceMean", ["maps", "all"], ["score"], keepdims=0),
        helper.make_node("ReduceMean", ["maps", "channels"], ["tokens"], keepdims=0),
        helper.make_node("Reshape", ["tokens", "square"], ["score_map"]),
        helper.make_node("Sigmoid", ["score_map"], ["weight_map"]),
    ]
    axes = {"all": [1, 2, 3, 4], "channels": [1, 2, 4], "square": [-1, side, side]}
    constants = [numpy_helper.from_array(np.array(value), name) for name, value in axes.items()]
    graph = helper.make_graph(nodes, "means", [maps], outputs, constants)
    opset = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), tmp_path / "onnx" / "vcg.onnx")
    vcg = dataclasses.replace(vcg, inputs=specs[:1])
    manifest = dataclasses.replace(directory.manifest, kinds=(Kind.DIS,), alignment=1, stages=(vit, vcg))
    return EngineDirectory(tmp_path, manifest)


@pytest.fixture(scope="module")
def host(directory: EngineDirectory) -> HostExecutor:
    return HostExecutor(directory.manifest, load_stages(directory, OnnxRuntime(threads=1)))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile as on large images, at a size the tests can afford."""
    monkeypatch.setattr(plan_module, "TILE", 96)
    monkeypatch.setattr(plan_module, "OVERLAP", 32)


def device(layer: FakeLayer, directory: EngineDirectory, form: Form = Form.LOOP, **profiles: Any) -> DeviceExecutor:
    return DeviceExecutor(directory.manifest, layer, fake_stages(layer, directory, **profiles), form=form)


def planned(directory: EngineDirectory, pixels: Picture, **options: Any) -> Plan:
    return make_plan(pixels.shape[0], pixels.shape[1], directory.manifest, Options(**options))


def scores(outcome: Outcome) -> list[float]:
    branches = [branch for v in outcome.verdicts for branch in (v.vcg, v.vda) if branch]
    assert len(branches) == 2 * len(outcome.verdicts)
    return [branch.score for branch in branches]


def same(a: Outcome, b: Outcome) -> bool:
    """Whether two outcomes are bit for bit the same, notes apart."""
    mine, theirs = (
        [m.tobytes() for v in o.verdicts for x in (v.vcg, v.vda) if x for m in (x.score_map, x.weight_map)]
        for o in (a, b)
    )
    planes = all(np.array_equal(plane, b.planes[kind]) for kind, plane in a.planes.items())
    return scores(a) == scores(b) and mine == theirs and np.array_equal(a.crops, b.crops) and planes


def check_close(found: Outcome, expected: Outcome, pixels: float = PIXELS, score: float = SCORES) -> None:
    assert set(found.planes) == set(expected.planes)
    for kind, plane in expected.planes.items():
        np.testing.assert_allclose(found.planes[kind], plane, atol=pixels)
    np.testing.assert_array_equal(found.crops[:, 0], expected.crops[:, 0])  # the image as given: no tolerance
    np.testing.assert_allclose(found.crops, expected.crops, atol=pixels)
    np.testing.assert_allclose(scores(found), scores(expected), atol=score)
    for mine, theirs in zip(found.verdicts, expected.verdicts, strict=True):
        assert mine.vcg is not None
        assert theirs.vcg is not None
        np.testing.assert_allclose(mine.vcg.score_map, theirs.vcg.score_map, atol=10 * score)
        np.testing.assert_allclose(mine.vcg.weight_map, theirs.vcg.weight_map, atol=10 * score)


# ---------------------------------------------------------------------------------------------- the host's results


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("mode", "height", "width", "crops", "seed"),
    [
        (Mode.WHOLE, 32, 32, 1, 0),
        (Mode.WHOLE, 45, 70, 5, 1),
        (Mode.TILE, 100, 37, 9, 2**40 + 3),
        (Mode.TILE, 120, 128, 7, 5),
        (Mode.CROP, 100, 37, 9, 2**40 + 3),
    ],
)
def test_outcomes_are_those_of_the_host(
    directory: EngineDirectory,
    host: HostExecutor,
    layer: FakeLayer,
    mode: Mode,
    height: int,
    width: int,
    crops: int,
    seed: int,
) -> None:
    pixels = photo(seed % 97, height, width)
    plan = planned(directory, pixels, mode=mode, crops=crops)
    executor = device(layer, directory)
    expected = host.run(to_plane(pixels), plan, seed)
    for _ in range(3):  # without a graph, captured, replayed
        check_close(executor.run(pixels, plan, seed), expected)


def test_a_float_image_gives_what_its_pixels_give(directory: EngineDirectory, layer: FakeLayer) -> None:
    pixels = photo(1, 41, 50)
    plan, executor = planned(directory, pixels, crops=3), device(layer, directory)
    assert same(executor.run(pixels, plan, 7), executor.run(to_plane(pixels), plan, 7))


@pytest.mark.parametrize("taps", [Taps(t1=4, t2=2), Taps(t1=2, t2=2)], ids=str)
def test_taps_are_the_states_after_their_steps(directory: EngineDirectory, layer: FakeLayer, taps: Taps) -> None:
    """With the taps elsewhere the planes are other ones, and each is the host's."""
    manifest = dataclasses.replace(directory.manifest, taps=taps)
    pixels = photo(3, 48, 64)
    plan = planned(directory, pixels)
    reference = HostExecutor(manifest, load_stages(directory, OnnxRuntime(threads=1)))
    expected = reference.run(to_plane(pixels), plan, 3)
    found = DeviceExecutor(manifest, layer, fake_stages(layer, directory)).run(pixels, plan, 3)
    check_close(found, expected)
    assert not np.allclose(found.planes[Kind.Y0], found.planes[Kind.T1], atol=0.01)


def test_a_model_that_restores_nothing_is_scored_as_given(bare: EngineDirectory, layer: FakeLayer) -> None:
    pixels = photo(4, 41, 43)
    plan = make_plan(41, 43, bare.manifest, Options(crops=6))
    reference = HostExecutor(bare.manifest, load_stages(bare, OnnxRuntime(threads=1)))
    expected = reference.run(to_plane(pixels), plan, 0)
    found = device(layer, bare).run(pixels, plan, 0)
    np.testing.assert_array_equal(found.crops, expected.crops)
    assert [v.vda for v in found.verdicts] == [None] * 6
    assert [v.vcg.score for v in found.verdicts if v.vcg] == pytest.approx(
        [v.vcg.score for v in expected.verdicts if v.vcg], abs=SCORES
    )


# --------------------------------------------------------------------------------------------------------- graphs


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("mode", "precision", "together"),
    [
        (Mode.WHOLE, Precision.FP32, 1),
        (Mode.WHOLE, Precision.FP16, 2),
        (Mode.TILE, Precision.FP32, 2),
        (Mode.CROP, Precision.FP16, 1),
    ],
)
def test_every_form_of_graph_gives_the_bits_of_none(
    directory: EngineDirectory, host: HostExecutor, driver: Driver, mode: Mode, precision: Precision, together: int
) -> None:
    tasks = [(photo(seed, 70, 118), seed) for seed in range(together)]
    plan = planned(directory, tasks[0][0], mode=mode, crops=5)
    size = {Mode.WHOLE: "72x120", Mode.TILE: "72x96", Mode.CROP: "32x32"}[mode]
    results = {}
    for form in Form:
        stages = fake_stages(
            layer := FakeLayer(driver), directory, batches=("1", "2"), sizes=(size,), precision=precision
        )
        executor = DeviceExecutor(directory.manifest, layer, stages, form=form, together=together)
        # Without a graph, captured, replayed.
        results[form] = [outcome for _ in range(3) for outcome in executor.run_together(tasks, plan)]
        assert all(not outcome.notes for outcome in results[form])
        assert (executor.graphs.captures > 0) is (form is not Form.NONE)
        executor.close()
        assert layer.left == 0
    for form in Form:
        assert all(same(a, b) for a, b in zip(results[form], results[Form.NONE], strict=True))
    # fp16 keeps 11 bits of images in [-1, 1]: 5e-4 a step, of which there are six; noise up to 5.8 less.
    near = {"pixels": 3 * PIXELS} if precision is Precision.FP32 else {"pixels": 5e-2, "score": 5e-3}
    for found, (pixels, seed) in zip(results[Form.NONE], tasks, strict=False):
        check_close(found, host.run(to_plane(pixels), plan, seed), **near)


def launches(layer: FakeLayer, run: Callable[[], object]) -> list[str]:
    before = len(layer.log)
    run()
    return layer.log[before:]


def test_a_shape_is_launched_plainly_once_and_then_by_one_graph(directory: EngineDirectory, layer: FakeLayer) -> None:
    pixels = photo(5, 48, 64)
    plan, executor = planned(directory, pixels, crops=1), device(layer, directory)
    first, second, third = (launches(layer, lambda: executor.run(pixels, plan, 0)) for _ in range(3))
    steps = directory.manifest.schedule.steps
    assert first.count("unet") == first.count("sampler_step_f32") == steps
    assert second == third == ["normalise_pad_f32", "gather_crops_f32", "graph", *["gather_crops_f32"] * 2, "graph"]
    assert executor.graphs.captures == 2  # the loop and the heads


def test_a_graph_of_one_step_is_launched_once_a_step(directory: EngineDirectory, layer: FakeLayer) -> None:
    pixels = photo(5, 48, 64)
    plan, executor = planned(directory, pixels, crops=1), device(layer, directory, Form.STEP)
    executor.run(pixels, plan, 0)
    again = launches(layer, lambda: executor.run(pixels, plan, 0))
    assert again.count("noise_init_f32") == 1
    assert again.count("graph") == directory.manifest.schedule.steps + 1  # the heads'
    assert "unet" not in again


@pytest.mark.parametrize("form", Form)
def test_what_nobody_wants_any_more_is_not_launched(directory: EngineDirectory, layer: FakeLayer, form: Form) -> None:
    pixels = photo(5, 48, 64)
    plan, executor = planned(directory, pixels, crops=1), device(layer, directory, form)
    for _ in range(2):
        executor.run(pixels, plan, 0)

    def cancel() -> None:
        with pytest.raises(Cancelled):
            executor.run(pixels, plan, 0, lambda: True)

    assert not {"graph", "noise_init_f32", "unet"} & set(launches(layer, cancel))


def test_another_shape_is_captured_anew_and_the_first_is_kept(directory: EngineDirectory, layer: FakeLayer) -> None:
    executor = device(layer, directory)
    small, large = photo(6, 48, 64), photo(7, 80, 64)
    plans = [planned(directory, picture, crops=1) for picture in (small, large)]
    for picture, plan in zip((small, large), plans, strict=True):
        for _ in range(3):
            executor.run(picture, plan, 0)
    assert executor.graphs.captures == 3  # two loops, one batch of heads
    before = executor.run(small, plans[0], 1)
    assert executor.graphs.captures == 3
    assert same(before, device(FakeLayer(layer.driver), directory).run(small, plans[0], 1))


@pytest.mark.parametrize("form", [Form.STEP, Form.LOOP])
def test_graphs_of_moved_memory_are_dropped(directory: EngineDirectory, layer: FakeLayer, form: Form) -> None:
    """The crop's profile comes first and is small; the family's moves every buffer. A stale graph would write there."""
    executor = device(layer, directory, form)
    tiny, large = photo(8, 32, 32), photo(9, 100, 90)
    plans = [planned(directory, picture, crops=1) for picture in (tiny, large)]
    expected = executor.run(tiny, plans[0], 4)
    for _ in range(3):
        assert same(executor.run(tiny, plans[0], 4), expected)
    for _ in range(3):
        executor.run(large, plans[1], 4)
        assert same(executor.run(tiny, plans[0], 4), expected)


SAMPLINGS: dict[str, dict[str, Any]] = {
    "four": {"steps": 4},
    "three": {"steps": 3},
    "re-noised": {"steps": 2, "sampler": "ddim"},
    "half the noise": {"steps": 4, "sampler": "ddim:0.5"},
    "from the image": {"steps": 3, "sampler": "image+ancestral"},
}


@pytest.mark.parametrize(
    ("name", "form"), [*((name, Form.LOOP) for name in SAMPLINGS), ("four", Form.STEP), ("re-noised", Form.STEP)]
)
def test_other_steps_are_the_hosts_and_a_graph_changes_no_bit(
    directory: EngineDirectory, host: HostExecutor, layer: FakeLayer, form: Form, name: str
) -> None:
    pixels = photo(5, 48, 64)
    plan, executor = planned(directory, pixels, crops=2, **SAMPLINGS[name]), device(layer, directory, form)
    plain = device(FakeLayer(layer.driver), directory, Form.NONE)
    expected = {seed: plain.run(pixels, plan, seed) for seed in (7, 8)}
    check_close(expected[7], host.run(to_plane(pixels), plan, 7))
    assert same(executor.run(pixels, plan, 7), expected[7])
    assert layer.log.count("unet") == SAMPLINGS[name]["steps"]
    for seed in (8, 7, 8):  # what another run leaves behind must not look like a result
        assert same(executor.run(pixels, plan, seed), expected[seed])


@pytest.mark.parametrize("form", [Form.STEP, Form.LOOP])
def test_samplings_that_take_turns_keep_their_own_tables(
    directory: EngineDirectory, layer: FakeLayer, form: Form
) -> None:
    """A graph reads its table at every replay: one table for all would hold the steps of whoever came last."""
    pixels = photo(5, 48, 64)
    executor = device(layer, directory, form)
    plans = [planned(directory, pixels, crops=1, **options) for options in ({}, *SAMPLINGS.values())]
    expected = [device(FakeLayer(layer.driver), directory, Form.NONE).run(pixels, plan, 3) for plan in plans]
    for _ in range(3):
        for plan, wanted in zip(plans, expected, strict=True):
            assert same(executor.run(pixels, plan, 3), wanted)


def test_only_so_many_shapes_keep_their_contexts_and_graphs(
    directory: EngineDirectory, layer: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bindings_module, "MAX_LOOPS", 2)
    executor = device(layer, directory, sizes=("32x32:64x64:128x128",))
    expected: dict[int, Outcome] = {}
    # Twice each, so that there is a graph to outlive its context; then all over again.
    for _, side, _ in itertools.product(range(2), range(4), range(2)):
        picture = photo(side, 32, 32 + 16 * side)
        outcome = executor.run(picture, planned(directory, picture, crops=1), 0)
        assert same(outcome, expected.setdefault(side, outcome))
        assert layer.contexts <= 2 + 3
    assert sum(not graph.closed for graph in layer.graphs) <= 2 + 1


@pytest.mark.parametrize(
    ("fails", "graphs", "says"),
    [
        pytest.param({13}, 6 + 1, "with a CUDA graph of one step, not of all steps: ", id="all steps"),
        pytest.param({2, 13}, 1, "without a CUDA graph: ", id="all steps and one"),
        pytest.param({3}, 1, "without a CUDA graph: ", id="heads"),
        pytest.param({2, 3, 13}, 0, "without a CUDA graph: ", id="everything"),
    ],
)
def test_a_failing_capture_falls_back_and_every_result_says_so(
    directory: EngineDirectory, layer: FakeLayer, fails: set[int], graphs: int, says: str
) -> None:
    """All six steps are 13 launches, one step 2 and the heads 3."""
    layer.capture_fails = lambda count: count in fails
    pixels = photo(10, 48, 64)
    plan, executor = planned(directory, pixels, crops=1), device(layer, directory)
    first = executor.run(pixels, plan, 0)
    assert first.notes == ()  # no graph was to be used yet
    for _ in range(2):
        before = layer.log.count("graph")
        again = executor.run(pixels, plan, 0)
        assert same(first, again)
        assert layer.log.count("graph") - before == graphs
        assert again.notes == (f"ran {says}the fake GPU captures nothing today",)
    executor.close()
    assert layer.alive == 0


def test_an_engine_that_says_it_cannot_be_captured_is_believed(
    directory: EngineDirectory, layer: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ... import fake_device

    monkeypatch.setattr(fake_device.FakeContext, "capture_problem", lambda self: "engine says no")
    pixels = photo(10, 32, 32)
    plan, executor = planned(directory, pixels, crops=1), device(layer, directory)
    executor.run(pixels, plan, 0)
    assert executor.run(pixels, plan, 0).notes == ("ran without a CUDA graph: engine says no",)
    assert executor.graphs.captures == 0


# --------------------------------------------------------------------------------------------------- memory, batches


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mode", Mode)
def test_nothing_is_allocated_once_every_shape_has_been_seen(
    directory: EngineDirectory, layer: FakeLayer, mode: Mode
) -> None:
    executor = device(layer, directory)
    pictures = [photo(i, *shape) for i, shape in enumerate([(120, 110), (32, 32), (64, 90)])]
    for seed in range(4):
        if seed == 2:
            allocations, captures = layer.allocations, executor.graphs.captures
        for picture in pictures:
            executor.run(picture, planned(directory, picture, mode=mode, crops=5, steps=3), seed)
    assert layer.allocations == allocations
    assert captures > 0


def test_closing_frees_everything_and_twice_is_no_harm(directory: EngineDirectory, layer: FakeLayer) -> None:
    pixels = photo(11, 64, 64)
    executor = device(layer, directory)
    for _ in range(2):
        executor.run(pixels, planned(directory, pixels, crops=5), 0)
    executor.close()
    executor.close()
    assert layer.alive == 0
    assert layer.closed
    with pytest.raises(UsageError, match="closed"):
        executor.run(pixels, planned(directory, pixels), 0)


@pytest.mark.parametrize(
    ("mode", "batches", "sizes"),
    [
        pytest.param(Mode.WHOLE, ("1",), [1] * 7, id="one at a time"),
        pytest.param(Mode.WHOLE, ("1:2:4",), [4, 3], id="family"),
        pytest.param(Mode.CROP, ("1:2:4",), [4, 3], id="family of crops"),
        pytest.param(Mode.CROP, ("1", "4"), [4, 1, 1, 1], id="static"),
        pytest.param(Mode.CROP, ("3",), [3, 3, 3], id="the last has room to spare"),
        pytest.param(Mode.WHOLE, ("16",), [16], id="none is full"),
    ],
)
def test_crops_of_an_image_are_batched_as_profiles_allow(
    directory: EngineDirectory,
    host: HostExecutor,
    layer: FakeLayer,
    mode: Mode,
    batches: tuple[str, ...],
    sizes: list[int],
) -> None:
    pixels = photo(12, 90, 100)
    plan = planned(directory, pixels, mode=mode, crops=7)
    # A family of sizes takes one image at a time, so in crop mode it would take those that fill no batch.
    images = ("32x32",) if mode is Mode.CROP else ("32x32:64x64:128x128",)
    executor = device(layer, directory, Form.NONE, batches=batches, sizes=images)
    outcome = executor.run(pixels, plan, 5)
    check_close(outcome, host.run(to_plane(pixels), plan, 5))
    assert layer.log.count("vit") == len(sizes)
    if mode is Mode.CROP:
        assert layer.log.count("noise_init_f32") == len(sizes)


def test_out_of_memory_makes_batches_smaller_and_says_so(
    directory: EngineDirectory, host: HostExecutor, layer: FakeLayer, driver: Driver
) -> None:
    pixels = photo(13, 90, 100)
    plan = planned(directory, pixels, mode=Mode.CROP, crops=8)
    static = ("1", "2", "4", "8")
    unlimited = device(layer, directory, batches=static)
    unlimited.run(pixels, plan, 5)
    capacity = layer.held * 2 // 3
    unlimited.close()
    short = FakeLayer(driver, capacity=capacity)
    executor = device(short, directory, batches=static)
    for _ in range(3):
        outcome = executor.run(pixels, plan, 5)
        check_close(outcome, host.run(to_plane(pixels), plan, 5))
        assert outcome.notes == ("fake GPU has no memory for 8 crops at a time: at most 4 ran at once",)
    executor.close()
    assert short.alive == 0


def test_memory_for_not_even_one_crop_is_an_error_that_leaves_nothing_behind(
    directory: EngineDirectory, driver: Driver
) -> None:
    layer = FakeLayer(driver, capacity=200_000)
    executor = device(layer, directory)
    pixels = photo(14, 120, 120)
    with pytest.raises(DeviceMemoryError, match="fake GPU has no"):
        executor.run(pixels, planned(directory, pixels), 0)
    assert layer.alive == 0
    assert driver.kept == 0, "what was freed is kept from others"
    driver.capacity = 2**30  # another process has gone
    small = photo(15, 32, 32)
    assert executor.run(small, planned(directory, small), 0).verdicts


def test_an_image_outside_every_profile_is_refused_with_the_command_that_helps(
    directory: EngineDirectory, layer: FakeLayer
) -> None:
    stages = fake_stages(layer, directory, sizes=("32x32",))
    executor = DeviceExecutor(directory.manifest, layer, stages, rebuild="iqa-build --sizes 32x32,{} --batch {}".format)
    pixels = photo(16, 40, 60)
    with pytest.raises(BackendError, match=r"no images of 60×40; use tile or crop mode.*--sizes 32x32,40x60"):
        executor.run(pixels, planned(directory, pixels), 0)
    assert executor.run(pixels, planned(directory, pixels, mode=Mode.CROP), 0).verdicts


def test_the_profile_that_spans_least_is_taken() -> None:
    def profile(low: int, high: int) -> dict[str, ShapeRange]:
        return {"x": ShapeRange((low, 3), (low, 3), (high, 3))}

    profiles = (profile(1, 8), profile(2, 2), profile(1, 4))
    assert [choose_profile(profiles, {"x": (n, 3)}) for n in (1, 2, 3, 5, 9)] == [2, 1, 2, 0, None]
    assert choose_profile(profiles, {"x": (1, 4)}) is None


def test_stages_that_do_not_agree_on_types_are_refused(directory: EngineDirectory, layer: FakeLayer) -> None:
    stages = fake_stages(layer, directory)
    stages[StageName.VIT] = fake_stages(layer, directory, precision=Precision.FP16)[StageName.VIT]
    with pytest.raises(EngineError, match="do not agree on their types"):
        DeviceExecutor(directory.manifest, layer, stages)


# --------------------------------------------------------------------------------------------------- interruptions


def test_a_cancelled_plan_ends_at_its_next_step(directory: EngineDirectory, layer: FakeLayer) -> None:
    pixels = photo(18, 32, 32)
    plan, executor = planned(directory, pixels), device(layer, directory)
    answers = iter([False, False, True])
    with pytest.raises(Cancelled):
        executor.run(pixels, plan, 0, lambda: next(answers))
    assert layer.log.count("unet") == 1
    assert executor.run(pixels, plan, 0).verdicts


def test_a_device_that_fails_is_told_and_may_come_back(directory: EngineDirectory, layer: FakeLayer) -> None:
    pixels = photo(19, 32, 32)
    plan, executor = planned(directory, pixels), device(layer, directory)
    expected = executor.run(pixels, plan, 0)

    def gone(count: int) -> None:
        raise BackendError("fake GPU failed: it has fallen off the bus")

    layer.watch = gone
    with pytest.raises(BackendError, match="off the bus"):
        executor.run(pixels, plan, 0)
    layer.watch = lambda count: None
    assert same(executor.run(pixels, plan, 0), expected)


def test_verdicts_alone_are_those_with_pictures(directory: EngineDirectory, layer: FakeLayer) -> None:
    pixels = photo(20, 60, 60)
    plan, executor = planned(directory, pixels, crops=3), device(layer, directory)
    seen, unseen = executor.run(pixels, plan, 0), executor.run(pixels, plan, 0, pictures=False)
    assert scores(seen) == scores(unseen)
    assert (unseen.planes, unseen.crops.shape) == ({}, (0, 4, 3, 32, 32))
    assert all(isinstance(stage, FakeStage) for stage in executor._stages.values())


# ------------------------------------------------------------------------------------------------ several at a time


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mode", Mode)
def test_images_that_share_a_batch_get_the_bits_they_get_with_others_or_alone(
    directory: EngineDirectory, driver: Driver, mode: Mode
) -> None:
    pixels = [photo(seed, 70, 118) for seed in range(7)]
    plan = planned(directory, pixels[0], mode=mode, crops=3, steps=3)
    tasks = [(picture, 10 + number) for number, picture in enumerate(pixels)]
    layer = FakeLayer(driver)
    static = {Mode.WHOLE: ("72x120",), Mode.TILE: ("72x96",), Mode.CROP: ("32x32",)}[mode]
    stages = fake_stages(layer, directory, batches=("1", "4"), sizes=static)
    executor = DeviceExecutor(directory.manifest, layer, stages, together=4)
    groups = [tasks[:4], tasks[4:], tasks[:1], [tasks[1], tasks[6]], tasks[3:5]]
    first: dict[int, Outcome] = {}
    for group in groups:
        for (_, seed), outcome in zip(group, executor.run_together(group, plan), strict=True):
            assert same(outcome, first.setdefault(seed, outcome))
            assert outcome.notes == ()
    executor.close()
    assert layer.alive == 0


def test_images_that_share_a_batch_are_restored_at_once(directory: EngineDirectory, layer: FakeLayer) -> None:
    pixels = photo(1, 48, 64)
    plan = planned(directory, pixels, crops=2)
    stages = fake_stages(layer, directory, batches=("1", "4"), sizes=("48x64",))
    executor = DeviceExecutor(directory.manifest, layer, stages, form=Form.NONE, together=4)
    executor.run_together([(pixels, seed) for seed in range(4)], plan)
    steps = directory.manifest.schedule.steps
    assert layer.log.count("unet") == steps
    assert layer.log.count("vit") == 2  # eight crops, four at a time
    executor.run_together([(pixels, 0)], plan)
    assert layer.log.count("unet") == 2 * steps
    assert layer.log.count("vit") == 2 + 1


def test_a_build_that_takes_fewer_at_a_time_says_so_and_how_to_change_it(
    directory: EngineDirectory, host: HostExecutor, layer: FakeLayer
) -> None:
    pixels = photo(1, 48, 64)
    plan = planned(directory, pixels, crops=2)
    executor = DeviceExecutor(directory.manifest, layer, fake_stages(layer, directory), together=4)
    outcomes = executor.run_together([(pixels, seed) for seed in range(3)], plan)
    for seed, outcome in enumerate(outcomes):
        check_close(outcome, host.run(to_plane(pixels), plan, seed))
        assert outcome.notes == (
            "restored 1 at a time, not 4: this build's U-Net takes no more images of 64×48; build again with: "
            "iqa-build --sizes 48x64 --batch 4",
        )


@pytest.mark.parametrize("capturing", [False, True], ids=["while launching", "while capturing"])
def test_the_next_image_comes_in_while_another_is_computed_with(
    directory: EngineDirectory, layer: FakeLayer, capturing: bool
) -> None:
    pixels, executor = [photo(seed, 48, 64) for seed in range(2)], device(layer, directory)
    plan = planned(directory, pixels[0], crops=1)
    expected = [executor.run(picture, plan, 3) for picture in pixels]
    executor.graphs.clear()
    if capturing:
        executor.run(pixels[0], plan, 3)  # the next of this shape is captured
    reached, go_on = threading.Event(), threading.Event()

    def hold(_launches: int) -> None:
        if layer.driver.capturing is capturing:
            reached.set()
            assert go_on.wait(30)

    layer.watch, before = hold, layer.brought
    with ThreadPoolExecutor(2) as threads:
        one = threads.submit(executor.run, pixels[0], plan, 3)
        assert reached.wait(30)
        other = threads.submit(executor.run, pixels[1], plan, 3)
        deadline = time.monotonic() + 30
        while layer.brought < before + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        came_in = layer.brought == before + 2
        go_on.set()
        assert same(one.result(), expected[0])
        assert same(other.result(), expected[1])
    assert came_in, "the second image waited for the first"
    layer.watch = lambda launches: None
    executor.close()
    assert layer.alive == 0


def test_an_image_that_waits_does_not_take_the_memory_of_one_that_fits(
    directory: EngineDirectory, layer: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it make that one's batches smaller."""
    small, large = photo(1, 32, 32), photo(2, 128, 128)
    plans = [planned(directory, picture, crops=4, mode=Mode.CROP) for picture in (small, large)]
    executor = device(layer, directory)
    expected = executor.run(small, plans[0], 3)
    layer.capacity = layer.held + 1000
    bring, came_in, go_on = layer.bring, threading.Event(), threading.Event()

    def hold(address: int, values: Any) -> None:
        bring(address, values)
        if values.nbytes >= large.nbytes and not came_in.is_set():
            came_in.set()
            assert go_on.wait(30)

    monkeypatch.setattr(layer, "bring", hold)
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(executor.run, large, plans[1], 3)
        assert came_in.wait(30)  # what it needed, the buffers of the small one have been given up for
        fits = threads.submit(executor.run, small, plans[0], 3)
        time.sleep(0.5)  # enough to fail for lack of memory; on a machine too slow for that the test shows less
        go_on.set()
        assert same(fits.result(60), expected)
        assert fits.result().notes == ()
        with contextlib.suppress(DeviceMemoryError):
            waiting.result(60)  # this one may have to run in smaller batches, or not at all
    executor.close()
    assert layer.alive == 0


def test_seeds_that_are_too_many_for_the_memory_run_fewer_at_a_time_and_keep_their_bits(
    directory: EngineDirectory, layer: FakeLayer, driver: Driver
) -> None:
    pixels = photo(2, 96, 96)
    plan = planned(directory, pixels, crops=3)

    def opened(on: FakeLayer) -> DeviceExecutor:
        return DeviceExecutor(directory.manifest, on, fake_stages(on, directory), together=4)

    tasks = [(pixels, seed) for seed in range(4)]
    together = opened(layer)
    expected, needed = together.run_together(tasks, plan), layer.held
    together.close()
    alone = opened(FakeLayer(driver))
    alone.run_together(tasks[:1], plan)
    assert layer.held < needed
    needed = layer.held
    alone.close()
    short = FakeLayer(driver, capacity=needed + 1000)
    executor = opened(short)
    for mine, theirs in zip(executor.run_together(tasks, plan), expected, strict=True):
        assert same(mine, theirs)
        assert mine.notes == theirs.notes
    executor.close()
    assert short.alive == 0


def test_seeds_of_one_image_bring_it_once(
    directory: EngineDirectory, layer: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, sizes, bring = photo(2, 48, 64), [], layer.bring

    def counted(address: int, values: Any) -> None:
        sizes.append(values.nbytes)
        bring(address, values)

    monkeypatch.setattr(layer, "bring", counted)
    executor = DeviceExecutor(directory.manifest, layer, fake_stages(layer, directory), together=4)
    executor.run_together([(pixels, seed) for seed in range(4)], planned(directory, pixels))
    assert sizes == [pixels.nbytes]


def test_memory_that_cannot_be_freed_is_no_reason_to_hang(
    directory: EngineDirectory, layer: FakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels, executor = photo(2, 48, 64), device(layer, directory)
    plan = planned(directory, pixels)
    executor.run(pixels, plan, 0)

    def gone(address: int) -> None:
        raise BackendError("fake GPU failed: it has fallen off the bus")

    monkeypatch.setattr(layer, "free", gone)
    executor.close()
    with pytest.raises(UsageError, match="closed"):
        executor.run(pixels, plan, 0)


def test_closing_waits_for_images_that_have_come_in_and_refuses_them(
    directory: EngineDirectory, layer: FakeLayer
) -> None:
    pixels, executor = photo(2, 48, 64), device(layer, directory)
    plan = planned(directory, pixels, crops=1)
    expected = executor.run(pixels, plan, 3)
    reached, go_on = threading.Event(), threading.Event()

    def hold(_launches: int) -> None:
        reached.set()
        assert go_on.wait(30)

    layer.watch = hold
    with ThreadPoolExecutor(3) as threads:
        running = threads.submit(executor.run, pixels, plan, 3)
        assert reached.wait(30)
        late = threads.submit(executor.run, pixels, plan, 3)
        closing = threads.submit(executor.close)
        go_on.set()
        closing.result(30)
        assert same(running.result(), expected)
        refusal = late.exception()
        if refusal is None:  # its turn came before the closing
            assert same(late.result(), expected)
        else:
            assert "closed" in str(refusal)
    assert layer.left == 0


# ------------------------------------------------------------------------------------------- waits that are left out


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    "left_out",
    [
        None,
        ("executor", "_run"),
        ("executor", "_download_restored"),
        ("executor", "_settle"),
        ("memory", "get"),
        ("bindings", "_make_room"),
        ("graphs", "_captured"),
    ],
    ids=lambda where: ".".join(where) if where else "none",
)
def test_a_wait_that_is_left_out_shows(
    directory: EngineDirectory, driver: Driver, monkeypatch: pytest.MonkeyPatch, left_out: tuple[str, str] | None
) -> None:
    """Each wait of the executor is there for something, and these tests would notice if it were gone."""

    class Hasty(FakeLayer):
        def synchronise(self) -> None:
            caller = sys._getframe(1).f_code
            if (Path(caller.co_filename).stem, caller.co_name) != left_out:
                super().synchronise()

    monkeypatch.setattr(bindings_module, "MAX_LOOPS", 1)
    small, large = photo(1, 40, 48), photo(2, 70, 118)

    def outcomes(layer: FakeLayer) -> list[Outcome]:
        executor = device(layer, directory, batches=("1", "2"), sizes=("32x32", "32x32:64x64:96x128"))
        # Without a graph, captured, with buffers that move, and again.
        found = [
            executor.run(pixels, planned(directory, pixels, mode=mode, crops=3, steps=3), 7)
            for pixels in (small, small, large, small)
            for mode in (Mode.CROP, Mode.WHOLE, Mode.TILE)
        ]
        launched = len(layer.log)

        def interrupt(launches: int) -> None:
            if launches == launched + 5:
                raise KeyboardInterrupt

        layer.watch = interrupt
        with pytest.raises(KeyboardInterrupt):
            executor.run(small, planned(directory, small, mode=Mode.CROP, crops=3), 7, form=Form.NONE)
        executor.close()
        return found

    expected = outcomes(FakeLayer(driver))
    try:
        shows = not all(map(same, outcomes(Hasty(driver)), expected))
    except (BackendError, AssertionError):
        shows = True
    problems = driver.problems()
    assert (shows or bool(problems)) is (left_out is not None)
