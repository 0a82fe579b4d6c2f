"""ResNet with bottleneck blocks (ResNet50 by default), up to its class outputs. Names are torchvision's."""

import torch.nn.functional as F
from torch import Tensor, nn

EXPANSION = 4


class Bottleneck(nn.Module):
    """1×1 → 3×3 (carries the stride) → 1×1, with a skip."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * EXPANSION
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = (
            nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))
            if stride != 1 or inputs != outputs
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) → (N, 4·width, H/stride, W/stride)."""
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        h = self.bn3(self.conv3(h))
        return F.relu(h + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """(N, 3, H, W) → (N, classes)."""

    def __init__(self, width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        inputs = width
        for level, count in enumerate(blocks):
            inner = width * 2**level
            layers = []
            for index in range(count):
                layers.append(Bottleneck(inputs, inner, stride=2 if level > 0 and index == 0 else 1))
                inputs = inner * EXPANSION
            self.add_module(f"layer{level + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(inputs, classes)
        self.levels = len(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """Return class outputs, before any softmax."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        for level in range(self.levels):
            x = self.get_submodule(f"layer{level + 1}")(x)
        out: Tensor = self.fc(x.mean(dim=(2, 3)))
        return out
