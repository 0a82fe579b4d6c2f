"""What comparisons with a NumPy reference share: random weights, a record of those that were read, a verdict."""

import math
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Array = npt.NDArray[np.float64]
Module = TypeVar("Module", bound=nn.Module)


class Weights(dict[str, Array]):
    """A module's weights in NumPy, and which of them the reference has read."""

    def __init__(self, module: nn.Module, prefix: str = "") -> None:
        super().__init__()
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point() and tensor.numel():
                self[prefix + name] = tensor.numpy()
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> Array:
        self.read.add(name)
        return super().__getitem__(name)

    def unread(self) -> set[str]:
        return set(self) - self.read


def randomised(module: Module, seed: int) -> Module:
    """Set every weight and statistic to float64 noise of a fitting size, so that nothing saturates or dies."""
    random = np.random.default_rng(seed)
    module.double().eval()
    for name, tensor in sorted(module.state_dict().items()):
        shape = tuple(tensor.shape)
        noise = random.standard_normal(shape)
        last = name.rpartition(".")[2]
        if last == "num_batches_tracked":
            continue
        if last == "running_var":
            value = random.uniform(0.5, 1.5, shape)
        elif last == "weight" and len(shape) == 1:
            value = 1 + 0.3 * noise
        elif name.endswith("fc.weight"):
            value = noise * 4 / math.sqrt(shape[1])  # small random ResNets tell images apart only a little
        elif last in {"weight", "in_proj_weight"}:
            value = noise * 0.8 / math.sqrt(math.prod(shape[1:]))
        elif name.endswith("score.3.bias"):
            value = 0.8 + 0 * noise  # some tokens score and some are cut off by the last ReLU
        elif last in {"bias", "running_mean", "in_proj_bias"}:
            value = 0.3 * noise
        elif last in {"cls_token", "pos_embed", "noise_codes", "relative_position_bias_table", "panels", "prompts"}:
            value = noise
        elif last in {"gamma_1", "gamma_2", "deviation"}:
            value = random.uniform(0.5, 1.5, shape)
        elif last == "mean":
            value = 0.3 * noise
        else:
            raise AssertionError(f"what is {name}?")
        tensor.copy_(torch.from_numpy(value))
    return module


def images(random: np.random.Generator, *shape: int) -> Array:
    """Noise in [-1, 1] of another colour and contrast in every image, so that averages over it differ too."""
    colour = random.uniform(-1, 1, (*shape[:-2], 1, 1))
    contrast = random.uniform(0, 1, (*shape[:-3], 1, 1, 1))
    return np.clip(colour + contrast * random.uniform(-2, 2, shape), -1, 1)


def agree(actual: Tensor, expected: Array, what: str = "output", tolerance: float = 1e-9) -> None:
    assert actual.dtype == torch.float64
    assert tuple(actual.shape) == expected.shape
    assert np.isfinite(expected).all()
    assert expected.std() > 1e-4, f"{what}: constant, so nothing is compared"
    atol = tolerance * float(np.abs(expected).max())
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=atol, err_msg=what)
