"""`figures/gpu/kernel_rates.py`, as far as it goes without a GPU: what is launched, how often, and what that moves."""

import numpy as np

from diffiqa.figures.gpu import kernel_rates
from diffiqa.kernels.launch import CROP, Launch

from ..fake_device import FakeLayer, device_memory
from ..fakecuda.driver import Driver

# By kernel: which arguments are addresses of images, and of a loop's progress.
BUFFERS = {"noise_init": (0, 1, 5), "sampler_step": (0, 1, 2, 7), "normalise_pad": (0, 1), "gather_crops": (2,)}


def test_every_kernel_is_timed_as_a_graph_of_many_launches(layer: FakeLayer) -> None:
    rows = {row["kernel"]: row for row in kernel_rates.measure(layer, 2, 40, 48, crop=32, touched=0)}
    pixels, cut = 2 * 3 * 40 * 48, 2 * 3 * 32 * 32
    assert {name: row["bytes"] for name, row in rows.items()} == {
        "noise_init_f32": 4 * pixels,
        "sampler_step_f32": 12 * pixels,  # state and noise read, state written
        "normalise_pad_f32": 5 * pixels // 2,  # one image
        "gather_crops_f32": 8 * cut,
        "noise_init_f16": 6 * pixels,
        "sampler_step_f16": 12 * pixels,  # the noise is half as much, and the state is also written as half
        "normalise_pad_f16": 3 * pixels // 2,
        "gather_crops_f16": 6 * cut,
    }
    assert all(len(row["seconds"]) == kernel_rates.ROUNDS and row["gb_per_second"] > 0 for row in rows.values())
    assert len(layer.graphs) == len(rows)
    assert all(kernel_rates.LAUNCHES <= graph.work < 2 * kernel_rates.LAUNCHES for graph in layer.graphs)
    assert layer.alive == 0


class Watched(FakeLayer):
    """Keeps what is captured, with the crops that it cuts."""

    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self.launches: list[list[Launch]] = []
        self.crops: list[bytes] = []

    def begin_capture(self) -> None:
        super().begin_capture()
        self.launches.append([])

    def launch(self, launch: Launch) -> None:
        if self.driver.capturing:
            self.launches[-1].append(launch)
            if launch.kernel.startswith("gather_crops"):
                self.crops.append(device_memory(int(launch.arguments[1]), 2 * CROP.itemsize).tobytes())
        super().launch(launch)


def test_memory_is_not_met_again_before_more_was_touched_than_caches_hold(driver: Driver) -> None:
    layer, touched = Watched(driver), 600_000
    rows = {row["kernel"]: row for row in kernel_rates.measure(layer, 2, 40, 72, crop=32, touched=touched)}
    assert len(rows) == len(layer.launches)
    for captured in layer.launches:
        kernel, sets = captured[0].kernel, len({launch.arguments for launch in captured})
        assert sets > 1
        assert sets * rows[kernel]["bytes"] >= touched
        assert len(captured) >= kernel_rates.LAUNCHES
        assert len(captured) % sets == 0
        assert captured == captured[:sets] * (len(captured) // sets)
        for index in BUFFERS[kernel[: -len("_f32")]]:  # no set shares them with another
            assert len({launch.arguments[index] for launch in captured[:sets]}) == sets
        if kernel.startswith("sampler_step"):  # the last step draws no noise, and after it there is nothing to do
            assert int(captured[0].arguments[-3]) > len(captured) // sets
        if kernel.startswith("gather_crops"):
            cut = {row for rows in layer.crops[:sets] for row in np.frombuffer(rows, CROP).tolist()}
            assert len(cut) == 2 * sets
            del layer.crops[: len(captured)]
    assert layer.alive == 0
