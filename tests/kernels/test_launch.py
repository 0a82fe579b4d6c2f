"""launch.py: grids, arguments and tables as data; what the kernels do not check is refused here."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from diffiqa.engine.schedule import Schedule
from diffiqa.kernels.launch import (
    Launch,
    SamplerBuffers,
    Storage,
    Window,
    crop_table,
    gather_crops,
    normalise_pad,
    source_table,
    step_table,
    window_table,
)

COEFFICIENTS = vars(Schedule(steps=6).coefficients)


def buffers(**changes: Any) -> SamplerBuffers:
    names = ("state", "y", "noise", "noise_level", "taps", "windows", "table", "progress")
    addresses = {name: 4096 * (i + 1) for i, name in enumerate(names)}
    fields: dict[str, Any] = {
        "storage": Storage.F16,
        "batch": 2,
        "height": 32,
        "width": 48,
        "steps": 50,
        "start": 50,
        **addresses,
    }
    return SamplerBuffers(**{**fields, **changes})


def test_grid_fits_the_planes_and_cudas_limits() -> None:
    cases: list[tuple[int, int, int, tuple[int, int]]] = [
        (1, 16, 16, (1, 3)),
        (1, 224, 224, (49, 3)),
        (64, 224, 224, (49, 192)),
        (1, 512, 384, (192, 3)),
        (1, 4096, 4096, (1024, 3)),
        (40_000, 16, 16, (1, 65_535)),
    ]
    for batch, height, width, grid in cases:
        loop = buffers(batch=batch, height=height, width=width)
        for launch in (loop.begin(), loop.step()):
            assert (launch.grid, launch.block) == (grid, 256)


@pytest.mark.parametrize("storage", Storage)
def test_sampler_arguments_stand_in_the_kernels_order(storage: Storage) -> None:
    loop = buffers(storage=storage, given=4096 * 9, share=4096 * 10, planes=5, silent=2, clip=False)
    step, begin = loop.step(), loop.begin()
    assert step.kernel == f"sampler_step_{storage}"
    assert list(step.arguments) == [*(4096 * i for i in range(1, 9)), 2, 5, 32, 48, 50, 2, np.inf]
    assert buffers().step().arguments[-1] == 1
    assert begin.kernel == f"noise_init_{storage}"
    assert list(begin.arguments) == [*(4096 * i for i in (1, 2, 4, 6, 7, 8, 9, 10)), 2, 5, 32, 48, 50, 50, 0, 1]
    assert list(buffers(shares=(0.5, 0.75)).begin().arguments)[-2:] == [0.5, 0.75]
    assert step.grid[1] == begin.grid[1] == 10


def test_a_launch_is_a_value() -> None:
    assert buffers().step() == buffers().step()
    assert buffers().step() != buffers(state=1 << 20).step()


def test_rejects_buffers_the_kernels_cannot_use() -> None:
    cases: list[tuple[dict[str, int], str]] = [
        ({"width": 50}, "multiples of 4"),
        ({"batch": 0}, "0 × 48×32"),
        ({"height": 0}, "48×0"),
        ({"height": 2**16, "width": 2**15}, "below 2³¹"),
        ({"state": 4100}, "state is at address 0x1004"),
        ({"noise": 8}, "noise is at address 0x8"),
        ({"taps": 4}, "taps"),
        ({"y": 4096}, "share memory"),
    ]
    for change, says in cases:
        with pytest.raises(ValueError, match=says):
            buffers(**change)


def test_float32_state_may_be_the_input() -> None:
    shared = buffers(storage=Storage.F32, y=4096)
    assert shared.step().arguments[0] == shared.step().arguments[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"padded": (16, 18)}, "multiples of 4"),
        ({"size": (17, 5)}, "does not fit"),
        ({"size": (0, 5)}, "does not fit"),
        ({"row_bytes": 14}, "cannot be 14 bytes"),
        ({"plane": 8}, "plane is at address"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_rejects_images_that_do_not_fit(change: dict[str, Any], says: str) -> None:
    fields: dict[str, Any] = {"image": 1, "size": (9, 5), "row_bytes": 15, "plane": 256, "padded": (16, 16)}
    launch: Launch = normalise_pad(**fields, storage=Storage.F16)
    assert launch.arguments[4].dtype == np.int64
    with pytest.raises(ValueError, match=says):
        normalise_pad(**{**fields, **change}, storage=Storage.F16)


def test_rejects_crops_that_are_not_whole_quads() -> None:
    assert gather_crops(0, 4, (64, 64), 0, 9, 0, (32, 32), Storage.F16).grid == (1, 108)
    with pytest.raises(ValueError, match="crop"):
        gather_crops(0, 4, (64, 64), 0, 9, 0, (32, 30), Storage.F16)
    with pytest.raises(ValueError, match="source image"):
        gather_crops(0, 4, (64, 66), 0, 9, 0, (32, 32), Storage.F16)


def test_step_table_holds_coefficients_and_tap_slots() -> None:
    table = step_table(COEFFICIENTS, (0, 5, 2), (1, 3, 4, 7, 8, 9))
    assert table["counter"].tolist() == [1, 3, 4, 7, 8, 9]
    assert table["tap"].tolist() == [0, -1, 2, -1, -1, 1]
    for name, column in COEFFICIENTS.items():
        np.testing.assert_array_equal(table[name], column)


@pytest.mark.parametrize("taps", [(6,), (-1,), (1, 1)], ids=str)
def test_rejects_taps_that_are_no_step_or_twice_the_same(taps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="rows from 0 to 5"):
        step_table(COEFFICIENTS, taps, range(6))


def test_window_table_splits_the_seed() -> None:
    table = window_table([Window(0xFEDCBA9876543210, (64, 80), top=3, left=4, lane=9)], (16, 16))
    assert table.item() == (0x76543210, 0xFEDCBA98, 9, 64, 80, 3, 4, 0)


def test_rejects_noise_windows_outside_their_image() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seed": 2**64}, "seed"),
        ({"seed": -1}, "seed"),
        ({"lane": 2**32}, "lane"),
        ({"size": (64, 66)}, "aligned to 4"),
        ({"left": 2}, "aligned to 4"),
        ({"size": (2**17, 2**17)}, "noise counter"),
        ({"top": 50}, "leaves its image"),
        ({"left": 52}, "leaves its image"),
        ({"top": -1}, "leaves its image"),
    ]
    for change, says in cases:
        window = Window(1, (64, 64), top=48, left=48)
        assert len(window_table([window], (16, 16))) == 1
        with pytest.raises(ValueError, match=says):
            window_table([dataclasses.replace(window, **change)], (16, 16))


@pytest.mark.parametrize("crop", [(2, 0, 0), (-1, 0, 0), (0, 33, 0), (0, 0, 33), (0, -1, 0)], ids=str)
def test_rejects_crops_outside_their_image(crop: tuple[int, int, int]) -> None:
    assert len(crop_table([(1, 32, 32)], 2, (64, 64), (32, 32))) == 1
    with pytest.raises(ValueError, match="crop of"):
        crop_table([crop], 2, (64, 64), (32, 32))


def test_rejects_sources_that_are_not_aligned() -> None:
    assert source_table([(256, Storage.F16)]).item() == (256, 1, 0)
    with pytest.raises(ValueError, match="0x102"):
        source_table([(258, Storage.F16)])
