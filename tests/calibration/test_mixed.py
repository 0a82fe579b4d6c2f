"""`mixed`: stages are taken into 8 bits only while the score stays within the limit."""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner

from diffiqa.calibration import quantise as quantise_module
from diffiqa.calibration.cli import quantise
from diffiqa.calibration.mixed import OPTIONS, Trial, _work, choose_stages
from diffiqa.calibration.quantise import Number, Recipe, Target, quantise_engine
from diffiqa.engine.manifest import Check, EngineDirectory, Stage, StageName, file_sha256, open_engine
from diffiqa.errors import ExportError, UsageError
from diffiqa.runtime.scorer import load

from ..tiny import STAGES, photo


@pytest.fixture(scope="module")
def trials(tiny_engine: Path, calibration_folder: Path, calibration_images: list[Path]) -> list[Trial]:
    """Every stage, tried without a limit."""
    return choose_stages(tiny_engine, calibration_folder, calibration_images, Recipe(), limit=np.inf)


def test_stages_are_tried_by_their_work_and_the_change_is_that_of_the_engine_so_far(
    tiny_engine: Path, calibration_folder: Path, calibration_images: list[Path], trials: list[Trial], tmp_path: Path
) -> None:
    assert trials[0].stage is StageName.UNET
    assert {trial.stage for trial in trials} == set(STAGES)
    assert all(trial.taken for trial in trials)
    for count in (1, len(trials)):
        folder = tmp_path / str(count)
        only = [trial.stage for trial in trials[:count]]
        quantise_engine(tiny_engine, folder, calibration_folder, Recipe(), only=only)
        with load(tiny_engine) as exact, load(folder) as eight:
            scores = [[s.score(path, OPTIONS).score for path in calibration_images] for s in (exact, eight)]
        assert trials[count - 1].change == pytest.approx(np.abs(np.subtract(scores[0], scores[1])).mean(), abs=1e-7)
        assert trials[count - 1].change > 0


def test_the_work_of_the_stage_that_a_loop_asks_counts_every_step(pfd_engine: Path) -> None:
    directory = open_engine(pfd_engine)
    work = {stage.name: _work(directory, stage) / stage.macs for stage in directory.manifest.stages}
    assert {name for name, times in work.items() if times != 1} == {StageName.DENOISER}
    assert work[StageName.DENOISER] == directory.manifest.schedule.steps


def test_a_stage_beyond_the_limit_stays_float32_and_the_next_is_tried_without_it(
    tiny_engine: Path, calibration_folder: Path, calibration_images: list[Path], trials: list[Trial]
) -> None:
    limit = trials[0].change / 2
    limited = choose_stages(tiny_engine, calibration_folder, calibration_images, Recipe(), limit=limit)
    assert not limited[0].taken
    assert limited[0].change == trials[0].change
    assert all(trial.taken == (trial.change <= limit) for trial in limited)
    assert limited[1].change != trials[1].change


def test_a_stage_that_quantising_refuses_stays_float32_and_the_others_are_tried(
    tiny_engine: Path, calibration_folder: Path, calibration_images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = quantise_module._compare

    def refusing(directory: EngineDirectory, stage: Stage, file: Path) -> tuple[Check, ...]:
        if stage.name is StageName.VCG:
            raise ExportError("stage vcg: quantised, output score_map is off")
        return exact(directory, stage, file)

    monkeypatch.setattr(quantise_module, "_compare", refusing)
    found = choose_stages(tiny_engine, calibration_folder, calibration_images[:1], Recipe(), limit=np.inf)
    tried = {trial.stage: trial for trial in found}
    assert tried.keys() == set(STAGES)
    assert not tried[StageName.VCG].taken
    assert "score_map is off" in tried[StageName.VCG].why
    assert all(trial.taken and not trial.why for name, trial in tried.items() if name is not StageName.VCG)


def test_stages_that_are_not_taken_are_the_float32_ones_and_the_manifest_says_so(
    tiny_engine: Path, calibration_folder: Path, tmp_path: Path
) -> None:
    quantise_engine(tiny_engine, tmp_path / "some", calibration_folder, Recipe(), only=[StageName.VIT])
    before, after = open_engine(tiny_engine), open_engine(tmp_path / "some")
    for old, new in zip(before.manifest.stages, after.manifest.stages, strict=True):
        same = file_sha256(before.file(old.file)) == file_sha256(after.file(new.file))
        assert same == (old.name is not StageName.VIT)
        assert (new == old) == same
    assert "int8 for onnxruntime, of vit alone" in after.manifest.provenance.notes[-1]


def test_the_command_says_what_each_stage_does_and_writes_the_engine(
    tiny_engine: Path,
    calibration_folder: Path,
    calibration_images: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("diffiqa.calibration.mixed.MOST_IMAGES", 1)  # the trials above score all of them
    statistics = shutil.copytree(calibration_folder, tmp_path / "statistics")  # the command adds to it
    arguments = ["--engine", str(tiny_engine), "--statistics", str(statistics), "--precision", "mixed"]
    images = [argument for path in calibration_images for argument in ("--calib", str(path))]
    arguments += [*images, "--calib", str(_another(tmp_path))]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    unreadable = ["--calib", str(tmp_path / "broken.png"), "--drift", "1", "-o", str(tmp_path / "made")]
    done = CliRunner().invoke(quantise, [*arguments, *unreadable])
    assert done.exit_code == 1, done.output  # written; the one image is left out of the trials too
    assert "unet: int8, the score changes by" in done.output
    assert open_engine(tmp_path / "made").manifest.stages
    none = CliRunner().invoke(quantise, [*arguments, "--drift", "0", "-o", str(tmp_path / "none")])
    assert none.exit_code == 2
    assert "no stage keeps the score" in none.output
    assert not (tmp_path / "none").exists()

    def refuse(*_: object) -> tuple[Check, ...]:
        raise ExportError("quantised, it is off")

    monkeypatch.setattr(quantise_module, "_compare", refuse)
    none = CliRunner().invoke(quantise, [*arguments, "--drift", "1", "-o", str(tmp_path / "none")])
    assert none.exit_code == 2
    assert "no stage can be quantised" in none.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "mixed"], "give --calib"),
        (["--drift", "0.1"], "int8 takes all"),
        (["--precision", "mixed", "--target", "tensorrt", "--calib", "x"], "leave --target out, or take openvino"),
    ],
)
def test_contradictions_are_refused_before_anything_is_run(
    tiny_engine: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    done = CliRunner().invoke(quantise, ["--engine", str(tiny_engine), *arguments, "-o", str(tmp_path / "made")])
    assert done.exit_code == 2
    assert message in done.output


def test_fp8_cannot_be_tried_here(tiny_engine: Path, calibration_folder: Path, calibration_images: list[Path]) -> None:
    with pytest.raises(UsageError, match="ONNX Runtime"):
        choose_stages(tiny_engine, calibration_folder, calibration_images, Recipe(Number.FP8, Target.TENSORRT))


def _another(folder: Path) -> Path:
    """Return one more picture: a calibration by the command takes four."""
    path = folder / "another.png"
    PIL.Image.fromarray(photo(9, 32, 48)).save(path)
    return path
