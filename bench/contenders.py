"""The ways to score images that are compared: ours and its peers, each set up as well as we know how.

On the CPU they differ only in what runs the networks; images, crops, noise and sampler are ours, in float32. The plain
loop is the exception. On a GPU PyTorch has a loop of its own (`torch_loop.py`): our loop keeps images on the host, and
nobody with a GPU would do that.
"""

import contextlib
import enum
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..engine.manifest import EngineDirectory, Library, Manifest, StageName, open_engine
from ..engine.pixels import ImageForm, to_plane
from ..errors import BackendError, UsageError
from ..runtime.backends import BACKENDS, Backend, GpuBackend, OnnxOnGpu, OnnxRuntime, OpenVino
from ..runtime.executor import Call, StageRunner
from ..runtime.gpu.onnx_stage import CUDA, prepare
from ..runtime.gpu.tensorrt import load_library
from ..runtime.host.onnx_stage import Provider, available_cpus
from ..runtime.images import read_for, synthetic
from ..runtime.plan import sampling_of
from ..runtime.results import Mode, Options
from ..runtime.scorer import Scorer, load

if TYPE_CHECKING:
    import torch

    from ..model.network import DiffV2IQA

FloatArray = npt.NDArray[np.float32]


class Place(enum.StrEnum):
    """Where a contender runs."""

    CPU = "the CPU"
    GPU = "a GPU"


def place_of(backend: Backend | type[Backend]) -> Place:
    """Return where a backend of ours runs."""
    return Place.GPU if backend.on_gpu else Place.CPU


@dataclass(frozen=True)
class Ground:
    """What every contender gets."""

    engine: Path
    ckpt: Path | None
    backend: Backend = field(default_factory=OnnxRuntime)  # ours, which the others are compared with

    @property
    def threads(self) -> int:
        """How many threads each contender gets on the CPU."""
        return (None if isinstance(self.backend, GpuBackend) else self.backend.threads) or available_cpus()

    @property
    def gpu(self) -> int | None:
        """The GPU's number; None on the CPU."""
        return self.backend.device if isinstance(self.backend, GpuBackend) else None


Score = Callable[[Path, Options], float]
Make = Callable[[Ground], tuple[Score, str]]  # runs in the peer's process; the text is the version of its library


class Missing(Exception):  # noqa: N818 — a library that is not installed is no error
    """Raised by a contender that this machine cannot run; the text says what is missing."""


def ours(ground: Ground) -> tuple[Score, str]:
    """Return diffiqa as `iqa-run` runs it."""
    return _loaded(ground, ground.backend)


class DefaultStage:
    """A stage run as in ONNX Runtime's own examples: default settings, arrays in, arrays out."""

    def __init__(
        self,
        path: Path,
        provider: str = "CPUExecutionProvider",
        how: Mapping[str, str] | None = None,
        *,
        threads: int | None = None,  # None: ONNX Runtime decides
    ) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if threads is not None:
            options.intra_op_num_threads = threads
        self._session = onnxruntime.InferenceSession(path, options, providers=[(provider, dict(how or {}))])
        if provider not in self._session.get_providers():  # it only warns, and computes elsewhere
            raise BackendError(f"onnxruntime cannot start {provider} here")

    def bind(self, inputs: Mapping[str, FloatArray], outputs: Mapping[str, FloatArray]) -> Call:
        """Return a call that runs it from and into these arrays."""

        def call() -> None:
            for name, value in zip(outputs, self._session.run(list(outputs), dict(inputs)), strict=True):
                outputs[name][...] = value

        return call


def onnxruntime_default(ground: Ground) -> tuple[Score, str]:
    """Return the exported graphs, run as in ONNX Runtime's own examples."""
    import onnxruntime

    provider, how = "CPUExecutionProvider", {}
    if ground.gpu is not None:
        provider, how = CUDA, {"device_id": str(ground.gpu)}
        with _or_missing():
            prepare(OnnxRuntime(providers=[provider]))
    directory = open_engine(ground.engine)
    stages = {
        stage.name: DefaultStage(directory.file(stage.file), provider, how, threads=ground.threads)
        for stage in directory.manifest.stages
    }
    return _in_our_loop(directory.manifest, stages), f"onnxruntime {onnxruntime.__version__}"


def onnxruntime_bound(ground: Ground) -> tuple[Score, str]:
    """Return `iqa-run --backend onnxruntime-gpu`: images stay on the GPU, and sessions are bound to their memory."""
    with _or_missing():
        prepare(None)
    return _loaded(ground, OnnxOnGpu(ground.gpu or 0, builds=False))


def onnxruntime_tensorrt(ground: Ground, *, fp16: bool) -> tuple[Score, str]:
    """Return the same with ONNX Runtime's TensorRT provider. It builds an engine for each size that it meets."""
    providers: list[Provider] = [("TensorrtExecutionProvider", {"trt_fp16_enable": str(int(fp16))}), CUDA]
    with _or_missing():
        load_library(Library.TENSORRT)  # into this process: onnxruntime does not look for it where pip puts it
        prepare(OnnxRuntime(providers=providers))
    return _loaded(ground, OnnxOnGpu(ground.gpu or 0, providers=providers, builds=False))


def openvino(ground: Ground, *, precision: str) -> tuple[Score, str]:
    """Return `iqa-run --backend openvino`."""
    backend = OpenVino(ground.threads, precision)
    with _or_missing():
        _ = backend.name
    if precision == "bf16" and open_engine(ground.engine).manifest.stage(StageName.UNET) is None:
        raise Missing("this engine restores nothing: there is no U-Net to compute in bf16")
    return _loaded(ground, backend)


def openvino_nncf(ground: Ground) -> tuple[Score, str]:
    """Return OpenVINO with the U-Net in NNCF's int8, and the rest of it in bf16 if the CPU has that."""
    backend, directory = OpenVino(ground.threads), open_engine(ground.engine)
    with _or_missing():
        version = backend.name.partition(":")[0]
    if directory.manifest.stage(StageName.UNET) is None:
        raise Missing("this engine restores nothing: there is no U-Net to quantise")
    stages = {**backend.load(directory).stages, StageName.UNET: nncf_stage(directory, backend)}
    return _in_our_loop(directory.manifest, stages), f"{version}, nncf {importlib.import_module('nncf').__version__}"


def nncf_stage(directory: EngineDirectory, backend: OpenVino) -> StageRunner:
    """Return the U-Net of an engine as NNCF quantises it. Raises Missing."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type] # or NNCF reports to Intel
    try:
        nncf = importlib.import_module("nncf")
    except ModuleNotFoundError as exc:
        raise Missing("nncf is not installed; install it with: pip install nncf") from exc
    import openvino

    stage = directory.manifest.stage(StageName.UNET)
    assert stage is not None  # noqa: S101 — asked before
    core = openvino.Core()
    model = core.read_model(directory.file(stage.file))
    quantised = nncf.quantize(model, nncf.Dataset(unet_inputs(directory.manifest)))
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "unet.xml")
        openvino.save_model(quantised, file, compress_to_fp16=False)
        return replace(backend, precision="bf16" if has_bf16 else "fp32").load_stage(file, stage.name)


def unet_inputs(m: Manifest) -> list[dict[str, FloatArray]]:
    """Return inputs of the U-Net, of pictures of ours with the noise of sixteen steps, to calibrate on."""
    random, size = np.random.default_rng(0), m.crop.size
    inputs: list[dict[str, FloatArray]] = []
    levels = m.schedule.coefficients.noise_level
    for level in levels[:: -(-len(levels) // 16)]:
        picture = to_plane(synthetic((0, len(inputs)), size, size))[None]
        noisy = level * picture + np.sqrt(1 - level**2) * random.standard_normal(picture.shape)
        values = {"y": noisy, "condition": picture, "noise_level": [[level]]}
        inputs.append({name: np.asarray(value, np.float32) for name, value in values.items()})
    return inputs


def torch_networks(ground: Ground, *, precision: str, way: str) -> tuple[Score, str]:
    """Return PyTorch with the modules that we export, channels last; `way` is one of `torch_loop.Way`."""
    return _torch_stages(ground, precision, way) if ground.gpu is None else _torch_loop(ground, precision, way)


def _torch_loop(ground: Ground, precision: str, way: str) -> tuple[Score, str]:
    """Run the whole score on the GPU."""
    model, device = _torch_model(ground), _torch_device(ground)
    import torch

    from .torch_loop import TorchScorer, Way

    version = f"torch {torch.__version__}"
    if Way(way) is Way.TENSORRT:
        try:
            torch_tensorrt = importlib.import_module("torch_tensorrt")
        except ModuleNotFoundError as exc:
            raise Missing("torch_tensorrt is not installed") from exc
        version += f", torch_tensorrt {torch_tensorrt.__version__}"
        torch_tensorrt.runtime.set_cudagraphs_mode(True)  # off by default, which would measure launches
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    scorer = TorchScorer(model, device, dtype, Way(way))
    manifest = open_engine(ground.engine).manifest

    def score(path: Path, options: Options) -> float:
        image = read_for(path, manifest)
        return scorer.score(image.pixels, manifest, options, image.restored_from)

    return score, version


def _torch_stages(ground: Ground, precision: str, way: str) -> tuple[Score, str]:
    """Run the networks on the CPU, within our loop. `torch.compile` freezes the weights."""
    model = _torch_model(ground)
    import torch

    from ..export.stages import StagePlan, stage_plans

    compiled = way == "torch.compile"
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
    return _in_our_loop(manifest, stages), f"torch {torch.__version__}"


def plain_loop(ground: Ground) -> tuple[Score, str]:
    """Return how the authors work, in PyTorch: one program restores into PNG files, another scores those."""
    model, device = _torch_model(ground), _torch_device(ground)
    import torch
    from PIL import Image

    from ..engine.crops import padded_size, place_crops
    from ..engine.schedule import Kind

    manifest = open_engine(ground.engine).manifest
    if manifest.image_form is ImageForm.SQUASHED:
        raise Missing("it squashes no images")
    model.to(device)

    @torch.no_grad()
    def score(path: Path, options: Options) -> float:
        size, sampling = manifest.crop.size, sampling_of(manifest, options)
        read = read_for(path, manifest)
        pixels, (height, width) = read.pixels, read.size
        restored_from = pixels if read.restored_from is None else read.restored_from
        rows, columns = padded_size(height, width, manifest.alignment)
        padding = ((0, 0), (0, rows - height), (0, columns - width))
        image = torch.from_numpy(np.pad(to_plane(restored_from), padding, mode="reflect"))[None].to(device)
        with tempfile.TemporaryDirectory() as folder:
            files = {kind: Path(folder, f"{kind}.png") for kind in manifest.kinds}
            Image.fromarray(pixels.astype(np.uint8, copy=False)).save(files[Kind.DIS])
            for kind, plane in model.restore(image, options.seed, sampling).items():
                restored = plane[0, :, :height, :width].add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)
                Image.fromarray(restored.permute(1, 2, 0).contiguous().cpu().numpy()).save(files[kind])
            planes = torch.from_numpy(np.stack([to_plane(np.asarray(Image.open(file))) for file in files.values()]))
        planes = planes.to(device)
        count = options.crops or manifest.crop.count
        crops = place_crops(manifest.crop.places, height, width, size, count, options.seed)
        cut = (planes[None, :, :, c.top : c.top + size, c.left : c.left + size] for c in crops)
        return float(np.mean([model(crop).total.item() for crop in cut]))

    return score, f"torch {torch.__version__}"


def _scored(scorer: Scorer) -> Score:
    return lambda path, options: scorer.score(path, options).score


def _in_our_loop(manifest: Manifest, stages: Mapping[StageName, StageRunner]) -> Score:
    return _scored(Scorer(manifest, stages, backend="peer"))


def _loaded(ground: Ground, backend: Backend) -> tuple[Score, str]:
    scorer = load(ground.engine, backend)
    return _scored(scorer), scorer.info.backend.partition(":")[0]


@contextlib.contextmanager
def _or_missing() -> Iterator[None]:
    try:
        yield
    except BackendError as exc:
        raise Missing(str(exc)) from exc


def _torch_model(ground: Ground) -> "DiffV2IQA":
    if ground.ckpt is None:
        raise Missing("PyTorch needs the weights: give --ckpt FILE")
    try:
        import torch
    except ModuleNotFoundError as exc:
        raise Missing("torch is not installed") from exc
    from ..model.checkpoint import load as load_model

    torch.set_num_threads(ground.threads)
    return load_model(ground.ckpt).model


def _torch_device(ground: Ground) -> "torch.device":
    """Return the device of PyTorch, and set PyTorch up for it."""
    import torch

    if ground.gpu is None:
        return torch.device("cpu")
    if torch.version.cuda is None:
        raise Missing(f"torch {torch.__version__} is built for the CPU alone")
    from .torch_loop import prepare as prepare_torch

    device = torch.device("cuda", ground.gpu)
    prepare_torch(device)
    return device


@dataclass(frozen=True)
class Contender:
    """One way to score images."""

    name: str
    precision: str
    make: Make
    places: tuple[Place, ...] = (Place.CPU, Place.GPU)
    weights: bool = False  # it runs the checkpoint, not the engine
    backend: str | None = None  # of ours, if it is one: it is no peer where ours runs on that
    untiled: tuple[Place, ...] = ()  # where it restores images whole, however large

    @property
    def exact(self) -> bool:
        """Whether it computes the very same function, up to the order of sums."""
        return self.precision == "fp32"

    def takes(self, mode: Mode, place: Place) -> bool:
        """Return whether it can be compared with ours on images that ours restores in this mode."""
        return mode is Mode.WHOLE or place not in self.untiled


OURS = Contender("diffiqa", "fp32", ours)
_CPU, _GPU, _BOTH = (Place.CPU,), (Place.GPU,), (Place.CPU, Place.GPU)


def _torch(name: str, precision: str, way: str, places: tuple[Place, ...]) -> Contender:
    make = partial(torch_networks, precision=precision, way=way)
    return Contender(name, precision, make, places, weights=True, untiled=_GPU)


PEERS = (
    Contender("onnxruntime, default settings", "fp32", onnxruntime_default, _CPU),
    Contender("openvino", "fp32", partial(openvino, precision="fp32"), _CPU),
    Contender("openvino, bf16", "bf16", partial(openvino, precision="bf16"), _CPU),
    Contender("openvino, NNCF", "int8", openvino_nncf, _CPU),
    # Left alone, ONNX Runtime's CUDA and TensorRT providers multiply in TF32.
    Contender("onnxruntime-gpu, default settings", "tf32", onnxruntime_default, _GPU),
    Contender("onnxruntime-gpu", "fp32", onnxruntime_bound, _GPU, backend="onnxruntime-gpu"),
    Contender("onnxruntime-gpu, TensorRT", "tf32", partial(onnxruntime_tensorrt, fp16=False), _GPU),
    Contender("onnxruntime-gpu, TensorRT, fp16", "fp16", partial(onnxruntime_tensorrt, fp16=True), _GPU),
    _torch("torch eager", "fp32", "eager", _BOTH),
    _torch("torch eager, bf16", "bf16", "eager", _BOTH),
    _torch("torch eager, fp16", "fp16", "eager", _GPU),
    _torch("torch, CUDA graph", "fp32", "CUDA graph", _GPU),
    _torch("torch, CUDA graph, fp16", "fp16", "CUDA graph", _GPU),
    _torch("torch.compile", "fp32", "torch.compile", _BOTH),
    _torch("torch.compile, bf16", "bf16", "torch.compile", _CPU),
    _torch("torch.compile, fp16", "fp16", "torch.compile", _GPU),
    _torch("Torch-TensorRT", "fp32", "Torch-TensorRT", _GPU),
    _torch("Torch-TensorRT, fp16", "fp16", "Torch-TensorRT", _GPU),
    Contender("plain loop", "fp32, PNG between", plain_loop, weights=True, untiled=_BOTH),
)


def peers_for(backend: str, names: Sequence[str] = ()) -> tuple[Contender, ...]:
    """Return the peers that run where our backend runs: all, or those that are named. Raises UsageError."""
    place = place_of(BACKENDS[backend])
    here = {peer.name: peer for peer in PEERS if place in peer.places and peer.backend != backend}
    if not names:
        return tuple(here.values())
    for name in names:
        if name in here:
            continue
        known = next((peer for peer in PEERS if peer.name == name), None)
        if known is None:
            why = f"there is no peer {name!r}"
        elif place in known.places:
            why = f"the peer {name!r} is --backend {backend} itself"
        else:
            why = f"the peer {name!r} runs on {known.places[0]}, and --backend {backend} on {place}"
        raise UsageError(f"{why}; choose from: {'; '.join(here)}")
    return tuple(here[name] for name in names)
