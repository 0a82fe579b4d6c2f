"""The commands: they read well, start fast, and end every error with one line and the right exit code."""

import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from diffiqa import cli
from diffiqa.engine.manifest import StageName, read_manifest
from diffiqa.model.bundle import save_bundle
from diffiqa.model.network import DiffV2IQA

from .tiny import STAGES

COMMANDS = (
    *("export", "build", "calibrate", "quantise", "verify", "run", "status", "convert", "prompts", "serve", "bench"),
)


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, [str(a) for a in arguments])


def failed(result: Result, *says: str) -> bool:
    """Whether a command ended with exit code 2 and one line that says all this."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.exit_code == 2, result.output
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    return all(word in lines[0] for word in says)


@pytest.fixture(scope="module")
def bundle(tiny_model: DiffV2IQA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_bundle(tiny_model, path)
    return path


def test_every_command_is_in_the_group_and_installed_under_its_own_name() -> None:
    project = tomllib.loads((Path(cli.__file__).parent / "pyproject.toml").read_text())
    assert set(cli.main.commands) == {*COMMANDS, "train", "eval"}
    homes = {
        "diffiqa.calibration.cli": ["calibrate", "quantise"],
        "diffiqa.export.cli": ["build", "convert", "prompts"],
        "diffiqa.shards.cli": ["run", "status"],
        "diffiqa.cli": ["export"],
        **{f"diffiqa.{name}.cli": [name] for name in ("bench", "serve", "verify")},
        "diffiqa.training.cli": ["train"],
    }
    scripts = {f"iqa-{name}": f"{home}:{name}" for home, names in homes.items() for name in names}
    assert {name.removeprefix("iqa-") for name in scripts} == {*COMMANDS, "train"}
    scripts["iqa-eval"] = "diffiqa.evaluation.cli:evaluate"  # Python has taken the name
    assert project["project"]["scripts"] == {"iqa": "diffiqa.cli:main", **scripts}
    assert all(getattr(cli, name) is cli.main.commands[name] for name in COMMANDS)


def test_help_gives_examples_and_exit_codes() -> None:
    for command in COMMANDS:
        text = call(command, "--help").stdout
        assert f"iqa-{command}" in text
        assert "Exit codes: 0" in text
        assert "--debug" in text


def test_commands_under_their_own_names_take_h_as_iqa_does() -> None:
    for command in (*COMMANDS, "train"):
        assert CliRunner().invoke(getattr(cli, command), ["-h"]).stdout.startswith("Usage:")


def test_help_does_not_wait_for_heavy_imports() -> None:
    code = (
        "import sys; from diffiqa.cli import main\n"
        f"for arguments in ([], *([name, '--help'] for name in {(*COMMANDS, 'eval')!r})):\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "    print('HEAVY', arguments, sorted({'torch', 'onnx', 'onnxruntime', 'PIL', 'rich'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    heavy = [line for line in out.splitlines() if line.startswith("HEAVY")]
    assert len(heavy) == len(COMMANDS) + 2
    assert [line for line in heavy if not line.endswith(" []")] == []


@pytest.mark.usefixtures("ready_graphs")
def test_export_writes_an_engine_that_opens_and_a_table(bundle: Path, tmp_path: Path) -> None:
    result = call("export", "--ckpt", bundle, "-o", tmp_path / "engine", "--stage", "vda", "--stage", "vit")
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "engine")
    assert [stage.name for stage in manifest.stages] == [StageName.VIT, StageName.VDA]
    assert manifest.provenance.sources[0].name == "tiny.safetensors"
    assert manifest.engine_id in result.stdout
    assert "max error" in result.stdout


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(bundle: Path, tmp_path: Path) -> None:
    result = call("export", "--ckpt", bundle, "-o", tmp_path / "engine", "--dry-run")
    assert result.exit_code == 0
    assert all(f"onnx/{name}.onnx" in result.stdout for name in STAGES)
    assert "nothing was written" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_what_was_read_assumed_and_given_is_listed(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text("score-range = [1, 5]\nsteps = 8\n")
    weights = call("convert", "--ckpt", bundle, "-o", tmp_path / "m.pt", "--swin-scale", "0.13")
    assert "given    swin-scale 0.13\n" in weights.stdout
    result = call("export", "--ckpt", tmp_path / "m.pt", "--steps", "7", "-o", tmp_path / "engine", "--dry-run")
    read, given, *_ = result.stdout.splitlines()
    assert read.startswith("read     model tiny; swin-scale 0.13; branch-weights 0.5,1.5; taps 1,3;")
    assert given == "given    steps 7; score-range 1,5 (m.toml)"
    assert "note: given: swin-scale 0.13" in result.stderr
    assert "note: given: score-range 1,5, steps 7" in result.stderr
    unset = call(
        "export", "--preset", "mini", "--seed", "0", "-o", tmp_path / "engine", "--dry-run"
    ).stdout.splitlines()
    assert unset[0] == "given    model mini"
    assert unset[1].startswith("assumed  swin-scale 0.8; branch-weights 1,1; steps 50; taps 5,10;")


def test_wrong_options_end_an_export_before_it_begins(bundle: Path, tmp_path: Path) -> None:
    def refused(*options: str, why: str) -> None:
        assert failed(call("export", "--ckpt", bundle, *options, "-o", tmp_path / "engine"), why)

    refused("--taps", "5", why="taps must be T1,T2, not '5'")
    refused("--norm-groups", "8", why="model 'tiny' has no use for norm-groups")
    refused("--options", str(tmp_path / "none.toml"), why="none.toml: No such file")
    (tmp_path / "o.toml").write_text("swin_scale = 1")
    refused("--options", str(tmp_path / "o.toml"), why="there is no option 'swin_scale'; the nearest is swin-scale")


def test_convert_makes_a_bundle_that_exports_to_the_same_model(bundle: Path, tmp_path: Path) -> None:
    result = call("convert", "--ckpt", bundle, "-o", tmp_path / "again.pt")
    assert result.exit_code == 0, result.output
    assert "tiny" in result.stdout
    assert failed(call("convert", "--ckpt", bundle, "-o", tmp_path / "again.pt"), "exists", "--force")


def test_export_errors_name_the_file_and_the_way_out(bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    short = tmp_path / "short.safetensors"
    short.write_bytes(bundle.read_bytes()[:-100])
    assert failed(call("export", "-o", out), "--ckpt FILE")
    assert failed(call("export", "--ckpt", tmp_path / "none.pt", "-o", out), "none.pt")
    assert failed(call("export", "--ckpt", text, "-o", out), "notes.txt")
    assert failed(call("export", "--ckpt", short, "-o", out), "short.safetensors")
    assert failed(call("export", "--ckpt", bundle, "--preset", "huge", "-o", out), "no preset 'huge'", "mini")
    assert failed(call("export", "--ckpt", bundle, "-o", tmp_path / "a" / "b"), "make it first")
    assert failed(call("export", "--ckpt", bundle, "-o", text), "is not a directory")
    assert not out.exists()


def test_a_wrong_preset_names_tensors_and_the_preset_that_would_fit(tmp_path: Path) -> None:
    made = call("convert", "--preset", "mini", "--seed", "0", "-o", tmp_path / "mini.safetensors", "-q")
    assert made.exit_code == 0, made.output
    result = call("export", "--ckpt", tmp_path / "mini.safetensors", "--preset", "paper", "-o", tmp_path / "engine")
    assert result.exit_code == 2
    assert "unet.downs.0.weight" in result.stderr
    assert "mini" in result.stderr


def test_debug_shows_the_traceback_and_keeps_the_exit_code(tmp_path: Path) -> None:
    result = call("export", "--ckpt", tmp_path / "none.pt", "-o", tmp_path / "engine", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_an_interrupted_export_leaves_the_old_engine_and_exits_with_2(tiny_engine: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    before = read_manifest(target)
    options = ["--preset", "mini", "--seed", "0", "--stage", "vda", "-o", str(target), "--force"]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffiqa.cli", "export", *options], stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob(".engine.partial/*")) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in stderr
    assert [p.name for p in tmp_path.iterdir()] == ["engine"]
    assert read_manifest(target) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_inside_executed_text_gives_the_same_exit_code(tmp_path: Path, number: signal.Signals) -> None:
    """Imports execute text; CPython ends a module (`-m`) whose KeyboardInterrupt passed through one by SIGINT."""
    code = (
        "import click, os, signal\n"
        "from diffiqa.command import Command\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "@click.command(cls=Command)\n"
        f"def wait(): exec('import time; os.kill(os.getpid(), {int(number)}); time.sleep(20)')\n"
        "wait()"
    )
    (tmp_path / "waiting.py").write_text(code)
    done = subprocess.run([sys.executable, "-m", "waiting"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "error: interrupted\n")


@pytest.mark.parametrize(
    ("package", "command", "extra"),
    [
        ("torch", ["export", "--preset", "mini", "-o", "engine"], "export"),
        ("onnx", ["export", "--preset", "mini", "-o", "engine"], "export"),
        ("ml_dtypes", ["quantise", "--engine", "engine", "--calib", "a.png", "-o", "int8"], "calibration"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_extra_that_brings_it(
    tmp_path: Path, package: str, command: list[str], extra: str
) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from diffiqa.cli import main; main(sys.argv[1:])"
    run = subprocess.run(
        [sys.executable, "-c", code, *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 2
    assert f"{package} is not installed; install what this command needs: pip install 'diffiqa[{extra}]'" in run.stderr
    assert run.stderr.count("\n") == 1
