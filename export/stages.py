"""The deployed form of each stage: the model's own modules, with neighbouring linear maps merged.

A BatchNorm after a linear layer folds into it, and VCG's chain of 1×1 convolutions becomes one. The merges are exact
in real numbers and computed in float64. They work on copies: the model that is passed in does not change.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..engine.manifest import Shape, StageName
from ..engine.pixels import TapForm
from ..engine.schedule import Kind
from ..model.config import ModelConfig
from ..model.heads import VCG, VDA, Readout
from ..model.lite import Block, Lite
from ..model.network import DiffV2IQA
from ..model.pfd.denoiser import Bottleneck as PfdBottleneck
from ..model.pfd.encoder import LiteEncoder
from ..model.resnet import Bottleneck, ResNet
from ..model.unet import SelfAttention, UNet
from ..model.unet import Stage as UNetStage

DISTORTED = torch.tensor(0.999)  # the level of the little noise on the image as given
N = TypeVar("N", bound=nn.Module)
Draw = Callable[[int, tuple[int, int], torch.Generator], tuple[Tensor, ...]]  # (batch, (H, W), generator)


@dataclass(frozen=True)
class StagePlan:
    """A stage to export: its module, its signature, and how to draw random inputs like those of the real loop."""

    name: StageName
    module: nn.Module
    inputs: dict[str, Shape]  # free dimensions by name
    outputs: dict[str, Shape]
    draw: Draw


class VitStage(nn.Module):
    """Images (N, 3, crop, crop) → ViT maps (N, layers, tokens, width)."""

    def __init__(self, vcg: VCG) -> None:
        super().__init__()
        self.normalise, self.vit, self.layers = vcg.normalise, vcg.vit, vcg.config.layers

    def forward(self, image: Tensor) -> Tensor:
        """Return the maps of the selected blocks."""
        out: Tensor = self.vit(self.normalise(image), self.layers)
        return out


class HeadStage(nn.Module):
    """A scoring branch with its own copy of the stage-1 TABs."""

    def __init__(self, branch: VCG | VDA, tabs: nn.ModuleList) -> None:
        super().__init__()
        self.branch, self.tabs = branch, tabs

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return score (B,), score_map and weight_map (B, grid, grid)."""
        score, score_map, weight_map = self.branch(x, self.tabs)
        return score, score_map, weight_map


def stage_plans(model: DiffV2IQA) -> Iterator[StagePlan]:
    """Yield the stages of a model in the order they run: one by one, for each holds a copy of its weights."""
    c = model.config
    kinds, size, grid = len(c.kinds), c.crop, c.grid
    verdict: dict[str, Shape] = {"score": ("B",), "score_map": ("B", grid, grid), "weight_map": ("B", grid, grid)}
    if model.unet:
        image: Shape = ("B", 3, "H", "W")
        inputs: dict[str, Shape] = {"y": image, "condition": image, "noise_level": ("B", 1)}
        yield StagePlan(StageName.UNET, fold_unet(model.unet), inputs, {"noise": image}, _draw_unet(c))
    if model.vcg and c.vcg:
        maps: Shape = (len(c.vcg.layers), c.tokens, c.vcg.vit.width)
        vit = VitStage(model.vcg)
        yield StagePlan(StageName.VIT, vit, {"image": ("N", 3, size, size)}, {"maps": ("N", *maps)}, _draw_images(c))
        head = HeadStage(merge_squeeze(model.vcg), model.tabs)
        yield StagePlan(StageName.VCG, head, {"maps": ("B", kinds, *maps)}, verdict, _draw_maps(c, vit))
    if model.vda:
        shape: Shape = ("B", kinds, 3, size, size)
        head = HeadStage(fold(model.vda), model.tabs)
        yield StagePlan(StageName.VDA, head, {"images": shape}, verdict, _draw_crops(c))


@torch.no_grad()
def fold_unet(unet: UNet) -> UNet:
    """Fold the BatchNorms that follow a linear map: block 2's into block 1 and the noise shift, attention's into qkv.

    Block 1's stay, because their input also feeds the skip. A U-Net with GroupNorm does not change.
    """
    unet = copy.deepcopy(unet)
    for stage in unet.modules():
        if isinstance(stage, UNetStage):
            block = stage.res_block
            conv, norm, shift = block.block1.block[3], block.block2.block[0], block.noise_func.noise_func[0]
            if isinstance(norm, nn.BatchNorm2d) and isinstance(conv, nn.Conv2d) and isinstance(shift, nn.Linear):
                scale, offset = _affine(norm)
                _scale_outputs(conv, scale, offset)
                _scale_outputs(shift, scale, torch.zeros_like(offset))
                block.block2.block[0] = nn.Identity()
        elif isinstance(stage, SelfAttention) and isinstance(stage.norm, nn.BatchNorm2d):
            scale, offset = _affine(stage.norm)
            weight = stage.qkv.weight.double()[:, :, 0, 0]
            qkv = nn.Conv2d(stage.qkv.in_channels, stage.qkv.out_channels, 1)
            qkv.weight.copy_((weight * scale)[:, :, None, None])
            _bias(qkv).copy_(weight @ offset)
            stage.qkv, stage.norm = qkv, nn.Identity()
    return unet.eval()


@torch.no_grad()
def merge_squeeze(vcg: VCG) -> VCG:
    """Merge VCG's chain of 1×1 convolutions, which has nothing between them, into one. The ViT is left out."""
    vcg = copy.deepcopy(vcg, {id(vcg.vit): nn.Identity()})
    first, *rest = vcg.squeeze
    assert isinstance(first, nn.Conv2d)  # noqa: S101 — tells the type checker what heads.py builds
    weight, bias = first.weight.double().flatten(1), _bias(first).double()
    for conv in rest:
        assert isinstance(conv, nn.Conv2d)  # noqa: S101
        matrix = conv.weight.double().flatten(1)
        weight, bias = matrix @ weight, matrix @ bias + _bias(conv).double()
    merged = nn.Conv2d(weight.shape[1], weight.shape[0], 1)
    merged.weight.copy_(weight[:, :, None, None])
    _bias(merged).copy_(bias)
    vcg.squeeze = nn.ModuleList([merged])
    return vcg.eval()


def fold(network: N) -> N:
    """Fold BatchNorms into the convolutions before them, and the scale of Lite's readout into its matrix."""
    network = copy.deepcopy(network).eval()
    for module in list(network.modules()):
        if isinstance(module, ResNet):
            _fold_pairs(module, "conv1", "bn1")
        elif isinstance(module, Bottleneck):
            _fold_pairs(module, "conv1", "bn1", "conv2", "bn2", "conv3", "bn3")
            if module.downsample is not None:
                _fold_pairs(module.downsample, "0", "1")
        elif isinstance(module, Lite):
            _fold_pairs(module, "_conv_stem", "_bn0", "_conv_head", "_bn1")
        elif isinstance(module, Block):
            expand = ("_expand_conv", "_bn0") if module.expands else ()
            _fold_pairs(module, *expand, "_depthwise_conv", "_bn1", "_project_conv", "_bn2")
        elif isinstance(module, Readout):
            _fold_readout(module)
        elif isinstance(module, LiteEncoder):
            _fold_pairs(module, "project", "norm")
        elif isinstance(module, PfdBottleneck) and isinstance(module.norm1, nn.BatchNorm2d):
            _fold_pairs(module, "down", "norm1", "mix", "norm2", "up", "norm3")
    return network


@torch.no_grad()
def _fold_readout(readout: Readout) -> None:
    weight = readout.linear.weight.double() / readout.deviation.double()
    bias = readout.linear.bias.double() - weight @ readout.mean.double()
    readout.linear.weight.copy_(weight)
    readout.linear.bias.copy_(bias)
    readout.mean.zero_()
    readout.deviation.fill_(1)


def _fold_pairs(parent: nn.Module, *names: str) -> None:
    """Fold (convolution, norm) children, named in turn, and leave nothing in the norm's place."""
    for conv_name, norm_name in zip(names[::2], names[1::2], strict=True):
        conv, norm = parent.get_submodule(conv_name).double(), parent.get_submodule(norm_name).double()
        assert isinstance(conv, nn.Conv2d)  # noqa: S101 — tells the type checker what the encoders are built of
        assert isinstance(norm, nn.BatchNorm2d)  # noqa: S101
        setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm).float())
        setattr(parent, norm_name, nn.Identity())


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return the scale and offset, float64, that a BatchNorm applies in eval mode."""
    assert norm.running_mean is not None  # noqa: S101 — a BatchNorm of ours always tracks
    assert norm.running_var is not None  # noqa: S101
    scale = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)
    return scale, norm.bias.double() - norm.running_mean.double() * scale


def _scale_outputs(layer: nn.Conv2d | nn.Linear, scale: Tensor, offset: Tensor) -> None:
    """Make a layer return `scale · output + offset`, per output channel."""
    per_output = scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight.copy_(layer.weight.double() * per_output)
    _bias(layer).copy_(_bias(layer).double() * scale + offset)


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    assert layer.bias is not None  # noqa: S101
    return layer.bias


def _draw_unet(c: ModelConfig) -> Draw:
    """Draw states of the loop: pictures at the noise level of a step."""

    def draw(batch: int, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        steps = torch.randint(c.schedule.steps, (batch,), generator=generator)
        level = torch.from_numpy(c.schedule.coefficients.noise_level)[steps][:, None]
        condition = pictures(batch, size, generator)
        return _noisy(condition, level[:, :, None, None], generator), condition, level

    return draw


def _draw_images(c: ModelConfig) -> Draw:
    """Draw what the heads see, kind by kind as far as they go."""

    def draw(batch: int, _size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        groups = -(-batch // len(c.kinds))
        return (_seen(c, groups, generator).flatten(0, 1)[:batch],)

    return draw


def _draw_crops(c: ModelConfig) -> Draw:
    def draw(batch: int, _size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        return (_seen(c, batch, generator),)

    return draw


def _draw_maps(c: ModelConfig, vit: "VitStage") -> Draw:
    @torch.no_grad()
    def draw(batch: int, _size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        maps = vit(_seen(c, batch, generator).flatten(0, 1))  # real maps: their range is what the head must cope with
        return (maps.reshape(batch, len(c.kinds), *maps.shape[1:]),)

    return draw


def _seen(c: ModelConfig, batch: int, generator: torch.Generator) -> Tensor:
    """Return crops of all kinds (B, kinds, 3, crop, crop): a picture, and it with the noise that each tap has left."""
    picture = pictures(batch, (c.crop, c.crop), generator)

    def left(kind: Kind) -> Tensor:
        if kind is Kind.DIS:
            return _noisy(picture, DISTORTED, generator).clamp(-1, 1)
        step = c.taps.step_of(kind)
        y = (
            _noisy(picture, torch.from_numpy(c.schedule.coefficients.noise_level)[step - 1], generator)
            if step
            else picture
        )
        return y if c.tap_form is TapForm.FLOAT else y.clamp(-1, 1)

    return torch.stack([left(kind) for kind in c.kinds], dim=1)


def _noisy(picture: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    return picture * level + torch.randn(picture.shape, generator=generator) * (1 - level**2).sqrt()


def pictures(batch: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return pictures (B, 3, H, W) from −1 to 1 that are to a network what photographs are.

    Two surfaces, whose amplitudes fall with the frequency as behind a lens, and the sharp outline where one covers the
    other. Random networks answer white noise 20 to 40 times as strongly.
    """
    frequency = (torch.fft.fftfreq(size[0])[:, None] ** 2 + torch.fft.rfftfreq(size[1]) ** 2).sqrt()
    period = 1 / frequency.clamp(min=1 / max(size))

    def surface(channels: int, power: float = 1.5) -> Tensor:
        white = torch.randn(batch, channels, *size, generator=generator)
        values: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) * period**power, s=size)
        return values / values.std(dim=(1, 2, 3), keepdim=True)

    near, far = (0.8 * surface(1) + 0.4 * surface(3) for _ in range(2))  # grey and colour
    return torch.where(surface(1, 2.5) > 0, 0.35 * near + 0.3, 0.35 * far - 0.3).clamp(-1, 1)
