"""Finds the build of an engine directory that fits a machine, or the reason and the command that makes one."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..engine.manifest import Build, EngineDirectory, Library, Precision, ShapeRange, check_file
from ..errors import BackendError, EngineError

OLDEST_PORTABLE = (8, 0)  # a build of RTX that names no compute capability is not for Turing and before
CPU = "cpu-"  # how the target of a build begins that is for a CPU


class NotForShapesError(BackendError):
    """A stage does not take inputs of these shapes."""


@dataclass(frozen=True)
class Machine:
    """What a build must fit: a library that is installed, and what it is to run on."""

    library: Library
    version: str | None  # None: builds are for every version of this library
    target: str  # a GPU's compute capability, such as "8.9", or a CPU: `CPU` and a digest of its features
    supported: tuple[str, ...] = ()  # the compute capabilities that the library has kernels for; none: it does not say


def newest_build(directory: EngineDirectory, machines: Sequence[Machine]) -> Build:
    """Return the newest build that fits, of the first installed library that has one.

    Raises the EngineError of `open_build`: that of a library with builds in this directory, where there is one.
    """
    problems: dict[Library, EngineError] = {}
    for machine in machines:
        try:
            return open_build(directory, machine)
        except EngineError as exc:
            problems[machine.library] = exc
    built = {build.library for build in directory.manifest.builds}
    raise next((problem for library, problem in problems.items() if library in built), next(iter(problems.values())))


def open_build(directory: EngineDirectory, machine: Machine) -> Build:
    """Return the newest build that fits the library's version and the machine, its files checked.

    Raises EngineError with the `iqa-build` command to run: there is none, it is for another library, version, GPU or
    precision, its ONNX stages have changed, or its files have. Where the library has no kernels for this GPU no build
    helps, and the error names other ways.
    """
    library = machine.library
    if machine.supported and machine.target not in machine.supported:
        raise EngineError(
            f"{library} {machine.version} has no kernels for the compute capability {machine.target} of this GPU, only "
            f"for {', '.join(machine.supported)}; use another backend, such as inductor-gpu or onnxruntime-gpu"
        )
    builds = [
        build
        for build in reversed(directory.manifest.builds)
        if build.library is library and is_for_cpu(build) == machine.target.startswith(CPU)
    ]
    if not builds:
        capabilities = ("cpu",) if machine.target.startswith(CPU) and library is Library.INDUCTOR else ()
        command = build_command(directory.path, library=library, capabilities=capabilities)
        raise EngineError(f"{directory.path} holds no {library} build; make one with: {command}")
    problems = [_problem(directory, build, machine) for build in builds]
    for build, problem in zip(builds, problems, strict=True):
        if problem is None:
            command = rebuild_command(directory.path, build, force=True)
            for entry in build.files:
                check_file(directory.path, entry, f"build it again with: {command}")
            return build
    command = rebuild_command(directory.path, builds[0], machine.target)
    raise EngineError(f"build {builds[0].key} of {directory.path} {problems[0]}; build it again with: {command}")


def is_for_cpu(build: Build) -> bool:
    """Return whether a build is for a CPU."""
    return any(target.startswith(CPU) for target in build.compute_capabilities)


def _problem(directory: EngineDirectory, build: Build, machine: Machine) -> str | None:
    """Return why a build cannot be used here, or None."""
    target = machine.target
    if machine.version and build.version != machine.version:
        return f"was made by {build.library} {build.version}, and {machine.version} is installed"
    if build.compute_capabilities and target not in build.compute_capabilities:
        if target.startswith(CPU):
            return "is for a CPU with other features than this one"
        return f"is for compute capability {', '.join(build.compute_capabilities)}, and this GPU has {target}"
    portable = build.library is Library.TENSORRT_RTX and not build.compute_capabilities
    if portable and tuple(map(int, target.split("."))) < OLDEST_PORTABLE:
        return f"is portable from compute capability 8.0 on, and this GPU has {target}"
    if {stage.name: stage.onnx_sha256 for stage in build.stages} != {
        stage.name: stage.file.sha256 for stage in directory.manifest.stages
    }:
        return "was made from other ONNX stages than are there now"
    return None


def rebuild_command(
    path: Path,
    build: Build,
    compute_capability: str | None = None,
    *,
    more_batches: tuple[str, ...] = (),
    more_sizes: tuple[str, ...] = (),
    force: bool = False,
) -> str:
    """Return the command that makes this build again, for another GPU if one is named, and for more shapes."""
    capabilities = build.compute_capabilities
    if compute_capability and build.library is Library.TENSORRT_RTX:
        portable = not capabilities and tuple(map(int, compute_capability.split("."))) >= OLDEST_PORTABLE
        capabilities = () if portable else (compute_capability,)
    return build_command(
        path,
        library=build.library,
        precision=build.precision,
        batches=tuple(dict.fromkeys((*build.batches, *more_batches))),
        sizes=tuple(dict.fromkeys((*build.sizes, *more_sizes))),
        # The others build for the machine they run on: a GPU where there is one.
        capabilities=capabilities if build.library is Library.TENSORRT_RTX else ("cpu",) if is_for_cpu(build) else (),
        tabulate=build.tabulated,
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
    tabulate: bool = False,
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
    words += [option for option, given in (("--tabulate", tabulate), ("--force", force)) if given]
    return shlex.join(words)


def choose_profile(profiles: tuple[dict[str, ShapeRange], ...], shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Return the profile that takes these input shapes and spans least, so a static one if there is one; or None."""

    def takes(profile: Mapping[str, ShapeRange]) -> bool:
        return all(
            len(shape) == len(profile[name].minimum)
            and all(
                low <= n <= high
                for low, n, high in zip(profile[name].minimum, shape, profile[name].maximum, strict=True)
            )
            for name, shape in shapes.items()
        )

    def largest(index: int) -> int:
        return sum(math.prod(span.maximum) for span in profiles[index].values())

    fitting = [index for index, profile in enumerate(profiles) if takes(profile)]
    return min(fitting, key=largest, default=None)
