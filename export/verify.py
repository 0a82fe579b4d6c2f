"""An exported stage against its PyTorch original, on random inputs, through ONNX Runtime."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

from ..engine.manifest import Check, StageName
from ..errors import ExportError
from ..model.network import DiffV2IQA
from .stages import StagePlan

FloatArray = npt.NDArray[np.float32]
TOLERANCE = 1e-4  # absolute for noise and scores; for ViT maps, whose range is open, of their largest value above 1


@torch.no_grad()
def reference(model: DiffV2IQA, name: StageName, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Run a stage in the *unmerged* model, so that what export merges is checked along with what it converts."""
    if name is StageName.UNET and model.unet:
        return (model.unet(*inputs),)
    if name is StageName.VIT and model.vcg:
        return (model.vcg.maps(*inputs),)
    return tuple(model.vcg_scores(*inputs) if name is StageName.VCG else model.vda_scores(*inputs))


def verify_stage(model: DiffV2IQA, plan: StagePlan, path: Path, *, seed: int) -> tuple[Check, ...]:
    """Compare at two batch sizes, and two image sizes where they are free. Raises ExportError on disagreement."""
    session = onnxruntime.InferenceSession(path, _options(), providers=["CPUExecutionProvider"])
    crop = model.config.crop
    other = (crop // 32 * 16, crop + 32) if plan.name is StageName.UNET else (crop, crop)  # aligned for every U-Net
    checks = []
    for batch, size in zip((1, 2), ((crop, crop), other), strict=True):
        inputs = plan.draw(batch, size, torch.Generator().manual_seed(seed + batch))
        expected = reference(model, plan.name, inputs)
        feed = {name: value.numpy() for name, value in zip(plan.inputs, inputs, strict=True)}
        got = session.run(list(plan.outputs), feed)
        for output, want, have in zip(plan.outputs, expected, got, strict=True):
            checks.append(_compare(plan, output, feed, want.numpy(), have, seed + batch))
    return tuple(checks)


def _compare(
    plan: StagePlan,
    output: str,
    feed: dict[str, FloatArray],
    want: FloatArray,
    have: FloatArray,
    seed: int,
) -> Check:
    shapes = {name: value.shape for name, value in feed.items()}
    where = f"stage {plan.name}, output {output}, inputs {shapes}, seed {seed}"
    if have.shape != want.shape:
        raise ExportError(f"{where}: ONNX Runtime returns shape {have.shape}, PyTorch {want.shape}")
    if not np.isfinite(want).all():
        raise ExportError(f"{where}: PyTorch itself returns NaN or Inf; the weights are not usable")
    error = np.abs(have.astype(np.float64) - want)
    largest = float(np.abs(want).max())
    tolerance = TOLERANCE * (max(1.0, largest) if output == "maps" else 1.0)
    check = Check(output, shapes, seed, float(error.max()), float(error.mean()), largest, tolerance)
    if not check.max_abs_error <= tolerance:  # written so that NaN fails
        raise ExportError(f"{where}: ONNX Runtime differs from PyTorch by {check.max_abs_error:.3g} > {tolerance:.3g}")
    return check


def _options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return options
