"""Writing an engine directory: whole or not at all, and never over something that is not ours."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffiqa.engine.manifest import Manifest, Source, Stage, StageName, file_sha256, open_engine, read_manifest
from diffiqa.engine.pixels import ImageForm
from diffiqa.errors import DiffiqaError, EngineError, ExportError
from diffiqa.export import engine as engine_module
from diffiqa.export import pytorch
from diffiqa.export.engine import StageCost, check_target, export_engine, manifest_of, plan_names, preparation_of
from diffiqa.export.pytorch import compare_with_pytorch, reference
from diffiqa.export.stages import StagePlan, stage_plans
from diffiqa.model.checkpoint import Loaded
from diffiqa.model.config import PRESETS
from diffiqa.model.network import build

from ..tiny import TINY

VDA = (StageName.VDA,)


@pytest.fixture
def quick(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy stages from the tiny engine instead of exporting them: what is tested is the directory around them."""
    made = read_manifest(tiny_engine)

    def copy(_model: object, plan: StagePlan, work: Path, _say: object, **_options: object) -> StageCost:
        stage = made.stage(plan.name)
        assert stage is not None
        (work / "onnx").mkdir(exist_ok=True)
        shutil.copy(tiny_engine / stage.file.path, work / stage.file.path)
        return StageCost(stage, 0.0, 0.0)

    monkeypatch.setattr(engine_module, "_export_stage", copy)


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_the_directory_holds_the_four_stages_and_a_manifest_with_their_hashes(tiny_engine: Path) -> None:
    manifest = open_engine(tiny_engine).manifest
    assert [stage.name.value for stage in manifest.stages] == ["unet", "vit", "vcg", "vda"]
    files = {"manifest.json", "self-test.json", *(f"onnx/{name}.onnx" for name in ("unet", "vit", "vcg", "vda"))}
    assert set(snapshot(tiny_engine)) == files
    for stage in manifest.stages:
        assert stage.file.sha256 == file_sha256(tiny_engine / stage.file.path)


@pytest.mark.usefixtures("quick")
def test_the_manifest_says_whether_the_weights_were_trained(tiny_loaded: Loaded, tmp_path: Path) -> None:
    seeded = dataclasses.replace(tiny_loaded, sources=(Source("seed", "0", 0, "", "seeded random numbers"),))
    export_engine(tiny_loaded, tmp_path / "a", stages=VDA)
    export_engine(seeded, tmp_path / "b", stages=VDA)
    assert read_manifest(tmp_path / "a").score.trained
    score = read_manifest(tmp_path / "b").score
    assert not score.trained
    assert "mean nothing" in score.meaning


@pytest.mark.usefixtures("quick")
def test_an_export_of_some_stages_is_marked_incomplete(tiny_loaded: Loaded, tmp_path: Path) -> None:
    export_engine(tiny_loaded, tmp_path / "engine", stages=VDA)
    assert not read_manifest(tmp_path / "engine").complete
    assert set(snapshot(tmp_path / "engine")) == {"manifest.json", "onnx/vda.onnx"}


def test_a_stage_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, vda=None)
    with pytest.raises(ExportError, match="has no stage vda"):
        export_engine(Loaded(build(config, 0), (), ()), tmp_path / "engine", stages=VDA)


@pytest.mark.usefixtures("quick")
def test_an_engine_is_replaced_only_with_force(tiny_loaded: Loaded, tmp_path: Path) -> None:
    target = tmp_path / "engine"
    export_engine(tiny_loaded, target, stages=VDA)
    before = snapshot(target)
    with pytest.raises(EngineError, match="already holds an engine; give --force"):
        export_engine(tiny_loaded, target, stages=VDA)
    assert snapshot(target) == before
    export_engine(tiny_loaded, target, stages=(StageName.VIT,), force=True)
    assert set(snapshot(target)) == {"manifest.json", "onnx/vit.onnx"}
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


@pytest.mark.parametrize("content", ["photo.jpg", "manifest.json"])
def test_a_directory_that_is_not_an_engine_is_never_replaced(tmp_path: Path, content: str) -> None:
    target = tmp_path / "holiday"
    target.mkdir()
    (target / content).write_text("{}")
    with pytest.raises(EngineError, match="not an engine directory; it is left alone"):
        check_target(target, force=True)


def test_a_file_or_link_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(EngineError, match="is not a directory"):
            check_target(tmp_path / name, force=True)
    with pytest.raises(EngineError, match="make it first"):
        check_target(tmp_path / "no" / "where", force=True)


class Stopped(BaseException):
    """Stands for Ctrl-C, a kill or anything else that ends an export from outside."""


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("_export_stage", KeyboardInterrupt),
        ("_export_stage", OSError(28, "No space left on device")),
        ("manifest_of", Stopped),
        ("_replace", OSError(28, "No space left on device")),
    ],
)
@pytest.mark.usefixtures("quick")
def test_an_export_that_ends_early_leaves_the_old_engine_and_nothing_else(
    tiny_loaded: Loaded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    error: BaseException | type[BaseException],
) -> None:
    target = tmp_path / "engine"
    export_engine(tiny_loaded, target, stages=VDA)
    before = snapshot(target)

    def stop(*_args: object, **_options: object) -> None:
        raise error

    monkeypatch.setattr(engine_module, where, stop)
    with pytest.raises((KeyboardInterrupt, Stopped, DiffiqaError)) as caught:
        export_engine(tiny_loaded, target, stages=VDA, force=True)
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
    assert snapshot(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


@pytest.mark.usefixtures("quick")
def test_what_a_killed_export_left_behind_is_cleared_by_the_next(tiny_loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / ".engine.partial" / "onnx").mkdir(parents=True)
    (tmp_path / ".engine.partial" / "onnx" / "unet.onnx").write_bytes(b"half")
    export_engine(tiny_loaded, tmp_path / "engine", stages=VDA)
    assert set(snapshot(tmp_path)) == {"engine/manifest.json", "engine/onnx/vda.onnx"}
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]


@pytest.mark.usefixtures("quick")
def test_an_engine_that_a_killed_export_had_moved_away_comes_back(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_engine(tiny_loaded, tmp_path / "engine", stages=VDA)
    before = snapshot(tmp_path / "engine")
    (tmp_path / "engine").rename(tmp_path / ".engine.previous")
    monkeypatch.setattr(engine_module, "_export_stage", _interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_engine(tiny_loaded, tmp_path / "engine", stages=VDA)
    assert snapshot(tmp_path / "engine") == before


@pytest.mark.usefixtures("quick")
def test_two_exports_to_one_target_do_not_meet(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = engine_module.manifest_of

    def meanwhile(loaded: Loaded, stages: tuple[Stage, ...]) -> Manifest:
        with pytest.raises(EngineError, match="another export is writing"):
            export_engine(tiny_loaded, tmp_path / "engine", stages=VDA)
        return finish(loaded, stages)

    monkeypatch.setattr(engine_module, "manifest_of", meanwhile)
    export_engine(tiny_loaded, tmp_path / "engine", stages=VDA)
    assert read_manifest(tmp_path / "engine").stages[0].name is StageName.VDA


@pytest.mark.usefixtures("quick")
def test_what_appears_at_the_target_during_an_export_is_not_overwritten(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, finish = tmp_path / "engine", engine_module.manifest_of

    def meanwhile(loaded: Loaded, stages: tuple[Stage, ...]) -> Manifest:
        target.mkdir()
        (target / "notes.txt").write_text("mine")
        return finish(loaded, stages)

    monkeypatch.setattr(engine_module, "manifest_of", meanwhile)
    with pytest.raises(EngineError, match="not an engine directory; it is left alone"):
        export_engine(tiny_loaded, target, stages=VDA, force=True)
    assert snapshot(tmp_path) == {"engine/notes.txt": b"mine"}


def test_the_current_directory_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for target in (Path(), Path(".."), tmp_path.parent):
        with pytest.raises(EngineError, match="is the current directory or holds it"):
            check_target(target, force=True)


def _interrupt(*_args: object, **_options: object) -> None:
    raise KeyboardInterrupt


def test_a_disk_too_small_is_noticed_before_the_work(
    tiny_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    with pytest.raises(ExportError, match="0 MB free, the engine needs"):
        export_engine(tiny_loaded, tmp_path / "engine", stages=VDA)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda x: x + 3e-4,
            r"^stage vda, output score, .* ONNX Runtime differs from PyTorch by 0\.0003 > [^,]+, [^,]+ of the largest "
            r"value, which is more than 30 times the rounding of PyTorch itself: .* --accept-drift",
        ),
        (lambda _: float("nan"), "returns NaN"),
    ],
    ids=["off by 3e-4", "nan"],
)
def test_a_stage_that_disagrees_with_pytorch_fails_the_export(
    tiny_loaded: Loaded,
    tiny_engine: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[float], float],
    says: str,
) -> None:
    plan = next(plan for plan in stage_plans(tiny_loaded.model) if plan.name is StageName.VDA)

    def tampered(*arguments: Any) -> tuple[torch.Tensor, ...]:
        return tuple(x.clone().apply_(change) for x in reference(*arguments))

    monkeypatch.setattr(pytorch, "reference", tampered)
    with pytest.raises(ExportError, match=says):
        compare_with_pytorch(tiny_loaded.model, plan, tiny_engine / "onnx" / "vda.onnx", seed=1)


@pytest.mark.usefixtures("ready_graphs")
def test_drift_is_written_where_that_is_accepted_and_the_manifest_says_how_far(
    tiny_loaded: Loaded, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tampered(change: float) -> None:
        monkeypatch.setattr(pytorch, "reference", lambda *given: tuple(x + change for x in reference(*given)))

    tampered(3e-4)
    made, _ = export_engine(tiny_loaded, tmp_path / "engine", stages=VDA, accept_drift=True)
    assert "score of vda by 0.0003 where " in made.drift
    assert made.drift.count(" of vda by ") == 3
    assert read_manifest(tmp_path / "engine") == made
    assert read_manifest(tiny_engine).drift == ""
    tampered(float("nan"))
    with pytest.raises(ExportError, match="PyTorch itself returns NaN"):
        export_engine(tiny_loaded, tmp_path / "other", stages=VDA, accept_drift=True)


def test_the_manifest_names_no_directory_of_this_machine(tiny_engine: Path) -> None:
    text = (tiny_engine / "manifest.json").read_text()
    assert str(tiny_engine.parent) not in text
    assert str(Path(__file__).parents[2]) not in text
    assert json.loads(text)["provenance"]["versions"]["diffiqa"]


@pytest.mark.parametrize(
    ("preset", "says"),
    [
        ("paper", "sides padded to multiples of 16, 9 crops of 224×224, restorations as floats"),
        (
            "authors",
            "sides resized to multiples of 16, 1 random crop of 224×224, restorations as 8-bit PNG files hold them",
        ),
        ("maniqa", "20 random crops of 224×224"),
        ("mini", "sides padded to multiples of 16, 9 crops of 112×112, restorations as floats"),
    ],
)
def test_the_manifest_has_the_presets_way_with_images(preset: str, says: str) -> None:
    config = PRESETS[preset]
    stages = tuple(SimpleNamespace(name=name) for name in plan_names(config))
    manifest = manifest_of(Loaded(SimpleNamespace(config=config), (), ()), stages)  # type: ignore[arg-type]
    assert preparation_of(manifest) == says
    found = (manifest.tap_form, manifest.sides, manifest.image_form, manifest.crop.places, manifest.crop.count)
    assert found == (config.tap_form, config.sides, config.image_form, config.crop_places, config.crop_count)
    squashed = dataclasses.replace(manifest, image_form=ImageForm.SQUASHED)
    assert f"squashed to {config.crop}×{config.crop}" in preparation_of(squashed)
