"""Stages that PyTorch's compiler turned into machine code: what host and GPU share of running them.

A package (`STAGE.pt2`) holds one compiled form for each profile. It is loaded by PyTorch, and only after `check_seal`:
to load it is to run it.
"""

import contextlib
import functools
import hashlib
import os
import platform
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engine.manifest import Build, EngineDirectory, Library, StageName
from ..engine.seal import check_seal
from ..errors import BackendError, EngineError, first_line
from .builds import CPU, Machine, open_build, rebuild_command

if TYPE_CHECKING:
    from torch import Tensor

Form = Callable[[Sequence["Tensor"]], Sequence["Tensor"]]


def form_name(profile: int) -> str:
    """Return what a package calls the form of a profile."""
    return f"profile{profile}"


class Package:
    """The compiled forms of one stage; each is loaded when it is first asked for. `device` is None on the CPU."""

    def __init__(self, path: Path, device: int | None) -> None:
        self._path, self._device = path, device
        self._forms: dict[int, Form] = {}
        self._lock = threading.Lock()

    def form(self, profile: int) -> Form:
        """Return the form of a profile, ready to run. Raises BackendError if PyTorch cannot load it."""
        with self._lock:
            if profile not in self._forms:
                self._forms[profile] = self._load(form_name(profile))
            return self._forms[profile]

    def _load(self, name: str) -> Form:
        torch()
        from torch._inductor.package.package import load_package

        # On a GPU no form runs twice at a time, and the checks for that would break the capture of a graph.
        alone, index = self._device is not None, -1 if self._device is None else self._device
        try:
            with quiet():
                loaded: Any = load_package(str(self._path), name, run_single_threaded=alone, device_index=index)
        except Exception as exc:  # of the loader, the linker or CUDA: they share no base class
            raise BackendError(f"torch cannot load {self._path}: {first_line(exc)}") from exc
        run: Form = loaded.loader.boxed_run
        return lambda inputs: run(list(inputs))  # it empties the list that it gets, and bindings keep theirs


def torch() -> Any:
    """Return PyTorch. Raises BackendError saying how to install it."""
    if "torch" not in sys.modules:
        # GNU's OpenMP reads this when it is loaded. By default idle threads wait busily: on a CPU with other work, a
        # step of `mini` on two threads then took ten times as long.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import torch as module
    except ModuleNotFoundError as exc:
        if exc.name != "torch":
            raise
        raise BackendError("torch is not installed; install it with: pip install 'diffiqa[inductor]'") from exc
    except (ImportError, OSError) as exc:
        raise BackendError(f"torch is installed but cannot be loaded: {first_line(exc)}") from exc
    return module


def torch_on_gpu(ordinal: int) -> Any:
    """Return PyTorch, set up for a GPU. Raises BackendError if it was built for the CPU alone."""
    module = torch()
    if module.version.cuda is None or not module.cuda.is_available():
        raise BackendError(f"torch {module.__version__} cannot use a GPU; install a build of it for CUDA")
    module.cuda.set_device(ordinal)
    # A plan says what stays float32, and the same pixels give the same bits.
    module.backends.cuda.matmul.allow_tf32 = module.backends.cudnn.allow_tf32 = False
    module.backends.cudnn.deterministic, module.backends.cudnn.benchmark = True, False
    return module


def fitting_build(directory: EngineDirectory, target: str) -> Build:
    """Return the newest build for this PyTorch and target that this account made. Raises EngineError."""
    build = open_build(directory, Machine(Library.INDUCTOR, str(torch().__version__), target))
    folder = (directory.path / build.plan.path).parent
    command = rebuild_command(directory.path, build, force=True)
    check_seal(folder, (stage.file for stage in build.stages), f"build it here with: {command}")
    for made in build.stages:
        stage = directory.manifest.stage(made.name)
        names = [[(spec.name, spec.shape) for spec in (*s.inputs, *s.outputs)] for s in (made, stage) if s]
        if len(names) != 2 or names[0] != names[1]:
            raise EngineError(f"build {build.key} has other tensors than the stages; build it again with: {command}")
    return build


def packages(directory: EngineDirectory, build: Build, device: int | None) -> Mapping[StageName, Package]:
    """Return the packages of a build."""
    return {stage.name: Package(directory.path / stage.file.path, device) for stage in build.stages}


@functools.cache
def cpu_target() -> str:
    """Return what compiled code for this CPU is bound to: a digest of the features that the compiler may use."""
    features = [platform.processor()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        found = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
        features = sorted(set(found.partition(":")[2].split())) or features
    return CPU + hashlib.sha256(" ".join([platform.machine(), *features]).encode()).hexdigest()[:8]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep PyTorch's warnings about its own insides off the terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
