"""Finds the TensorRT build of an engine directory that fits a machine, or the reason and the command that makes one."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from ...engine.manifest import Build, EngineDirectory, Library, Precision, check_file
from ...errors import EngineError
from .tensorrt import supported_capabilities

OLDEST_PORTABLE = (8, 0)  # a build of RTX that names no compute capability is not for Turing and before


def newest_build(directory: EngineDirectory, versions: Mapping[Library, str], compute_capability: str) -> Build:
    """Return the newest build that fits, of the first installed library that has one.

    Raises the EngineError of `open_build`: that of a library with builds in this directory, where there is one.
    """
    problems: dict[Library, EngineError] = {}
    for library, version in versions.items():
        try:
            return open_build(directory, library=library, version=version, compute_capability=compute_capability)
        except EngineError as exc:
            problems[library] = exc
    built = {build.library for build in directory.manifest.builds}
    raise next((problem for library, problem in problems.items() if library in built), next(iter(problems.values())))


def open_build(
    directory: EngineDirectory,
    *,
    library: Library,
    version: str,
    compute_capability: str,
    precision: Precision | None = None,
) -> Build:
    """Return the newest build that fits the library's version and the GPU's compute capability, its files checked.

    Raises EngineError with the `iqa-build` command to run: there is none, it is for another library, version, GPU or
    precision, its ONNX stages have changed, or its files have. Where the library has no kernels for this GPU no build
    helps, and the error names another backend.
    """
    supported = supported_capabilities(library)
    if supported and compute_capability not in supported:
        raise EngineError(
            f"{library} {version} has no kernels for the compute capability {compute_capability} of this GPU, only for "
            f"{', '.join(supported)}; use another backend, such as onnxruntime-gpu"
        )
    builds = [
        build
        for build in reversed(directory.manifest.builds)
        if build.library is library and precision in {None, build.precision}
    ]
    if not builds:
        what = f"{library} {precision}" if precision else library
        command = build_command(directory.path, library=library, precision=precision)
        raise EngineError(f"{directory.path} holds no {what} engines; build them with: {command}")
    problems = [_problem(directory, build, version, compute_capability) for build in builds]
    for build, problem in zip(builds, problems, strict=True):
        if problem is None:
            command = rebuild_command(directory.path, build, force=True)
            for entry in build.files:
                check_file(directory.path, entry, f"build it again with: {command}")
            return build
    command = rebuild_command(directory.path, builds[0], compute_capability)
    raise EngineError(f"build {builds[0].key} of {directory.path} {problems[0]}; build it again with: {command}")


def _problem(directory: EngineDirectory, build: Build, version: str, capability: str) -> str | None:
    """Return why a build cannot be used here, or None."""
    if build.version != version:
        return f"was made by {build.library} {build.version}, and {version} is installed"
    if build.compute_capabilities and capability not in build.compute_capabilities:
        return f"is for compute capability {', '.join(build.compute_capabilities)}, and this GPU has {capability}"
    if not build.compute_capabilities and tuple(map(int, capability.split("."))) < OLDEST_PORTABLE:
        return f"is portable from compute capability 8.0 on, and this GPU has {capability}"
    if {stage.name: stage.onnx_sha256 for stage in build.stages} != {
        stage.name: stage.file.sha256 for stage in directory.manifest.stages
    }:
        return "was made from other ONNX stages than are there now"
    return None


def rebuild_command(path: Path, build: Build, compute_capability: str | None = None, *, force: bool = False) -> str:
    """Return the command that makes this build again, for another GPU if one is named."""
    capabilities = build.compute_capabilities
    if compute_capability and build.library is Library.TENSORRT_RTX:
        portable = not capabilities and tuple(map(int, compute_capability.split("."))) >= OLDEST_PORTABLE
        capabilities = () if portable else (compute_capability,)
    return build_command(
        path,
        library=build.library,
        precision=build.precision,
        batches=build.batches,
        sizes=build.sizes,
        # TensorRT asks the GPU it runs on.
        capabilities=capabilities if build.library is Library.TENSORRT_RTX else (),
        force=force,
    )


def build_command(
    path: Path,
    *,
    library: Library,
    precision: Precision | None = None,
    batches: tuple[str, ...] = (),
    sizes: tuple[str, ...] = (),
    capabilities: tuple[str, ...] = (),
    force: bool = False,
) -> str:
    """Return the `iqa-build` command with these options, quoted for a shell."""
    words = ["iqa-build", "--engine", str(path), "--target", library]
    for option, values in (
        ("--precision", [precision] if precision else []),
        ("--batch", batches),
        ("--sizes", sizes),
        ("--compute-capability", capabilities),
    ):
        words += [option, ",".join(values)] if values else []
    return shlex.join([*words, "--force"] if force else words)
