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
from diffiqa.engine.pixels import ImageForm, Sides, TapForm, bicubic, to_plane
from diffiqa.engine.schedule import Kind
from diffiqa.errors import ConfigError
from diffiqa.model.network import DiffV2IQA
from diffiqa.runtime import plan as plan_module
from diffiqa.runtime.executor import Outcome
from diffiqa.runtime.gpu.executor import DeviceExecutor
from diffiqa.runtime.host.executor import HostExecutor
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.images import Image as ImageRead
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
@pytest.mark.parametrize(
    ("form", "mode"), [(TapForm.CLAMPED, Mode.WHOLE), (TapForm.PNG8, Mode.TILE), (TapForm.PNG8, Mode.CROP)]
)
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


@pytest.mark.parametrize("form", [TapForm.CLAMPED, TapForm.PNG8])
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
    seen = restored_from = pixels
    if "sides" in fields:
        assert (score.height, score.width) == (44, 68)
        restored_from = np.asarray(Image.fromarray(pixels).resize((68, 44), Image.Resampling.BILINEAR))
        seen = bicubic(pixels, *((32, 32) if "image_form" in fields else (44, 68)))
    images = [torch.from_numpy(to_plane(each))[None] for each in (seen, restored_from)]
    model = as_configured(tiny_model, monkeypatch, **fields)
    expected = model.score(images[0], 8, crops=4, restored_from=images[1]).total.item()
    # Float32 sums in another order may round a value that lies between two bytes to the other.
    assert score.score == pytest.approx(expected, abs=2e-5)
    assert abs(score.score - plain.score) > 2e-4
    assert score.digest == plain.digest
    assert (score.engine == plain.engine) is False


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("mode", "height", "width"), [(Mode.WHOLE, 45, 70), (Mode.TILE, 120, 100), (Mode.CROP, 45, 70)]
)
def test_whole_images_and_restorations_are_squashed_to_one_crop(
    directory: EngineDirectory, stages: dict[Any, Any], layer: FakeLayer, mode: Mode, height: int, width: int
) -> None:
    pixels, manifest = photo(6, height, width), changed(directory, **SQUASHED)
    plan = make_plan(height, width, manifest, Options(mode=mode, crops=4))
    assert (plan.squashed, plan.mode) == (True, Mode.WHOLE if mode is Mode.CROP else mode)
    seen = bicubic(pixels, 32, 32)
    found = HostExecutor(manifest, stages).run((to_plane(seen), to_plane(pixels)), plan, 1)
    assert (len(found.verdicts), found.crops.shape) == (1, (1, 4, 3, 32, 32))
    np.testing.assert_array_equal(found.crops[0, 0], to_plane(seen))
    if plan.mode is Mode.WHOLE:
        as_is = make_plan(height, width, directory.manifest, Options())
        restored = HostExecutor(directory.manifest, stages).run(to_plane(pixels), as_is, 1).planes
        for row, kind in enumerate((Kind.Y0, Kind.T1, Kind.T2), start=1):
            file = np.rint((through_png(restored[kind]) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
            np.testing.assert_array_equal(found.crops[0, row], to_plane(bicubic(file, 32, 32)))
    executor = DeviceExecutor(manifest, layer, fake_stages(layer, directory, batches=("1", "2")), together=2)
    tasks = [((seen, pixels), 1), ((to_plane(seen), to_plane(pixels)), 1)]
    for outcome in executor.run_together(tasks, plan):
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
    np.testing.assert_array_equal(score.pictures.planes[Kind.DIS], bicubic(pixels, 32, 32))
    assert {plane.shape for plane in score.pictures.planes.values()} == {(32, 32, 3)}
    assert np.isfinite(score.pictures.score_map).all()
    assert score.pictures.score_map.shape == (32, 32)
    assert score.notes == ("squashed to 32×32",)


def test_random_crops_follow_the_first_seed(directory: EngineDirectory, stages: dict[Any, Any]) -> None:
    scorer = Scorer(changed(directory, crop_places=CropPlaces.RANDOM), stages, backend="test")
    several = scorer.score(photo(8, 60, 50), Options(crops=7, seed=3, seeds=2))
    again, other = (scorer.score(photo(8, 60, 50), Options(crops=7, seed=seed)) for seed in (3, 4))
    places = place_crops(CropPlaces.RANDOM, 60, 50, 32, 7, 3)
    assert tuple(Crop(crop.top, crop.left) for crop in several.crops) == places
    assert tuple(Crop(crop.top, crop.left) for crop in again.crops) == places
    assert again.score == scorer.score(photo(8, 60, 50), Options(crops=7, seed=3)).score != other.score


def prepared(pixels: Picture, manifest: Manifest) -> ImageRead:
    image = read_for(pixels, manifest)
    assert image.digest == read_image(pixels, min_side=1).digest
    assert not image.pixels.flags.writeable
    return image


def test_sides_are_resized_to_the_multiples_below_once_for_each_reader(directory: EngineDirectory) -> None:
    """By Pillow for the U-Net, and by OpenCV's filter for the heads: they are two programs."""
    manifest = changed(directory, alignment=16, sides=Sides.RESIZED)
    pixels = photo(1, 75, 100)
    image = prepared(pixels, manifest)
    by_pillow = np.asarray(Image.fromarray(pixels).resize((96, 64), Image.Resampling.BILINEAR))
    assert image.restored_from is not None
    np.testing.assert_array_equal(image.restored_from, by_pillow)
    np.testing.assert_array_equal(image.pixels, bicubic(pixels, 64, 96))
    assert image.notes == ("resized to 96×64",)
    assert make_plan(*image.size, manifest, Options()).padded == image.size == (64, 96)
    floats = read_for((pixels / np.float32(255)).astype(np.float32), manifest)
    np.testing.assert_array_equal(floats.pixels, image.pixels)
    aligned = prepared(photo(2, 64, 96), manifest)
    np.testing.assert_array_equal(aligned.pixels, photo(2, 64, 96))
    assert (aligned.restored_from, aligned.notes) == (None, ())
    padded = prepared(pixels, changed(directory, alignment=16))
    assert (padded.size, padded.restored_from, padded.notes) == ((75, 100), None, ())


@pytest.mark.parametrize("mode", [Mode.WHOLE, Mode.CROP])
def test_the_unet_and_the_heads_each_get_their_picture(
    directory: EngineDirectory, stages: dict[Any, Any], layer: FakeLayer, mode: Mode
) -> None:
    seen, restored_from = photo(4, 40, 48), photo(5, 40, 48)
    plan = make_plan(40, 48, directory.manifest, Options(mode=mode, crops=3))
    host = HostExecutor(directory.manifest, stages)
    found = host.run((to_plane(seen), to_plane(restored_from)), plan, 1)
    np.testing.assert_array_equal(found.crops[:, 0], host.run(to_plane(seen), plan, 1).crops[:, 0])
    np.testing.assert_array_equal(found.crops[:, 1:], host.run(to_plane(restored_from), plan, 1).crops[:, 1:])
    executor = DeviceExecutor(directory.manifest, layer, fake_stages(layer, directory, batches=("1", "2")), together=2)
    tasks = [((seen, restored_from), 1), ((seen, seen), 1)]
    pair, one = executor.run_together(tasks, plan)
    np.testing.assert_allclose(pair.crops, found.crops, atol=1e-4)
    np.testing.assert_array_equal(pair.crops[:, 0], found.crops[:, 0])
    np.testing.assert_allclose(one.crops, host.run(to_plane(seen), plan, 1).crops, atol=1e-4)


def test_without_a_unet_the_image_itself_is_squashed(directory: EngineDirectory) -> None:
    manifest = changed(directory, kinds=(Kind.DIS,), alignment=1, image_form=ImageForm.SQUASHED)
    pixels = photo(3, 40, 50)
    image = prepared(pixels, manifest)
    np.testing.assert_array_equal(image.pixels, bicubic(pixels, 32, 32))
    assert (image.notes, image.restored_from) == (("squashed to 32×32",), None)
    plan = make_plan(*image.size, manifest, Options(crops=9))
    assert (plan.crops, plan.squashed) == ((Crop(0, 0),), False)


def test_a_model_that_squashes_floats_is_refused(tiny_model: DiffV2IQA) -> None:
    with pytest.raises(ConfigError, match="image_form squashed needs tap_form png8"):
        dataclasses.replace(tiny_model.config, image_form=ImageForm.SQUASHED)
