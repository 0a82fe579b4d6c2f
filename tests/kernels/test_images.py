"""images.cu against NumPy, bit for bit: odd sizes, unaligned rows, small images, every crop position modulo 4."""

import numpy as np
import pytest

from diffiqa.engine.pixels import TapForm, as_tapped
from diffiqa.kernels.launch import Storage, crop_table, gather_crops, normalise_pad, source_table

from .devices import Array, Device

both = pytest.mark.parametrize("storage", Storage)

SIZES = {
    "one pixel": (1, 1),
    "one row": (1, 37),
    "one column": (23, 1),
    "two by two": (2, 2),
    "reflected many times": (3, 2),
    "aligned": (16, 32),
    "one short": (31, 47),
    "one over": (33, 65),
    "odd": (57, 83),
}


def normalised(image: Array, storage: Storage, padded: tuple[int, int]) -> Array:
    """The reference: (3, *padded)."""
    plane = (image.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
    rows, columns = padded[0] - image.shape[0], padded[1] - image.shape[1]
    return np.pad(plane.transpose(2, 0, 1), ((0, 0), (0, rows), (0, columns)), mode="reflect").astype(storage.dtype)


def aligned(size: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // 16) * 16, -(-size[1] // 16) * 16


def some_image(size: tuple[int, int], seed: int = 0) -> Array:
    # Below 255, the byte of the guard bands: a read past the image shows.
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)


@both
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
def test_image_is_normalised_and_padded_as_in_numpy(device: Device, storage: Storage, size: tuple[int, int]) -> None:
    image, padded = some_image(size), aligned(size)
    for offset in range(4):
        plane = device.like((3, *padded), storage.dtype)
        device.run(normalise_pad(device.put(image, offset), size, 3 * size[1], plane, padded, storage))
        np.testing.assert_array_equal(device.get(plane), normalised(image, storage, padded), f"offset {offset}")


@both
def test_every_pixel_value_is_numpys_to_the_bit(device: Device, storage: Storage) -> None:
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    plane = device.like((3, 16, 16), storage.dtype)
    device.run(normalise_pad(device.put(image), (16, 16), 48, plane, (16, 16), storage))
    np.testing.assert_array_equal(device.get(plane), normalised(image, storage, (16, 16)))
    assert device.get(plane)[0, 0, 0] == -1
    assert device.get(plane)[0, 15, 15] == 1


@pytest.mark.parametrize("extra", [1, 4, 13])
def test_rows_may_be_apart_in_memory(device: Device, extra: int) -> None:
    image = some_image((9, 14))
    rows = np.full((9, 14 * 3 + extra), 255, np.uint8)
    rows[:, : 14 * 3] = image.reshape(9, -1)
    plane = device.like((3, 16, 16), np.float32)
    device.run(normalise_pad(device.put(rows), (9, 14), rows.shape[1], plane, (16, 16), Storage.F32))
    np.testing.assert_array_equal(device.get(plane), normalised(image, Storage.F32, (16, 16)))


def test_image_stored_bottom_up_is_read_from_its_last_row(device: Device) -> None:
    image = some_image((9, 14))
    plane = device.like((3, 16, 16), np.float32)
    first = device.put(image[::-1].copy()) + 8 * 14 * 3
    device.run(normalise_pad(first, (9, 14), -14 * 3, plane, (16, 16), Storage.F32))
    np.testing.assert_array_equal(device.get(plane), normalised(image, Storage.F32, (16, 16)))


@both
def test_crops_of_all_kinds_are_numpys_slices(device: Device, rng: np.random.Generator, storage: Storage) -> None:
    images, kinds = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    crop = int(rng.integers(1, 20)), 4 * int(rng.integers(1, 8))
    size = crop[0] + int(rng.integers(0, 20)), crop[1] + 4 * int(rng.integers(1, 6))
    kept = [Storage(rng.choice(list(Storage))) for _ in range(kinds)]  # float and half side by side
    arrays = [rng.normal(size=(images, 3, *size)).astype(each.dtype) for each in kept]
    lefts = [*range(5), size[1] - crop[1]]  # every alignment
    places = [
        (int(rng.integers(0, images)), int(rng.integers(0, size[0] - crop[0] + 1)), min(left, size[1] - crop[1]))
        for left in lefts
    ]
    sources = device.put(source_table([(device.put(a), each) for a, each in zip(arrays, kept, strict=True)]))
    out = device.like((len(places), kinds, 3, *crop), storage.dtype)
    table = device.put(crop_table(places, images, size, crop))
    device.run(gather_crops(sources, kinds, size, table, len(places), out, crop, storage))
    expected = np.stack(
        [
            np.stack([a[image, :, top : top + crop[0], left : left + crop[1]].astype(storage.dtype) for a in arrays])
            for image, top, left in places
        ]
    )
    np.testing.assert_array_equal(device.get(out), expected)


def test_one_kind_may_be_looked_at_twice(device: Device) -> None:
    image = np.random.default_rng(0).normal(size=(1, 3, 256, 240)).astype(np.float32)
    address = device.put(image)
    sources = device.put(source_table([(address, Storage.F32)] * 2))
    crops = device.put(crop_table([(0, 32, 13)], 1, (256, 240), (224, 224)))
    out = device.like((1, 2, 3, 224, 224), np.float32)
    device.run(gather_crops(sources, 2, (256, 240), crops, 1, out, (224, 224), Storage.F32))
    np.testing.assert_array_equal(device.get(out), np.stack([image[:, :, 32:, 13:237]] * 2, 1))


@both
@pytest.mark.parametrize("form", TapForm)
def test_restorations_take_their_form_to_the_bit_and_the_first_kind_stays(
    device: Device, storage: Storage, form: TapForm
) -> None:
    given, restored = np.random.default_rng(0).normal(0, 1.1, (2, 2, 3, 32, 48)).astype(np.float32)
    # At and beside the middles of two bytes.
    middles = ((np.arange(255, dtype=np.float32) + np.float32(0.5)) / np.float32(127.5)) - 1
    middles = np.concatenate([np.nextafter(middles, np.float32(-9)), middles, np.nextafter(middles, np.float32(9))])
    restored.reshape(-1)[: middles.size] = middles
    restored[1, 2, 3, 4] = np.nan
    sources = [(device.put(given), Storage.F32), (device.put(restored), Storage.F32)]
    places = [(0, 0, 1), (1, 3, 0), (0, 16, 20)]
    out = device.like((3, 2, 3, 16, 28), storage.dtype)
    table = device.put(crop_table(places, 2, (32, 48), (16, 28)))
    device.run(gather_crops(device.put(source_table(sources, form)), 2, (32, 48), table, 3, out, (16, 28), storage))
    kinds = np.stack([given, as_tapped(restored.copy(), form)], axis=1)
    expected = [kinds[i, :, :, top : top + 16, left : left + 28] for i, top, left in places]
    np.testing.assert_array_equal(device.get(out), np.stack(expected).astype(storage.dtype))
