"""Builds for ONNX Runtime: the stages in another precision, for every GPU and size, and never in 8 bits."""

import dataclasses
import shutil
from pathlib import Path

import onnx
import pytest

from diffiqa.engine.manifest import Library, Precision, open_engine, read_manifest
from diffiqa.errors import UsageError
from diffiqa.export.builds import BuildOptions, build_engines
from diffiqa.export.compare import CAST_TOLERANCE
from diffiqa.export.precision import cast, resolve_plan
from diffiqa.runtime.builds import Machine, open_build

OPTIONS = BuildOptions(Library.ONNXRUNTIME)


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_engine, tmp_path / "engine"))


@pytest.mark.parametrize("precision", [None, Precision.BF16])
def test_a_build_is_the_cast_stages(engine: Path, precision: Precision | None) -> None:
    build, stages = build_engines(engine, dataclasses.replace(OPTIONS, precision=precision))
    wanted = precision or Precision.FP16
    directory = open_engine(engine)
    plan = resolve_plan(directory, wanted)
    assert (build.precision, build.compute_capabilities, build.batches, build.sizes) == (wanted, (), (), ())
    assert directory.manifest.builds == (build,)
    assert build.key.startswith(f"onnxruntime-{build.version}-portable-{wanted}-")
    for made, stage in zip(build.stages, directory.manifest.stages, strict=True):
        assert made.file.path == f"onnxruntime/{build.key}/{stage.name}.onnx"
        typed = cast(onnx.load(directory.file(stage.file)), plan.stage(stage.name), wanted)
        assert onnx.load(engine / made.file.path) == typed
        assert {spec.name: spec.dtype for spec in (*made.inputs, *made.outputs)} == plan.stage(stage.name).tensors
        assert made.profiles == ()
        assert all(0 < check.max_abs_error <= check.tolerance for check in made.drift if check.output != "score")
        assert max(check.tolerance / check.max_abs_reference for check in made.drift) >= CAST_TOLERANCE[wanted]
    assert len(stages) == len(build.stages)
    # Any ONNX Runtime on any GPU takes it.
    assert open_build(directory, Machine(Library.ONNXRUNTIME, None, "9.0")) == build


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batches": ("1",)}, "takes every batch and size"),
        ({"sizes": ("32x32",)}, "takes every batch and size"),
        ({"compute_capabilities": ("8.9",)}, "are for every GPU"),
    ],
)
def test_what_makes_no_difference_cannot_be_asked_for(engine: Path, changes: dict[str, tuple[str]], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        build_engines(engine, dataclasses.replace(OPTIONS, **changes))  # type: ignore[arg-type]
    assert read_manifest(engine).builds == ()


@pytest.mark.parametrize("library", [Library.ONNXRUNTIME, Library.INDUCTOR])
def test_stages_in_8_bits_are_refused(engine: Path, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffiqa.export.builds.in_8_bits", lambda model: True)
    with pytest.raises(UsageError, match=f"is in 8 bits, and {library} builds are made of float32 stages"):
        build_engines(engine, BuildOptions(library))
