"""Counter-based Gaussian noise: Philox4x32-10 and Box–Muller. Every backend computes the same numbers from this page.

The noise of element `e` of an image (its index in the whole padded image, channel-major) at step `i` is output `e % 4`
of the block `counter = (e // 4, i, lane, 0)`, `key = (seed low, seed high)`. The starting state uses `i = T`. So noise
depends on nothing but seed and place: not on batch, order, tiles or backend. `lane` separates independent restorations
of the same place (crop mode numbers its crops).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
WordArray = npt.NDArray[np.uint64]

MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
MAX_SEED = 2**64 - 1

_LOW = np.uint64(0xFFFFFFFF)
_HIGH = np.uint64(32)
_TO_23_BITS = np.uint64(9)
_TWO_PI = np.float32(2 * np.pi)
_BLOCK = 32768  # counters worked on at a time: scratch fits the cache, and NumPy's calls cost little beside it


def philox4x32(counter: Sequence[WordArray | int], key: tuple[int, int]) -> list[WordArray]:
    """Return the four output words (32-bit values in uint64 arrays) of Philox4x32-10, reference form."""
    c0, c1, c2, c3 = (np.asarray(word, np.uint64) for word in counter)
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> _HIGH) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _HIGH) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = _next_key(k0, k1)
    return [c0, c1, c2, c3]


def split_seed(seed: int) -> tuple[int, int]:
    """Return a seed as Philox's two key words; raises ValueError outside 0 … 2⁶⁴ − 1."""
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"a seed is a whole number from 0 to {MAX_SEED}, not {seed}")
    return seed & 0xFFFFFFFF, seed >> 32


class NoiseField:
    """The noise of one window of one image. `fill` works in scratch memory of its own: one field, one thread.

    `size` is (height, width) of the whole padded image; the window starts at (top, left). Widths and `left` are
    multiples of 4, so that a window reads whole blocks of the image it is cut from. A state of another kind than an
    image is one plane with one row of elements.
    """

    def __init__(
        self,
        seed: int,
        size: tuple[int, int],
        *,
        window: tuple[int, int] | None = None,
        top: int = 0,
        left: int = 0,
        lane: int = 0,
        planes: int = 3,
    ) -> None:
        height, width = size
        rows, columns = window or size
        if width % 4 or columns % 4 or left % 4:
            raise ValueError(f"noise windows are aligned to 4 pixels: image {size}, window {window} at {left}")
        if not (0 <= top <= height - rows and 0 <= left <= width - columns):
            raise ValueError(f"the window {rows}×{columns} at ({top}, {left}) leaves the image {size}")
        if planes * height * width // 4 > _LOW:
            raise ValueError(f"an image of {width}×{height} has more elements than the noise counter can number")
        self.shape = (planes, rows, columns)
        self._key, self._lane = split_seed(seed), lane
        rows_of = (np.arange(planes)[:, None] * height + np.arange(top, top + rows)).ravel()
        first = (rows_of * width + left) // 4
        self._blocks = (first[:, None] + np.arange(columns // 4)).ravel().astype(np.uint64)
        n = min(_BLOCK, self._blocks.size)
        self._words = [np.empty(n, np.uint64) for _ in range(6)]
        self._floats = [np.empty(n, np.float32) for _ in range(3)]

    def fill(self, step: int, out: FloatArray) -> None:
        """Write the standard normals of `step` into `out`, a C-contiguous float32 array of `self.shape` elements."""
        if not out.flags.c_contiguous:
            raise ValueError("noise is written in place: the array must be C-contiguous")
        quads = out.reshape(-1, 4)
        for start in range(0, self._blocks.size, _BLOCK):
            counter = self._blocks[start : start + _BLOCK]
            self._normals(self._philox(counter, step), quads[start : start + _BLOCK])

    def _philox(self, blocks: WordArray, step: int) -> list[WordArray]:
        """`philox4x32((blocks, step, lane, 0), key)` in scratch memory."""
        c0, c1, c2, c3, p0, p1 = (scratch[: blocks.size] for scratch in self._words)
        c0[:], c1[:], c2[:], c3[:] = blocks, step, self._lane, 0
        k0, k1 = self._key
        for _ in range(ROUNDS):
            np.multiply(c0, MULTIPLIERS[0], out=p0)
            np.multiply(c2, MULTIPLIERS[1], out=p1)
            np.right_shift(p1, _HIGH, out=c0)
            c0 ^= c1
            c0 ^= np.uint64(k0)
            np.bitwise_and(p1, _LOW, out=c1)
            np.right_shift(p0, _HIGH, out=c2)
            c2 ^= c3
            c2 ^= np.uint64(k1)
            np.bitwise_and(p0, _LOW, out=c3)
            k0, k1 = _next_key(k0, k1)
        return [c0, c1, c2, c3]

    def _normals(self, words: list[WordArray], out: FloatArray) -> None:
        """Box–Muller on (w0, w1) and (w2, w3) into the columns of `out`.

        A word becomes `u = ((word >> 9) + ½)·2⁻²³`: exact in float32, never 0 or 1, so |z| ≤ 5.8.
        """
        radius, angle, wave = (scratch[: len(out)] for scratch in self._floats)
        for pair in (0, 2):
            for word, u in ((words[pair], radius), (words[pair + 1], angle)):
                word >>= _TO_23_BITS
                u[:] = word
                u += np.float32(0.5)
                u *= np.float32(2**-23)
            np.log(radius, out=radius)
            radius *= np.float32(-2)
            np.sqrt(radius, out=radius)
            angle *= _TWO_PI
            np.multiply(radius, np.cos(angle, out=wave), out=out[:, pair])
            np.multiply(radius, np.sin(angle, out=wave), out=out[:, pair + 1])


def _next_key(k0: int, k1: int) -> tuple[int, int]:
    return (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
