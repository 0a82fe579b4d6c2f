"""Builds stages with TensorRT or TensorRT-RTX."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from ..engine.manifest import EngineDirectory, Library, Precision, Stage, TensorSpec
from ..errors import BackendError, ExportError, UsageError
from ..runtime.gpu.tensorrt import DTYPES, TensorRT, device_capability, load_library
from .maker import Made, Profiles
from .profiles import BATCHES


class TensorRtMaker:
    """TensorRT or TensorRT-RTX. Raises BackendError if it is missing or cannot build for what is asked."""

    suffix, folder, machine_code = ".engine", "tensorrt", False
    precision: Precision = Precision.FP16
    batches: tuple[str, ...] = BATCHES

    def __init__(self, library: Library, compute_capabilities: tuple[str, ...]) -> None:
        self._tool = load_library(library)
        self.library, self.version = library, self._tool.version
        self.capabilities = _capabilities(self._tool, compute_capabilities)
        self._log_start = 0
        self._builder: _Builder | None = None

    @contextlib.contextmanager
    def building(self, _directory: EngineDirectory, known_timings: bytes) -> Iterator[None]:
        """Start the library's builder."""
        self._log_start = self._tool.log.count
        self._builder = _Builder(self._tool, self.capabilities, known_timings)
        yield

    def make(
        self, stage: Stage, typed: onnx.ModelProto, dtypes: dict[str, str], profiles: Profiles, file: Path
    ) -> Made:
        """Write a serialised engine."""
        assert self._builder is not None  # noqa: S101 — `building` came first
        self._tool.log.add("INFO", f"diffiqa: stage {stage.name}")
        engine, inputs, outputs = self._builder.build(stage, typed.SerializeToString(), profiles, dtypes)
        file.write_bytes(engine)
        return Made(inputs, outputs)

    def log(self) -> str:
        """Return the messages of parser and builder."""
        return self._tool.log.text(self._log_start)

    def timings(self) -> bytes | None:
        """Return the builder's timing cache, where the library has one."""
        return self._builder.timings if self._builder and self._tool.traits.timing_cache else None


def _capabilities(library: TensorRT, asked: tuple[str, ...]) -> tuple[str, ...]:
    """Return the compute capabilities to build for; none: portable. Raises if this machine or library cannot."""
    if library.traits.ahead_of_time:
        for name in asked:
            library.capability(name)
        return tuple(sorted(set(asked)))
    if asked:
        raise UsageError(f"{library.library} builds for the GPU it runs on; leave --compute-capability out")
    capability = device_capability()
    if capability is None:
        raise BackendError(
            f"{library.library} builds on the GPU that will run the engine, and none is here; run iqa-build there, or "
            f"use --target {Library.TENSORRT_RTX}"
        )
    return (capability,)


class _Builder:
    """A library's builder, with the same settings for every stage. Each stage adds to `timings`."""

    def __init__(self, library: TensorRT, capabilities: tuple[str, ...], timings: bytes) -> None:
        self._api, self._log, self._traits = library.api, library.log, library.traits
        self._capabilities = [library.capability(name) for name in capabilities] if self._traits.ahead_of_time else []
        self.timings = timings
        self._cache: Any = None
        log_start = self._log.count
        self._builder = self._api.Builder(self._log.logger)
        if self._builder is None:
            raise self._failure("the builder does not start", log_start)

    def build(
        self, stage: Stage, model: bytes, profiles: Profiles, dtypes: dict[str, str]
    ) -> tuple[memoryview, tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
        """Return a serialised engine and its signature. Raises ExportError with what parser and builder said."""
        log_start = self._log.count
        # TensorRT 11 knows no other networks and ignores the flag; 10 and RTX need it.
        network = self._builder.create_network(1 << int(self._api.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = self._api.OnnxParser(network, self._log.logger)
        if not parser.parse(model):
            messages = [parser.get_error(i).desc() for i in range(parser.num_errors)]
            raise self._failure(f"stage {stage.name}: the ONNX parser refuses it", log_start, *messages)
        inputs = _signature(stage, stage.inputs, [network.get_input(i) for i in range(network.num_inputs)])
        outputs = _signature(stage, stage.outputs, [network.get_output(i) for i in range(network.num_outputs)])
        if wrong := [spec for spec in (*inputs, *outputs) if spec.dtype != dtypes[spec.name]]:
            raise ExportError(f"stage {stage.name}: {wrong[0].name} is {wrong[0].dtype}, the plan has another dtype")
        config = self._config(profiles)
        engine = self._builder.build_serialized_network(network, config)
        if engine is None:
            raise self._failure(f"stage {stage.name}: the builder failed", log_start)
        if self._traits.timing_cache:
            self.timings = bytes(memoryview(config.get_timing_cache().serialize()))
        return memoryview(engine), inputs, outputs

    def _config(self, profiles: Profiles) -> Any:
        config = self._builder.create_builder_config()
        # On unless cleared: TF32 would round to 10 bits what the plan keeps in float32.
        config.clear_flag(self._api.BuilderFlag.TF32)
        config.max_aux_streams = 0  # a graph captures our stream, not those an engine makes for itself
        if self._capabilities:  # none given: a portable engine
            config.num_compute_capabilities = len(self._capabilities)
            for index, capability in enumerate(self._capabilities):
                config.set_compute_capability(capability, index)
        if self._traits.timing_cache:
            # A cache of another GPU or version is refused: start an empty one.
            for known in (self.timings, b""):
                self._cache = config.create_timing_cache(known)  # the config does not own it
                if config.set_timing_cache(self._cache, ignore_mismatch=False):
                    break
        for shapes in profiles:
            profile = self._builder.create_optimization_profile()
            for name, span in shapes.items():
                profile.set_shape(name, span.minimum, span.optimum, span.maximum)
            config.add_optimization_profile(profile)
        return config

    def _failure(self, what: str, log_start: int, *messages: str) -> ExportError:
        distinct = dict.fromkeys([*messages, *self._log.errors(since=log_start)])
        return ExportError(f"{what}: {'; '.join(list(distinct)[:3]) or 'it gave no reason'}")


def _signature(stage: Stage, planned: tuple[TensorSpec, ...], tensors: list[Any]) -> tuple[TensorSpec, ...]:
    """Return inputs or outputs as the library reads them. Raises ExportError if they are not those of the stage."""
    found = {tensor.name: tuple(tensor.shape) for tensor in tensors}
    expected = {spec.name: tuple(d if isinstance(d, int) else -1 for d in spec.shape) for spec in planned}
    if found != expected:
        raise ExportError(f"stage {stage.name}: the network has tensors {found}, the stage {expected}")
    dtypes = {tensor.name: DTYPES.get(tensor.dtype.name, tensor.dtype.name) for tensor in tensors}
    return tuple(dataclasses.replace(spec, dtype=dtypes[spec.name]) for spec in planned)
