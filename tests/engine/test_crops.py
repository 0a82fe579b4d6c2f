import numpy as np
import pytest

from diffiqa.engine.crops import Crop, CropPlaces, crop_grid, padded_size, place_crops

from .test_noise import BIG_SEED, scalar_philox


def sizes(seed: int) -> list[tuple[int, int, int]]:
    generator = np.random.default_rng(seed)
    return [tuple(generator.integers([224, 224, 4], [1500, 1500, 40]).tolist()) for _ in range(50)]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_four_or_more_crops_are_exactly_as_many_as_asked_and_touch_every_border(seed: int) -> None:
    for height, width, count in sizes(seed):
        crops = crop_grid(height, width, 224, count)
        assert len(set(crops)) == len(crops)
        if min(height, width) > 224 + count:  # room enough for `count` different places
            assert len(crops) == count
        assert min(c.top for c in crops) == 0
        assert min(c.left for c in crops) == 0
        assert max(c.top for c in crops) == height - 224
        assert max(c.left for c in crops) == width - 224


def test_a_crop_sized_image_has_one_crop_however_many_are_asked() -> None:
    assert crop_grid(224, 224, 224, 9) == (Crop(0, 0),)


def test_one_crop_lies_in_the_middle() -> None:
    assert crop_grid(324, 524, 224, 1) == (Crop(50, 150),)


@pytest.mark.parametrize("count", [2, 3])
def test_two_or_three_crops_lie_on_the_diagonal(count: int) -> None:
    crops = crop_grid(300, 400, 224, count)
    assert crops[0] == Crop(0, 0)
    assert crops[-1] == Crop(76, 176)


def test_a_strip_is_covered_along_its_length() -> None:
    assert crop_grid(224, 624, 224, 5) == tuple(Crop(0, left) for left in (0, 100, 200, 300, 400))


def test_nine_crops_of_a_square_are_a_three_by_three_grid() -> None:
    assert crop_grid(424, 424, 224, 9) == tuple(Crop(y, x) for y in (0, 100, 200) for x in (0, 100, 200))


def test_five_crops_fill_rows_of_two_and_three() -> None:
    rows = [crop.top for crop in crop_grid(424, 424, 224, 5)]
    assert sorted(rows.count(row) for row in set(rows)) == [2, 3]


def test_refuses_an_image_smaller_than_a_crop() -> None:
    with pytest.raises(ValueError, match="no 4 crops of 224×224 in an image of 300×200"):
        crop_grid(200, 300, 224, 4)


@pytest.mark.parametrize(("side", "aligned"), [(16, 16), (17, 32), (224, 224), (225, 240)])
def test_padding_reaches_the_next_multiple(side: int, aligned: int) -> None:
    assert padded_size(side, 16, 16) == (aligned, 16)


def test_four_crops_lie_in_the_corners_and_not_on_the_diagonal() -> None:
    assert crop_grid(300, 400, 224, 4) == (Crop(0, 0), Crop(0, 176), Crop(76, 0), Crop(76, 176))


def test_a_little_room_holds_one_crop_more_than_its_pixels() -> None:
    assert crop_grid(224, 226, 224, 9) == (Crop(0, 0), Crop(0, 1), Crop(0, 2))
    assert crop_grid(224, 225, 224, 9) == (Crop(0, 0), Crop(0, 1))


def test_crops_of_a_wide_image_lie_in_two_rows_at_least() -> None:
    assert {crop.top for crop in crop_grid(300, 1500, 224, 9)} == {0, 76}


def test_odd_room_rounds_to_whole_pixels() -> None:
    (middle,) = crop_grid(225, 227, 224, 1)
    assert (middle.top, middle.left) == (0, 1)
    assert isinstance(middle.left, int)
    assert [crop.left for crop in crop_grid(224, 227, 224, 3)] == [0, 2, 3]  # halves round up
    assert padded_size(15, 33, 16) == (16, 48)
    assert all(isinstance(n, int) for n in padded_size(15, 33, 16))


@pytest.mark.parametrize("seed", [0, 7, BIG_SEED])
def test_random_crops_are_drawn_from_their_own_words_of_the_seed(seed: int) -> None:
    crops = place_crops(CropPlaces.RANDOM, 300, 524, 224, 20, seed)
    for k, crop in enumerate(crops):
        top, left, *_ = scalar_philox((k, 0, 0, 1), (seed % 2**32, seed // 2**32))
        assert crop == Crop(top * 77 // 2**32, left * 301 // 2**32)
    assert len(crops) == 20
    assert crops[:5] == place_crops(CropPlaces.RANDOM, 300, 524, 224, 5, seed)
    assert crops != place_crops(CropPlaces.RANDOM, 300, 524, 224, 20, seed + 1)


def test_random_crops_reach_every_place_about_as_often() -> None:
    crops = place_crops(CropPlaces.RANDOM, 34, 33, 32, 6000)
    counts = [crops.count(Crop(top, left)) for top in range(3) for left in range(2)]
    assert sum(counts) == 6000
    assert min(counts) > 850  # of 1000; five standard deviations are 144


def test_an_image_of_a_crops_size_has_one_crop_wherever_crops_lie() -> None:
    assert {place_crops(places, 224, 224, 224, 20) for places in CropPlaces} == {(Crop(0, 0),)}
    assert place_crops(CropPlaces.GRID, 424, 424, 224, 9, 5) == crop_grid(424, 424, 224, 9)
    with pytest.raises(ValueError, match="no 4 crops"):
        place_crops(CropPlaces.RANDOM, 200, 300, 224, 4)
