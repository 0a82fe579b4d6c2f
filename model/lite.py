"""EfficientNet-Lite0 and -Lite2 up to their last map, read at five depths. Names are efficientnet-lite-pytorch's."""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEM, HEAD = 32, 1280
READ = (1, 2, 4, 6)  # groups whose last outputs are read, beside the last map: strides 4, 8, 16, 32


@dataclass(frozen=True)
class Variant:
    """The sizes of one of the networks."""

    name: str
    groups: tuple[tuple[int, int, int, int, int], ...]  # kernel, stride, expansion, channels out, blocks

    @property
    def blocks(self) -> int:
        """How many there are in all."""
        return sum(count for *_, count in self.groups)

    @property
    def read(self) -> tuple[int, ...]:
        """Blocks whose outputs are read."""
        ends = tuple(itertools.accumulate(count for *_, count in self.groups))
        return tuple(ends[group] - 1 for group in READ)

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the maps that are read, but for the last one, which has `HEAD`."""
        return tuple(self.groups[group][3] for group in READ)

    @property
    def features(self) -> int:
        """A mean and a deviation of each channel that is read."""
        return 2 * (sum(self.channels) + HEAD)


LITE0 = Variant(
    "EfficientNet-Lite0",
    (
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 2),
        (5, 2, 6, 40, 2),
        (3, 2, 6, 80, 3),
        (5, 1, 6, 112, 3),
        (5, 2, 6, 192, 4),
        (3, 1, 6, 320, 1),
    ),
)
LITE2 = Variant(
    "EfficientNet-Lite2",
    (
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 3),
        (5, 2, 6, 48, 3),
        (3, 2, 6, 88, 4),
        (5, 1, 6, 120, 4),
        (5, 2, 6, 208, 5),
        (3, 1, 6, 352, 1),
    ),
)
TINY = 1e-6  # variance that keeps the root's slope finite where a channel is constant


class Conv(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME" pads an even side: with a stride, one row more below than above."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → (N, C', H/stride, W/stride)."""
        padding = self.kernel_size[0] - self.stride[0]
        before = padding // 2
        out: Tensor = super().forward(F.pad(x, (before, padding - before, before, padding - before)))
        return out


class Block(nn.Module):
    """1×1 up → depthwise (carries the stride) → 1×1 down, with a skip where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        if expansion > 1:
            self._expand_conv = nn.Conv2d(inputs, inner, 1, bias=False)
            self._bn0 = _norm(inner)
        self._depthwise_conv = Conv(inner, inner, kernel, stride=stride, groups=inner, bias=False)
        self._bn1 = _norm(inner)
        self._project_conv = nn.Conv2d(inner, outputs, 1, bias=False)
        self._bn2 = _norm(outputs)
        self.expands, self.skips = expansion > 1, stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) → (N, outputs, H/stride, W/stride)."""
        h = F.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        out: Tensor = self._bn2(self._project_conv(h))
        return out + x if self.skips else out


class Lite(nn.Module):
    """Images (N, 3, H, W) in [-1, 1] → the mean and deviation of every channel that is read, (N, variant.features)."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self._conv_stem = Conv(3, STEM, 3, stride=2, bias=False)
        self._bn0 = _norm(STEM)
        blocks, inputs = [], STEM
        for kernel, stride, expansion, outputs, count in variant.groups:
            for index in range(count):
                blocks.append(Block(inputs, outputs, kernel, stride if index == 0 else 1, expansion))
                inputs = outputs
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(inputs, HEAD, 1, bias=False)
        self._bn1 = _norm(HEAD)

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the maps that are read, from the first to the last one, of 1280 channels."""
        # The published weights want (pixel - 127) / 128. Our images are pixel / 127.5 - 1.
        x = images * (127.5 / 128) + 0.5 / 128
        x = F.relu6(self._bn0(self._conv_stem(x)))
        read = []
        for index, block in enumerate(self._blocks):
            x = block(x)
            if index in self.variant.read:
                read.append(x)
        read.append(F.relu6(self._bn1(self._conv_head(x))))
        return read

    def forward(self, images: Tensor) -> Tensor:
        """Return means and deviations, from the first map that is read to the last one."""
        return moments(self.maps(images))


def moments(maps: list[Tensor]) -> Tensor:
    """Maps of N images → the mean and deviation of each of their channels, (N, features) for all that is read."""
    return torch.cat([part for of_map in map(_moments, maps) for part in of_map], dim=1)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    mean = x.mean(dim=(2, 3), keepdim=True)
    return mean.flatten(1), ((x - mean).square().mean(dim=(2, 3)) + TINY).sqrt()


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
