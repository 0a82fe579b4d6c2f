"""ONNX stages → TensorRT or TensorRT-RTX engines inside the engine directory, recorded in its manifest.

A build is written beside its place and then moved there. Replacing the manifest comes last: until then the engine
directory is what it was. The ONNX stages never change.
"""

import contextlib
import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from ..engine.atomic import locked, replacing, sync
from ..engine.codec import encode
from ..engine.manifest import (
    MANIFEST,
    Build,
    BuiltStage,
    EngineDirectory,
    FileEntry,
    Library,
    Precision,
    ShapeRange,
    Stage,
    StageName,
    TensorSpec,
    check_file,
    file_sha256,
    open_engine,
    read_manifest,
)
from ..errors import BackendError, EngineError, ExportError, UsageError
from ..runtime.gpu.tensorrt import TensorRT, device_capability, load_library
from .compare import compare_cast
from .precision import PrecisionPlan, cast, resolve_plan
from .profiles import BATCHES, default_sizes, stage_profiles

FOLDER = "tensorrt"
KEY_SCHEMA = 1  # of what a build's key is a digest of
_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}

Profiles = tuple[dict[str, ShapeRange], ...]


@dataclass(frozen=True)
class BuildOptions:
    """What to build. Empty batches and sizes: the defaults for the engine. No compute capability: portable."""

    library: Library
    precision: Precision = Precision.FP16
    batches: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    plan: PrecisionPlan | None = None  # instead of the one made from the graphs


@dataclass(frozen=True)
class _Job:
    """Everything that decides what a build contains."""

    directory: EngineDirectory
    library: TensorRT
    options: BuildOptions
    plan: PrecisionPlan
    profiles: dict[StageName, Profiles]

    @cached_property
    def key(self) -> str:
        """The build's folder name: library, version, target, precision, and a digest of all that engines depend on."""
        library, options = self.library, self.options
        identity = {
            "schema": KEY_SCHEMA,
            "library": library.library,
            "version": library.version,
            "compute_capabilities": options.compute_capabilities,
            "plan": self.plan,  # which has the hashes of the ONNX stages
            "profiles": self.profiles,
        }
        digest = hashlib.sha256(json.dumps(encode(identity), sort_keys=True).encode()).hexdigest()[:12]
        target = "+".join(f"sm{name.replace('.', '')}" for name in options.compute_capabilities) or "portable"
        return f"{library.library}-{library.version}-{target}-{options.precision}-{digest}"

    def entry(self, work: Path, name: str) -> FileEntry:
        """Return the manifest's entry for a file in `work`, under the path it will have."""
        file = work / name
        sync(file)
        return FileEntry(f"{FOLDER}/{self.key}/{name}", file.stat().st_size, file_sha256(file))


@dataclass(frozen=True)
class StageBuild:
    """A finished stage and how long it took."""

    stage: BuiltStage
    cast_seconds: float  # with the comparison
    build_seconds: float


def build_engines(
    path: Path, options: BuildOptions, *, force: bool = False, say: Callable[[str], None] = lambda _text: None
) -> tuple[Build, list[StageBuild]]:
    """Build every stage of the engine directory `path`, or return the same build with no stages if it is there.

    Raises EngineError if the directory is damaged or in use, BackendError if the library is missing or cannot build
    for what is asked, UsageError for options that do not fit, ExportError with the builder's own words if it fails.
    """
    library = load_library(options.library)
    options = dataclasses.replace(options, compute_capabilities=_capabilities(library, options))
    directory = open_engine(path)
    options = dataclasses.replace(
        options, batches=options.batches or BATCHES, sizes=options.sizes or default_sizes(directory.manifest)
    )
    stages = directory.manifest.stages
    profiles = {s.name: stage_profiles(directory.manifest, s, options.batches, options.sizes) for s in stages}
    job = _Job(directory, library, options, resolve_plan(directory, options.precision, options.plan), profiles)
    if not force and (build := _existing(job)):
        return build, []
    try:
        with locked(path) as ours:
            if not ours:
                raise EngineError(f"another process is writing {path}; wait for it")
            work = path / FOLDER / f".{job.key}.partial"
            shutil.rmtree(work, ignore_errors=True)  # of a killed build: we hold the lock
            work.mkdir(parents=True)
            try:
                done = _build_stages(job, work, say)
                build = _record(job, work, done)
                _publish(directory, build, work)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as exc:
        raise ExportError(f"cannot write into {path}: {exc.strerror or exc}; no build was added") from exc
    return build, done


def _capabilities(library: TensorRT, options: BuildOptions) -> tuple[str, ...]:
    """Return the compute capabilities to build for; none: portable. Raises if this machine or library cannot."""
    if library.traits.ahead_of_time:
        for name in options.compute_capabilities:
            library.capability(name)
        return tuple(sorted(set(options.compute_capabilities)))
    if options.compute_capabilities:
        raise UsageError(f"{library.library} builds for the GPU it runs on; leave --compute-capability out")
    capability = device_capability()
    if capability is None:
        raise BackendError(
            f"{library.library} builds on the GPU that will run the engine, and none is here; run iqa-build there, or "
            f"use --target {Library.TENSORRT_RTX}"
        )
    return (capability,)


def _existing(job: _Job) -> Build | None:
    """Return the same build if the engine directory holds it undamaged."""
    for build in job.directory.manifest.builds:
        if build.key == job.key:
            with contextlib.suppress(EngineError):
                for entry in build.files:
                    check_file(job.directory.path, entry)
                return build
    return None


def _build_stages(job: _Job, work: Path, say: Callable[[str], None]) -> list[StageBuild]:
    """Write engines, plan, log and timing cache into `work`. A failed build leaves its log in the engine directory."""
    options, log = job.options, job.library.log
    start_of_log = log.count
    failed = work.parent / "failed.log"
    builder = _Builder(job.library, options.compute_capabilities, _known_timings(job))
    done = []
    for stage in job.directory.manifest.stages:
        start = time.perf_counter()
        say(f"{stage.name}: casting to {options.precision}")
        plan, profiles = job.plan.stage(stage.name), job.profiles[stage.name]
        typed = cast(onnx.load(job.directory.file(stage.file)), plan, options.precision)
        low = options.precision is not Precision.FP32
        checks = compare_cast(job.directory, stage, typed, options.precision) if low else ()
        middle = time.perf_counter()
        say(f"{stage.name}: building with {options.library}")
        log.add("INFO", f"diffiqa: stage {stage.name}")
        try:
            engine, inputs, outputs = builder.build(stage, typed.SerializeToString(), profiles, plan.tensors)
        except ExportError as exc:
            failed.write_text(log.text(start_of_log), encoding="utf-8")
            raise ExportError(f"{exc}; the whole log is in {failed}") from exc
        (work / f"{stage.name}.engine").write_bytes(engine)
        file = job.entry(work, f"{stage.name}.engine")
        built = BuiltStage(stage.name, stage.file.sha256, file, inputs, outputs, profiles, checks)
        done.append(StageBuild(built, middle - start, time.perf_counter() - middle))
    (work / "plan.json").write_text(job.plan.to_json(), encoding="utf-8")
    (work / "build.log").write_text(log.text(start_of_log), encoding="utf-8")
    if job.library.traits.timing_cache:
        (work / "timing.cache").write_bytes(builder.timings)
    failed.unlink(missing_ok=True)
    return done


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
    dtypes = {tensor.name: _DTYPES.get(tensor.dtype.name, tensor.dtype.name) for tensor in tensors}
    return tuple(dataclasses.replace(spec, dtype=dtypes[spec.name]) for spec in planned)


def _known_timings(job: _Job) -> bytes:
    """Return what an earlier build of this library and GPU measured, or nothing."""
    for build in reversed(job.directory.manifest.builds):
        same = (build.library, build.version) == (job.library.library, job.library.version)
        if same and build.compute_capabilities == job.options.compute_capabilities and build.timing_cache:
            with contextlib.suppress(EngineError):
                check_file(job.directory.path, build.timing_cache)
                return (job.directory.path / build.timing_cache.path).read_bytes()
    return b""


def _record(job: _Job, work: Path, done: list[StageBuild]) -> Build:
    options = job.options
    return Build(
        key=job.key,
        library=options.library,
        version=job.library.version,
        compute_capabilities=options.compute_capabilities,
        precision=options.precision,
        batches=options.batches,
        sizes=options.sizes,
        stages=tuple(stage.stage for stage in done),
        plan=job.entry(work, "plan.json"),
        log=job.entry(work, "build.log"),
        timing_cache=job.entry(work, "timing.cache") if job.library.traits.timing_cache else None,
    )


def _publish(directory: EngineDirectory, build: Build, work: Path) -> None:
    """Move a finished build to its place, then name it in the manifest."""
    manifest = read_manifest(directory.path)  # again: other builds may have come since, or another export
    if manifest.stages != directory.manifest.stages:
        raise EngineError(f"{directory.path} was exported anew meanwhile; run iqa-build again")
    others = tuple(other for other in manifest.builds if other.key != build.key)
    target = directory.path / FOLDER / build.key
    sync(work)
    shutil.rmtree(target, ignore_errors=True)  # damaged, unfinished, or to be made again
    work.rename(target)
    sync(target.parent)
    updated = dataclasses.replace(manifest, builds=(*others, build))
    with replacing(directory.path / MANIFEST) as stream:
        stream.write(updated.to_json().encode())
