"""Which build a machine may use: the newest that fits, whole; any other is refused with the command that helps."""

import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from diffiqa import cli
from diffiqa.engine.manifest import (
    MANIFEST,
    Build,
    BuiltStage,
    EngineDirectory,
    FileEntry,
    Library,
    Precision,
    ShapeRange,
    file_sha256,
    read_manifest,
)
from diffiqa.errors import EngineError
from diffiqa.runtime.builds import Machine, open_build, rebuild_command

RTX = Library.TENSORRT_RTX
ONE = ShapeRange((1, 1), (1, 1), (1, 1))


def build_of(directory: EngineDirectory, key: str, **changes: object) -> Build:
    """Write the files of a build whose engines are a few bytes, and return its entry."""

    def written(name: str) -> FileEntry:
        file = directory.path / "tensorrt" / key / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(f"{key} {name}".encode())
        return FileEntry(file.relative_to(directory.path).as_posix(), file.stat().st_size, file_sha256(file))

    stages = tuple(
        BuiltStage(s.name, s.file.sha256, written(f"{s.name}.engine"), s.inputs, s.outputs, ({"x": ONE},), ())
        for s in directory.manifest.stages
    )
    plan, log = written("plan.json"), written("build.log")
    made = Build(key, RTX, "1.7", ("8.9",), Precision.FP16, ("1", "1:2:4"), ("32x32",), stages, plan, log, None)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type] # one field each, as the tests name them


@pytest.fixture
def directory(tiny_engine: Path, tmp_path: Path) -> EngineDirectory:
    return EngineDirectory(tmp_path / "my engine", read_manifest(tiny_engine))


def holding(directory: EngineDirectory, *builds: Build) -> EngineDirectory:
    return dataclasses.replace(directory, manifest=dataclasses.replace(directory.manifest, builds=builds))


def opened(directory: EngineDirectory, **changes: object) -> Build:
    return open_build(directory, dataclasses.replace(Machine(RTX, "1.7", "8.9"), **changes))  # type: ignore[arg-type]


def advised(message: str) -> dict[str, object]:
    """Return the options of the `iqa-build` command that a message ends with, as iqa-build itself reads them."""
    command, *arguments = shlex.split(message[message.index("iqa-build") :])
    assert command == "iqa-build"
    return cli.main.commands["build"].make_context("iqa-build", arguments).params


def test_a_build_that_fits_is_opened_and_survives_the_manifest(directory: EngineDirectory) -> None:
    build = build_of(directory, "a")
    holder = holding(directory, build)
    assert opened(holder) is build
    (directory.path / MANIFEST).write_text(holder.manifest.to_json())
    assert read_manifest(directory.path) == holder.manifest


def test_the_newest_build_that_fits_is_taken(directory: EngineDirectory) -> None:
    old, new = build_of(directory, "old"), build_of(directory, "new", precision=Precision.BF16)
    elsewhere = build_of(directory, "elsewhere", compute_capabilities=("12.0",))
    holder = holding(directory, old, new, elsewhere)
    assert opened(holder) is new
    assert opened(holding(directory, new, old)) is old


def test_builds_do_not_change_the_identity_of_an_engine(directory: EngineDirectory) -> None:
    assert holding(directory, build_of(directory, "a")).manifest.engine_id == directory.manifest.engine_id


def test_without_a_build_the_message_says_how_to_make_one(directory: EngineDirectory) -> None:
    with pytest.raises(EngineError, match="holds no tensorrt-rtx build") as caught:
        opened(holding(directory, build_of(directory, "a", library=Library.TENSORRT)))
    asked = advised(str(caught.value))
    assert (asked["engine"], asked["target"]) == (directory.path, "tensorrt-rtx")


@pytest.mark.parametrize(
    ("change", "machine", "says", "capability"),
    [
        pytest.param({}, {"version": "1.8"}, "made by tensorrt-rtx 1.7, and 1.8 is installed", "8.9", id="version"),
        pytest.param({}, {"target": "12.0"}, "for compute capability 8.9", "12.0", id="other GPU"),
        pytest.param({"compute_capabilities": ()}, {"target": "7.5"}, "portable from", "7.5", id="portable, old GPU"),
        pytest.param({"compute_capabilities": ()}, {"version": "1.8"}, "1.8 is installed", "", id="portable, version"),
    ],
)
def test_a_foreign_build_is_refused_with_the_command_for_this_machine(
    directory: EngineDirectory, change: dict[str, object], machine: dict[str, object], says: str, capability: str
) -> None:
    with pytest.raises(EngineError, match=says) as caught:
        opened(holding(directory, build_of(directory, "a", **change)), **machine)
    asked = advised(str(caught.value))
    assert asked["engine"] == directory.path
    assert (asked["target"], asked["precision"]) == ("tensorrt-rtx", "fp16")
    assert (asked["batches"], asked["sizes"], asked["capabilities"]) == ("1,1:2:4", "32x32", capability)


def test_a_gpu_that_the_library_has_no_kernels_for_is_told_of_another_backend(directory: EngineDirectory) -> None:
    """Hopper with TensorRT-RTX: no command would build anything that runs there."""
    supported = ("7.5", "8.9", "12.0")
    holder = holding(directory, build_of(directory, "a", compute_capabilities=()))
    with pytest.raises(
        EngineError, match=r"no kernels .* 9\.0 .* only for 7\.5, 8\.9, 12\.0; use .* onnxruntime-gpu"
    ) as caught:
        opened(holder, target="9.0", supported=supported)
    assert "iqa-build" not in str(caught.value)
    assert opened(holder, supported=supported) in holder.manifest.builds


def test_a_stale_build_is_refused_when_its_onnx_stages_have_changed(directory: EngineDirectory) -> None:
    build = build_of(directory, "a")
    first, *others = build.stages
    stale = dataclasses.replace(build, stages=(dataclasses.replace(first, onnx_sha256="0" * 64), *others))
    with pytest.raises(EngineError, match=r"from other ONNX stages.*iqa-build --engine"):
        opened(holding(directory, stale))


def _flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        pytest.param(_flip, "SHA-256 differs", id="changed"),
        pytest.param(lambda file: file.write_bytes(b"x"), "has 1 bytes", id="cut short"),
        pytest.param(Path.unlink, "is missing", id="gone"),
    ],
)
@pytest.mark.parametrize("name", ["unet.engine", "plan.json"])
def test_a_damaged_build_is_refused_with_the_command_that_makes_it_again(
    directory: EngineDirectory, damage: Callable[[Path], object], says: str, name: str
) -> None:
    holder = holding(directory, build_of(directory, "a"))
    damage(directory.path / "tensorrt" / "a" / name)
    with pytest.raises(EngineError, match=says) as caught:
        opened(holder)
    asked = advised(str(caught.value))
    assert (asked["capabilities"], asked["force"]) == ("8.9", True)


def test_a_build_outside_the_directory_is_refused(directory: EngineDirectory) -> None:
    build = build_of(directory, "a")
    with pytest.raises(EngineError, match="leaves the engine directory"):
        opened(holding(directory, dataclasses.replace(build, log=FileEntry("../log", 1, "0" * 64))))


def test_tensorrt_is_built_again_without_a_compute_capability(directory: EngineDirectory) -> None:
    build = build_of(directory, "a", library=Library.TENSORRT)
    assert "--compute-capability" not in rebuild_command(directory.path, build, "12.0")
