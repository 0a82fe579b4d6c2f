"""What scores images in a peer's process: ours, and what one could use instead, each as well set up as we know how.

All but the plain loop differ in what runs the networks alone: images, crops, noise and sampler are ours for each of
them, in float32.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import BackendError
from ..runtime.host import Call, StageRunner
from ..runtime.images import read_image
from ..runtime.manifest import Manifest, StageName, open_engine
from ..runtime.results import Options
from ..runtime.scorer import Scorer, host_name, host_settings, load_stages, to_plane
from .measure import with_steps

if TYPE_CHECKING:
    from ..model.network import DiffV2IQA

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Ground:
    """What every contender gets."""

    engine: Path
    ckpt: Path | None
    threads: int
    backend: str = "onnxruntime"  # of ours, in float32: what the others are compared with


@dataclass(frozen=True)
class Ask:
    """One image to score."""

    image: Path
    crops: int
    seed: int
    steps: int


Score = Callable[[Ask], float]
Make = Callable[[Ground], tuple[Score, str]]  # runs in the peer's process; returns the version of what runs there too


class Missing(Exception):  # noqa: N818 — what is not here is no error
    """Raised by a contender that cannot be had on this machine; the text says what it lacks."""


def ours(ground: Ground) -> tuple[Score, str]:
    """Return diffiqa as `iqa-run` runs it."""
    directory, settings = open_engine(ground.engine), host_settings(ground.backend, ground.threads)
    return _scored(directory.manifest, load_stages(directory, settings)), host_name(settings).partition(":")[0]


def onnxruntime_default(ground: Ground) -> tuple[Score, str]:
    """Return the exported graphs run as ONNX Runtime's own examples do: default settings, arrays in, arrays out."""
    import onnxruntime

    class Stage:
        def __init__(self, path: Path) -> None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = ground.threads  # as many as the others have
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
            def call() -> None:
                for name, value in zip(outputs, self._session.run(list(outputs), dict(inputs)), strict=True):
                    outputs[name][...] = value

            return call

    directory = open_engine(ground.engine)
    stages = {stage.name: Stage(directory.file(stage.file)) for stage in directory.manifest.stages}
    return _scored(directory.manifest, stages), f"onnxruntime {onnxruntime.__version__}"


def openvino(ground: Ground, *, precision: str) -> tuple[Score, str]:
    """Return `iqa-run --backend openvino`."""
    settings = host_settings("openvino", ground.threads, precision)
    try:
        name = host_name(settings)
    except BackendError as exc:
        raise Missing(str(exc)) from exc
    directory = open_engine(ground.engine)
    return _scored(directory.manifest, load_stages(directory, settings)), name.partition(":")[0]


def torch_stages(ground: Ground, *, precision: str, compiled: bool) -> tuple[Score, str]:
    """Return PyTorch with the merged modules that we export, channels last; compiled ones have frozen weights."""
    model = _torch_model(ground)
    import torch

    from ..export.stages import StagePlan, stage_plans

    if compiled:
        import torch._inductor.config as inductor

        inductor.freezing = True  # type: ignore[attr-defined, unused-ignore]

    class Stage:
        def __init__(self, plan: StagePlan) -> None:
            self._plan = plan
            module = plan.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, unused-ignore]
            self._module = torch.compile(module, dynamic=False) if compiled else module

        def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
            given = [torch.from_numpy(inputs[name]) for name in self._plan.inputs]
            wanted = [torch.from_numpy(outputs[name]) for name in self._plan.outputs]

            @torch.no_grad()
            def call() -> None:
                last = [x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for x in given]
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    found = self._module(*last)
                for target, value in zip(wanted, found if isinstance(found, tuple) else (found,), strict=True):
                    target.copy_(value)

            return call

    manifest = open_engine(ground.engine).manifest
    stages = {plan.name: Stage(plan) for plan in stage_plans(model)}
    return _scored(manifest, stages), f"torch {torch.__version__}"


def plain_loop(ground: Ground) -> tuple[Score, str]:
    """Return the authors' way of working, in PyTorch: one program restores to PNG files, another scores from them."""
    model = _torch_model(ground)
    import torch
    from PIL import Image

    from ..runtime.crops import crop_grid, padded_size
    from ..runtime.schedule import Kind

    manifest = open_engine(ground.engine).manifest
    trained = model.config

    @torch.no_grad()
    def score(ask: Ask) -> float:
        stepped = with_steps(manifest, ask.steps)
        model.config = replace(trained, schedule=stepped.schedule, taps=stepped.taps)
        size = manifest.crop.size
        pixels = read_image(ask.image, min_side=size).pixels
        height, width = pixels.shape[:2]
        rows, columns = padded_size(height, width, manifest.alignment)
        padding = ((0, 0), (0, rows - height), (0, columns - width))
        image = torch.from_numpy(np.pad(to_plane(pixels), padding, mode="reflect"))[None]
        with tempfile.TemporaryDirectory() as folder:
            files = {kind: Path(folder, f"{kind}.png") for kind in manifest.kinds}
            Image.fromarray(pixels.astype(np.uint8, copy=False)).save(files[Kind.DIS])
            for kind, plane in model.restore(image, ask.seed).items():
                restored = plane[0, :, :height, :width].add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
                Image.fromarray(restored.permute(1, 2, 0).contiguous().numpy()).save(files[kind])
            planes = torch.from_numpy(np.stack([to_plane(np.asarray(Image.open(file))) for file in files.values()]))
        crops = crop_grid(height, width, size, ask.crops)
        cut = (planes[None, :, :, c.top : c.top + size, c.left : c.left + size] for c in crops)
        return float(np.mean([model(crop).total.item() for crop in cut]))

    return score, f"torch {torch.__version__}"


def _scored(manifest: Manifest, stages: Mapping[StageName, StageRunner]) -> Score:
    """Return what scores files with these stages in our loop."""
    scorers: dict[int, Scorer] = {}

    def score(ask: Ask) -> float:
        if ask.steps not in scorers:
            scorers.clear()  # buffers of the case before
            scorers[ask.steps] = Scorer(with_steps(manifest, ask.steps), stages, backend="peer")
        return scorers[ask.steps].score(ask.image, Options(crops=ask.crops, seed=ask.seed)).score

    return score


def _torch_model(ground: Ground) -> "DiffV2IQA":
    if ground.ckpt is None:
        raise Missing("PyTorch needs the weights: give --ckpt FILE")
    try:
        import torch
    except ModuleNotFoundError as exc:
        raise Missing("torch is not installed") from exc
    from ..model.checkpoint import load

    torch.set_num_threads(ground.threads)
    return load(ground.ckpt).model


@dataclass(frozen=True)
class Contender:
    """One way to score images."""

    name: str
    precision: str
    exact: bool  # whether it computes the very function, up to the order of sums
    make: Make
    weights: bool = False  # whether it runs the checkpoint, not the engine


OURS = Contender("diffiqa", "fp32", exact=True, make=ours)
PEERS = (
    Contender("onnxruntime, default settings", "fp32", exact=True, make=onnxruntime_default),
    Contender("openvino", "fp32", exact=True, make=partial(openvino, precision="fp32")),
    Contender("openvino, bf16", "bf16", exact=False, make=partial(openvino, precision="bf16")),
    Contender(
        "torch eager", "fp32", exact=True, make=partial(torch_stages, precision="fp32", compiled=False), weights=True
    ),
    Contender(
        "torch eager, bf16",
        "bf16",
        exact=False,
        make=partial(torch_stages, precision="bf16", compiled=False),
        weights=True,
    ),
    Contender(
        "torch.compile", "fp32", exact=True, make=partial(torch_stages, precision="fp32", compiled=True), weights=True
    ),
    Contender(
        "torch.compile, bf16",
        "bf16",
        exact=False,
        make=partial(torch_stages, precision="bf16", compiled=True),
        weights=True,
    ),
    Contender("plain loop", "fp32, PNG between", exact=False, make=plain_loop, weights=True),
)
