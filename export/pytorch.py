"""An exported stage beside its PyTorch original: it may differ by what rounding explains, and by no more.

Networks round differently: a ViT loses more digits than a head, and random weights more than trained ones; labels of
0 to 100 make all numbers larger. So PyTorch's own rounding is measured first, in float32 beside float64.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..engine.manifest import Check, Stage, StageName
from ..model.network import DiffV2IQA
from ..model.pfd.network import PfdIQA
from ..runtime.executor import Call
from . import pfd
from .compare import SMALLEST, FloatArray, compare, run_onnx
from .stages import StagePlan

MULTIPLE = 30  # of PyTorch's own rounding: ONNX Runtime adds in another order, and merged layers round once less
LEAST = 5e-6  # of the largest value: rounding measured on a few numbers can be nothing, by luck
ADVICE = (
    f", which is more than {MULTIPLE} times the rounding of PyTorch itself: the conversion changed what the stage "
    f"computes; try another version of torch, and report this; with --accept-drift the engine is written all the same, "
    f"and says so wherever it runs"
)


@torch.no_grad()
def reference(model: DiffV2IQA | PfdIQA, name: StageName, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Run a stage in the *unmerged* model, so that a check covers what export merges and what it converts."""
    if isinstance(model, PfdIQA):
        results = pfd.part_of(model, name)(*inputs)
        return (results,) if isinstance(results, torch.Tensor) else tuple(results)
    if name is StageName.UNET and model.unet:
        return (model.unet(*inputs),)
    if name is StageName.VIT and model.vcg:
        return (model.vcg.maps(*inputs),)
    return tuple(model.vcg_scores(*inputs) if name is StageName.VCG else model.vda_scores(*inputs))


class TorchStage:
    """A stage of the unmerged model behind the arrays of a runtime."""

    def __init__(self, model: DiffV2IQA | PfdIQA, stage: Stage) -> None:
        self._model, self._stage = model, stage

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> Call:
        """Return a call that runs the stage on these arrays."""
        tensors = tuple(torch.from_numpy(inputs[spec.name]) for spec in self._stage.inputs)

        def call() -> None:
            results = reference(self._model, self._stage.name, tensors)
            for spec, result in zip(self._stage.outputs, results, strict=True):
                if spec.name in outputs:
                    outputs[spec.name][...] = result.numpy()

        return call


def compare_with_pytorch(
    model: DiffV2IQA | PfdIQA, plan: StagePlan, path: Path, *, seed: int, accept_drift: bool = False
) -> tuple[Check, ...]:
    """Compare at two batch sizes, and at two image sizes where they are free.

    Raises ExportError on disagreement; with `accept_drift` only where shapes differ or values are not finite.
    """
    crop = model.config.crop
    other = (crop // 32 * 16, crop + 32) if plan.name is StageName.UNET else (crop, crop)  # aligned for every U-Net
    checks: list[Check] = []
    allowed: dict[str, float] = {}
    for batch, size in zip((1, 2), ((crop, crop), other), strict=True):
        inputs = plan.draw(batch, size, torch.Generator().manual_seed(seed + batch))
        feed = {name: value.numpy() for name, value in zip(plan.inputs, inputs, strict=True)}
        results = reference(model, plan.name, inputs)
        want = [value.numpy() for value in results]
        have = run_onnx(path, feed)
        if not allowed or _is_beyond(allowed, plan, want, have):
            # Some inputs round far worse than others: where two weights of an attention are nearly alike, for example.
            own = _allowed(model, plan, inputs, results)
            allowed = {output: max(share, allowed.get(output, 0.0)) for output, share in own.items()}
        checks += compare(
            plan.name,
            plan.outputs,
            feed,
            seed + batch,
            ("PyTorch", want),
            ("ONNX Runtime", have),
            partial(_tolerance, allowed),
            ADVICE,
            accept=accept_drift,
        )
    return tuple(checks)


def _is_beyond(
    allowed: dict[str, float], plan: StagePlan, want: Sequence[FloatArray], have: Sequence[FloatArray]
) -> bool:
    """Return whether an output differs by more than was allowed for the inputs before."""
    return any(
        a.shape == b.shape and float(np.abs(a - b).max()) > _tolerance(allowed, output, float(np.abs(a).max()))
        for output, a, b in zip(plan.outputs, want, have, strict=True)
    )


def _tolerance(allowed: dict[str, float], output: str, largest: float) -> float:
    return allowed[output] * max(largest, SMALLEST)


def _allowed(
    model: DiffV2IQA | PfdIQA, plan: StagePlan, inputs: tuple[torch.Tensor, ...], results: tuple[torch.Tensor, ...]
) -> dict[str, float]:
    """Return what each output may differ by, of its largest value, from how PyTorch itself rounds."""
    with _in_float64(model, plan.name):
        exact = reference(model, plan.name, tuple(value.double() for value in inputs))
    shares = {
        output: float((result - precise).abs().max() / precise.abs().max().clamp(min=SMALLEST))
        for output, result, precise in zip(plan.outputs, results, exact, strict=True)
    }
    return {output: max(MULTIPLE * share, LEAST) for output, share in shares.items()}


def _parts(model: DiffV2IQA, name: StageName) -> list[nn.Module]:
    parts: dict[StageName, list[nn.Module | None]] = {
        StageName.UNET: [model.unet],
        StageName.VIT: [model.vcg and model.vcg.vit],
        StageName.VCG: [model.vcg, model.tabs],
        StageName.VDA: [model.vda, model.tabs],
    }
    return [part for part in parts[name] if part is not None]


@contextmanager
def _in_float64(model: DiffV2IQA | PfdIQA, name: StageName) -> Iterator[None]:
    """Hold what a stage is made of in float64, and give it back as it was: float32 survives the way there and back."""
    used = [pfd.part_of(model, name)] if isinstance(model, PfdIQA) else _parts(model, name)
    try:
        for part in used:
            part.double()
        yield
    finally:
        for part in used:
            part.float()
