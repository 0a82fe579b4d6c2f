"""TensorRT-RTX's compiled kernels on disk, with a library that only says what it would do."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffiqa.engine.manifest import BuiltStage, FileEntry, Library, StageName
from diffiqa.runtime.gpu import runtime_cache
from diffiqa.runtime.gpu.runtime_cache import RuntimeCache, cache_of
from diffiqa.runtime.gpu.tensorrt import TRAITS
from diffiqa.runtime.gpu.tensorrt_stage import _Engine


class Kernels:
    """An `IRuntimeCache`: the names of kernels, for one environment."""

    def __init__(self, environment: str) -> None:
        self.environment, self.compiled = environment, set[str]()

    def deserialize(self, data: bytes) -> bool:
        environment, *names = data.decode().split()
        if environment == self.environment:
            self.compiled |= set(names)
        return environment == self.environment

    def serialize(self) -> bytes:
        return " ".join([self.environment, *sorted(self.compiled)]).encode()


class Config:
    """An `IRuntimeConfig`."""

    def __init__(self, environment: str = "driver-1") -> None:
        self.environment = environment
        self.cache: Any = None

    def create_runtime_cache(self) -> Kernels:
        return Kernels(self.environment)

    def set_execution_context_allocation_strategy(self, strategy: object) -> None: ...

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True


def started(cache: RuntimeCache, *kernels: str, environment: str = "driver-1") -> set[str]:
    """Run a process that needs some kernels; return those it found."""
    config = Config(environment)
    cache.attach(config)
    found = set(config.cache.compiled)
    config.cache.compiled |= set(kernels)
    cache.save()
    return found


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    (tmp_path / "build").mkdir()
    return [tmp_path / "build", tmp_path / "user" / "cache"]


@pytest.fixture
def make(folders: list[Path]) -> Callable[..., RuntimeCache]:
    return lambda key="gpu": RuntimeCache(folders, key)


Make = Callable[..., RuntimeCache]


def files(folders: list[Path]) -> list[int]:
    return [len(list(folder.glob("*"))) for folder in folders]


def test_the_next_start_finds_what_was_compiled(make: Make, folders: list[Path]) -> None:
    assert started(make(), "conv", "norm") == set()
    assert started(make(), "gemm") == {"conv", "norm"}
    assert started(make()) == {"conv", "norm", "gemm"}
    assert files(folders) == [1, 0]


def test_contexts_share_one_cache(make: Make) -> None:
    cache, configs = make(), [Config(), Config()]
    for config in configs:
        cache.attach(config)
    assert configs[0].cache is configs[1].cache


def test_nothing_is_written_when_nothing_was_compiled(make: Make, folders: list[Path]) -> None:
    started(make(), "conv")
    (file,) = folders[0].iterdir()
    before = file.stat().st_mtime_ns, file.stat().st_ino
    started(make(), "conv")
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before
    make().save()  # never attached


def test_builds_and_gpus_have_files_of_their_own(make: Make, folders: list[Path]) -> None:
    started(make("a"), "conv")
    assert started(make("b")) == set()
    assert files(folders) == [2, 0]


def test_a_folder_that_cannot_be_written_gives_way_to_the_users(make: Make, folders: list[Path]) -> None:
    folders[0].rmdir()
    folders[0].write_text("in the way")  # permissions would not stop root
    started(make(), "conv")
    assert started(make()) == {"conv"}
    assert (folders[1].stat().st_mode & 0o077) == 0


def test_what_a_user_adds_to_a_build_that_others_write_is_found_again(make: Make, folders: list[Path]) -> None:
    started(make(), "conv")
    # As if the first folder could be read only: permissions would not stop root.
    started(RuntimeCache([folders[0] / "none", folders[1]], "gpu"), "conv", "gemm")
    assert started(make()) == {"conv", "gemm"}


def test_a_build_that_was_deleted_meanwhile_does_not_come_back(make: Make, folders: list[Path]) -> None:
    folders[0].rmdir()
    started(make(), "conv")
    assert not folders[0].exists()
    assert files(folders) == [0, 1]


def test_what_can_be_written_nowhere_is_said(make: Make, folders: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    for folder in (folders[0], folders[1].parent):
        if folder.exists():
            folder.rmdir()
        folder.write_text("in the way")
    started(make(), "conv")
    assert "compiled kernels cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        pytest.param(lambda data: data[:-1], "is damaged", id="cut off"),
        pytest.param(lambda data: data[:-1] + b"~", "is damaged", id="changed"),
        pytest.param(lambda data: b"", "is damaged", id="empty"),
        pytest.param(lambda data: data + bytes(100), "too large", id="too large"),
    ],
)
def test_a_file_that_is_not_whole_is_ignored_with_a_word_and_replaced(
    make: Make,
    folders: list[Path],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[bytes], bytes],
    says: str,
) -> None:
    monkeypatch.setattr(runtime_cache, "MAX_BYTES", 50)
    started(make(), "conv")
    (file,) = folders[0].iterdir()
    file.write_bytes(harm(file.read_bytes()))
    assert started(make(), "conv") == set()
    assert says in caplog.text
    assert started(make()) == {"conv"}


def test_a_file_under_another_key_is_damaged(make: Make, folders: list[Path]) -> None:
    started(make("a"), "conv")
    (file,) = folders[0].iterdir()
    started(make("b"), "norm")
    (other,) = set(folders[0].iterdir()) - {file}
    other.write_bytes(file.read_bytes())
    assert started(make("b")) == set()


def test_what_the_library_refuses_is_ignored_with_a_word_and_replaced(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    started(make(), "conv")
    assert started(make(), "norm", environment="driver-2") == set()
    assert "another GPU, driver" in caplog.text
    assert started(make(), environment="driver-2") == {"norm"}


def test_more_than_the_limit_is_not_kept(
    make: Make, folders: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    started(make(), "conv")
    monkeypatch.setattr(runtime_cache, "MAX_BYTES", 50)
    caplog.set_level(logging.WARNING)
    started(make(), "x" * 60)
    assert "are not kept" in caplog.text
    assert started(make()) == {"conv"}


@pytest.mark.parametrize("changed", ["key", "version", "gpu", "capability", "engine"])
def test_the_key_changes_with(changed: str, tmp_path: Path) -> None:
    def cache(**changes: str) -> RuntimeCache:
        said = {"key": "a", "version": "1.7", "gpu": "RTX", "capability": "8.9", "engine": "0" * 64} | changes
        stage = SimpleNamespace(name="unet", file=SimpleNamespace(sha256=said["engine"]))
        plan = SimpleNamespace(path="tensorrt/a/plan.json")
        build = SimpleNamespace(key=said["key"], library="rtx", version=said["version"], stages=(stage,), plan=plan)
        return cache_of(tmp_path, build, said["gpu"], said["capability"])  # type: ignore[arg-type]

    assert cache()._paths[0].parent == tmp_path / "tensorrt" / "a"
    assert cache()._paths == cache()._paths
    assert cache(**{changed: "other"})._paths[0].name != cache()._paths[0].name


def test_engines_use_it_in_every_context_and_save_it_when_they_go(make: Make) -> None:
    class Strategies:
        USER_MANAGED = EAGER = DISABLED = VALID = 0
        INVALID = 1

    names = (
        "CudaGraphStrategy DynamicShapesKernelSpecializationStrategy EngineValidity ExecutionContextAllocationStrategy"
    )
    made = SimpleNamespace(
        num_io_tensors=0, create_runtime_config=Config, create_execution_context=lambda config: config
    )
    runtime = SimpleNamespace(
        get_engine_validity=lambda data: (Strategies.VALID, 0), deserialize_cuda_engine=lambda data: made
    )
    api = SimpleNamespace(Runtime=lambda logger: runtime, **dict.fromkeys(names.split(), Strategies))
    log = SimpleNamespace(count=0, logger=None)
    rtx = Library.TENSORRT_RTX
    library: Any = SimpleNamespace(library=rtx, traits=TRAITS[rtx], api=api, log=log)
    built = BuiltStage(StageName.UNET, "", FileEntry("", 0, ""), (), (), (), ())
    layer: Any = None
    cache = make()
    engines = [_Engine(layer, library, built, b"", "", cache) for _ in range(2)]
    contexts = [engine.create_context() for engine in engines for _ in range(2)]
    contexts[3].cache.compiled.add("conv")
    assert len({id(context.cache) for context in contexts}) == 1
    for engine in engines:
        engine.close()
    assert started(make()) == {"conv"}
