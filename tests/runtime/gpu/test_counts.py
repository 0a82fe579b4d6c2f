"""What one image costs beside the networks, in calls that the driver gets: numbers that need no GPU."""

from pathlib import Path

import pytest

from diffiqa import cli
from diffiqa.engine.manifest import EngineDirectory, open_engine
from diffiqa.runtime.gpu.executor import DeviceExecutor
from diffiqa.runtime.gpu.graphs import Form
from diffiqa.runtime.results import Mode

from ...fake_device import FakeLayer, fake_stages
from ...fakecuda.driver import Driver
from ...tiny import photo
from .test_executor import planned, small_tiles  # noqa: F401 — a fixture

# In this order: the device's graphs; kernels and engines that are in none; copies; waits of the host; allocations.
TABLE = """\
| mode | crops | images at once | a graph holds | graphs | launches beside | uploads | downloads | waits | allocations |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
| whole | 1 | 1 | loop | 2 | 4 | 8 | 6 | 2 | 0 |
| whole | 8 | 1 | loop | 3 | 5 | 10 | 12 | 2 | 0 |
| whole | 1 | 4 | loop | 2 | 7 | 8 | 6 | 2 | 0 |
| crop | 8 | 1 | loop | 4 | 9 | 19 | 12 | 2 | 0 |
| tile | 8 | 1 | loop | 4 | 7 | 16 | 14 | 4 | 0 |
| whole | 1 | 1 | step | 7 | 5 | 8 | 6 | 2 | 0 |
| whole | 1 | 1 | none | 0 | 20 | 8 | 6 | 2 | 0 |
"""
GROUPS = [("graph",), ("kernel", "stage"), ("upload",), ("download",), ("wait",), ("device memory", "pinned memory")]


def row(driver: Driver, directory: EngineDirectory, mode: Mode, form: Form, crops: int, images: int) -> list[str]:
    """Return the row of an image of 118×70, after the runs that allocate and capture."""
    pictures = [photo(i, 70, 118) for i in range(images)]
    sizes = {Mode.WHOLE: "72x120", Mode.TILE: "72x96", Mode.CROP: "32x32"}
    stages = fake_stages(FakeLayer(driver), directory, batches=("1", "4"), sizes=(sizes[mode],))
    executor = DeviceExecutor(directory.manifest, driver.layers[-1], stages, form=form, together=images)
    plan = planned(directory, pictures[0], mode=mode, crops=crops)
    counts = []
    for _ in range(5):
        before = [driver.count(*group) for group in GROUPS]
        executor.run_together([(picture, 1) for picture in pictures], plan, pictures=False)
        counts.append([driver.count(*group) - old for group, old in zip(GROUPS, before, strict=True)])
    assert counts[3] == counts[4], "a run costs what the one before did"
    executor.close()
    return [str(mode), str(crops), str(images), str(form), *map(str, counts[4])]


@pytest.mark.usefixtures("small_tiles")
def test_an_image_costs_these_calls_and_allocates_nothing(tiny_engine: Path, driver: Driver) -> None:
    directory = open_engine(tiny_engine)
    cases = [(Mode.WHOLE, Form.LOOP, 1, 1), (Mode.WHOLE, Form.LOOP, 8, 1), (Mode.WHOLE, Form.LOOP, 1, 4)]
    cases += [(Mode.CROP, Form.LOOP, 8, 1), (Mode.TILE, Form.LOOP, 8, 1)]
    cases += [(Mode.WHOLE, Form.STEP, 1, 1), (Mode.WHOLE, Form.NONE, 1, 1)]
    lines = ["| " + " | ".join(row(driver, directory, *case)) + " |\n" for case in cases]
    assert lines == TABLE.splitlines(keepends=True)[2:]
    docs = Path(cli.__file__).parent / "docs" / "gpu.md"
    assert TABLE in docs.read_text(encoding="utf-8")
