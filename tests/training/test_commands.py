"""`iqa-train`: both commands from files to a bundle, and how they end when they cannot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffiqa.engine.codec import encode
from diffiqa.model.checkpoint import load
from diffiqa.tests.tiny import TINY
from diffiqa.training.cli import train

from .runs import write_photos


def toml(value: object) -> str:
    """Return a value of a configuration as inline TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(toml, value)) + "]"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value).replace("'", '"')


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("config") / "run.toml"
    model = toml(encode(TINY))
    file.write_text(f"model = {model}\nseed = 1\noptimisation = {{steps = 2, batch = 2}}\n")
    return file


def test_restore_then_score_leave_a_bundle_to_export(config: Path, tmp_path: Path) -> None:
    paths = write_photos(tmp_path / "photos", count=10, side=44)
    runner = CliRunner()
    unet, scored = tmp_path / "unet", tmp_path / "score"
    restore_config = tmp_path / "restore.toml"
    restore_config.write_text(config.read_text() + "crop = 16\n")
    args = ["--config", str(restore_config), "--data", str(tmp_path / "photos"), "-o", str(unet), "--device", "cpu"]
    result = runner.invoke(train, ["restore", *args])
    assert result.exit_code == 0, result.stderr
    assert str(unet / "model.safetensors") in result.stdout
    assert "step 2 of 2: loss" in result.stderr

    labels = tmp_path / "labels.csv"
    labels.write_text("image,score\n" + "".join(f"photos/{path.name},{i}\n" for i, path in enumerate(paths)))
    names = [f"photos/{path.name}" for path in paths]
    parts = {"train": names[:6], "validation": names[6:]}
    split = json.dumps({"dataset": "labels", "seed": None, "parts": parts})
    (tmp_path / "split.json").write_text(split)
    args = ["--config", str(config), "--data", str(labels), "-o", str(scored), "--device", "cpu"]
    args += ["--split", str(tmp_path / "split.json"), "--unet", str(unet / "model.safetensors")]
    result = runner.invoke(train, ["score", *args])
    assert result.exit_code == 0, result.stderr
    assert all(source.role != "seed" for source in load(scored / "model.safetensors").sources)

    again = runner.invoke(train, ["score", *args])
    assert again.exit_code == 2
    assert "--resume" in again.stderr
    assert runner.invoke(train, ["score", *args, "--resume"]).exit_code == 0


def test_photographs_cannot_be_trained_on_and_held_out(config: Path, tmp_path: Path) -> None:
    write_photos(tmp_path)
    args = ["--config", str(config), "--data", str(tmp_path), "--held-out", str(tmp_path), "-o", str(tmp_path / "x")]
    result = CliRunner().invoke(train, ["restore", *args])
    assert result.exit_code == 2
    assert "both with --data and with --held-out" in result.stderr


def test_a_missing_config_is_one_line_on_stderr(tmp_path: Path) -> None:
    args = ["--config", str(tmp_path / "none.toml"), "--data", str(tmp_path), "-o", str(tmp_path / "x")]
    result = CliRunner().invoke(train, ["restore", *args])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "none.toml" in result.stderr


def test_help_loads_no_torch() -> None:
    code = "import sys, diffiqa.training.cli; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
