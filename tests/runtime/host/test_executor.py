"""The host's execution of plans: against the plain PyTorch reference, and against itself in other modes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffiqa.engine.manifest import Manifest, open_engine
from diffiqa.engine.noise import NoiseField
from diffiqa.engine.pixels import to_plane
from diffiqa.engine.schedule import Kind
from diffiqa.model.network import DiffV2IQA
from diffiqa.runtime import plan as plan_module
from diffiqa.runtime.executor import Cancelled, FloatArray, Outcome
from diffiqa.runtime.host.executor import BoundDenoiser, HostExecutor
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.plan import Window, make_plan, sampling_of
from diffiqa.runtime.results import Mode, Options, Picture

from ...tiny import photo


@pytest.fixture(scope="module")
def setup(tiny_engine: Path) -> tuple[Manifest, HostExecutor]:
    directory = open_engine(tiny_engine)
    return directory.manifest, HostExecutor(directory.manifest, load_stages(directory, OnnxRuntime(threads=1)))


def run(
    setup: tuple[Manifest, HostExecutor],
    pixels: Picture,
    seed: int = 0,
    **options: object,
) -> Outcome:
    manifest, executor = setup
    plane = to_plane(pixels)
    plan = make_plan(plane.shape[1], plane.shape[2], manifest, Options(**options))  # type: ignore[arg-type]
    return executor.run(plane, plan, seed)


@pytest.mark.parametrize(("height", "width", "seed"), [(32, 32, 0), (45, 70, 1), (67, 41, 2**40 + 3)])
def test_scores_are_those_of_the_pytorch_reference(
    setup: tuple[Manifest, HostExecutor], tiny_model: DiffV2IQA, height: int, width: int, seed: int
) -> None:
    pixels = photo(seed % 97, height, width)
    outcome = run(setup, pixels, seed, crops=5)
    expected = tiny_model.score(torch.from_numpy(to_plane(pixels))[None], seed, crops=5)
    assert expected.vcg is not None
    assert expected.vda is not None
    vcg = np.mean([v.vcg.score for v in outcome.verdicts if v.vcg])
    vda = np.mean([v.vda.score for v in outcome.verdicts if v.vda])
    # float32 in both, summed in another order by other kernels: a few units of the last place of scores near 1
    assert vcg == pytest.approx(expected.vcg.item(), abs=2e-6)
    assert vda == pytest.approx(expected.vda.item(), abs=2e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"steps": 2, "sampler": "ddim"}, {"steps": 3, "sampler": "image+ancestral"}],
    ids=["trained", "re-noised", "from the image"],
)
def test_restored_planes_are_those_of_the_pytorch_reference(
    setup: tuple[Manifest, HostExecutor], tiny_model: DiffV2IQA, options: dict[str, Any]
) -> None:
    pixels = photo(5, 48, 64)
    outcome = run(setup, pixels, seed=9, **options)
    sampling = sampling_of(setup[0], Options(**options))
    expected = tiny_model.restore(torch.from_numpy(to_plane(pixels))[None], 9, sampling)
    assert set(outcome.planes) == set(expected)
    for kind, plane in outcome.planes.items():
        # Two steps divide what rounding left by a smaller √ᾱ than six do.
        np.testing.assert_allclose(plane, expected[kind][0].numpy(), atol=2e-4 if options else 2e-5)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tile as on large images, at a size the tests can afford."""
    monkeypatch.setattr(plan_module, "TILE", 96)
    monkeypatch.setattr(plan_module, "OVERLAP", 32)


def test_a_small_image_in_tile_mode_is_bit_for_bit_the_whole_one(setup: tuple[Manifest, HostExecutor]) -> None:
    pixels = photo(6, 50, 60)
    whole, tile = run(setup, pixels, 3), run(setup, pixels, 3, mode=Mode.TILE)
    np.testing.assert_array_equal(whole.crops, tile.crops)


@pytest.mark.usefixtures("small_tiles")
def test_a_crop_scores_the_same_whichever_other_crops_are_scored(setup: tuple[Manifest, HostExecutor]) -> None:
    pixels = photo(7, 150, 180)  # two tiles down, three across
    few, many = run(setup, pixels, crops=4, mode=Mode.TILE), run(setup, pixels, crops=12, mode=Mode.TILE)
    corner = few.verdicts[0].vcg, many.verdicts[0].vcg  # both grids start in the top-left corner
    assert corner[0] is not None
    assert corner[1] is not None
    assert corner[0].score == corner[1].score


@pytest.mark.usefixtures("small_tiles")
def test_overlapping_tiles_blend_into_a_plane_close_to_the_whole_one(setup: tuple[Manifest, HostExecutor]) -> None:
    pixels = photo(8, 160, 64)
    whole, tile = run(setup, pixels, crops=9), run(setup, pixels, crops=9, mode=Mode.TILE)
    assert np.isfinite(tile.crops).all()
    # Same noise, same network: only its border effects and attention span differ. Other noise differs by ≈ 0.5.
    other = run(setup, pixels, seed=1, crops=9)
    assert np.abs(tile.crops - whole.crops).mean() < 0.1 * np.abs(other.crops - whole.crops).mean()


def test_crop_mode_is_scoring_each_crop_as_an_image_of_its_own(setup: tuple[Manifest, HostExecutor]) -> None:
    pixels = photo(9, 32, 32)
    whole, crop = run(setup, pixels, 4), run(setup, pixels, 4, mode=Mode.CROP)
    np.testing.assert_array_equal(whole.crops, crop.crops)


def test_a_workspace_is_reused_for_images_of_other_sizes_without_a_trace(setup: tuple[Manifest, HostExecutor]) -> None:
    first = run(setup, photo(10, 40, 52), 5)
    run(setup, photo(11, 64, 32), 6)
    again = run(setup, photo(10, 40, 52), 5)
    np.testing.assert_array_equal(first.crops, again.crops)
    assert first.verdicts[0].vda is not None
    assert again.verdicts[0].vda is not None
    assert first.verdicts[0].vda.score == again.verdicts[0].vda.score


def test_a_cancelled_plan_ends_at_its_next_step(setup: tuple[Manifest, HostExecutor]) -> None:
    manifest, executor = setup
    plane = to_plane(photo(12, 32, 32))
    answers = iter([False, False, True])
    with pytest.raises(Cancelled):
        executor.run(plane, make_plan(32, 32, manifest, Options()), 0, lambda: next(answers))


@pytest.mark.parametrize("mode", [Mode.WHOLE, Mode.CROP])
def test_who_looks_on_sees_every_state_and_map_and_changes_nothing(
    setup: tuple[Manifest, HostExecutor], mode: Mode
) -> None:
    manifest, executor = setup
    plane = to_plane(photo(13, 40, 52))
    plan = make_plan(40, 52, manifest, Options(mode=mode, crops=2))
    shown: list[tuple[Window, FloatArray]] = []
    seen = executor.run(plane, plan, 5, show=lambda window, values: shown.append((window, values.copy())))
    outcome = executor.run(plane, plan, 5)
    np.testing.assert_array_equal(seen.crops, outcome.crops)
    each = len(plan.sampling.steps) + 1
    states, maps = shown[: len(plan.windows) * each], shown[len(plan.windows) * each :]
    assert [window for window, _ in states] == [window for window in plan.windows for _ in range(each)]
    first = plan.windows[0]
    noise = np.empty((3, first.height, first.width), np.float32)
    field = NoiseField(5, plan.noise_size, window=noise.shape[1:], top=0, left=0, lane=first.lane)
    field.fill(manifest.schedule.steps, noise)
    np.testing.assert_array_equal(states[0][1], noise)
    for kind, found in ((Kind.T1, states[:each]), (Kind.Y0, states[each - 1 : each])):
        tapped = outcome.planes.get(kind, outcome.crops[0, manifest.kinds.index(kind)])
        assert any(np.array_equal(state[:, :40, :52], tapped) for _, state in found)
    for (window, score_map), crop, verdict in zip(maps, plan.crops, outcome.verdicts, strict=True):
        assert window == Window(crop.top, crop.left, plan.crop_size, plan.crop_size)
        assert verdict.vcg
        np.testing.assert_array_equal(score_map, verdict.vcg.score_map)


def test_a_denoiser_runs_until_it_is_cancelled() -> None:
    """Other rooms use one that nobody cancels."""
    levels: list[float] = []
    stage: Any = SimpleNamespace(bind=lambda inputs, _outputs: lambda: levels.append(inputs["noise_level"].item()))
    denoiser = BoundDenoiser(stage, 32, 48)
    denoiser(0.5)

    def cancel() -> None:
        raise Cancelled

    denoiser.watch = cancel
    with pytest.raises(Cancelled):
        denoiser(0.25)
    assert levels == [0.5]
