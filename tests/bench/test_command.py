"""`iqa-bench` from the outside: its report, its files, bad input, and Ctrl-C."""

import dataclasses
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from diffiqa.bench import report
from diffiqa.bench.ceilings import host_product, matmul_model
from diffiqa.bench.results import read
from diffiqa.cli import main
from diffiqa.engine.manifest import MANIFEST, read_manifest
from diffiqa.engine.monotone import Monotone
from diffiqa.engine.sampling import Fast, Sampling


def call(engine: Path | str, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["bench", "--engine", str(engine), *map(str, arguments)])


@pytest.fixture(scope="module")
def finished(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    files = folder / "bench.json", folder / "bench.html"
    sweep = ("--size", "48x40,64x64", "--crops", "1,2", "--steps", "6", "--rounds", "2", "--starts", "1", "--soak", "4")
    result = call(tiny_engine, *sweep, "--peer", "torch eager", "--json", files[0], "--html", files[1], "-q")
    return result, *files


def test_every_combination_is_a_case_with_all_its_tables(finished: tuple[Result, Path, Path]) -> None:
    result, file, _ = finished
    assert result.exit_code in {0, 1}, result.output  # whether this machine is quiet is not tested
    results = read(file)
    assert [(c.width, c.height, c.crops) for c in results.cases] == [(48, 40, 1), (48, 40, 2), (64, 64, 1), (64, 64, 2)]
    assert all(len(case.end_to_end) == 2 and len(case.compute) == 4 for case in results.measured)
    for name, make in report.TABLES.items():
        assert bool(make(results)) == (name != "GPU"), name
        assert make(results) in result.stdout
    assert "**Verdict**" in result.stdout
    assert any("GPU" in figure for figure in results.not_measured)
    assert results.engine.id in result.stdout
    assert results.overhead is not None
    assert results.overhead < 0.005


def test_the_peer_that_lacks_weights_is_skipped_and_ours_is_measured(finished: tuple[Result, Path, Path]) -> None:
    ours, torch = read(finished[1]).peers
    assert ours.problem is None
    assert torch.skipped
    assert "skipped: PyTorch needs the weights" in finished[0].stdout


def test_the_json_file_holds_raw_samples_and_a_digest_and_reads_back(finished: tuple[Result, Path, Path]) -> None:
    data = json.loads(finished[1].read_text())
    assert data["summary"]["cases"][0]["stages"]["unet"]["ms"]["count"] == 4
    assert data["cases"][0]["step_seconds"][0][0] > 0
    assert data["starts"][0]["first_score"] > 0
    assert len(data["soak"]["seconds"]) == 4
    assert data["engine"]["stages"].keys() == {"unet", "vit", "vcg", "vda"}


def test_the_page_stands_alone_and_draws_what_was_measured(finished: tuple[Result, Path, Path]) -> None:
    page = finished[2].read_text(encoding="utf-8")
    assert page.count("<figure") == 4
    assert page.count("<rect") == 4 + 5  # a rate for each case, and what a start is made of
    assert page.count("<circle") == 4  # the stages under the roof
    assert "http" not in page.split("<body>")[1]
    assert "Roofline" in page
    assert page.count("<table") == len(report.TABLES) - 1  # all but that of a GPU


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--engine", "nowhere"], "does not exist; make an engine directory"),
        (["--engine", "ENGINE", "EMPTY"], "no image can be measured"),
        (["--engine", "ENGINE", "missing.png"], "missing.png"),
        (["--engine", "ENGINE", "x.png", "--size", "64x64"], "sizes and count are of generated images"),
        (["--engine", "ENGINE", "--size", "16x16"], "smaller than a crop"),
        (["--engine", "ENGINE", "--size", "64"], "is not WIDTHxHEIGHT"),
        (["--engine", "ENGINE", "--crops", "1,x"], "is not whole numbers"),
        (["--engine", "ENGINE", "--steps", "2"], "2 of 6 steps cannot hold the noise levels"),
        (["--engine", "ENGINE", "--fast"], "no fast sampling yet; make one with: iqa-calibrate"),
        (["--engine", "ENGINE", "--fast", "--steps", "4"], "fast has steps of its own"),
        (["--engine", "ENGINE", "--fast", "--peer", "openvino"], "which no peer takes"),
        (["--engine", "ENGINE", "--peer", "magic"], "there is no peer 'magic'; choose from"),
        (["--engine", "ENGINE", "--ckpt", "none.pt"], "none.pt is not a file"),
        (["--engine", "ENGINE", "--cpu-precision", "bf16"], "--cpu-precision is an option of the backend openvino"),
        (
            ["--engine", "ENGINE", "--backend", "openvino", "--cpu-precision", "bf16", "--peer", "openvino"],
            "peers are compared with float32 scores",
        ),
        (["--engine", "ENGINE", "--json", "no/such/folder/a.json"], "create it first"),
        (
            ["--engine", "ENGINE", "--device", "0"],
            "--device is an option of the backends tensorrt, inductor-gpu and onnxruntime-gpu, not of onnxruntime",
        ),
        (
            ["--engine", "ENGINE", "--no-cuda-graph"],
            "--no-cuda-graph is an option of the backends tensorrt, inductor-gpu and",
        ),
        (["--engine", "ENGINE", "--batch", "1,4"], "onnxruntime scores crops one at a time"),
        (
            ["--engine", "ENGINE", "--backend", "tensorrt", "--threads", "2"],
            "--threads is an option of the backends onnxruntime, openvino and inductor",
        ),
        (["--engine", "ENGINE", "--backend", "openvino", "--spin"], "--spin is an option of the backend onnxruntime"),
    ],
)
def test_what_cannot_be_measured_is_exit_code_2_and_one_line(
    tiny_engine: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    named = {"ENGINE": str(tiny_engine), "EMPTY": str(tmp_path)}
    result = CliRunner().invoke(main, ["bench", *(named.get(a, a) for a in arguments)])
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="openvino is not installed")
def test_openvino_can_be_what_is_measured_and_the_record_says_so(tiny_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ("--size", "40x40", "--crops", "1", "--rounds", "1", "--starts", "1", "--json", file)
    result = call(tiny_engine, "--backend", "openvino", *options, "--peer", "openvino")
    assert result.exit_code in {0, 1}, result.output
    results = read(file)
    assert results.engine.backend.startswith("openvino ")
    assert results.engine.backend.endswith(": CPU, fp32")
    assert results.starts[0].first_score > 0
    ours, peer = results.peers
    assert ours.version == peer.version == results.engine.backend.partition(":")[0]
    assert peer.cases[0].drift == 0  # it is the same backend


def test_the_fast_sampling_is_a_case_beside_all_steps(tiny_engine: Path, tmp_path: Path) -> None:
    engine, file = Path(shutil.copytree(tiny_engine, tmp_path / "engine")), tmp_path / "bench.json"
    fast = Fast(Sampling((0, 2, 5)), Monotone((0.0,), (0.1,), slope_beyond=1), 40)
    (engine / MANIFEST).write_text(dataclasses.replace(read_manifest(engine), fast=fast).to_json())
    options = ("--size", "40x40", "--crops", "1", "--rounds", "1", "--starts", "0", "--json", file)
    assert call(engine, "--fast", *options).exit_code in {0, 1}
    own, quick = read(file).cases
    assert (own.steps, quick.steps) == (6, 3)
    assert (len(own.step_seconds), len(quick.step_seconds)) == (6, 3)
    assert quick.work["unet"].gflop == pytest.approx(own.work["unet"].gflop / 2)


def test_a_bad_image_is_left_out_and_said(tiny_engine: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 40)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    result = call(tiny_engine, tmp_path, "--rounds", "1", "--starts", "0", "--crops", "1")
    assert result.exit_code == 1
    assert "left out: " in result.stdout
    assert "bad.png" in result.stdout
    assert "| 40×40 |" in result.stdout


def test_spinning_reaches_the_benchmark_its_fresh_processes_and_its_record(tiny_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ("--size", "40x40", "--crops", "1", "--rounds", "1", "--starts", "1", "--json", file)
    result = call(tiny_engine, "--spin", *options)
    assert result.exit_code in {0, 1}, result.output
    results = read(file)
    assert results.engine.backend.endswith(", idle threads wait busily")
    assert len(results.starts) == 1
    assert results.starts[0].second_score is None


def test_ctrl_c_writes_what_was_measured(tiny_engine: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    options = ["--size", "40x40", "--crops", "1", "--rounds", "100000", "--starts", "0", "--json", str(file)]
    command = [sys.executable, "-m", "diffiqa.cli", "bench", "--engine", str(tiny_engine), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if line.startswith("round 4 "):
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "error: interrupted"
    assert "The benchmark was interrupted" in stdout
    results = read(file)
    assert results.interrupted
    assert len(results.cases[0].end_to_end) >= 3


def test_the_matrix_product_that_is_probed_is_one() -> None:
    model = onnx.load_from_string(matmul_model(300))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["MatMul"]
    a, b = np.random.default_rng(0).standard_normal((2, 64, 64), np.float32)
    np.testing.assert_allclose(host_product(1, 64)(), a @ b, atol=1e-4)
