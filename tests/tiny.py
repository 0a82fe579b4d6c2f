"""A tiny model with every part of the real one, and pictures to score with it."""

import numpy as np
import numpy.typing as npt
import torch

from diffiqa.engine.manifest import StageName
from diffiqa.engine.schedule import Kind, Schedule, Taps
from diffiqa.model.config import ModelConfig, SwinConfig, UNetConfig, VCGConfig, VDAConfig, ViTConfig
from diffiqa.model.network import DiffV2IQA

STAGES = (StageName.UNET, StageName.VIT, StageName.VCG, StageName.VDA)  # of the tiny model

TINY = ModelConfig(
    name="tiny",
    unet=UNetConfig(width=8, multipliers=(1, 2, 2), blocks=1, attention_levels=(2,)),
    schedule=Schedule(steps=6),
    taps=Taps(t1=1, t2=3),
    crop=32,
    grid=4,
    vcg=VCGConfig(
        vit=ViTConfig(patch=8, width=16, heads=2, mlp=32),
        selection={Kind.DIS: (0, 1), Kind.Y0: (0,), Kind.T1: (1,), Kind.T2: (1,)},
        noise_code=4,
        squeeze=(24, 16),
        swin=SwinConfig(layers=1, heads=2, window=2, mlp=16),
    ),
    vda=VDAConfig(resnet_width=4, resnet_blocks=(1, 1, 1, 1), classes=12, width=8),
    vcg_weight=0.5,  # unlike each other: weights that changed places would go unnoticed
    vda_weight=1.5,
)


def perturbed(model: DiffV2IQA, seed: int) -> DiffV2IQA:
    """Move every weight and statistic off its initial value: zeros and ones hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and not name.endswith("mask"):
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.mul_(0.8 + 0.4 * noise).add_(0.02 * noise)
    return model


def photo(seed: int, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Return a smooth random picture: noise at three scales, so that crops differ."""
    generator = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for cell in (1, 4, 16):
        rows, columns = -(-height // cell), -(-width // cell)
        picture += np.kron(generator.random((rows, columns, 3)), np.ones((cell, cell, 1)))[:height, :width]
    return (picture / 3 * 255).astype(np.uint8)
