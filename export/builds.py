"""ONNX stages → a build of one library inside the engine directory, recorded in its manifest.

A build is written beside its place and then moved there. Replacing the manifest comes last: until then the engine
directory is what it was. The ONNX stages never change.

Each library has a `Maker`, which turns a cast stage into a file: `tensorrt.py`, `onnx_build.py`, `inductor.py`.
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

import onnx

from ..engine.atomic import locked, replacing, sync, sync_all
from ..engine.codec import encode
from ..engine.manifest import (
    MANIFEST,
    TABULATED,
    Build,
    BuiltStage,
    EngineDirectory,
    FileEntry,
    Library,
    Precision,
    StageName,
    check_file,
    file_sha256,
    open_engine,
    read_manifest,
)
from ..engine.seal import seal
from ..errors import BackendError, EngineError, ExportError, UsageError
from ..runtime.gpu.tensorrt import device_capability, usable_library
from ..runtime.inductor import torch_on_gpu
from .compare import compare_cast
from .maker import Maker, Profiles
from .precision import PrecisionPlan, cast, in_8_bits, resolve_plan
from .profiles import default_sizes, stage_profiles
from .tabulate import tabulate

KEY_SCHEMA = 1  # of what a build's key is a digest of


@dataclass(frozen=True)
class BuildOptions:
    """What to build. No precision: the library's default. No batches or sizes: the defaults for the engine.

    No compute capability: portable, or for the machine that builds, as the library has it.
    """

    library: Library
    precision: Precision | None = None
    batches: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    compute_capabilities: tuple[str, ...] = ()
    plan: PrecisionPlan | None = None  # instead of the one made from the graphs
    tabulate: bool = False  # put a table in the place of what depends on the step alone


@dataclass(frozen=True)
class _Job:
    """Everything that decides what a build contains."""

    directory: EngineDirectory
    maker: Maker
    options: BuildOptions
    plan: PrecisionPlan
    profiles: dict[StageName, Profiles]

    @cached_property
    def key(self) -> str:
        """The build's folder name: library, version, target, precision, and a digest of all that engines depend on."""
        maker = self.maker
        identity = {
            "schema": KEY_SCHEMA,
            "library": maker.library,
            "version": maker.version,
            "compute_capabilities": maker.capabilities,
            "plan": self.plan,  # which has the hashes of the ONNX stages
            "profiles": self.profiles,
        }
        digest = hashlib.sha256(json.dumps(encode(identity), sort_keys=True).encode()).hexdigest()[:12]
        names = (f"sm{name.replace('.', '')}" if name[0].isdigit() else name for name in maker.capabilities)
        target = "+".join(names) or "portable"
        form = f"{self.plan.precision}{TABULATED if self.options.tabulate else ''}"
        return f"{maker.library}-{maker.version}-{target}-{form}-{digest}"

    @property
    def folder(self) -> Path:
        """Where builds of this library are."""
        return self.directory.path / self.maker.folder

    def entry(self, work: Path, name: str) -> FileEntry:
        """Return the manifest's entry for a file in `work`, under the path it will have."""
        file = work / name
        return FileEntry(f"{self.maker.folder}/{self.key}/{name}", file.stat().st_size, file_sha256(file))


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
    maker = make_maker(options)
    directory = open_engine(path)
    if options.tabulate and directory.manifest.stage(StageName.UNET) is None:
        raise UsageError("this engine has no U-Net whose steps could be tabulated: leave --tabulate out")
    if maker.library in {Library.ONNXRUNTIME, Library.INDUCTOR}:
        _refuse_8_bits(directory, maker.library)
    plan = resolve_plan(directory, options.precision or (None if options.plan else maker.precision), options.plan)
    if maker.batches:
        options = dataclasses.replace(
            options,
            batches=options.batches or maker.batches,
            sizes=options.sizes or default_sizes(directory.manifest),
        )
    elif options.batches or options.sizes:
        raise UsageError(f"{maker.library} takes every batch and size; leave --batch and --sizes out")
    stages = directory.manifest.stages
    profiles = {
        s.name: stage_profiles(directory.manifest, s, options.batches, options.sizes) if maker.batches else ()
        for s in stages
    }
    job = _Job(directory, maker, options, plan, profiles)
    if not force and (build := _existing(job)):
        return build, []
    try:
        with locked(path) as ours:
            if not ours:
                raise EngineError(f"another process is writing {path}; wait for it")
            work = job.folder / f".{job.key}.partial"
            shutil.rmtree(work, ignore_errors=True)  # of a killed build: we hold the lock
            work.mkdir(parents=True)
            try:
                done = _build_stages(job, work, say)
                build = _record(job, work, done)
                _publish(job, build, work)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as exc:
        raise ExportError(f"cannot write into {path}: {exc.strerror or exc}; no build was added") from exc
    return build, done


def make_maker(options: BuildOptions) -> Maker:
    """Return the builder of a library. Raises BackendError if it is missing or cannot build for what is asked."""
    if options.library is Library.ONNXRUNTIME:
        from .onnx_build import OnnxMaker

        return OnnxMaker(options.compute_capabilities)
    if options.library is Library.INDUCTOR:
        from .inductor import InductorMaker

        return InductorMaker(options.compute_capabilities)
    from .tensorrt import TensorRtMaker

    return TensorRtMaker(options.library, options.compute_capabilities)


def target_here() -> Library | None:
    """Return what builds the fastest engines for this machine's GPU; None without a GPU, or a library for it."""
    capability = device_capability()
    if capability is None:
        return None
    if library := usable_library(capability):
        return library
    with contextlib.suppress(BackendError):
        torch_on_gpu(0)
        return Library.INDUCTOR
    return None


def default_target() -> Library:
    """Return what `iqa-build` builds for unasked. Without a GPU that is a library which needs none to build."""
    return target_here() or (Library.ONNXRUNTIME if device_capability() else Library.TENSORRT_RTX)


def _refuse_8_bits(directory: EngineDirectory, library: Library) -> None:
    for stage in directory.manifest.stages:
        if in_8_bits(onnx.load(directory.file(stage.file))):
            raise UsageError(
                f"{directory.path} is in 8 bits, and {library} builds are made of float32 stages; give the float32 "
                f"engine that it was quantised from, or --target {Library.TENSORRT_RTX}"
            )


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
    """Write stages, plan, log and timing cache into `work`. A failed build leaves its log in the engine directory."""
    maker, precision = job.maker, job.plan.precision
    failed = work.parent / "failed.log"
    done = []
    with maker.building(job.directory, _known_timings(job)):
        for stage in job.directory.manifest.stages:
            start = time.perf_counter()
            say(f"{stage.name}: casting to {precision}")
            plan, profiles = job.plan.stage(stage.name), job.profiles[stage.name]
            model = onnx.load(job.directory.file(stage.file))
            if job.options.tabulate:
                model, plan = tabulate(model, plan, job.directory.manifest.schedule)
            typed = cast(model, plan, precision)
            low = precision is not Precision.FP32
            drift = compare_cast(job.directory, stage, typed, precision) if low else ()
            middle = time.perf_counter()
            say(f"{stage.name}: building with {maker.library}")
            name = f"{stage.name}{maker.suffix}"
            try:
                made = maker.make(stage, typed, plan.tensors, profiles, work / name)
            except ExportError as exc:
                failed.write_text(maker.log(), encoding="utf-8")
                raise ExportError(f"{exc}; the whole log is in {failed}") from exc
            built = BuiltStage(
                stage.name,
                stage.file.sha256,
                job.entry(work, name),
                made.inputs,
                made.outputs,
                profiles,
                made.drift or drift,
            )
            done.append(StageBuild(built, middle - start, time.perf_counter() - middle))
    if maker.machine_code:
        seal(work, (finished.stage.file for finished in done))
    (work / "plan.json").write_text(job.plan.to_json(), encoding="utf-8")
    (work / "build.log").write_text(maker.log(), encoding="utf-8")
    if (timings := maker.timings()) is not None:
        (work / "timing.cache").write_bytes(timings)
    failed.unlink(missing_ok=True)
    return done


def _known_timings(job: _Job) -> bytes:
    """Return what an earlier build of this library and GPU measured, or nothing."""
    maker = job.maker
    for build in reversed(job.directory.manifest.builds):
        same = (build.library, build.version, build.compute_capabilities) == (
            maker.library,
            maker.version,
            maker.capabilities,
        )
        if same and build.timing_cache:
            with contextlib.suppress(EngineError):
                check_file(job.directory.path, build.timing_cache)
                return (job.directory.path / build.timing_cache.path).read_bytes()
    return b""


def _record(job: _Job, work: Path, done: list[StageBuild]) -> Build:
    return Build(
        key=job.key,
        library=job.maker.library,
        version=job.maker.version,
        compute_capabilities=job.maker.capabilities,
        precision=job.plan.precision,
        batches=job.options.batches,
        sizes=job.options.sizes,
        stages=tuple(stage.stage for stage in done),
        plan=job.entry(work, "plan.json"),
        log=job.entry(work, "build.log"),
        timing_cache=job.entry(work, "timing.cache") if (work / "timing.cache").exists() else None,
    )


def _publish(job: _Job, build: Build, work: Path) -> None:
    """Move a finished build to its place, then name it in the manifest."""
    directory = job.directory
    manifest = read_manifest(directory.path)  # again: other builds may have come since, or another export
    if manifest.stages != directory.manifest.stages:
        raise EngineError(f"{directory.path} was exported anew meanwhile; run iqa-build again")
    others = tuple(other for other in manifest.builds if other.key != build.key)
    target = job.folder / build.key
    sync_all(work)
    shutil.rmtree(target, ignore_errors=True)  # damaged, unfinished, or to be made again
    work.rename(target)
    sync(target.parent)
    updated = dataclasses.replace(manifest, builds=(*others, build))
    with replacing(directory.path / MANIFEST) as stream:
        stream.write(updated.to_json().encode())
