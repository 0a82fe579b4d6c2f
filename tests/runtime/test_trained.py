"""Taps and images as the heads were trained on, in whole scores: files of restorations, sizes, places of crops."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffiqa.engine.crops import Crop, CropPlaces, place_crops
from diffiqa.engine.manifest import EngineDirectory, Manifest, open_engine
from diffiqa.engine.pixels import ImageForm, Sides, TapForm, squash, to_plane
from diffiqa.engine.schedule import Kind
from diffiqa.errors import ConfigError
from diffiqa.model.network import DiffV2IQA
from diffiqa.runtime import plan as plan_module
from diffiqa.runtime.executor import Outcome
from diffiqa.runtime.gpu.executor import DeviceExecutor
from diffiqa.runtime.host.executor import HostExecutor
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.images import read_for, read_image
from diffiqa.runtime.plan import make_plan
from diffiqa.runtime.results import Mode, Options, Picture
from diffiqa.runtime.scorer import Scorer

from ..fake_device import FakeLayer, fake_stages
from ..model.reference import through_png
from ..tiny import photo

EXPECTED = {
    TapForm.FLOAT: lambda plane: plane,
    TapForm.CLAMPED: lambda plane: plane.clip(-1, 1),
    TapForm.PNG8: through_png,
}
SQUASHED = {"tap_form": TapForm.PNG8, "image_form": ImageForm.SQUASHED}


@pytest.fixture(scope="module")
def directory(tiny_engine: Path) -> EngineDirectory:
    return open_engine(tiny_engine)


@pytest.fixture(scope="module")
def stages(directory: EngineDirectory) -> dict[Any, Any]:
    return dict(load_stages(directory, OnnxRuntime(threads=1)))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "TILE", 96)
    monkeypatch.setattr(plan_module, "OVERLAP", 32)


def changed(directory: EngineDirectory, **fields: Any) -> Manifest:
    crop = dataclasses.replace(directory.manifest.crop, places=fields.pop("crop_places", CropPlaces.GRID))
    return dataclasses.replace(directory.manifest, crop=crop, **fields)


def as_configured(model: DiffV2IQA, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> DiffV2IQA:
    monkeypatch.setattr(model, "config", dataclasses.replace(model.config, **fields))
    return model


def check_forms(float_: Outcome, found: Outcome, form: TapForm) -> None:
    """The crops that the heads saw, and the restored pictures, are the sampler's results in that form, to the bit."""
    np.testing.assert_array_equal(found.crops[:, 0], float_.crops[:, 0])
    for before, after in zip(float_.crops[:, 1:], found.crops[:, 1:], strict=True):
        assert (np.abs(before) > 1).any()
        for plane, tapped in zip(before, after, strict=True):
            np.testing.assert_array_equal(tapped, EXPECTED[form](plane))
    assert set(found.planes) == set(float_.planes)
    for kind, plane in float_.planes.items():
        np.testing.assert_array_equal(found.planes[kind], EXPECTED[form](plane))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("form", TapForm)
def test_host_and_gpu_give_the_heads_restorations_as_trained(
    directory: EngineDirectory, stages: dict[Any, Any], layer: FakeLayer, form: TapForm, mode: Mode
) -> None:
    """In tile mode after tiles are blended: between two rounded tiles there are values that no file holds."""
    pixels, manifest = photo(3, 120, 70), changed(directory, tap_form=form)
    plan = make_plan(120, 70, manifest, Options(mode=mode, crops=5))
    as_floats, as_trained = (HostExecutor(m, stages) for m in (directory.manifest, manifest))
    check_forms(as_floats.run(to_plane(pixels), plan, 2), as_trained.run(to_plane(pixels), plan, 2), form)
    floats = DeviceExecutor(directory.manifest, layer, fake_stages(layer, directory)).run(pixels, plan, 2)
    device = DeviceExecutor(manifest, layer, fake_stages(layer, directory))
    for _ in range(2):  # without a graph, and captured
        check_forms(floats, device.run(pixels, plan, 2), form)


@pytest.mark.parametrize("form", TapForm)
def test_pytorch_scores_what_files_hold(tiny_model: DiffV2IQA, monkeypatch: pytest.MonkeyPatch, form: TapForm) -> None:
    image = torch.from_numpy(to_plane(photo(4, 45, 70)))[None]
    padded = torch.from_numpy(np.pad(image[0].numpy(), ((0, 0), (0, 3), (0, 2)), mode="reflect"))[None]
    restored = [EXPECTED[form](plane[0, :, :45, :70].numpy()) for plane in tiny_model.restore(padded, 6).values()]
    planes = torch.from_numpy(np.stack([image[0].numpy(), *restored]))[None]
    places = place_crops(CropPlaces.GRID, 45, 70, 32, 3)
    crops = [tiny_model(planes[..., c.top : c.top + 32, c.left : c.left + 32]).total for c in places]
    found = as_configured(tiny_model, monkeypatch, tap_form=form).score(image, 6, crops=3).total
    assert torch.equal(found, torch.stack(crops).mean(0))


@pytest.mark.parametrize(
    "fields",
    [
        {"tap_form": TapForm.PNG8},
        {"tap_form": TapForm.CLAMPED, "sides": Sides.RESIZED, "crop_places": CropPlaces.RANDOM},
        {"tap_form": TapForm.PNG8, "sides": Sides.RESIZED, "image_form": ImageForm.SQUASHED},
    ],
    ids=["png8", "resized, random crops", "squashed"],
)
def test_scores_are_those_of_the_pytorch_reference(
    directory: EngineDirectory,
    stages: dict[Any, Any],
    tiny_model: DiffV2IQA,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
) -> None:
    manifest = changed(directory, **fields)
    pixels, options = photo(5, 45, 70), Options(crops=4, seed=8)
    score = Scorer(manifest, stages, backend="test").score(pixels, options)
    plain = Scorer(directory.manifest, stages, backend="test").score(pixels, options)
    if "sides" in fields:
        assert (score.height, score.width) == (44, 68)
        pixels = np.asarray(Image.fromarray(pixels).resize((68, 44), Image.Resampling.BILINEAR))
    image = torch.from_numpy(to_plane(pixels))[None]
    expected = as_configured(tiny_model, monkeypatch, **fields).score(image, 8, crops=4).total.item()
    # Float32 sums in another order may round a value that lies between two bytes to the other.
    assert score.score == pytest.approx(expected, abs=2e-5)
    assert abs(score.score - plain.score) > 2e-4
    assert score.digest == plain.digest
    assert (score.engine == plain.engine) is False


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize(("height", "width"), [(45, 70), (120, 100)])
def test_whole_images_and_restorations_are_squashed_to_one_crop(
    directory: EngineDirectory, stages: dict[Any, Any], layer: FakeLayer, mode: Mode, height: int, width: int
) -> None:
    pixels, manifest = photo(6, height, width), changed(directory, **SQUASHED)
    plan = make_plan(height, width, manifest, Options(mode=mode, crops=4))
    assert (plan.squashed, plan.mode) == (True, Mode.WHOLE if mode is Mode.CROP else mode)
    found = HostExecutor(manifest, stages).run(to_plane(pixels), plan, 1)
    assert (len(found.verdicts), found.crops.shape) == (1, (1, 4, 3, 32, 32))
    np.testing.assert_array_equal(found.crops[0, 0], to_plane(squash(pixels, 32)))
    if plan.mode is Mode.WHOLE:
        as_is = make_plan(height, width, directory.manifest, Options())
        restored = HostExecutor(directory.manifest, stages).run(to_plane(pixels), as_is, 1).planes
        for row, kind in enumerate((Kind.Y0, Kind.T1, Kind.T2), start=1):
            file = np.rint((through_png(restored[kind]) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
            np.testing.assert_array_equal(found.crops[0, row], to_plane(squash(file, 32)))
    executor = DeviceExecutor(manifest, layer, fake_stages(layer, directory, batches=("1", "2")), together=2)
    for outcome in executor.run_together([(pixels, 1), (to_plane(pixels), 1)], plan):
        np.testing.assert_array_equal(outcome.crops[0, 0], found.crops[0, 0])
        # A value between two bytes may fall to the other: the device's noise has other last bits.
        assert np.abs(outcome.crops - found.crops).max() < 0.1
        assert (outcome.crops != found.crops).mean() < 0.01


def test_pictures_of_a_squashed_image_are_those_the_heads_saw(
    directory: EngineDirectory, stages: dict[Any, Any]
) -> None:
    pixels = photo(7, 40, 60)
    score = Scorer(changed(directory, **SQUASHED), stages, backend="test").score(pixels, pictures=True)
    assert score.pictures
    np.testing.assert_array_equal(score.pictures.planes[Kind.DIS], squash(pixels, 32))
    assert {plane.shape for plane in score.pictures.planes.values()} == {(32, 32, 3)}
    assert np.isfinite(score.pictures.score_map).all()
    assert score.pictures.score_map.shape == (32, 32)
    assert score.notes == ("squashed from 60×40 to 32×32",)


def test_random_crops_follow_the_first_seed(directory: EngineDirectory, stages: dict[Any, Any]) -> None:
    scorer = Scorer(changed(directory, crop_places=CropPlaces.RANDOM), stages, backend="test")
    several = scorer.score(photo(8, 60, 50), Options(crops=7, seed=3, seeds=2))
    again, other = (scorer.score(photo(8, 60, 50), Options(crops=7, seed=seed)) for seed in (3, 4))
    places = place_crops(CropPlaces.RANDOM, 60, 50, 32, 7, 3)
    assert tuple(Crop(crop.top, crop.left) for crop in several.crops) == places
    assert tuple(Crop(crop.top, crop.left) for crop in again.crops) == places
    assert again.score == scorer.score(photo(8, 60, 50), Options(crops=7, seed=3)).score != other.score


def prepared(pixels: Picture, manifest: Manifest) -> tuple[Any, tuple[str, ...]]:
    image = read_for(pixels, manifest)
    assert image.digest == read_image(pixels, min_side=1).digest
    assert not image.pixels.flags.writeable
    again = read_for(image.pixels, manifest)
    np.testing.assert_array_equal(again.pixels, image.pixels)
    return image.pixels, image.notes


def test_sides_are_resized_to_the_multiples_below_as_pillow_does(directory: EngineDirectory) -> None:
    manifest = changed(directory, alignment=16, sides=Sides.RESIZED)
    pixels = photo(1, 75, 100)
    found, notes = prepared(pixels, manifest)
    np.testing.assert_array_equal(
        found, np.asarray(Image.fromarray(pixels).resize((96, 64), Image.Resampling.BILINEAR))
    )
    assert notes == ("resized from 100×75 to 96×64",)
    floats, _ = prepared((pixels / 255).astype(np.float32), manifest)
    np.testing.assert_allclose(floats * 255, found, atol=1.01)  # bytes are rounded between the two directions
    aligned = photo(2, 64, 96)
    found, notes = prepared(aligned, manifest)
    np.testing.assert_array_equal(found, aligned)
    assert notes == ()
    assert make_plan(64, 96, manifest, Options()).padded == (64, 96)
    assert read_for(pixels, changed(directory, alignment=16)).pixels.shape == pixels.shape  # padded by the executor


def test_without_a_unet_the_image_itself_is_squashed(directory: EngineDirectory) -> None:
    manifest = changed(directory, kinds=(Kind.DIS,), alignment=1, image_form=ImageForm.SQUASHED)
    pixels = photo(3, 40, 50)
    found, notes = prepared(pixels, manifest)
    np.testing.assert_array_equal(found, squash(pixels, 32))
    assert notes == ("squashed from 50×40 to 32×32",)
    floats, _ = prepared((pixels / 255).astype(np.float32), manifest)
    np.testing.assert_array_equal(floats, found)
    plan = make_plan(32, 32, manifest, Options(crops=9))
    assert (plan.crops, plan.squashed) == ((Crop(0, 0),), False)


def test_a_model_that_squashes_floats_is_refused(tiny_model: DiffV2IQA) -> None:
    with pytest.raises(ConfigError, match="image_form squashed needs tap_form png8"):
        dataclasses.replace(tiny_model.config, image_form=ImageForm.SQUASHED)
