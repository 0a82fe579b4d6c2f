"""What TensorRT says: its messages, bounded, and its verdict on an engine, with the way out that fits the reason."""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from diffiqa.engine.manifest import BuiltStage, FileEntry, Library, StageName
from diffiqa.errors import BackendError, EngineError
from diffiqa.runtime.gpu import tensorrt
from diffiqa.runtime.gpu.tensorrt import TRAITS, Log, gpu_capability
from diffiqa.runtime.gpu.tensorrt_stage import _Engine


class ILogger:
    VERBOSE, ERROR = SimpleNamespace(name="VERBOSE"), SimpleNamespace(name="ERROR")
    INFO = SimpleNamespace(name="INFO")


def log(monkeypatch: pytest.MonkeyPatch, most: int = 4) -> Any:
    monkeypatch.setattr(tensorrt, "MAX_MESSAGES", most)
    return Log(SimpleNamespace(ILogger=ILogger))


def test_a_log_that_is_full_forgets_its_oldest_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    found = log(monkeypatch)
    for number in range(10):
        found.logger.log(ILogger.INFO, str(number))
    assert found.count == 10
    assert found.text() == "[INFO] 6\n[INFO] 7\n[INFO] 8\n[INFO] 9\n"
    assert found.text(since=8) == "[INFO] 8\n[INFO] 9\n"


@pytest.mark.parametrize("before", [0, 3, 4, 9])
def test_errors_are_those_since_a_call_began_however_many_came_before(
    monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    found = log(monkeypatch)
    for _ in range(before):
        found.logger.log(ILogger.ERROR, "old")
    start = found.count
    assert found.errors(start) == []
    found.logger.log(ILogger.VERBOSE, "chatter")
    found.logger.log(ILogger.INFO, "news")
    found.logger.log(ILogger.ERROR, "new")
    assert found.errors(start) == ["new"]


@pytest.mark.parametrize(
    ("diagnostics", "says", "helps"),
    [
        (["VERSION_MISMATCH"], "VERSION_MISMATCH", "build it again with: X"),
        (["UNSUPPORTED_CC"], "UNSUPPORTED_CC", "another backend"),
        (["OLD_CUDA_DRIVER", "OLD_CUDA_RUNTIME"], "OLD_CUDA_DRIVER, OLD_CUDA_RUNTIME", "current NVIDIA driver"),
        (["CUDA_ERROR"], "CUDA_ERROR", "current NVIDIA driver"),
        (["INSUFFICIENT_GPU_MEMORY"], "INSUFFICIENT_GPU_MEMORY", "; free memory of the GPU, or build with smaller"),
        ([], "it gives no reason", "another backend"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else None,
)
def test_an_engine_that_the_library_refuses_is_refused_with_its_reason_and_a_way_out(
    diagnostics: list[str], says: str, helps: str
) -> None:
    rtx = pytest.importorskip("tensorrt_rtx")
    flags = sum(int(getattr(rtx.EngineInvalidityDiagnostics, name)) for name in diagnostics)

    class Runtime:
        def __init__(self, logger: Any) -> None:
            logger.log(rtx.ILogger.ERROR, "its own words")

        def get_engine_validity(self, data: bytes) -> tuple[Any, int]:
            return rtx.EngineValidity.INVALID, flags

    api = SimpleNamespace(
        ILogger=rtx.ILogger,
        Runtime=Runtime,
        EngineValidity=rtx.EngineValidity,
        EngineInvalidityDiagnostics=rtx.EngineInvalidityDiagnostics,
    )
    library: Any = SimpleNamespace(
        library=Library.TENSORRT_RTX, traits=TRAITS[Library.TENSORRT_RTX], api=api, log=Log(api)
    )
    built = BuiltStage(StageName.VIT, "", FileEntry("", 0, ""), (), (), (), ())
    with pytest.raises(EngineError) as caught:
        _Engine(SimpleNamespace(name="fake GPU"), library, built, b"", "build it again with: X")  # type: ignore[arg-type]
    message = str(caught.value)
    assert f"refuses vit.engine on fake GPU: {says}" in message
    assert helps in message
    assert "its own words" in message
    assert ("build it again" in message) is ("build it again" in helps)


def test_the_capability_is_that_of_the_gpu_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [SimpleNamespace(major=8, minor=9), SimpleNamespace(major=12, minor=0)]

    class Device:
        def __init__(self, ordinal: int | None) -> None:
            self.compute_capability = gpus[ordinal or 0]

        @staticmethod
        def get_all_devices() -> list[SimpleNamespace]:
            return gpus

    core: Any = ModuleType("cuda.core")
    core.__spec__, core.Device = ModuleSpec("cuda.core", None), Device
    monkeypatch.setitem(sys.modules, "cuda.core", core)
    monkeypatch.setattr(tensorrt, "_has_driver", lambda: True)
    assert [gpu_capability(ordinal) for ordinal in (None, 0, 1)] == ["8.9", "8.9", "12.0"]
    with pytest.raises(BackendError, match="there is no GPU 2; this machine has 2, counted from 0"):
        gpu_capability(2)
    monkeypatch.setattr(tensorrt, "_has_driver", lambda: False)
    with pytest.raises(BackendError, match="no NVIDIA GPU: its driver is not installed"):
        gpu_capability(0)
