"""What two forms of a stage are compared on, and how far they may differ."""

from pathlib import Path

import numpy as np
import pytest

from diffiqa.engine.manifest import StageName, open_engine
from diffiqa.export.compare import draw_inputs
from diffiqa.export.pytorch import _tolerance

from ..tiny import STAGES


@pytest.mark.parametrize("name", STAGES)
def test_inputs_depend_on_the_seed_and_on_nothing_else(tiny_engine: Path, name: StageName) -> None:
    directory = open_engine(tiny_engine)
    stage = directory.manifest.stage(name)
    assert stage is not None
    one, same, other = (draw_inputs(directory, stage, seed) for seed in (1, 1, 2))
    assert list(one) == [spec.name for spec in stage.inputs]
    for key, values in one.items():
        np.testing.assert_array_equal(values, same[key])
        assert key == "noise_level" or not np.array_equal(values, other[key])


def test_the_unet_gets_the_ends_of_the_loop_and_the_heads_images_with_less_and_less_left(tiny_engine: Path) -> None:
    directory = open_engine(tiny_engine)
    unet, vda = (directory.manifest.stage(name) for name in (StageName.UNET, StageName.VDA))
    assert unet is not None
    assert vda is not None
    levels = directory.manifest.schedule.coefficients.noise_level
    feed = draw_inputs(directory, unet, 1)
    np.testing.assert_array_equal(feed["noise_level"], np.array([[levels[0]], [levels[-1]]], np.float32))
    first, last = np.abs(feed["y"] - feed["condition"]).mean(axis=(1, 2, 3))
    assert first < 0.3 * last
    (images,) = draw_inputs(directory, vda, 1).values()
    assert np.abs(images).max() <= 1
    changed = np.abs(images[0] - images[0, 0]).mean(axis=(1, 2, 3))
    assert (np.diff(changed) > 0.01).all()


def test_a_limit_grows_with_the_values_and_never_falls_to_nothing() -> None:
    assert [_tolerance({"maps": 1e-5}, "maps", largest) for largest in (100, 2)] == pytest.approx([1e-3, 2e-5])
    assert _tolerance({"score": 1e-5}, "score", 0) == pytest.approx(1e-7)  # a head may answer 0
