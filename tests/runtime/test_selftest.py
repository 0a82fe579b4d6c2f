"""The self-test: it passes where the engine gives the model's answers, and notices where it does not."""

import base64
import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image

from diffiqa import Options, Scorer, load
from diffiqa.cli import main
from diffiqa.engine.manifest import MANIFEST, StageName, file_sha256, open_engine, read_manifest
from diffiqa.engine.pixels import to_plane
from diffiqa.engine.schedule import Kind
from diffiqa.engine.seal import state_folder
from diffiqa.errors import BackendError, EngineError
from diffiqa.export.pytorch import TorchStage
from diffiqa.export.selftest import write_self_test
from diffiqa.model.network import DiffV2IQA
from diffiqa.runtime import selftest
from diffiqa.runtime.host.openvino_stage import OpenVino
from diffiqa.runtime.images import read_for
from diffiqa.runtime.selftest import SELF_TEST, answer, load_tested, read_self_test, run_self_test, self_test

from ..tiny import photo


@pytest.fixture
def engine(tiny_engine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_engine, tmp_path / "engine"))


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def change(engine: Path, /, **entries: Any) -> None:
    file = engine / SELF_TEST
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def spoil(engine: Path, name: StageName) -> None:
    """Move the rows of one weight by one place, as a wrong build would, under a manifest that has the file's hash.

    Its self-test is told the new id: so it looks like an engine that is as it was made.
    """
    manifest = read_manifest(engine)
    stages = []
    for stage in manifest.stages:
        file = engine / stage.file.path
        if stage.name is name:
            model = onnx.load(file)
            weight = next(t for t in model.graph.initializer if len(t.dims) == 4 and t.dims[0] > 1)
            moved = np.roll(numpy_helper.to_array(weight), 1, axis=0)
            weight.CopyFrom(numpy_helper.from_array(moved, weight.name))
            onnx.save(model, file)
            entry = dataclasses.replace(stage.file, bytes=file.stat().st_size, sha256=file_sha256(file))
            stage = dataclasses.replace(stage, file=entry)
        stages.append(stage)
    changed = dataclasses.replace(manifest, stages=tuple(stages))
    (engine / MANIFEST).write_text(changed.to_json())
    change(engine, engine=changed.engine_id)


def test_an_exported_engine_gives_the_answers_of_the_model(engine: Path) -> None:
    tested = self_test(engine)
    names = {a.name for a in tested.answers}
    assert tested.within
    assert names == {"score", "vcg", "vda", "y0", "t1", "t2"}
    assert {a.picture for a in tested.answers} == {1, 2}
    assert all(abs(a.found - a.expected) < 1e-5 for a in tested.answers)
    assert self_test(engine, OpenVino()).within


def test_answers_are_those_of_the_plain_loop_in_pytorch(tiny_engine: Path, tiny_model: DiffV2IQA) -> None:
    manifest = read_manifest(tiny_engine)
    stages = {stage.name: TorchStage(tiny_model, stage) for stage in manifest.stages}
    picture = photo(1, 32, 32)
    found = answer(Scorer(manifest, stages, backend="PyTorch"), read_for(picture, manifest), Options(crops=1))
    plane = torch.from_numpy(to_plane(picture)[None])
    scores = tiny_model.score(plane, 0, 1)
    assert scores.vcg is not None
    assert scores.vda is not None
    assert [found["score"], found["vcg"], found["vda"]] == pytest.approx(
        [scores.total.item(), scores.vcg.item(), scores.vda.item()], rel=1e-5
    )
    change = (tiny_model.restore(plane)[Kind.Y0].clamp(-1, 1) - plane) / 2
    assert found["y0"] == pytest.approx(change.square().mean().sqrt().item(), abs=2e-3)  # pictures have 8 bits


@pytest.mark.parametrize("name", [StageName.UNET, StageName.VIT, StageName.VDA])
def test_notices_a_wrong_weight(engine: Path, name: StageName) -> None:
    spoil(engine, name)
    tested = self_test(engine)
    assert not tested.within
    beyond = {a.name for a in tested.answers if not a.within}
    assert beyond >= {StageName.UNET: {"y0"}, StageName.VIT: {"vcg"}, StageName.VDA: {"vda"}}[name]
    assert name is StageName.UNET or not beyond & {"y0", "t1", "t2"}


def test_a_number_that_is_none_is_beyond_any_tolerance(engine: Path) -> None:
    assert not dataclasses.replace(self_test(engine).answers[0], found=math.nan).within


def test_tolerates_more_of_less_precise_arithmetic(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = read_self_test(open_engine(engine))
    assert test is not None
    with load(engine) as scorer:
        for name, precision in (
            ("openvino 2026.4: CPU, fp32", "fp32"),
            ("openvino 2026.4: CPU, U-Net in bf16", "bf16"),
            ("tensorrt-rtx 1.7 fp16: Fake GPU", "fp16"),
            ("onnxruntime 1.31: CPUExecutionProvider", "fp32"),
        ):
            monkeypatch.setattr(scorer, "_backend", name)
            tested = run_self_test(test, scorer)
            assert tested.precision == precision
            assert tested.answers[-1].allowed >= test.tolerances[precision]


def test_leaves_pictures_out_where_the_first_takes_long(engine: Path) -> None:
    test = read_self_test(open_engine(engine))
    assert test is not None
    with load(engine) as scorer:
        tested = run_self_test(test, scorer, seconds=0)
    assert (tested.left_out, {a.picture for a in tested.answers}) == (1, {1})


def test_runs_once_for_a_build_and_machine(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for _ in range(2):
        with load_tested(engine, say=said.append):
            pass
    assert len(said) == 1
    (note,) = (state_folder() / "self-tests").iterdir()
    assert json.loads(note.read_text())["backend"].startswith("onnxruntime")
    monkeypatch.setattr("platform.node", lambda: "another")
    with load_tested(engine, say=said.append):
        pass
    monkeypatch.undo()
    (engine / MANIFEST).write_text((engine / MANIFEST).read_text() + "\n")  # as a new build changes it
    with load_tested(engine, say=said.append):
        pass
    assert len(said) == 3


def test_a_run_refuses_an_engine_that_fails_and_never_remembers_it(engine: Path) -> None:
    spoil(engine, StageName.UNET)
    says = r"does not give the model's answers here: .* of picture [12], onnxruntime"
    for _ in range(2):
        with pytest.raises(BackendError, match=says), load_tested(engine):
            pass
    with load_tested(engine, wanted=False) as scorer:
        assert math.isfinite(scorer.score(photo(1, 40, 40)).score)


def test_goes_on_where_nothing_can_be_remembered(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with load_tested(engine):
        pass
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(selftest, "state_folder", Path("~nobody-of-this-name").expanduser)
    with load_tested(engine):
        pass


def test_an_engine_of_an_earlier_version_still_scores(engine: Path) -> None:
    (engine / SELF_TEST).unlink()
    with load_tested(engine) as scorer:
        assert scorer.info.engine
    with pytest.raises(EngineError, match="was made before engines had self-tests; export it again"):
        self_test(engine)


@pytest.mark.parametrize(
    ("entries", "why"),
    [
        ({"engine": "0" * 16}, "it is of engine 0000000000000000, and this is"),
        ({"schema": 2}, "schema version 2"),
        ({"pictures": []}, "no pictures"),
        ({"tolerances": {"fp32": -1.0}}, "tolerances"),
        ({"span": 0.0}, "tolerances"),
        ({"pictures": [{"png": "####", "answers": {"score": 0.0}}]}, "a picture of the self-test is damaged"),
        ({"pictures": [{"png": "QUJD", "answers": {"score": 0.0}}]}, "a picture of the self-test is damaged"),
        ({"steps": "3"}, "steps"),
    ],
)
def test_says_what_is_wrong_with_the_file(engine: Path, entries: dict[str, Any], why: str) -> None:
    change(engine, **entries)
    with pytest.raises(EngineError, match=why):
        self_test(engine)


def test_a_picture_that_is_a_bomb_is_refused(engine: Path, tmp_path: Path) -> None:
    Image.new("L", (3000, 3000)).save(tmp_path / "bomb.png")
    png = base64.b64encode((tmp_path / "bomb.png").read_bytes()).decode()
    change(engine, pictures=[{"png": png, "answers": {"score": 0.0}}])
    with pytest.raises(EngineError, match="is more than 2097152 pixels"):
        self_test(engine)


def test_the_engines_own_drift_widens_what_is_allowed(engine: Path) -> None:
    """An 8-bit engine, or one that was exported with --accept-drift, is not the model to the last digit."""
    directory = open_engine(engine)
    before = read_self_test(directory)
    with load(engine) as reference:
        spoil(engine, StageName.VDA)
        write_self_test(engine, read_manifest(engine), reference)
    after = read_self_test(open_engine(engine))
    assert before
    assert after
    assert after.tolerances["fp32"] > before.tolerances["fp32"] * 2
    assert self_test(engine).within


def test_commands(engine: Path, tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> Any:
        return CliRunner().invoke(main, list(map(str, arguments)))

    result = run("verify", "--engine", engine, "--self-test", "--json", tmp_path / "found.json")
    assert result.exit_code == 0, result.output
    assert "The model's answers, as fp32 gives them." in result.stdout
    assert json.loads((tmp_path / "found.json").read_text())["within"] is True
    assert "leave out --precision" in run("verify", "--engine", engine, "--self-test", "--precision", "fp16").output
    assert "leave out images" in run("verify", "--engine", engine, "--self-test", tmp_path).output
    assert "--backend openvino is for --self-test" in run("verify", "--engine", engine, "--backend", "openvino").output

    spoil(engine, StageName.VDA)
    Image.fromarray(photo(1, 40, 40)).save(tmp_path / "a.png")
    result = run("verify", "--engine", engine, "--self-test")
    assert result.exit_code == 1
    assert "NOT THE MODEL'S ANSWERS" in result.stdout
    result = run("run", "--engine", engine, tmp_path / "a.png")
    assert result.exit_code == 2
    assert "score all the same with --no-self-test" in result.output
    assert run("run", "--engine", engine, tmp_path / "a.png", "--no-self-test").exit_code == 0
