"""A whole score in PyTorch, in the memory of one device: the program that somebody who knows PyTorch well would write.

The networks are those that we export. State, noise, taps and crops never leave the device. The float32 sampler takes
the steps of `runtime/host/sampler.py`. The image is uploaded once, and only scores come back.
"""

import contextlib
import copy
import enum
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..engine.manifest import Manifest, StageName
from ..engine.noise import MULTIPLIERS, ROUNDS, WEYL, split_seed
from ..engine.sampling import Sampling, TapRule
from ..engine.schedule import Kind
from ..engine.score import weighted_sum
from ..errors import UsageError
from ..export.stages import stage_plans
from ..model.config import ModelConfig
from ..model.network import DiffV2IQA, as_tapped
from ..model.unet import UNet
from ..runtime.gpu.onnx_stage import BATCH
from ..runtime.plan import Plan, make_plan
from ..runtime.results import Mode, Options

Function = Callable[..., Tensor]

# Plain numbers: compilers trace none of NumPy's.
_M0, _M1 = map(int, MULTIPLIERS)
_LOW = 0xFFFFFFFF
_TWO_PI = float(np.float32(2 * np.pi))
_WARM_UP = 3  # calls before a capture: cuDNN chooses its algorithms, and cuBLAS takes its workspace


class Way(enum.StrEnum):
    """How PyTorch is made fast."""

    EAGER = "eager"
    # Eager kernels, with each step recorded as one CUDA graph. This shows the cost of launches alone, and works where
    # Inductor does not. `torch.compile`'s mode "reduce-overhead" is left out, as "max-autotune" includes it.
    GRAPH = "CUDA graph"
    COMPILED = "torch.compile"
    TENSORRT = "Torch-TensorRT"


def prepare(device: torch.device) -> None:
    """Set PyTorch up for a GPU, in the whole process."""
    torch.cuda.set_device(device)
    torch.backends.cudnn.benchmark = True
    # Ours computes in float32. These are the settings' old names: libraries still use them, and mixing is an error.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


class TorchScorer:
    """Scores images with a model on a device, one at a time."""

    def __init__(
        self, model: DiffV2IQA, device: torch.device, dtype: torch.dtype = torch.float32, way: Way = Way.EAGER
    ) -> None:
        self._device, self._dtype = device, dtype
        modules = {plan.name: copy.deepcopy(plan.module) for plan in stage_plans(model)}
        unet = modules.pop(StageName.UNET, None)
        self._noise = _fast(normals, way, network=False)
        self._assess = _fast(self._placed(_Heads(modules, model.config, device.type, dtype)), way)
        self._step = _fast(self._placed(_Step(unet, dtype)), way) if isinstance(unet, UNet) else None

    @torch.inference_mode()
    def score(
        self,
        pixels: npt.NDArray[Any],
        manifest: Manifest,
        options: Options,
        restored_from: npt.NDArray[Any] | None = None,
    ) -> float:
        """Return the score of pixels (height, width, 3), uint8 or float in [0, 1], restored from others if given."""
        whole = pixels if restored_from is None else restored_from
        plan = make_plan(whole.shape[0], whole.shape[1], manifest, options)
        if plan.mode is not Mode.WHOLE:
            raise UsageError(f"{plan.width}×{plan.height} pixels are more than this peer restores, which has no tiles")
        if plan.squashed:
            raise UsageError("this peer squashes no images")
        if plan.sampling.taps is TapRule.RENOISED:
            raise UsageError("this peer taps states alone, and this sampler makes taps of its result")
        plane = self._plane(pixels, plan)
        condition = plane if whole is pixels else self._plane(whole, plan)
        restored = self._restore(self._step, condition, manifest, plan.sampling, options.seed) if self._step else {}
        planes = torch.cat([plane, *restored.values()])[:, :, : plan.height, : plan.width]
        crops = _cut(planes, plan)
        scores = [self._assess(crops[start : start + BATCH]) for start in range(0, len(crops), BATCH)]
        return statistics.fmean(torch.cat(scores).tolist())  # waits for all of it: a clock may be read now

    def _placed(self, module: nn.Module) -> nn.Module:
        module = module.eval().to(self._device)
        return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore, no-any-return]

    def _plane(self, pixels: npt.NDArray[Any], plan: Plan) -> Tensor:
        """Upload an image → (1, 3, *padded) in [-1, 1], padded by reflection, channels last."""
        uploaded = torch.from_numpy(np.array(pixels)).to(self._device)  # a copy: PyTorch takes no read-only arrays
        unit = uploaded.float() / 255 if pixels.dtype == np.uint8 else uploaded.float()
        plane = ((unit - 0.5) / 0.5).permute(2, 0, 1)[None]
        missing = (0, plan.padded[1] - plan.width, 0, plan.padded[0] - plan.height)
        plane = nn.functional.pad(plane, missing, mode="reflect") if any(missing) else plane
        return plane.contiguous(memory_format=torch.channels_last)

    def _restore(
        self, step: Function, plane: Tensor, manifest: Manifest, sampling: Sampling, seed: int
    ) -> dict[Kind, Tensor]:
        """Run the sampling loop → the state (1, 3, H, W) for every restored kind."""
        rows = sampling.rows(manifest.schedule, manifest.taps, manifest.kinds)
        c = rows.factors
        columns = (c.noise_level, c.y_to_x0, c.noise_to_x0, c.x0_to_mean, c.y_to_mean, c.sigma)
        table = torch.from_numpy(np.stack(columns, axis=1)).to(self._device)  # [steps, 6]
        z = self._draw(seed, [*rows.steps, rows.start], plane)
        condition = plane.to(self._dtype)
        tapped = {}
        y = z[-1:] * rows.image[1] + plane * rows.image[0] if rows.image else z[-1:]
        for i in reversed(range(len(rows.steps))):
            y = step(y, condition, z[i][None], table[i])
            if i in rows.taps.values():
                tapped[i] = y
        return {kind: as_tapped(tapped[i], manifest.tap_form) for kind, i in rows.taps.items()}

    def _draw(self, seed: int, steps: Sequence[int], plane: Tensor) -> Tensor:
        """Return the noise of steps as (steps, 3, H, W).

        All noise is drawn at once, on the device, within the score's time. On the host it would take longer than the
        networks on a GPU. A step of a 224×224 image has 0.6 MB of noise; scratch memory takes about ten times as much.
        """
        _, _, height, width = plane.shape
        low, high = split_seed(seed)
        keys = [[(low + i * WEYL[0]) & _LOW, (high + i * WEYL[1]) & _LOW] for i in range(ROUNDS)]
        drawn = self._noise(
            torch.tensor(keys, device=self._device),
            torch.arange(3 * height * width // 4, device=self._device),
            torch.tensor(steps, device=self._device)[:, None],
        )
        return drawn.reshape(len(steps), 3, height, width).contiguous(memory_format=torch.channels_last)


def normals(keys: Tensor, blocks: Tensor, steps: Tensor) -> Tensor:
    """Return the normals of `engine/noise.py`: round keys (10, 2), blocks (n,), steps (T, 1), int64 → (T, n, 4).

    Products of two 32-bit words may overflow int64; that does not change the bits that are used.
    """
    c0, c1, c2, c3 = blocks, steps, torch.zeros_like(blocks), torch.zeros_like(blocks)
    for i in range(ROUNDS):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1 = ((p1 >> 32) & _LOW) ^ c1 ^ keys[i, 0], p1 & _LOW
        c2, c3 = ((p0 >> 32) & _LOW) ^ c3 ^ keys[i, 1], p0 & _LOW

    def pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        u, v = (((word >> 9).float() + 0.5) * 2**-23 for word in (first, second))
        radius, angle = (-2 * u.log()).sqrt(), _TWO_PI * v
        return radius * angle.cos(), radius * angle.sin()

    return torch.stack([*pair(c0, c1), *pair(c2, c3)], dim=-1)


def lowered_unet(unet: UNet, dtype: torch.dtype) -> UNet:
    """Give a U-Net weights of `dtype` and return it; its noise level stays float32.

    Cast once: autocast would cast for every image, and for every step if compiled. BatchNorms stay float32, too: their
    variances may not fit 16 bits.
    """
    for name, part in unet.named_modules():
        if isinstance(part, nn.Conv2d | nn.Linear | nn.GroupNorm) and not name.startswith("noise_level_mlp"):
            part.to(dtype)
    unet.noise_level_mlp = nn.Sequential(unet.noise_level_mlp, _Cast(dtype))
    return unet


class _Step(nn.Module):
    """One step of the sampling loop. The U-Net has its weights in `dtype`; the state is float32."""

    def __init__(self, unet: UNet, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.unet = dtype, lowered_unet(unet, dtype)

    def forward(self, y: Tensor, condition: Tensor, z: Tensor, row: Tensor) -> Tensor:
        """State, image and noise (1, 3, H, W), coefficients (6,) → the next state."""
        noise_level, y_to_x0, noise_to_x0, x0_to_mean, y_to_mean, sigma = row.unbind()
        noise = self.unet(y.to(self.dtype), condition, noise_level.reshape(1, 1)).float()
        x0 = (y * y_to_x0 - noise * noise_to_x0).clamp(-1, 1)
        out: Tensor = x0 * x0_to_mean + y * y_to_mean + z * sigma
        return out


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return x.to(self.dtype)


class _Heads(nn.Module):
    """ViT and both branches. They run once per image, so autocast is enough; on a GPU it keeps norms, sums float32."""

    def __init__(
        self, modules: Mapping[StageName, nn.Module], config: ModelConfig, device: str, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({name.value: module for name, module in modules.items()})
        self.config, self.device, self.dtype = config, device, dtype

    def forward(self, crops: Tensor) -> Tensor:
        """Crops of all kinds (B, kinds, 3, crop, crop) → scores (B,)."""
        vcg = vda = None
        with torch.autocast(self.device, self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext():
            if "vcg" in self.stages:
                maps = self.stages["vit"](crops.flatten(0, 1))
                score, *_ = self.stages["vcg"](maps.unflatten(0, crops.shape[:2]))
                vcg = score.float()
            if "vda" in self.stages:
                score, *_ = self.stages["vda"](crops)
                vda = score.float()
        total: Tensor = weighted_sum(self.config, vcg, vda)
        return total


def _cut(planes: Tensor, plan: Plan) -> Tensor:
    """Cut planes (kinds, 3, H, W) into crops (crops, kinds, 3, crop, crop), with channels last in memory."""
    size, last = plan.crop_size, planes.permute(0, 2, 3, 1)
    return torch.stack([last[:, c.top : c.top + size, c.left : c.left + size] for c in plan.crops]).movedim(-1, 2)


def _fast(function: Function, way: Way, *, network: bool = True) -> Function:
    if way is Way.EAGER:
        return function
    if way is Way.GRAPH:
        return _Captured(function)
    if way is Way.TENSORRT and network:
        # Types are those of the weights. PyTorch runs only operators that TensorRT does not support (no option forbids
        # that); even a single supported operator goes to TensorRT. An engine that cannot be built is an error.
        options = {
            "use_explicit_typing": True,
            "disable_tf32": True,
            "min_block_size": 1,
            "pass_through_build_failures": True,
        }
        return _compiled(function, backend="torch_tensorrt", options=options)
    return _compiled(function, mode="max-autotune")


def _compiled(function: Function, **how: Any) -> Function:
    # Whole graphs only: otherwise PyTorch silently stops compiling after a few shapes.
    fast: Function = torch.compile(function, dynamic=False, fullgraph=True, **how)

    def call(*inputs: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call, unused-ignore]
        return fast(*inputs).clone()  # the next call overwrites this memory

    return call


class _Captured:
    """A function as CUDA graphs, one for each set of shapes."""

    def __init__(self, function: Function) -> None:
        self._function = function
        self._graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]] = {}

    def __call__(self, *inputs: Tensor) -> Tensor:
        shapes = tuple(value.shape for value in inputs)
        if shapes not in self._graphs:
            self._graphs[shapes] = self._capture([value.clone() for value in inputs])
        graph, held, out = self._graphs[shapes]
        for target, value in zip(held, inputs, strict=True):
            target.copy_(value)
        graph.replay()
        return out.clone()  # the next replay overwrites this memory

    def _capture(self, held: list[Tensor]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], Tensor]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._function(*held)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self._function(*held)
        return graph, held, out
