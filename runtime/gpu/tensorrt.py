"""TensorRT and TensorRT-RTX as one library: which is here, its messages, and every point in which the two differ."""

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import sys
from collections import deque
from dataclasses import dataclass
from typing import Any

from ...engine.manifest import Library
from ...errors import BackendError, first_line

DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}  # the library's names of types
MAX_MESSAGES = 10_000  # that a log keeps: a service runs for months, and a build says some hundred things


@dataclass(frozen=True)
class Traits:
    """What is true of one library and not of the other."""

    module: str
    install: str
    # TensorRT builds for the GPU it runs on. RTX compiles its kernels when it runs. So its builder needs no GPU but a
    # list of compute capabilities; it measures nothing, and its manual calls operations on the timing cache no-ops.
    ahead_of_time: bool
    timing_cache: bool
    # RTX knows whether an engine is for this GPU and whether a context can be captured. TensorRT has no such calls: the
    # manifest answers the first question, a capture the second.
    tells_validity: bool
    tells_capturable: bool
    # RTX compiles kernels for a shape when it first meets it. By default it does so in the background and runs others
    # until then. Scores must not depend on when that is.
    compiles_late: bool


TRAITS = {
    Library.TENSORRT: Traits(
        "tensorrt",
        "pip install 'diffiqa[tensorrt]'",
        ahead_of_time=False,
        timing_cache=True,
        tells_validity=False,
        tells_capturable=False,
        compiles_late=False,
    ),
    Library.TENSORRT_RTX: Traits(
        "tensorrt_rtx",
        "pip install 'diffiqa[rtx]'",
        ahead_of_time=True,
        timing_cache=False,
        tells_validity=True,
        tells_capturable=True,
        compiles_late=True,
    ),
}


@dataclass(frozen=True)
class TensorRT:
    """A library that is installed."""

    library: Library
    api: Any  # its module
    version: str

    @property
    def traits(self) -> Traits:
        """How it differs from the other."""
        return TRAITS[self.library]

    @property
    def log(self) -> "Log":
        """Its one logger."""
        return _log(self.library, self.api)

    @property
    def capabilities(self) -> dict[str, Any]:
        """The library's constants for the compute capabilities that it can build for ahead of time, by "8.9"."""
        if not self.traits.ahead_of_time:
            return {}
        return {
            f"{digits[:-1]}.{digits[-1]}": value
            for label, value in self.api.ComputeCapability.__members__.items()
            if (digits := label.removeprefix("SM")).isdigit()
        }

    def capability(self, name: str) -> Any:
        """Return the library's constant for a compute capability such as "8.9". Raises BackendError if it has none."""
        known = self.capabilities
        if name not in known:
            raise BackendError(f"{self.library} {self.version} builds for compute {', '.join(known)}, not {name}")
        return known[name]


class Log:
    """The last messages of a library, as (severity, message), the oldest first; `count` is how many there ever were."""

    def __init__(self, api: Any) -> None:
        self._entries: deque[tuple[str, str]] = deque(maxlen=MAX_MESSAGES)
        self.count = 0
        add = self.add

        class Collector(api.ILogger):  # type: ignore[misc] # no stubs
            def __init__(self) -> None:
                api.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if severity != api.ILogger.VERBOSE:
                    add(severity.name, message)

        self.logger = Collector()

    def add(self, severity: str, message: str) -> None:
        """Add a message."""
        self._entries.append((severity, message))
        self.count += 1

    def text(self, since: int = 0) -> str:
        """Return the messages from number `since` on as lines."""
        return "".join(f"[{severity}] {message}\n" for severity, message in self._since(since))

    def errors(self, since: int) -> list[str]:
        """Return the messages from number `since` on that say what went wrong."""
        return [message for severity, message in self._since(since) if severity in {"ERROR", "INTERNAL_ERROR"}]

    def _since(self, number: int) -> list[tuple[str, str]]:
        kept = list(self._entries)
        return kept[max(0, number - (self.count - len(kept))) :]


@functools.cache  # all builders and runtimes of a process speak to the first logger that it registers
def _log(_library: Library, api: Any) -> Log:
    return Log(api)


def load_library(library: Library) -> TensorRT:
    """Import a library. Raises BackendError saying how to install it."""
    traits = TRAITS[library]
    try:
        api = importlib.import_module(traits.module)
    except ModuleNotFoundError as exc:
        if exc.name != traits.module:
            raise BackendError(f"{library} cannot be used: {first_line(exc)}") from exc
        raise BackendError(f"{library} is not installed; install it with: {traits.install}") from exc
    except (ImportError, OSError) as exc:  # its shared libraries are missing, or not for this machine
        raise BackendError(f"{library} is installed but cannot be loaded: {first_line(exc)}") from exc
    return TensorRT(library, api, str(api.__version__))


def usable_library(capability: str) -> Library | None:
    """Return the library that loads here and has kernels for a GPU, TensorRT first; None if there is none."""
    for name in installed_libraries():
        with contextlib.suppress(BackendError):
            library = load_library(name)
            if not library.capabilities or capability in library.capabilities:
                return name
    return None


def installed_libraries() -> list[Library]:
    """Return the libraries that are installed, TensorRT first; `load_library` finds out whether they load."""
    return [library for library, traits in TRAITS.items() if importlib.util.find_spec(traits.module)]


def device_capability() -> str | None:
    """Return the compute capability of the current GPU, such as "8.9"; None if there is no GPU or no driver."""
    try:
        return gpu_capability(None)
    except BackendError:
        return None


def _has_driver() -> bool:
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def gpu_capability(ordinal: int | None) -> str:
    """Return the compute capability of a GPU, None for the current one. Raises BackendError saying what is missing."""
    try:
        # Importing cuda.core takes longer than loading a small engine: not on machines that have no use for it.
        if importlib.util.find_spec("cuda.core") and not _has_driver():
            raise BackendError("no NVIDIA GPU: its driver is not installed")
        from cuda.core import Device
    except ImportError as exc:
        raise BackendError(f"cuda.core is not installed; install it with: pip install 'diffiqa[cuda]' ({exc})") from exc
    try:
        count = len(Device.get_all_devices())
        capability = Device(ordinal).compute_capability if (ordinal or 0) < count else None
    except Exception as exc:  # no GPU, a driver too old: cuda.core's errors have no public base class
        raise BackendError(f"no usable NVIDIA GPU: {first_line(exc)}") from exc
    if capability is None:
        raise BackendError(f"there is no GPU {ordinal or 0}; this machine has {count}, counted from 0")
    return f"{capability.major}.{capability.minor}"
