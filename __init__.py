"""diffiqa: Diff-V²-IQA image quality scores in production.

    >>> import diffiqa
    >>> with diffiqa.load("engine/") as scorer:
    ...     result = scorer.score("photo.jpg")

Everything a scoring machine needs is re-exported here; exporting and models live in `diffiqa.export`, `diffiqa.model`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bench.api import bench
    from .errors import (
        BackendError,
        CheckpointError,
        ConfigError,
        DiffiqaError,
        EngineError,
        ExportError,
        ImageError,
        OutputError,
        UsageError,
    )
    from .runtime.backends import OnnxOnGpu, OnnxRuntime, OpenVino, TensorRt, best
    from .runtime.results import CropScore, Failure, Mode, Options, Pictures, Score
    from .runtime.scorer import Info, Scorer, load

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "CropScore",
    "DiffiqaError",
    "EngineError",
    "ExportError",
    "Failure",
    "ImageError",
    "Info",
    "Mode",
    "OnnxOnGpu",
    "OnnxRuntime",
    "OpenVino",
    "Options",
    "OutputError",
    "Pictures",
    "Score",
    "Scorer",
    "TensorRt",
    "UsageError",
    "__version__",
    "bench",
    "best",
    "load",
]

_HOMES = {
    **dict.fromkeys(["OnnxOnGpu", "OnnxRuntime", "OpenVino", "TensorRt", "best"], "runtime.backends"),
    **dict.fromkeys(["CropScore", "Failure", "Mode", "Options", "Pictures", "Score"], "runtime.results"),
    **dict.fromkeys(["Info", "Scorer", "load"], "runtime.scorer"),
}
_CALLABLE = {"bench"}  # folders that are functions: see rooms.py


def __getattr__(name: str) -> Any:
    """Import public names at first use: `import diffiqa` waits for nothing that is not asked for."""
    if name in _CALLABLE:
        return importlib.import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module 'diffiqa' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value
