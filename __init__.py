"""diffiqa: Diff-V²-IQA image quality scores in production.

    >>> import diffiqa
    >>> with diffiqa.load("engine/") as scorer:
    ...     result = scorer.score("photo.jpg")

Every command is a function too: `diffiqa.export(...)` for `iqa-export`, `diffiqa.score(...)` for `iqa-run`, and so on.
Those of `iqa-train` are in `diffiqa.training.api`; `iqa-export --precision int8` is
`diffiqa.calibration.api.export_quantised`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bench.api import bench
    from .bench.recommend import recommend
    from .calibration.api import calibrate, fit_steps, quantise
    from .errors import (
        BackendError,
        CheckpointError,
        ConfigError,
        DatasetError,
        DiffiqaError,
        EngineError,
        ExportError,
        ImageError,
        OutputError,
        UsageError,
    )
    from .evaluation.api import evaluate
    from .export.api import build, convert, export, prompts
    from .runtime.backends import Inductor, InductorOnGpu, OnnxOnGpu, OnnxRuntime, OpenVino, TensorRt, best
    from .runtime.command.api import score
    from .runtime.results import CropScore, Failure, Mode, Options, Pictures, Score
    from .runtime.scorer import Info, Scorer, load
    from .runtime.selftest import self_test
    from .serve.api import serve
    from .shards import on_ray as ray
    from .shards.api import read_scores, run_shards, status
    from .verify.api import verify

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "CheckpointError",
    "ConfigError",
    "CropScore",
    "DatasetError",
    "DiffiqaError",
    "EngineError",
    "ExportError",
    "Failure",
    "ImageError",
    "Inductor",
    "InductorOnGpu",
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
    "build",
    "calibrate",
    "convert",
    "evaluate",
    "export",
    "fit_steps",
    "load",
    "prompts",
    "quantise",
    "ray",
    "read_scores",
    "recommend",
    "run_shards",
    "score",
    "self_test",
    "serve",
    "status",
    "verify",
]

_HOMES = {
    **dict.fromkeys(["bench"], "bench.api"),
    **dict.fromkeys(["recommend"], "bench.recommend"),
    **dict.fromkeys(["calibrate", "fit_steps", "quantise"], "calibration.api"),
    **dict.fromkeys(["evaluate"], "evaluation.api"),
    **dict.fromkeys(["build", "convert", "export", "prompts"], "export.api"),
    **dict.fromkeys(
        ["Inductor", "InductorOnGpu", "OnnxOnGpu", "OnnxRuntime", "OpenVino", "TensorRt", "best"], "runtime.backends"
    ),
    **dict.fromkeys(["score"], "runtime.command.api"),
    **dict.fromkeys(["CropScore", "Failure", "Mode", "Options", "Pictures", "Score"], "runtime.results"),
    **dict.fromkeys(["Info", "Scorer", "load"], "runtime.scorer"),
    **dict.fromkeys(["self_test"], "runtime.selftest"),
    **dict.fromkeys(["serve"], "serve.api"),
    **dict.fromkeys(["read_scores", "run_shards", "status"], "shards.api"),
    **dict.fromkeys(["verify"], "verify.api"),
}
_CALLABLE = {"bench", "export", "serve", "verify"}  # folders that are functions: see rooms.py


def __getattr__(name: str) -> Any:
    """Import public names at first use: `import diffiqa` waits for nothing that is not asked for."""
    if name == "ray":  # not a file of this name: where this folder is on the path, it would hide the real package
        return importlib.import_module(".shards.on_ray", __name__)
    if name in _CALLABLE:
        return importlib.import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module 'diffiqa' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value
