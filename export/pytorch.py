"""An exported stage beside its PyTorch original."""

from pathlib import Path

import torch

from ..engine.manifest import Check, StageName
from ..model.network import DiffV2IQA
from .compare import compare, run_onnx
from .stages import StagePlan

TOLERANCE = 1e-4  # absolute for noise and scores; for ViT maps, which have no range, of their largest value above 1


@torch.no_grad()
def reference(model: DiffV2IQA, name: StageName, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Run a stage in the *unmerged* model, so that a check covers what export merges and what it converts."""
    if name is StageName.UNET and model.unet:
        return (model.unet(*inputs),)
    if name is StageName.VIT and model.vcg:
        return (model.vcg.maps(*inputs),)
    return tuple(model.vcg_scores(*inputs) if name is StageName.VCG else model.vda_scores(*inputs))


def compare_with_pytorch(model: DiffV2IQA, plan: StagePlan, path: Path, *, seed: int) -> tuple[Check, ...]:
    """Compare at two batch sizes, and at two image sizes where they are free. Raises ExportError on disagreement."""
    crop = model.config.crop
    other = (crop // 32 * 16, crop + 32) if plan.name is StageName.UNET else (crop, crop)  # aligned for every U-Net
    checks: list[Check] = []
    for batch, size in zip((1, 2), ((crop, crop), other), strict=True):
        inputs = plan.draw(batch, size, torch.Generator().manual_seed(seed + batch))
        feed = {name: value.numpy() for name, value in zip(plan.inputs, inputs, strict=True)}
        want = [value.numpy() for value in reference(model, plan.name, inputs)]
        have = run_onnx(path, feed)
        checks += compare(
            plan.name, plan.outputs, feed, seed + batch, ("PyTorch", want), ("ONNX Runtime", have), _tolerance
        )
    return tuple(checks)


def _tolerance(output: str, largest: float) -> float:
    return TOLERANCE * (max(1.0, largest) if output == "maps" else 1.0)
