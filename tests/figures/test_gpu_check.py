"""`scripts/gpu-check` without a GPU: all of its code runs, what goes wrong is told and loses itself only, the page."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffiqa import cli
from diffiqa.figures.gpu.check import STEPS
from diffiqa.figures.gpu.page import FILE, NEVER, gpu, gpu_speed
from diffiqa.kernels.compile import KernelError, nvrtc_version

from ..kernels.devices import Missing, build_host

ROOT = Path(cli.__file__).parent
SCRIPT = ROOT / "scripts" / "gpu-check"
CARD = {"name": "NVIDIA H100", "driver_version": "580", "compute_cap": "9.0", "memory.total": "80 GiB"}


def call(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def dry(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a dry run of all steps writes."""
    out = tmp_path_factory.mktemp("dry")
    (out / "mini").symlink_to(tiny_engine)  # as --pack makes it
    try:
        nvrtc_version()
        build_host(out)
    except (KernelError, Missing) as reason:
        pytest.skip(str(reason))
    names = [step.name for step in STEPS]
    halves = [names[::2], names[1::2]]  # at once: a step has one thread
    runs = [
        subprocess.Popen(
            [sys.executable, SCRIPT, "--dry-run", "--steps", ",".join(half), "--out", out / half[0], "--packed", out],
            stdout=subprocess.PIPE,
            text=True,
        )
        for half in halves
    ]
    said = [run.communicate()[0] for run in runs]
    logs = [(out / half[0] / "gpu-check.log").read_text()[-5000:] for half in halves]
    assert [run.returncode for run in runs] == [0, 0], "".join([*said, *logs])
    found, other = (json.loads((out / half[0] / "gpu-check.json").read_text()) for half in halves)
    steps: dict[str, Any] = found["steps"] | other["steps"]
    return {**found, "steps": {name: steps[name] for name in names}}


@pytest.mark.minutes
def test_a_dry_run_runs_every_step_and_claims_no_more_than_it_shows(dry: dict[str, Any]) -> None:
    shown = {"kernels", "layer", "executor", "pfd"}
    wanted = {step.name: "ok" if step.name in shown else "not shown here" for step in STEPS}
    assert {name: step["status"] for name, step in dry["steps"].items()} == wanted
    assert all(step["figures"] for step in dry["steps"].values())
    checks = [check for step in dry["steps"].values() for check in step["checks"].values()]
    assert len(checks) > 20
    assert all(check["ok"] for check in checks)


# ------------------------------------------------------------------------------------------------ what goes wrong


def faulty(out: Path, *limit: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen([sys.executable, "-m", "diffiqa.tests.figures.faulty_steps", str(out), *limit])


def steps_in(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "gpu-check.json").read_text())["steps"]
    return found


def soon(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_gone(child: Path) -> bool:
    status = Path(f"/proc/{child.read_text()}/stat")
    return not status.exists() or status.read_text().split()[2] == "Z"


def test_a_step_that_goes_wrong_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    assert faulty(tmp_path).wait() == 1
    steps = steps_in(tmp_path)
    statuses = {"wrong": "wrong", "fails": "failed", "crashes": "crashed", "hangs": "timed out", "is_fine": "ok"}
    assert {name: step["status"] for name, step in steps.items()} == statuses
    assert all(step["figures"] == {"found": 1} for name, step in steps.items() if name != "is_fine")
    assert steps["wrong"]["checks"]["one figure less"]["found"].startswith("ZeroDivisionError")
    assert not steps["wrong"]["checks"]["bits of a graph"]["ok"]
    assert steps["fails"]["output"][-1] == "RuntimeError: on purpose"
    assert steps["crashes"]["exit_code"] == -signal.SIGSEGV
    soon(lambda: is_gone(tmp_path / "child"))


def test_what_no_longer_fits_is_left_out(tmp_path: Path) -> None:
    assert faulty(tmp_path, "3").wait() == 0
    assert {step["status"] for step in steps_in(tmp_path).values()} == {"left out"}


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_cut_off_leaves_a_whole_file_that_says_where(tmp_path: Path, by: signal.Signals) -> None:
    with faulty(tmp_path) as run:
        soon((tmp_path / "child").exists)
        os.kill(run.pid, by)
        assert run.wait() != 0
    status = {name: step["status"] for name, step in steps_in(tmp_path).items()}
    assert status == {
        "wrong": "wrong",
        "fails": "failed",
        "crashes": "crashed",
        "hangs": "running",
        "is_fine": "not begun",
    }
    if by is signal.SIGKILL:  # nobody was left to end what the step had started
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    soon(lambda: is_gone(tmp_path / "child"))


def test_a_step_that_does_not_exist_is_refused() -> None:
    done = call("--steps", "facts,magic", "--dry-run")
    assert done.returncode == 1
    assert done.stderr.strip() == "error: there is no step magic; --list names them all"


# ------------------------------------------------------------------------------------------------ the page


def test_without_a_card_the_page_says_so_once_and_how_to_make_it(tmp_path: Path) -> None:
    assert gpu(tmp_path) == NEVER
    assert "Not measured" in gpu_speed(tmp_path)


@pytest.mark.minutes
def test_the_page_has_a_section_for_everything_that_was_found(dry: dict[str, Any], tmp_path: Path) -> None:
    machine = dry["machine"] | {"card": CARD}
    (tmp_path / FILE).write_text(json.dumps(dry | {"dry": False, "device": "cuda", "machine": machine}))
    page = gpu(tmp_path)
    titles = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert titles == ["The card", "What ran", "One step of the U-Net", *map(str.capitalize, dry["steps"])]
    assert "NVIDIA H100, driver_version 580" in page
    assert all(f"| `{step.name}` | {step.shows} |" in page for step in STEPS)
    assert page.count("| torch.compile (max-autotune-no-cudagraphs), CUDA graph, fp16, one crop |") == 1
    assert "has not run" not in page
    assert "8 images at a time" in gpu_speed(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"dry": true, "device": "cpu", "steps": {}}'], ids=["empty", "other", "dry"]
)
def test_a_file_that_says_nothing_of_a_card_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    done = call("--report", file)
    assert done.returncode == 1
    assert str(file) in done.stderr
    assert "Traceback" not in done.stderr
