"""Makes lite_goldens.json: what the published package computes in float64 with weights that anyone can make again.

pip install efficientnet-lite-pytorch && python tests/model/lite_goldens.py
"""

import json
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

SIDE, PICKED = 64, 16
N = TypeVar("N", bound=nn.Module)
FILE = Path(__file__).with_name("lite_goldens.json")


def fill(network: N) -> N:
    """Give every tensor numbers that depend on its name and shape alone, of a size that keeps signals alive."""
    for name, tensor in network.state_dict().items():
        if name.startswith("_fc.") or not tensor.is_floating_point():
            continue
        random = np.random.default_rng(list(name.encode()))
        if tensor.ndim > 1:
            values = random.standard_normal(tensor.shape) * (2 / np.prod(tensor.shape[1:])) ** 0.5
        elif name.endswith(("running_var", ".weight")):
            values = random.uniform(0.7, 1.4, tensor.shape)
        else:
            values = random.standard_normal(tensor.shape) * 0.1
        tensor.copy_(torch.from_numpy(values.astype(np.float32)))
    return network.eval()


def images() -> Tensor:
    """Return two pictures in [-1, 1]."""
    return torch.from_numpy(np.random.default_rng(7).uniform(-1, 1, (2, 3, SIDE, SIDE)).astype(np.float32))


def published(network: nn.Module, pictures: Tensor) -> Tensor:
    """Return the means of the last map, of a network of the package."""
    pixels = (pictures + 1) * 127.5
    maps: Tensor = network.extract_features((pixels - 127) / 128)  # type: ignore[operator]
    return maps.mean(dim=(2, 3))


def main() -> None:
    from efficientnet_lite_pytorch import EfficientNet  # type: ignore[import-not-found]

    means = {}
    for name in ("efficientnet-lite0", "efficientnet-lite2"):
        with torch.no_grad():
            found = published(fill(EfficientNet.from_name(name, image_size=SIDE)).double(), images().double())
        means[name] = found[:, ::80][:, :PICKED].tolist()
    FILE.write_text(json.dumps(means, indent=1) + "\n")


if __name__ == "__main__":
    main()
