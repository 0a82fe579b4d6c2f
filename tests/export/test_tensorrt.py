"""Engines as TensorRT-RTX really builds them, on a machine without a GPU; TensorRT itself by what is common to both."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from diffiqa import cli
from diffiqa.engine.atomic import locked
from diffiqa.engine.manifest import (
    MANIFEST,
    Build,
    Library,
    Manifest,
    Precision,
    ShapeRange,
    StageName,
    file_sha256,
    open_engine,
    read_manifest,
)
from diffiqa.errors import BackendError, EngineError, ExportError, UsageError
from diffiqa.export import builds as builds_module
from diffiqa.export import tensorrt as tensorrt_module
from diffiqa.export.builds import BuildOptions, build_engines
from diffiqa.export.precision import read_plan
from diffiqa.runtime.builds import Machine, open_build

from ..rtx import ONE, RTX, check_signatures, needs_rtx
from ..tiny import STAGES

SMALL = BuildOptions(RTX, batches=("1:2:4",), sizes=("32x32", "32x32:64x64:96x96"))


@pytest.fixture(scope="session")
def built(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Build]:
    path = Path(shutil.copytree(tiny_engine, tmp_path_factory.mktemp("built") / "engine"))
    build, _ = build_engines(path, SMALL)
    return path, build


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    """Return an engine directory of one's own with two quick stages, the quickest first."""
    return two_stages(tiny_engine, tmp_path / "engine")


def two_stages(tiny_engine: Path, path: Path) -> Path:
    shutil.copytree(tiny_engine, path)
    data = json.loads((path / MANIFEST).read_text())
    data["stages"] = [stage for name in ("vda", "unet") for stage in data["stages"] if stage["name"] == name]
    (path / MANIFEST).write_text(json.dumps(data))
    return path


@pytest.fixture(scope="module")
def made(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Build]:
    path = two_stages(tiny_engine, tmp_path_factory.mktemp("made") / "engine")
    build, stages = build_engines(path, ONE)
    assert len(stages) == 2
    return path, build


@pytest.fixture
def one(made: tuple[Path, Build], tmp_path: Path) -> tuple[Path, Build]:
    """Return an engine directory of one's own with two stages, and the build `ONE` of it."""
    return Path(shutil.copytree(made[0], tmp_path / "engine")), made[1]


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(a) for a in arguments])


# What a build is.


@needs_rtx
def test_a_build_has_an_engine_for_every_stage_recorded_with_its_hash(built: tuple[Path, Build]) -> None:
    path, build = built
    manifest = open_engine(path).manifest
    assert manifest.builds == (build,)
    assert [stage.name for stage in build.stages] == [stage.name for stage in manifest.stages]
    folder = path / "tensorrt" / build.key
    assert {p.name for p in folder.iterdir()} == {*(f"{n}.engine" for n in STAGES), "plan.json", "build.log"}
    for entry in build.files:
        assert (path / entry.path).parent == folder
        assert file_sha256(path / entry.path) == entry.sha256
    assert {p.name for p in (path / "tensorrt").iterdir()} == {build.key}


@needs_rtx
def test_a_build_says_what_it_is_for_and_made_of(built: tuple[Path, Build]) -> None:
    path, build = built
    assert (build.library, build.version) == (RTX, pytest.importorskip("tensorrt_rtx").__version__)
    assert (build.compute_capabilities, build.precision) == ((), Precision.FP16)
    assert (build.batches, build.sizes) == (SMALL.batches, SMALL.sizes)
    assert build.key.startswith(f"tensorrt-rtx-{build.version}-portable-fp16-")
    onnx = {stage.name: stage.file.sha256 for stage in read_manifest(path).stages}
    assert {stage.name: stage.onnx_sha256 for stage in build.stages} == onnx
    plan = read_plan(path / build.plan.path)
    assert {stage.name: stage.onnx_sha256 for stage in plan.stages} == onnx


@needs_rtx
def test_engines_keep_names_and_shapes_and_are_fp16_where_planned(built: tuple[Path, Build]) -> None:
    check_signatures(*built)


@needs_rtx
def test_profiles_are_those_asked_for(built: tuple[Path, Build]) -> None:
    profiles = {stage.name: stage.profiles for stage in built[1].stages}
    assert [p["y"].maximum for p in profiles[StageName.UNET]] == [(4, 3, 32, 32), (1, 3, 96, 96)]
    assert [p["image"].maximum[0] for p in profiles[StageName.VIT]] == [16]


@needs_rtx
def test_engines_hold_the_fp16_weights_and_every_stage_reports_its_drift(built: tuple[Path, Build]) -> None:
    path, build = built
    for made, stage in zip(build.stages, read_manifest(path).stages, strict=True):
        assert made.file.bytes > stage.parameters * 2
        assert [check.output for check in made.drift] == [spec.name for spec in stage.outputs]


@needs_rtx
def test_the_log_holds_what_the_library_said(built: tuple[Path, Build]) -> None:
    path, build = built
    log = (path / build.log.path).read_text()
    assert all(f"diffiqa: stage {name}" in log for name in STAGES)
    assert "Total Activation Memory" in log


@needs_rtx
def test_the_build_opens_where_it_fits_and_the_onnx_stages_as_before(
    built: tuple[Path, Build], tiny_engine: Path
) -> None:
    path, build = built
    directory = open_engine(path)
    assert open_build(directory, Machine(RTX, build.version, "8.9")) == build
    assert snapshot(path / "onnx") == snapshot(tiny_engine / "onnx")
    assert directory.manifest.engine_id == read_manifest(tiny_engine).engine_id
    with pytest.raises(EngineError, match="iqa-build"):
        open_build(directory, Machine(RTX, "0.1", "8.9"))


@needs_rtx
def test_a_build_that_is_there_is_not_made_again_unless_it_is_damaged(one: tuple[Path, Build]) -> None:
    engine, build = one
    assert build_engines(engine, ONE) == (build, [])
    (engine / build.plan.path).write_text("damaged")
    again, stages = build_engines(engine, ONE)
    assert len(stages) == 2
    assert again.key == build.key
    assert read_manifest(engine).builds == (again,)


@needs_rtx
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"precision": Precision.BF16}, id="bf16"),
        pytest.param({"precision": Precision.FP32}, id="fp32"),
        pytest.param({"compute_capabilities": ("8.9",)}, id="one GPU"),
        pytest.param({"batches": ("2",)}, id="batch"),
    ],
)
def test_builds_that_differ_stand_side_by_side(one: tuple[Path, Build], changes: dict[str, Any]) -> None:
    engine, first = one
    second, _ = build_engines(engine, dataclasses.replace(ONE, **changes))
    assert first.key != second.key
    assert read_manifest(engine).builds == (first, second)
    assert (second.precision, second.compute_capabilities) == (
        changes.get("precision", Precision.FP16),
        changes.get("compute_capabilities", ()),
    )
    images = {Precision.FP16: "float16"}.get(second.precision, "float32")
    assert second.stages[0].inputs[0].dtype == images
    assert bool(second.stages[0].drift) == (second.precision is not Precision.FP32)


@needs_rtx
def test_a_plan_that_keeps_more_is_followed_and_one_of_another_model_refused(one: tuple[Path, Build]) -> None:
    engine, build = one
    plan = read_plan(engine / build.plan.path)
    tensors = plan.stages[0].tensors | {"images": "float32"}
    other = dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[0], tensors=tensors), *plan.stages[1:]))
    changed, _ = build_engines(engine, dataclasses.replace(ONE, plan=other))
    assert changed.stages[0].inputs[0].dtype == "float32"
    foreign = dataclasses.replace(
        plan, stages=(dataclasses.replace(plan.stages[0], onnx_sha256="0" * 64), *plan.stages[1:])
    )
    with pytest.raises(UsageError, match=r"is for another onnx/vda\.onnx"):
        build_engines(engine, dataclasses.replace(ONE, plan=foreign))
    with pytest.raises(UsageError, match="is for fp16, not bf16"):
        build_engines(engine, dataclasses.replace(ONE, plan=plan, precision=Precision.BF16))


# What goes wrong.


@needs_rtx
def test_the_builders_own_words_reach_the_user_and_the_log_is_kept(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(engine)
    wrong = ({"images": ShapeRange(*[(1, 32)] * 3)},)
    monkeypatch.setattr(builds_module, "stage_profiles", lambda *_: wrong)
    with pytest.raises(ExportError, match=r"stage vda: the builder failed: .*has 5 dimensions but profile 0 has 2"):
        build_engines(engine, ONE)
    after = snapshot(engine)
    assert "has 5 dimensions" in after.pop("tensorrt/failed.log").decode()
    assert after == before


@needs_rtx
def test_the_parsers_own_words_reach_the_user(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Nonsense:
        def SerializeToString(self) -> bytes:  # noqa: N802 — as protobuf has it
            return b"no model"

    monkeypatch.setattr(builds_module, "cast", lambda *_: Nonsense())
    monkeypatch.setattr(builds_module, "compare_cast", lambda *_: ())
    with pytest.raises(ExportError, match=r"stage vda: the ONNX parser refuses it: .*parse"):
        build_engines(engine, ONE)


@needs_rtx
def test_an_interrupted_build_leaves_the_directory_as_it_was(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = snapshot(engine)
    monkeypatch.setattr(builds_module, "_record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build_engines(engine, ONE)
    assert snapshot(engine) == before


@needs_rtx
def test_a_directory_that_is_exported_anew_meanwhile_gets_no_build(engine: Path) -> None:
    def export_again(_doing: str) -> None:
        data = json.loads((engine / MANIFEST).read_text())
        data["stages"][0]["macs"] += 1
        (engine / MANIFEST).write_text(json.dumps(data))

    with pytest.raises(EngineError, match="exported anew meanwhile"):
        build_engines(engine, ONE, say=export_again)
    assert read_manifest(engine).builds == ()


@needs_rtx
def test_two_builds_at_once_do_not_mix(engine: Path) -> None:
    with locked(engine), pytest.raises(EngineError, match="another process is writing"):
        build_engines(engine, ONE)


@needs_rtx
def test_a_gpu_the_library_does_not_know_is_refused_with_those_it_does(engine: Path) -> None:
    with pytest.raises(BackendError, match=r"builds for compute 7\.5, .*8\.9.*, not 3\.5"):
        build_engines(engine, dataclasses.replace(ONE, compute_capabilities=("3.5",)))


@pytest.mark.parametrize(("library", "extra"), [(RTX, "rtx"), (Library.TENSORRT, "tensorrt")])
def test_a_missing_library_is_named_with_the_way_to_install_it(
    engine: Path, library: Library, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library.replace("-", "_"), None)
    with pytest.raises(BackendError, match=rf"{library} is not installed.*diffiqa\[{extra}\]"):
        build_engines(engine, BuildOptions(library))


def test_an_onnx_stage_that_was_changed_is_not_built(engine: Path) -> None:
    (engine / "onnx" / "vda.onnx").write_bytes(b"changed")
    if importlib.util.find_spec("tensorrt_rtx"):
        with pytest.raises(EngineError, match="the manifest says"):
            build_engines(engine, ONE)


# TensorRT proper, which no package index has for machines without a GPU: RTX's module stands in for it.


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", pytest.importorskip("tensorrt_rtx"))
    monkeypatch.setattr(tensorrt_module, "device_capability", lambda: "8.6")


@pytest.mark.usefixtures("tensorrt")
@pytest.mark.filterwarnings("ignore:.*timing_cache.*|.*Timing cache:DeprecationWarning")
def test_tensorrt_builds_for_the_gpu_that_is_here_and_keeps_its_timing_cache(engine: Path) -> None:
    options = dataclasses.replace(ONE, library=Library.TENSORRT)
    build, _ = build_engines(engine, options)
    assert build.compute_capabilities == ("8.6",)
    assert build.timing_cache is not None
    assert (engine / build.timing_cache.path).stat().st_size == build.timing_cache.bytes > 0
    second, _ = build_engines(engine, dataclasses.replace(options, batches=("2",)))
    assert read_manifest(engine).builds == (build, second)


@pytest.mark.usefixtures("tensorrt")
def test_tensorrt_takes_no_compute_capability_and_needs_a_gpu(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dataclasses.replace(ONE, library=Library.TENSORRT)
    with pytest.raises(UsageError, match="leave --compute-capability out"):
        build_engines(engine, dataclasses.replace(options, compute_capabilities=("8.9",)))
    monkeypatch.setattr(tensorrt_module, "device_capability", lambda: None)
    with pytest.raises(BackendError, match=r"none is here.*--target tensorrt-rtx"):
        build_engines(engine, options)


# The commands.


@needs_rtx
def test_iqa_build_prints_a_table_and_the_name_of_the_build(engine: Path) -> None:
    arguments = ("build", "--engine", engine, "--target", "tensorrt-rtx", "--batch", "1,2", "--sizes", "32x32")
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    (build,) = read_manifest(engine).builds
    assert build.batches == ("1", "2")
    assert f"build {build.key}" in result.stdout
    assert "max error" in result.stdout
    assert "seed" in result.stdout
    again = call(*arguments)
    assert again.exit_code == 0
    assert again.stdout.splitlines() == [f"{engine}: build {build.key} is there already"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--batch", "0"), "is not of the form"),
        (("--plan", "none.json"), "cannot read none.json"),
    ],
)
@needs_rtx
def test_iqa_build_ends_errors_with_one_line(engine: Path, arguments: tuple[str, ...], says: str) -> None:
    result = call("build", "--engine", engine, "--target", "tensorrt-rtx", *arguments)
    assert result.exit_code == 2
    assert [says in line for line in result.stderr.splitlines() if line.startswith("error:")] == [True]


@pytest.fixture
def asked(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> list[BuildOptions]:
    """Have `iqa-export` copy an engine and note what it would build."""
    notes: list[BuildOptions] = []

    def export(_loaded: object, output: Path, **_: object) -> tuple[Manifest, list[object]]:
        shutil.copytree(tiny_engine, output)
        return read_manifest(output), []

    def build(_path: Path, options: BuildOptions, **_: object) -> tuple[SimpleNamespace, list[object]]:
        notes.append(options)
        return SimpleNamespace(key="made"), []

    monkeypatch.setattr("diffiqa.export.engine.export_engine", export)
    monkeypatch.setattr(builds_module, "build_engines", build)
    return notes


@needs_rtx
@pytest.mark.parametrize(
    ("target", "gpu", "library"),
    [
        pytest.param((), None, None, id="no GPU here"),
        pytest.param((), "8.9", RTX, id="a GPU here"),
        pytest.param((), "9.0", None, id="a GPU that nothing here is for"),
        pytest.param(("--target", "none"), "8.9", None, id="none"),
        pytest.param(("--target", "tensorrt-rtx"), None, RTX, id="for elsewhere"),
    ],
)
def test_iqa_export_builds_where_it_is_asked_to_or_engines_could_run(
    asked: list[BuildOptions],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    target: tuple[str, ...],
    gpu: str | None,
    library: Library | None,
) -> None:
    monkeypatch.setattr(builds_module, "device_capability", lambda: gpu)
    result = call("export", "--preset", "mini", "--seed", "0", "-o", tmp_path / "engine", *target)
    assert result.exit_code == 0, result.output
    assert asked == ([BuildOptions(library)] if library else [])


@needs_rtx
def test_an_export_whose_engines_fail_keeps_the_onnx_stages_and_says_so(
    asked: list[BuildOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ExportError("stage unet: the builder failed")

    monkeypatch.setattr(builds_module, "build_engines", failing)
    result = call(
        "export", "--preset", "mini", "--seed", "0", "-o", tmp_path / "engine", "--target", "tensorrt-rtx", "-q"
    )
    assert result.exit_code == 2
    assert "holds the ONNX stages, but no tensorrt-rtx engines: stage unet: the builder failed" in result.stderr
    open_engine(tmp_path / "engine")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(("--target", "tensorrt-rtx"), "is not installed"), (("--target", "tensorrt", "--stage", "vda"), "not both")],
)
def test_iqa_export_refuses_a_target_before_it_exports(
    asked: list[BuildOptions],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    result = call("export", "--preset", "mini", "--seed", "0", "-o", tmp_path / "engine", *arguments)
    assert result.exit_code == 2
    assert says in result.stderr
    assert list(tmp_path.iterdir()) == []
    assert asked == []


def test_building_needs_no_torch() -> None:
    code = (
        "import sys, diffiqa.export.api, diffiqa.export.builds, diffiqa.export.tensorrt; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@needs_rtx
@pytest.mark.slow
@pytest.mark.parametrize("precision", [Precision.FP16, Precision.BF16])
def test_full_size_stages_build(precision: Precision, tmp_path: Path) -> None:
    made = call("export", "--preset", "paper", "--seed", "0", "-o", tmp_path / "engine", "--target", "none")
    assert made.exit_code == 0, made.output
    build, _ = build_engines(tmp_path / "engine", BuildOptions(RTX, precision))
    manifest = read_manifest(tmp_path / "engine")
    assert len(build.stages) == 4
    for stage, source in zip(build.stages, manifest.stages, strict=True):
        assert 2 * source.parameters < stage.file.bytes < 3 * source.parameters
        assert all(check.max_abs_error < check.tolerance / 2 for check in stage.drift)
