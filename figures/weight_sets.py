"""Whether valid weights are refused: random full-size ones, exported as `iqa-export` does. Half an hour on two cores.

A set has weights whose size differs from channel to channel, biases with a few large ones, and batch norms with the
statistics of pictures. Scores are on the scale of labels to 1, 5 and 100. A stage that two presets share, or that the
scale does not change, is exported once in a set.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from record import write
from torch import nn

from diffiqa.engine.manifest import StageName
from diffiqa.errors import ExportError
from diffiqa.export.compare import SMALLEST
from diffiqa.export.engine import SEED
from diffiqa.export.graph import export_graph
from diffiqa.export.pytorch import MULTIPLE, compare_with_pytorch
from diffiqa.export.stages import StagePlan, pictures, stage_plans
from diffiqa.model.config import PRESETS
from diffiqa.model.network import DiffV2IQA, build

SCALES = (1, 5, 100)
STAGES = {
    "paper": (StageName.UNET, StageName.VIT, StageName.VCG, StageName.VDA),
    "authors": (StageName.UNET,),  # the others are those of `paper`
    "maniqa": (StageName.VCG,),  # its ViT is that of `paper`
}


@torch.no_grad()
def drawn(preset: str, seed: int) -> DiffV2IQA:
    """Return a model with random weights as training leaves them."""
    model, generator = build(PRESETS[preset], seed), torch.Generator().manual_seed(seed)

    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm | nn.GroupNorm):
            module.weight.copy_((0.3 * normal(module.weight)).exp())
            module.bias.copy_(0.3 * normal(module.bias))
        elif isinstance(module, nn.Linear | nn.Conv2d):
            of_channel = (0.5 * normal(module.weight.flatten(1)[:, 0])).exp()
            module.weight.mul_(of_channel.reshape(-1, *[1] * (module.weight.ndim - 1)))
            if module.bias is not None:
                module.bias.copy_((0.05 * normal(module.bias) / normal(module.bias).abs()).clamp(-10, 10))
    for name, parameter in model.named_parameters():
        if name.endswith(("noise_codes", "pos_embed", "relative_position_bias_table")):
            parameter.copy_(0.5 * normal(parameter))
    for branch in (model.vcg, model.vda):
        if branch:
            branch.score[3].weight.mul_(0.3)  # scores are around 0.5, and not the 0 of a ReLU
            nn.init.constant_(branch.score[3].bias, 0.5)
    _measure_norms(model, generator)
    return model


def _measure_norms(model: DiffV2IQA, generator: torch.Generator) -> None:
    """Give batch norms the statistics of pictures, nearly."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    if model.unet:
        condition, level = pictures(4, (96, 64), generator), torch.rand(4, 1, generator=generator)
        noise, share = torch.randn(condition.shape, generator=generator), level[:, :, None, None]
        model.unet.train()(share * condition + (1 - share**2).sqrt() * noise, condition, level)
    if model.vda:
        model.vda.resnet.train()(pictures(8, (224, 224), generator))
    model.eval()
    for norm in norms:
        if norm.running_mean is not None and norm.running_var is not None:
            by = torch.randn((2, *norm.running_var.shape), generator=generator) / 10
            norm.running_mean.add_(by[0] * norm.running_var.sqrt())
            norm.running_var.mul_(by[1].exp())


@torch.no_grad()
def rescale(head: nn.Linear, path: Path, factor: float) -> None:
    """Bring scores to another scale, in the model and in its exported file: the weights of the last layer."""
    model = onnx.load(path)
    for tensor in (head.weight, head.bias):
        old = tensor.numpy().copy()
        tensor.mul_(factor)
        found = [
            constant
            for constant in model.graph.initializer
            if sorted(constant.dims) == sorted(old.shape)
            and np.array_equal(numpy_helper.to_array(constant).reshape(-1), old.reshape(-1))
        ]
        (constant,) = found
        changed = tensor.numpy().reshape(numpy_helper.to_array(constant).shape)
        constant.CopyFrom(numpy_helper.from_array(changed, constant.name))
    onnx.save_model(model, path)


def remembered(plan: StagePlan) -> StagePlan:
    """Return a plan that draws the same inputs once: those of VCG are what the ViT makes of eight pictures."""
    drawn_before: dict[tuple[object, ...], tuple[torch.Tensor, ...]] = {}

    def draw(batch: int, size: tuple[int, int], generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        key = batch, size, generator.initial_seed()
        if key not in drawn_before:
            drawn_before[key] = plan.draw(batch, size, generator)
        return drawn_before[key]

    return replace(plan, draw=draw)


def checked(model: DiffV2IQA, plan: StagePlan, path: Path) -> dict[str, Any]:
    """Compare an exported stage with PyTorch: by output, how far it is off and may be, of the largest value."""
    outputs: dict[str, dict[str, float]] = {}
    try:
        for check in compare_with_pytorch(model, plan, path, seed=SEED, accept_drift=True):
            largest = max(check.max_abs_reference, SMALLEST)
            one = {"drift": check.max_abs_error / largest, "limit": check.tolerance / largest, "largest": largest}
            before = outputs.get(check.output)
            if before is None or one["drift"] * before["limit"] > before["drift"] * one["limit"]:
                outputs[check.output] = one  # of two comparisons, the one that is nearer to its limit
    except ExportError as exc:
        return {"refused": str(exc)}
    beyond = [name for name, one in outputs.items() if one["drift"] > one["limit"]]
    return {"refused": ", ".join(beyond), "outputs": outputs}


def exported(preset: str, seed: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Export the stages of a set, and yield what each one came to."""
    model = drawn(preset, seed)
    for plan in map(remembered, stage_plans(model)):
        if plan.name not in STAGES[preset]:
            continue
        path, start = folder / f"{plan.name}.onnx", time.perf_counter()
        branch = {StageName.VCG: model.vcg, StageName.VDA: model.vda}.get(plan.name)
        export_graph(plan, path, model.config.alignment if model.unet else 16)
        before = 1
        for scale in SCALES if branch else (1,):
            if scale > 1 and branch:
                head = branch.score[3]
                assert isinstance(head, nn.Linear)
                rescale(head, path, scale / before)
                before = scale
            row = {"set": seed, "preset": preset, "stage": plan.name, "scale": scale, **checked(model, plan, path)}
            yield row | {"seconds": round(time.perf_counter() - start, 1)}
            start = time.perf_counter()


def main() -> None:
    """Export set after set, and write figures/results/weight-sets.json after each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", type=int, default=5)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(parser.parse_args().sets):
            for preset in STAGES:
                for row in exported(preset, seed, Path(folder)):
                    rows.append(row)
                    write("weight-sets", {"multiple": MULTIPLE, "scales": SCALES, "exports": rows})


if __name__ == "__main__":
    main()
