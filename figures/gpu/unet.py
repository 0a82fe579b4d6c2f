"""Steps of `scripts/gpu-check` on one step of the full-size U-Net in PyTorch, with seeded weights."""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...bench.torch_loop import lowered_unet
from ...export.stages import fold_unet
from ...model.config import UNetConfig, preset
from ...model.unet import ResidualBlock, UNet
from ...tests.tiny import TINY
from .check import Notes, Place
from .networks import HALF, channels_last

PAPER_GFLOP = 2 * 143.56  # of a step at 224×224, by the count in the engine's manifest
CROPS = {1: "one crop", 8: "8 crops"}


class Rates:
    """Times of a step as rates, beside a matrix product in the same process."""

    def __init__(self, place: Place, notes: Notes) -> None:
        self._notes = notes
        torch.backends.cudnn.benchmark = True
        allow_tf32(False)
        self._peak = matmul_tflops(place, low(place))

    def note(self, name: str, batch: int, milliseconds: float) -> None:
        """Note a time, and the rate that it is."""
        rate = PAPER_GFLOP * batch / milliseconds
        row = {"ms": milliseconds, "ms per crop": milliseconds / batch, "TFLOP/s": rate}
        self._notes.add(**{f"{name}, {CROPS[batch]}": row | {"share of a large product": rate / self._peak}})


def unet(place: Place, notes: Notes) -> None:
    """float32, TF32 and fp16, for one crop and for eight; the figures that decide come first."""
    rates, exact = Rates(place, notes), full_unet(place)
    last = channels_last(copy.deepcopy(exact), place)
    half = lowered(place, copy.deepcopy(last))

    @torch.inference_mode()
    def timed(name: str, module: nn.Module, dtype: torch.dtype, batch: int) -> None:
        allow_tf32(name == "TF32")
        run = partial(module, *inputs_of(place, batch, dtype))
        rates.note(f"PyTorch, CUDA graph, {name}", batch, median_ms(graph_of(run)))
        rates.note(f"PyTorch, {name}", batch, median_ms(run))

    wide = torch.float32
    for batch, crops in CROPS.items():
        for name, module, dtype in (("fp16", half, low(place)), ("TF32", last, wide), ("float32", exact, wide)):
            notes.attempt(f"{name}, {crops}", timed, name, module, dtype, batch)
    notes.attempt("fp16: difference from float32", difference, place, exact, half)


def compile(place: Place, notes: Notes, mode: str = "default") -> None:  # noqa: A001 — a step's name
    """Inductor in a mode: seconds to compile, and rates with a CUDA graph and without."""
    rates, exact = Rates(place, notes), full_unet(place)
    half = lowered(place, channels_last(copy.deepcopy(exact), place))
    how: dict[str, Any] = {"backend": "eager"} if place.dry else {"mode": mode}
    for batch in (1,) if place.dry else CROPS:
        torch.compiler.reset()
        fast = cast(nn.Module, torch.compile(half, dynamic=False, fullgraph=True, **how))
        run = partial(fast, *inputs_of(place, batch, low(place)))
        with torch.inference_mode():
            notes.add(**{f"seconds to compile it for {CROPS[batch]}": seconds_of(run)})
            rates.note(f"torch.compile ({mode}), CUDA graph, fp16", batch, median_ms(graph_of(run)))
            rates.note(f"torch.compile ({mode}), fp16", batch, median_ms(run))
        if batch == 1:
            notes.attempt("difference from float32", difference, place, exact, fast)


def autotune(place: Place, notes: Notes) -> None:
    """Inductor's best, at minutes of compilation."""
    compile(place, notes, "max-autotune-no-cudagraphs")


def embedding(place: Place, notes: Notes) -> None:
    """A step with what depends on the step alone computed, and looked up in a table."""
    torch.backends.cudnn.benchmark = True
    half = lowered(place, channels_last(full_unet(place), place))
    for batch, crops in CROPS.items():
        inputs = inputs_of(place, batch, low(place))
        with torch.inference_mode():
            other = tabulated(half, inputs[2])
            gap = float((other(*inputs) - half(*inputs)).norm() / half(*inputs).norm())
            notes.check(f"{crops}: the table gives the same noise", gap < 1e-2, gap)
            # Ten calls in a graph: what a launch costs does not count.
            whole, less = (median_ms(graph_of(partial(module, *inputs), 10)) / 10 for module in (half, other))
        notes.add(**{crops: {"ms": whole, "ms with a table": less, "share saved": 1 - less / whole}})


class Row(nn.Module):
    """A row of a table, for the number of a step that is on the device, in the place of the noise embedding."""

    def __init__(self, table: Tensor, step: Tensor) -> None:
        super().__init__()
        self.table, self.step = table, step

    def forward(self, _noise_level: Tensor) -> Tensor:
        """Return a row for every image."""
        return self.table.index_select(0, self.step)


class AddPart(nn.Module):
    """A block's part of the row, added to every pixel."""

    def __init__(self, start: int, stop: int) -> None:
        super().__init__()
        self.part = slice(start, stop)

    def forward(self, x: Tensor, row: Tensor) -> Tensor:
        """Shift (B, C, H, W)."""
        return x + row[:, self.part, None, None]


def tabulated(unet: nn.Module, level: Tensor) -> nn.Module:
    """Return a copy of a U-Net in which all that depends on the noise level is a table of 50 rows."""
    other: Any = copy.deepcopy(unet)
    blocks: list[Any] = [part for part in other.modules() if isinstance(part, ResidualBlock)]
    embedding = other.noise_level_mlp(level[:1])
    pieces = [block.noise_func.noise_func(embedding) for block in blocks]
    stops = np.cumsum([piece.shape[1] for piece in pieces]).tolist()
    for block, start, stop in zip(blocks, [0, *stops], stops, strict=False):
        block.noise_func = AddPart(start, stop)
    step = torch.full((len(level),), 7, device=level.device)
    other.noise_level_mlp = Row(torch.cat(pieces, dim=1).repeat(50, 1), step)
    return cast(nn.Module, other)


def full_unet(place: Place) -> nn.Module:
    """Return the deployed U-Net of `paper`, in float32."""
    torch.manual_seed(0)
    config = cast(UNetConfig, (TINY if place.dry else preset("paper")).unet)
    with torch.device(place.device):
        return fold_unet(UNet(config).eval()).to(place.device)


def low(place: Place) -> torch.dtype:
    """Return what tensor cores multiply; a CPU stays at float32."""
    return HALF if place.device == "cuda" else torch.float32


def lowered(place: Place, unet: nn.Module) -> nn.Module:
    """Return the U-Net in that precision."""
    return lowered_unet(cast(UNet, unet), low(place))


def inputs_of(place: Place, batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return state, image and noise level: random, because zeros are faster."""
    side = TINY.crop if place.dry else 224
    y, condition = (torch.randn(batch, 3, side, side, device=place.device).to(dtype) for _ in "yc")
    return y, condition, torch.full((batch, 1), 0.6, device=place.device)


@torch.inference_mode()
def difference(place: Place, exact: nn.Module, other: nn.Module) -> float:
    """Return how far another form of a network is from float32: norm of the difference over norm of the result."""
    allow_tf32(False)
    y, condition, level = inputs_of(place, 1, torch.float32)
    wanted, found = exact(y, condition, level), other(y.to(low(place)), condition.to(low(place)), level).float()
    return float((found - wanted).norm() / wanted.norm())


def matmul_tflops(place: Place, dtype: torch.dtype) -> float:
    """Return the rate of a product of two square matrices of random numbers."""
    side = 64 if place.dry else 8192 if place.device == "cuda" else 1024
    a, b = (torch.randn(side, side, device=place.device).to(dtype) for _ in "ab")
    return 2 * side**3 / median_ms(partial(torch.matmul, a, b, out=torch.empty_like(a)), 10) / 1e9


def allow_tf32(allowed: bool) -> None:
    """Let float32 products be computed in TF32, or not."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def seconds_of(call: Callable[[], object]) -> float:
    """Return the time of a call by the host's clock, the device's work included."""
    begun = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def median_ms(call: Callable[[], object], repeats: int = 20) -> float:
    """Return the median time of a call on the device, after four to warm up."""
    repeats = 3 if max(seconds_of(call) for _ in range(4)) > 1 else repeats  # on a CPU
    event = partial(torch.cuda.Event, enable_timing=True)
    pairs = [(event(), event()) for _ in range(repeats)]
    for first, last in pairs:
        first.record()
        call()
        last.record()
    torch.cuda.synchronize()
    return statistics.median(float(first.elapsed_time(last)) for first, last in pairs)


def graph_of(call: Callable[[], object], times: int = 1) -> Callable[[], object]:
    """Return what replays a CUDA graph of so many calls; without a card, replaying does nothing."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call, unused-ignore]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay
