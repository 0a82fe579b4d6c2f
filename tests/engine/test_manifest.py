"""The engine directory is read strictly: anything tampered with, missing or foreign is refused with what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffiqa.engine.manifest import MANIFEST, TensorSpec, open_engine, read_manifest
from diffiqa.errors import EngineError


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_engine, tmp_path / "engine"))


def edit(engine: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = engine / MANIFEST
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


def test_reads_back_what_was_written(engine: Path) -> None:
    manifest = open_engine(engine).manifest
    (engine / MANIFEST).write_text(manifest.to_json())
    assert open_engine(engine).manifest == manifest


@pytest.mark.parametrize(
    ("name", "engine_id"), [("mini-with-build", "2c944dc68420c6ca"), ("mini-int8", "fe69ce6b938b8050")]
)
def test_manifests_of_earlier_versions_read_the_same(name: str, engine_id: str, tmp_path: Path) -> None:
    """Written by version 0.1: what a later version makes of them must not move a hash, nor a byte."""
    text = (Path(__file__).parent / "manifests" / f"{name}.json").read_text(encoding="utf-8")
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    manifest = read_manifest(tmp_path)
    assert manifest.engine_id == engine_id
    assert manifest.to_json() == text


def test_a_shape_and_the_sizes_of_its_free_dimensions_give_each_other() -> None:
    spec = TensorSpec("maps", "float32", ("N", 4, "tokens"))
    assert spec.at({"N": 2, "tokens": 9, "unused": 1}) == (2, 4, 9)
    assert spec.free((2, 4, 9)) == {"N": 2, "tokens": 9}
    with pytest.raises(ValueError, match="zip"):
        spec.free((2, 4))


def test_engine_id_follows_stages_and_scoring_but_not_provenance(engine: Path) -> None:
    before = read_manifest(engine).engine_id
    edit(engine, lambda d: d["provenance"].update(created="1999-12-31T00:00:00+00:00"))
    assert read_manifest(engine).engine_id == before
    edit(engine, lambda d: d["taps"].update(t1=2))
    assert read_manifest(engine).engine_id != before


FAST = {
    "sampling": {"steps": [0, 2, 5], "sampler": "ancestral", "eta": 0.0, "taps": "state"},
    "correction": {"inputs": [0.5], "outputs": [0.51], "slope_beyond": 1},
    "images": 40,
}


def with_fast(data: dict[str, Any], part: str = "sampling", **changes: Any) -> None:
    data["fast"] = {**FAST, part: {**FAST[part], **changes}}  # type: ignore[dict-item]


def test_a_fast_sampling_is_kept_and_is_no_part_of_the_engines_id(engine: Path) -> None:
    before = read_manifest(engine)
    edit(engine, with_fast)
    manifest = open_engine(engine).manifest
    assert manifest.fast
    assert manifest.fast.sampling.steps == (0, 2, 5)
    assert manifest.engine_id == before.engine_id
    assert json.loads(manifest.to_json())["fast"] == FAST
    assert "fast" not in json.loads(before.to_json())


@pytest.mark.parametrize(
    ("field", "value"),
    [("tap_form", "clamped"), ("tap_form", "png8"), ("sides", "resized"), ("image_form", "squashed")],
)
def test_engine_id_and_file_follow_how_images_are_prepared(engine: Path, field: str, value: str) -> None:
    before, text = read_manifest(engine).engine_id, (engine / MANIFEST).read_text()
    assert field not in json.loads(text)  # the default, as earlier versions wrote it
    edit(engine, lambda d: d.update({field: value}))
    changed = read_manifest(engine)
    assert changed.engine_id != before
    assert json.loads(changed.to_json())[field] == value
    edit(engine, lambda d: d.update({field: {"tap_form": "float", "sides": "padded", "image_form": "as-is"}[field]}))
    assert read_manifest(engine).engine_id == before
    assert read_manifest(engine).to_json() == text


def test_engine_id_follows_the_places_of_crops_but_not_their_number(engine: Path) -> None:
    before = read_manifest(engine).engine_id
    edit(engine, lambda d: d["crop"].update(count=20))
    assert read_manifest(engine).engine_id == before
    edit(engine, lambda d: d["crop"].update(places="random"))
    assert read_manifest(engine).engine_id != before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(lambda d: with_fast(d, steps=[0, 5]), "needs step 2, and one above it", id="no level of a tap"),
        pytest.param(lambda d: with_fast(d, steps=[0, 2, 6]), "within 0 to 5", id="a step beyond the last"),
        pytest.param(lambda d: with_fast(d, steps=[0, 2, 2.5]), r"steps\[2\] must be a whole number", id="half a step"),
        pytest.param(lambda d: with_fast(d, eta=2.0, sampler="ddim"), "eta must lie between 0 and 1", id="eta"),
        pytest.param(lambda d: with_fast(d, sampler="euler"), "must be one of ancestral, ddim", id="sampler"),
        pytest.param(
            lambda d: with_fast(d, "correction", outputs=[]), "the correction needs as many outputs", id="correction"
        ),
        pytest.param(lambda d: d.update(schema=2), "schema version 2", id="newer schema"),
        pytest.param(lambda d: d.update(schema="1"), "schema version '1'", id="schema of another type"),
        pytest.param(lambda d: d.pop("stages"), "lacks 'stages'", id="missing entry"),
        pytest.param(lambda d: d.update(surprise=1), "unknown entries: 'surprise'", id="unknown entry"),
        pytest.param(
            lambda d: d["stages"][0].update(macs="many"), r"stages\[0\].macs must be a whole", id="wrong type"
        ),
        pytest.param(lambda d: d["schedule"].update(steps=10**9), "steps must be between", id="absurd steps"),
        pytest.param(lambda d: d["taps"].update(t2=50), "taps must be step indices", id="tap beyond the steps"),
        pytest.param(lambda d: d.update(kinds=["y0"]), "kinds must start with dis", id="no distorted image"),
        pytest.param(lambda d: d["stages"].pop(0), "there is no U-Net", id="stage removed"),
        pytest.param(lambda d: d["stages"].append(d["stages"][0]), "listed twice", id="stage twice"),
        pytest.param(lambda d: d["crop"].update(size=31), "crop size must be", id="odd crop"),
        pytest.param(lambda d: d["score"].update(vcg_weight=float("inf")), "must be a finite number", id="infinite"),
    ],
)
def test_refuses_a_damaged_manifest_naming_the_place(
    engine: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    edit(engine, change)
    with pytest.raises(EngineError, match=says) as caught:
        open_engine(engine)
    assert "export" in str(caught.value)


@pytest.mark.parametrize(
    "path", ["../outside.onnx", "/etc/passwd", "onnx/../../outside.onnx", "..\\outside.onnx", "C:/x.onnx", ""]
)
def test_refuses_paths_that_leave_the_directory(engine: Path, path: str) -> None:
    (engine.parent / "outside.onnx").write_bytes(b"x")
    edit(engine, lambda d: d["stages"][0]["file"].update(path=path))
    with pytest.raises(EngineError, match="leaves the engine directory"):
        open_engine(engine)


def test_refuses_a_link_that_leaves_the_directory(engine: Path) -> None:
    stage = engine / "onnx" / "unet.onnx"
    outside = engine.parent / "unet.onnx"
    stage.rename(outside)
    stage.symlink_to(outside)
    with pytest.raises(EngineError, match="points outside"):
        open_engine(engine)


def test_refuses_a_loop_of_links(engine: Path) -> None:
    stage = engine / "onnx" / "unet.onnx"
    stage.unlink()
    stage.symlink_to(engine / "onnx" / "other.onnx")
    (engine / "onnx" / "other.onnx").symlink_to(stage)
    with pytest.raises(EngineError, match="cannot read"):
        open_engine(engine)


def test_refuses_a_file_with_one_byte_flipped(engine: Path) -> None:
    stage = engine / "onnx" / "vda.onnx"
    data = bytearray(stage.read_bytes())
    data[len(data) // 2] ^= 1
    stage.write_bytes(data)
    with pytest.raises(EngineError, match="was changed after export"):
        open_engine(engine)


def test_refuses_a_truncated_file(engine: Path) -> None:
    stage = engine / "onnx" / "vda.onnx"
    stage.write_bytes(stage.read_bytes()[:-1])
    with pytest.raises(EngineError, match="the manifest says"):
        open_engine(engine)


def test_refuses_a_missing_file(engine: Path) -> None:
    (engine / "onnx" / "vcg.onnx").unlink()
    with pytest.raises(EngineError, match=r"vcg\.onnx is missing; export the engine again"):
        open_engine(engine)


def test_refuses_what_is_not_a_manifest(engine: Path) -> None:
    for text in ("", "{", "[]", "null", "[" * 100_000, '{"schema": 1}', "\x00", '{"schema": NaN}'):
        (engine / MANIFEST).write_text(text)
        with pytest.raises(EngineError):
            open_engine(engine)


def test_refuses_a_directory_without_manifest_or_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"has no manifest.json"):
        open_engine(tmp_path)
    with pytest.raises(EngineError, match="does not exist; make an engine directory with: iqa-export"):
        open_engine(tmp_path / "nowhere")
    (weights := tmp_path / "model.safetensors").touch()
    with pytest.raises(EngineError, match=r"make one with: iqa-export --ckpt \S+model.safetensors -o engine/"):
        open_engine(weights)


def test_refuses_to_score_with_a_partial_export(engine: Path) -> None:
    edit(engine, lambda d: d.update(complete=False))
    with pytest.raises(EngineError, match="export again without --stage"):
        open_engine(engine)
