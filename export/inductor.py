"""Builds by PyTorch's compiler: AOTInductor packages of the cast stages, for the GPU or CPU of this machine.

A package has one compiled form for each profile. Each form is run here and compared with the original, so the drift in
the manifest is that of the code which will run.
"""

import contextlib
import operator
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ..engine.manifest import Check, EngineDirectory, Library, Precision, ShapeRange, Stage
from ..errors import BackendError, ExportError, UsageError, first_line
from ..runtime.gpu.tensorrt import device_capability
from ..runtime.inductor import Package, cpu_target, form_name, quiet, torch, torch_on_gpu
from .compare import CAST_SEED, CAST_TOLERANCE, FloatArray, compare_with_original, draw_inputs
from .maker import Made, Profiles, typed_signature
from .profiles import BATCHES
from .torch_graph import OnnxModule

ON_CPU = "cpu"  # as a compute capability: build for the CPU of a machine that has a GPU
# In float32 only the order of sums differs: through a whole network that is far less than this, of the largest value.
TOLERANCE = {Precision.FP32: 1e-3, **CAST_TOLERANCE}


class InductorMaker:
    """PyTorch's compiler, for the GPU that is here, or else for the CPU."""

    library, suffix, folder, machine_code = Library.INDUCTOR, ".pt2", "inductor", True

    def __init__(self, compute_capabilities: tuple[str, ...]) -> None:
        if compute_capabilities not in {(), (ON_CPU,)}:
            raise UsageError(
                f"{self.library} builds for the machine it runs on; --compute-capability takes only {ON_CPU}, for the "
                f"CPU of a machine with a GPU"
            )
        self.version = str(torch().__version__)
        _check_compiler()
        capability = None if compute_capabilities else device_capability()
        self._device = None if capability is None else 0
        if capability is None:
            self.capabilities: tuple[str, ...] = (cpu_target(),)
            self.precision = Precision.FP32
            self.batches: tuple[str, ...] = ("1",)
        else:
            torch_on_gpu(0)
            self.capabilities = (capability,)
            self.precision, self.batches = Precision.FP16, BATCHES
        self._lines: list[str] = []

    @contextlib.contextmanager
    def building(self, directory: EngineDirectory, _known_timings: bytes) -> Iterator[None]:
        """Begin a build; what the compiler leaves behind goes when it is over."""
        from torch._inductor.utils import fresh_cache

        self._engine, self._lines = directory, []
        with quiet(), tempfile.TemporaryDirectory() as folder, fresh_cache(dir=folder, delete=False):
            yield

    def make(
        self, stage: Stage, typed: onnx.ModelProto, dtypes: dict[str, str], profiles: Profiles, file: Path
    ) -> Made:
        """Compile a form for each profile, pack them, and compare each with the original."""
        from torch._inductor.package.package import package_aoti

        module = _module(typed, self._device)
        files: dict[str, Any] = {}
        for number, profile in enumerate(profiles):
            start = time.perf_counter()
            try:
                files[form_name(number)] = self._compile(module, stage, dtypes, profile)
            except Exception as exc:  # whatever PyTorch or the C++ compiler raise
                text = f"stage {stage.name}: torch cannot compile it: {type(exc).__name__}: {first_line(exc)}"
                raise ExportError(text) from exc
            spans = "; ".join(_span(name, span) for name, span in profile.items())
            self._lines.append(
                f"{stage.name}: {form_name(number)} ({spans}) took {time.perf_counter() - start:.0f} s\n"
            )
        package_aoti(str(file), files)
        return Made(*typed_signature(stage, dtypes), self._compare(stage, dtypes, profiles, file))

    def log(self) -> str:
        """Return a line for each form."""
        return "".join(self._lines)

    def timings(self) -> None:
        """Return None: nothing is measured."""

    def _compile(self, module: OnnxModule, stage: Stage, dtypes: dict[str, str], profile: dict[str, ShapeRange]) -> Any:
        """Return the files of a stage compiled for a profile: for its exact sizes, or for its ranges."""
        lib, unit = torch(), self._engine.manifest.alignment
        dims: dict[str, Any] = {}
        examples, free = [], []
        for spec in stage.inputs:
            span = profile[spec.name]
            size, ranges = list(span.optimum), {}
            for axis, (low, high) in enumerate(zip(span.minimum, span.maximum, strict=True)):
                if low != high:
                    name = str(spec.shape[axis])
                    if name not in dims:
                        dims[name] = _range(name, low, high, unit if name in {"H", "W"} else 1)
                    ranges[axis] = dims[name]
                    size[axis] = max(size[axis], 2)  # a trace with 1 would take the 1 for granted
            examples.append(_tensor(np.zeros(size, np.float32), dtypes[spec.name], self._device))
            free.append(ranges)
        # The code that calls the kernels costs nothing beside them, and takes half of the time to compile.
        options: dict[str, Any] = {"aot_inductor.package": True, "aot_inductor.compile_wrapper_opt_level": "O0"}
        if self._device is None:
            # As many threads as the machine that runs has, whatever the number here; and weights laid out for this CPU.
            # With free sizes that gives wrong results in torch 2.13, by a third of the largest value.
            options |= {"cpp.dynamic_threads": True, "freezing": not dims}
        with lib.no_grad():
            program = lib.export.export(module, tuple(examples), dynamic_shapes=(tuple(free),), strict=False)
            return lib._inductor.aot_compile(program.module(), tuple(examples), options=options)

    def _compare(self, stage: Stage, dtypes: dict[str, str], profiles: Profiles, file: Path) -> tuple[Check, ...]:
        """Run every form beside the original, at the least of its sizes and at its best."""
        package, drawn = Package(file, self._device), draw_inputs(self._engine, stage, CAST_SEED)
        low = {Precision.BF16: "bfloat16", Precision.FP16: "float16"}
        precision = next((p for p, dtype in low.items() if dtype in dtypes.values()), Precision.FP32)
        checks: list[Check] = []
        sizes = [
            (number, tuple((name, shape(span)) for name, span in profile.items()))
            for number, profile in enumerate(profiles)
            for shape in (operator.attrgetter("minimum"), operator.attrgetter("optimum"))
        ]
        for number, shapes in dict.fromkeys(sizes):  # once where the form has one size
            feed = {name: _fitted(drawn[name], shape) for name, shape in shapes}
            given = [_tensor(value, dtypes[name], self._device) for name, value in feed.items()]
            checks += compare_with_original(
                self._engine,
                stage,
                [result.float().cpu().numpy() for result in package.form(number)(given)],
                feed=feed,
                called=f"the code that torch compiled ({form_name(number)})",
                seed=CAST_SEED,
                allowed=TOLERANCE[precision],
                advice="; build in another --precision",
            )
        return tuple(checks)


def _module(typed: onnx.ModelProto, device: int | None) -> OnnxModule:
    """Return a cast stage on its device, ready to be traced."""
    module = OnnxModule(typed).eval()
    if device is not None:
        # The compiler computes convolutions with channels last, and would turn the weights in every step.
        for name, weight in module.named_buffers():
            if weight.ndim == 4:
                module.register_buffer(name, weight.to(memory_format=torch().channels_last))
        module.to(f"cuda:{device}")
    return module


def _span(name: str, span: ShapeRange) -> str:
    ends = dict.fromkeys("×".join(map(str, shape)) for shape in (span.minimum, span.maximum))
    return f"{name} {' to '.join(ends)}"


def _range(name: str, low: int, high: int, unit: int) -> Any:
    """Return a free dimension: multiples of `unit` between two sizes."""
    dim = torch().export.Dim(name.lower(), min=low // unit, max=high // unit)
    return unit * dim if unit > 1 else dim


def _tensor(value: FloatArray, dtype: str, device: int | None) -> Any:
    lib = torch()
    return lib.from_numpy(value).to(dtype=getattr(lib, dtype), device="cpu" if device is None else f"cuda:{device}")


def _fitted(value: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Return drawn inputs cut or repeated to another shape."""
    repeats = [-(-wanted // have) for wanted, have in zip(shape, value.shape, strict=True)]
    return np.ascontiguousarray(np.tile(value, repeats)[tuple(slice(wanted) for wanted in shape)])


def _check_compiler() -> None:
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if not shutil.which(compiler):
        raise BackendError(
            f"inductor needs a C++ compiler, and {compiler} is not here; install g++, or name yours in CXX"
        )
