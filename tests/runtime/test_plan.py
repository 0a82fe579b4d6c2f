import dataclasses
import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from diffiqa.engine.manifest import Manifest, read_manifest
from diffiqa.runtime.plan import OVERLAP, TILE, TILE_STEP, Plan, make_plan
from diffiqa.runtime.results import Mode, Options


@pytest.fixture(scope="module")
def manifest(tiny_engine: Path) -> Manifest:
    """A manifest with the real crop size; plans read nothing else that depends on the model."""
    m = read_manifest(tiny_engine)
    return dataclasses.replace(m, alignment=16, crop=dataclasses.replace(m.crop, size=224))


def coverage(plan: Plan) -> npt.NDArray[np.float64]:
    total = np.zeros(plan.padded)
    for w in plan.windows:
        weight = plan.blend_weight(w)
        total[w.top : w.top + w.height, w.left : w.left + w.width] += 1 if weight is None else weight
    return total


def test_a_whole_image_is_one_window_of_its_padded_size(manifest: Manifest) -> None:
    plan = make_plan(250, 233, manifest, Options())
    assert plan.mode is Mode.WHOLE
    assert plan.padded == plan.noise_size == (256, 240)
    assert [(w.top, w.left, w.height, w.width) for w in plan.windows] == [(0, 0, 256, 240)]


def test_an_image_above_the_pixel_budget_is_tiled(manifest: Manifest) -> None:
    assert make_plan(1024, 1024, manifest, Options(pixel_budget=1024 * 1024)).mode is Mode.WHOLE
    assert make_plan(1024, 1040, manifest, Options(pixel_budget=1024 * 1024)).mode is Mode.TILE


@pytest.mark.parametrize("seed", [4, 5])
def test_every_pixel_a_crop_reads_is_restored_by_all_tiles_that_could(manifest: Manifest, seed: int) -> None:
    generator = np.random.default_rng(seed)
    for _ in range(10):
        height, width = generator.integers(300, 3000, 2).tolist()
        few = make_plan(height, width, manifest, Options(mode=Mode.TILE, crops=5))
        every = make_plan(height, width, manifest, Options(mode=Mode.TILE, crops=400))
        some, total = coverage(few), coverage(every)
        assert total.min() > 0
        for crop in few.crops:  # so a crop's pixels do not depend on which other crops are asked for
            here = np.s_[crop.top : crop.top + 224, crop.left : crop.left + 224]
            np.testing.assert_array_equal(some[here], total[here])


def test_neighbouring_tiles_overlap_enough_and_start_on_the_noise_grid(manifest: Manifest) -> None:
    for length in (513, 600, 960, 961, 1000, 2222, 4096, 6000):
        plan = make_plan(length, 300, manifest, Options(mode=Mode.TILE, crops=60))
        tops = sorted({w.top for w in plan.windows})
        assert tops[0] == 0
        assert tops[-1] + TILE == plan.padded[0]
        assert all(top % TILE_STEP == 0 for top in tops)
        assert all(a + TILE - b >= OVERLAP for a, b in itertools.pairwise(tops))


def test_tiles_that_no_crop_reads_are_not_restored(manifest: Manifest) -> None:
    plan = make_plan(4000, 6000, manifest, Options(crops=4))
    every = make_plan(4000, 6000, manifest, Options(crops=1000))
    assert len(plan.windows) < len(every.windows) / 4


def test_crop_mode_restores_each_crop_with_noise_of_its_own(manifest: Manifest) -> None:
    plan = make_plan(500, 500, manifest, Options(mode=Mode.CROP, crops=4))
    assert plan.noise_size == (224, 224)
    assert [w.lane for w in plan.windows] == [0, 1, 2, 3]
    assert [plan.readers(w) for w in plan.windows] == [[0], [1], [2], [3]]
    assert {plan.noise_origin(w) for w in plan.windows} == {(0, 0)}


def test_blend_weights_fade_only_towards_neighbours(manifest: Manifest) -> None:
    plan = make_plan(600, 500, manifest, Options(mode=Mode.TILE))
    first, last = plan.windows[0], plan.windows[-1]
    top, bottom = plan.blend_weight(first), plan.blend_weight(last)
    assert top is not None
    assert bottom is not None
    assert (top[0] == 1).all()
    assert (bottom[-1] == 1).all()
    assert (top[-1] < 0.01).all()
    assert (bottom[0] < 0.01).all()
