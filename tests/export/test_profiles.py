"""Batches and sizes of `iqa-build` become optimization profiles, or are refused in words."""

from pathlib import Path

import pytest

from diffiqa.engine.manifest import Manifest, ShapeRange, StageName, read_manifest
from diffiqa.errors import UsageError
from diffiqa.export.profiles import default_sizes, stage_profiles

Profiles = tuple[dict[str, ShapeRange], ...]


@pytest.fixture
def manifest(tiny_engine: Path) -> Manifest:
    return read_manifest(tiny_engine)


def profiles(manifest: Manifest, name: StageName, batches: list[str], sizes: list[str]) -> Profiles:
    stage = manifest.stage(name)
    assert stage is not None
    return stage_profiles(manifest, stage, batches, sizes)


def test_a_number_makes_a_static_profile_and_a_range_a_family(manifest: Manifest) -> None:
    one, family = profiles(manifest, StageName.VDA, ["2", "1:4:16"], ["32x32"])
    assert one == {"images": ShapeRange(*[(2, 4, 3, 32, 32)] * 3)}
    assert [shape[0] for shape in (family["images"].minimum, family["images"].optimum, family["images"].maximum)] == [
        1,
        4,
        16,
    ]


def test_the_vit_takes_all_kinds_of_every_crop(manifest: Manifest) -> None:
    (one,) = profiles(manifest, StageName.VIT, ["3"], ["32x32"])
    assert one["image"].optimum == (12, 3, 32, 32)


def test_the_unet_takes_every_batch_at_every_static_size_and_families_of_sizes_one_by_one(manifest: Manifest) -> None:
    made = profiles(manifest, StageName.UNET, ["1", "8"], ["32x48", "32x32:64x64:96x128"])
    assert [profile["y"].maximum for profile in made] == [(1, 3, 32, 48), (8, 3, 32, 48), (1, 3, 96, 128)]
    assert all(profile["y"] == profile["condition"] for profile in made)
    assert [profile["noise_level"].maximum for profile in made] == [(1, 1), (8, 1), (1, 1)]
    assert made[2]["y"].minimum == (1, 3, 32, 32)


def test_default_sizes_hold_a_crop_alone_and_a_family_around_tiles(manifest: Manifest) -> None:
    made = profiles(manifest, StageName.UNET, ["1"], list(default_sizes(manifest)))
    assert made[0]["y"].minimum == made[0]["y"].maximum == (1, 3, 32, 32)
    assert made[1]["y"].optimum == (1, 3, 512, 512)


def test_a_batch_of_another_form_is_refused(manifest: Manifest) -> None:
    for text in ("", "0", "-1", "x", "1.5", "1:2", "1:2:3:4", "1x2", "99999999", "٣"):
        with pytest.raises(UsageError, match="is not of the form N or MIN:OPT:MAX"):
            profiles(manifest, StageName.VDA, [text], ["32x32"])


def test_a_size_of_another_form_is_refused(manifest: Manifest) -> None:
    for text in ("32", "32x", "x32", "32x0", "32x32:64x64", "32x32x32"):
        with pytest.raises(UsageError, match="is not of the form HxW"):
            profiles(manifest, StageName.UNET, ["1"], [text])


def test_a_family_that_shrinks_is_refused(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="must not shrink"):
        profiles(manifest, StageName.VDA, ["4:2:8"], ["32x32"])


def test_a_size_the_unet_cannot_take_is_refused(manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="takes multiples of 4"):
        profiles(manifest, StageName.UNET, ["1"], ["34x32"])
