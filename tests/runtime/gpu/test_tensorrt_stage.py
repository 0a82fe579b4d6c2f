"""Engines and their contexts, with a library that writes down what it is asked."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffiqa.engine.manifest import BuiltStage, FileEntry, Library, StageName, TensorSpec
from diffiqa.errors import BackendError, EngineError
from diffiqa.runtime.gpu import tensorrt_stage
from diffiqa.runtime.gpu.layer import DeviceMemoryError
from diffiqa.runtime.gpu.tensorrt import TRAITS
from diffiqa.runtime.gpu.tensorrt_stage import _Engine, load_engines

IMAGE, MAPS = TensorSpec("image", "float32", ("n", 3, 32, 32)), TensorSpec("maps", "float16", ("n", 4, 16))
BUILT = BuiltStage(StageName.VIT, "", FileEntry("vit.engine", 0, ""), (IMAGE,), (MAPS,), (), ())
LAYER: Any = SimpleNamespace(name="fake GPU", stream=77, _ordinal=1)


class Context:
    """An execution context: every call is written down and succeeds, unless `answers` has something else."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, ...]] = []
        self.answers: dict[str, Any] = {"infer_shapes": []}

    def __getattr__(self, name: str) -> Any:
        def call(*given: object) -> Any:
            self.said.append((name, *given))
            return self.answers.get(name, True)

        return call


class EngineOf:
    """An engine with the tensors of the ViT; what is changed is not as the manifest says."""

    def __init__(self, **changed: Any) -> None:
        self.context: Context | None = Context()
        self.names, self.dtypes, self.sizes = ["maps", "image"], {"image": "FLOAT", "maps": "HALF"}, {"image": 4}
        self.shapes = {"image": (-1, 3, 32, 32), "maps": (2, 4, 16)}  # a static profile fixed one
        for name, value in changed.items():
            setattr(self, name, getattr(self, name) | value if isinstance(value, dict) else value)
        self.num_io_tensors = len(self.names)
        self.get_tensor_name = self.names.__getitem__
        self.get_tensor_bytes_per_component = lambda name: self.sizes.get(name, -1)
        self.get_tensor_dtype = lambda name: SimpleNamespace(name=self.dtypes[name])
        self.get_tensor_shape = self.shapes.__getitem__
        self.get_device_memory_size_for_profile_v2 = {3: 4096}.__getitem__

    def create_execution_context(self, strategy: str) -> Context | None:
        assert strategy == "ours"
        return self.context


def library(engines: Iterator[EngineOf | None], *errors: str) -> Any:
    """Return TensorRT with these engines, one after the other, and with messages in its log."""
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: next(engines))
    own = SimpleNamespace(USER_MANAGED="ours")
    api = SimpleNamespace(Runtime=lambda logger: runtime, ExecutionContextAllocationStrategy=own)
    log = SimpleNamespace(count=5, logger=None, errors=lambda since: list(errors) if since == 5 else [])
    return SimpleNamespace(library=Library.TENSORRT, traits=TRAITS[Library.TENSORRT], api=api, log=log)


def engine(made: EngineOf | None, *errors: str) -> _Engine:
    return _Engine(LAYER, library(iter([made]), *errors), BUILT, b"", "build it again")


SHAPES, ADDRESSES = {"image": (2, 3, 32, 32)}, {"image": 256, "maps": 512}
BINDING = [
    ("set_optimization_profile_async", 3, 77),
    ("set_input_shape", "image", (2, 3, 32, 32)),
    ("infer_shapes",),
    ("set_tensor_address", "image", 256),
    ("set_tensor_address", "maps", 512),
]


def test_a_context_gets_its_profile_its_shapes_and_its_addresses_and_then_runs() -> None:
    made = EngineOf()
    context = engine(made).bind(3, SHAPES, ADDRESSES)
    assert made.context is not None
    assert made.context.said == BINDING
    assert context.activation_bytes == 4096
    context.use_activation(1024, 4096)
    context.enqueue()
    assert made.context.said[len(BINDING) :] == [("set_device_memory", 1024, 4096), ("execute_async_v3", 77)]


@pytest.mark.parametrize("call", [*dict.fromkeys(name for name, *_ in BINDING), "create_execution_context"])
def test_a_context_that_refuses_a_step_is_an_error_in_the_librarys_words(call: str) -> None:
    made = EngineOf()
    if call == "create_execution_context":
        made.context = None
    else:
        assert made.context is not None
        made.context.answers[call] = ["maps"] if call == "infer_shapes" else False
    with pytest.raises(BackendError, match=r"fake GPU: engine vit does not take .*\(2, 3, 32, 32\).*: no such profile"):
        engine(made, "no such profile").bind(3, SHAPES, ADDRESSES)


def test_a_run_that_fails_is_an_error_and_too_little_memory_another() -> None:
    for words, error in (("it broke", BackendError), ("Cuda Runtime (out of memory)", DeviceMemoryError)):
        made = EngineOf()
        context = engine(made, words).bind(3, SHAPES, ADDRESSES)
        assert made.context is not None
        made.context.answers["execute_async_v3"] = False
        with pytest.raises(error, match="fake GPU: engine vit failed") as caught:
            context.enqueue()
        assert words in str(caught.value)


def test_a_stage_that_cannot_be_captured_says_so_where_the_library_can_tell() -> None:
    made = EngineOf()
    assert made.context is not None
    made.context.answers["is_stream_capturable"] = False
    context = engine(made).bind(3, SHAPES, ADDRESSES)
    assert context.capture_problem() is None  # TensorRT cannot
    context._asks_capturable = True
    assert context.capture_problem() == "engine vit says that it cannot be captured"
    made.context.answers["is_stream_capturable"] = True
    assert context.capture_problem() is None
    assert made.context.said[-1] == ("is_stream_capturable", 77)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"names": ["image"]}, id="one less"),
        pytest.param({"names": ["image", "maps", "more"]}, id="one more"),
        pytest.param({"dtypes": {"maps": "FLOAT"}}, id="other type"),
        pytest.param({"dtypes": {"maps": "INT8"}}, id="unknown type"),
        pytest.param({"sizes": {"image": 2}}, id="other size"),
        pytest.param({"shapes": {"image": (-1, 3, 32, 64)}}, id="other shape"),
        pytest.param({"shapes": {"maps": (-1, 4)}}, id="fewer dimensions"),
    ],
)
def test_an_engine_with_other_tensors_than_the_manifest_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match=r"vit\.engine has other tensors than the manifest says; build it again"):
        engine(EngineOf(**changed))


def test_all_engines_of_a_build_are_loaded_or_none_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_stage, "gpu_capability", {1: "8.9"}.__getitem__)
    asked: list[tuple[Any, ...]] = []

    def command(*given: object, **options: object) -> str:
        asked.append((*given, options))
        return "iqa-build --force"

    monkeypatch.setattr(tensorrt_stage, "rebuild_command", command)
    (tmp_path / "vit.engine").touch()
    names = (StageName.VIT, StageName.UNET)
    build: Any = SimpleNamespace(stages=[dataclasses.replace(BUILT, name=name) for name in names])
    directory: Any = SimpleNamespace(path=tmp_path)
    stages = load_engines(LAYER, library(iter([EngineOf(), EngineOf()])), directory, build)
    assert {name: stage.built.name for name, stage in stages.items()} == {name: name for name in names}
    assert asked == [(tmp_path, build, "8.9", {"force": True})]

    closed: list[StageName] = []
    monkeypatch.setattr(_Engine, "close", lambda self: closed.append(self.built.name))
    with pytest.raises(
        BackendError, match=r"tensorrt cannot load unet\.engine; build it again with: iqa-build --force"
    ):
        load_engines(LAYER, library(iter([EngineOf(), None])), directory, build)
    assert closed == [StageName.VIT]
