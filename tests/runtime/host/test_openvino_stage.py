"""OpenVINO scores as ONNX Runtime does, bit for bit the same each time; what is asked for runs or is refused."""

import concurrent.futures
import importlib.util
import json
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from diffiqa import Failure, Mode, Options, Score, Scorer, UsageError
from diffiqa.calibration.quantise import Recipe, quantise_engine
from diffiqa.calibration.statistics import collect
from diffiqa.cli import main
from diffiqa.engine.manifest import EngineDirectory, StageName, open_engine
from diffiqa.errors import BackendError, EngineError
from diffiqa.runtime.host import openvino_stage as backend
from diffiqa.runtime.host.onnx_stage import OnnxRuntime, OnnxStage
from diffiqa.runtime.host.openvino_stage import OpenVino, OpenVinoStage, _openvino, _reason
from diffiqa.runtime.host.stages import load_stages
from diffiqa.runtime.scorer import load

from ...tiny import STAGES, photo

FloatArray = npt.NDArray[np.float32]
installed = importlib.util.find_spec("openvino") is not None
needs_openvino = pytest.mark.skipif(not installed, reason="openvino is not installed")
needs_bf16 = pytest.mark.skipif(
    not installed or "BF16" not in backend._capabilities(), reason="OpenVINO has no bf16 on this CPU"
)
SIZES = {"B": 2, "N": 3, "H": 24, "W": 40}
FP32 = 1e-5  # of the largest value: sums of some hundred float32 products, in another order
BF16 = 0.1  # of the largest value: bf16 keeps 8 bits, so a rounding is up to 1/512, and a stage has dozens in a row


@pytest.fixture(scope="module")
def directory(tiny_engine: Path) -> EngineDirectory:
    return open_engine(tiny_engine)


@pytest.fixture(scope="module")
def on_openvino(tiny_engine: Path) -> Scorer:
    return load(tiny_engine, OpenVino(threads=2))


def arrays(directory: EngineDirectory, name: StageName, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return random inputs of a stage, and outputs full of NaN."""
    stage, generator = directory.manifest.stage(name), np.random.default_rng(seed)
    assert stage is not None
    inputs, outputs = (
        {s.name: tuple(SIZES[d] if isinstance(d, str) else d for d in s.shape) for s in specs}
        for specs in (stage.inputs, stage.outputs)
    )
    return (
        {key: generator.random(shape, np.float32) for key, shape in inputs.items()},
        {key: np.full(shape, np.nan, np.float32) for key, shape in outputs.items()},
    )


def unet(height: int, width: int) -> tuple[dict[str, FloatArray], dict[str, FloatArray]]:
    """Return inputs and outputs of the U-Net for one image of a size."""
    image = np.random.default_rng(height).random((1, 3, height, width), np.float32)
    return {"y": image, "condition": image[:, ::-1].copy(), "noise_level": np.full((1, 1), 0.5, np.float32)}, {
        "noise": np.full((1, 3, height, width), np.nan, np.float32)
    }


def stage_of(directory: EngineDirectory, name: StageName = StageName.UNET, **how: Any) -> OpenVinoStage:
    stage = directory.manifest.stage(name)
    assert stage is not None
    return OpenVinoStage(directory.file(stage.file), OpenVino(**{"threads": 2, **how}))


def error(directory: EngineDirectory, name: StageName, seed: int, **how: Any) -> float:
    """Return the largest difference from ONNX Runtime in any output, as a share of its largest value."""
    stage = directory.manifest.stage(name)
    assert stage is not None
    inputs, found = arrays(directory, name, seed)
    _, wanted = arrays(directory, name, seed)
    stage_of(directory, name, **how).bind(inputs, found)()
    OnnxStage(directory.file(stage.file), OnnxRuntime(threads=1)).bind(inputs, wanted)()
    return max(float(np.abs(found[key] - wanted[key]).max() / np.abs(wanted[key]).max()) for key in wanted)


def bits(result: Score | Failure) -> tuple[Any, ...]:
    assert isinstance(result, Score)
    return result.score, result.vcg, result.vda, result.crops


# ---------------------------------------------------------------------------------------- the same as ONNX Runtime


@needs_openvino
@pytest.mark.parametrize("name", STAGES)
def test_every_stage_agrees_with_onnxruntime(directory: EngineDirectory, name: StageName) -> None:
    assert error(directory, name, 1) < FP32


@needs_bf16
@pytest.mark.parametrize("name", STAGES)
def test_bf16_is_near_and_is_not_float32(directory: EngineDirectory, name: StageName) -> None:
    assert FP32 < error(directory, name, 1, precision="bf16") < BF16


@needs_bf16
def test_the_heads_stay_in_float32(directory: EngineDirectory) -> None:
    reduced, full = (load_stages(directory, OpenVino(2, precision)) for precision in ("bf16", "fp32"))
    for name in STAGES:
        inputs, found = arrays(directory, name)
        _, wanted = arrays(directory, name)
        reduced[name].bind(inputs, found)()
        full[name].bind(inputs, wanted)()
        same = all(np.array_equal(found[key], wanted[key]) for key in wanted)
        assert same == (name is not StageName.UNET)


@needs_openvino
@pytest.mark.parametrize("mode", list(Mode))
def test_scores_agree_with_onnxruntime_whatever_the_size(scorer: Scorer, on_openvino: Scorer, mode: Mode) -> None:
    for shape in ((32, 32), (33, 70), (32, 32)):
        picture, options = photo(shape[1], *shape), Options(crops=2, mode=mode)
        # The loop feeds back, step after step, what one rounds.
        found, wanted = (one.score(picture, options).score for one in (on_openvino, scorer))
        assert found == pytest.approx(wanted, abs=1e-5)


@needs_openvino
def test_an_8_bit_engine_runs(tiny_engine: Path, tmp_path: Path) -> None:
    images = [tmp_path / f"{seed}.png" for seed in range(3)]
    for seed, path in enumerate(images):
        Image.fromarray(photo(seed, 32, 48)).save(path)
    collect(tiny_engine, images, tmp_path / "statistics", minimum=3)
    quantise_engine(tiny_engine, tmp_path / "int8", tmp_path / "statistics", Recipe())
    picture = photo(11, 40, 48)
    with load(tmp_path / "int8", OpenVino()) as ours, load(tmp_path / "int8") as theirs:
        # Where 8-bit values are rounded, the two differ in a last bit now and then: as far as 8 bits are from float32.
        assert ours.score(picture).score == pytest.approx(theirs.score(picture).score, rel=0.02)


# ------------------------------------------------------------------------------------------------- the same each time


@needs_openvino
def test_a_score_depends_on_nothing_but_the_image(tiny_engine: Path, on_openvino: Scorer) -> None:
    pictures = [photo(i, *shape) for i, shape in enumerate([(32, 32), (33, 70), (32, 32)])]
    alone = [bits(on_openvino.score(picture)) for picture in pictures]
    for workers in (1, 3):
        assert [bits(r) for r in on_openvino.stream(pictures, workers=workers)] == alone
    with load(tiny_engine, OpenVino(threads=2, shapes=1)) as forgetful:
        assert [bits(r) for r in forgetful.stream([*pictures, *pictures], workers=2)] == [*alone, *alone]


@needs_bf16
def test_bf16_scores_are_the_same_each_time_too(tiny_engine: Path) -> None:
    pictures = [photo(i, 32, 32 + 8 * i) for i in range(2)]
    with load(tiny_engine, OpenVino(precision="bf16")) as first:
        alone = [bits(first.score(picture)) for picture in pictures]
    with load(tiny_engine, OpenVino(precision="bf16")) as again:
        assert [bits(r) for r in again.stream([*pictures, *pictures], workers=2)] == [*alone, *alone]


@needs_openvino
def test_threads_may_bind_and_call_at_once_and_compile_a_shape_once(directory: EngineDirectory) -> None:
    stage, start = stage_of(directory), threading.Barrier(4)

    def one(height: int) -> bytes:
        inputs, outputs = unet(height, 32)
        start.wait()
        call = stage.bind(inputs, outputs)
        for _ in range(3):
            call()
        return outputs["noise"].tobytes()

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(one, [32, 40, 32, 40]))
    assert found[:2] == found[2:]
    assert found[0] != found[1]
    assert len(stage._compiled) == 2


@needs_openvino
def test_many_sizes_keep_few_compiled_forms_and_those_in_use_go_on_working(directory: EngineDirectory) -> None:
    stage = stage_of(directory, shapes=2)
    inputs, outputs = unet(32, 32)
    call = stage.bind(inputs, outputs)
    call()
    first = outputs["noise"].copy()
    for width in (40, 48, 56, 64):
        stage.bind(*unet(32, width))()
        assert len(stage._compiled) <= 2
    outputs["noise"][:] = np.nan
    call()
    np.testing.assert_array_equal(outputs["noise"], first)


@needs_openvino
def test_the_form_that_was_not_used_for_longest_goes_first(directory: EngineDirectory) -> None:
    stage = stage_of(directory, shapes=2)
    stage.bind(*unet(32, 32))
    [(shapes, form)] = stage._compiled.items()
    for width in (40, 32, 48):  # the third needs a place, and 40 was used before 32
        stage.bind(*unet(32, width))
    assert stage._compiled.get(shapes) is form


@needs_openvino
def test_a_call_reads_what_its_arrays_hold_by_then(directory: EngineDirectory) -> None:
    stage = stage_of(directory)
    inputs, outputs = unet(32, 32)
    call = stage.bind(inputs, outputs)
    call()
    before = outputs["noise"].copy()
    inputs["noise_level"][:] = 0.9
    call()
    assert not np.array_equal(outputs["noise"], before)


# -------------------------------------------------------------------------------------------------------- bad input


@needs_openvino
def test_arrays_that_do_not_fit_are_refused_with_the_stage_and_the_reason(directory: EngineDirectory) -> None:
    stage = stage_of(directory)
    inputs, outputs = unet(32, 32)
    with pytest.raises(BackendError, match=r"cannot run unet\.onnx .*incompatible"):
        stage.bind(inputs, unet(32, 48)[1])
    with pytest.raises(BackendError, match=r"cannot run unet\.onnx on .*33"):
        stage.bind(unet(33, 32)[0], outputs)
    with pytest.raises(ValueError, match="y must be a C-contiguous float32 array"):
        stage.bind({**inputs, "y": inputs["y"].astype(np.float64)}, outputs)
    stage.bind(inputs, outputs)()  # none of this has done it any harm


def test_the_reason_of_an_error_is_its_last_line_or_its_type() -> None:
    assert _reason(RuntimeError("Exception from src/x.cpp:1:\n  no memory \n\n")) == "no memory"
    assert _reason(RuntimeError(" \n")) == "RuntimeError"


@needs_openvino
def test_files_that_are_not_the_stage_are_refused(directory: EngineDirectory, tmp_path: Path) -> None:
    (tmp_path / "unet.onnx").write_bytes(b"")
    with pytest.raises(BackendError, match=r"openvino cannot load .*unet\.onnx: .*read the model"):
        OpenVinoStage(tmp_path / "unet.onnx", OpenVino())

    class Swapped(EngineDirectory):
        def file(self, _file: object) -> Path:
            stage = self.manifest.stage(StageName.VDA)
            assert stage is not None
            return super().file(stage.file)

    with pytest.raises(EngineError, match="is not the unet stage that the manifest describes"):
        load_stages(Swapped(directory.path, directory.manifest), OpenVino())


def test_the_command_that_installs_it_is_given(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"not installed; install it with: pip install 'diffiqa\[openvino\]'"):
        load(tiny_engine, OpenVino())


def test_a_cpu_without_bf16_is_said_and_nothing_else_runs(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_capabilities", lambda: ["FP32", "INT8"])
    with pytest.raises(BackendError, match=r"this CPU has no bfloat16 .*; ask for precision fp32"):
        load(tiny_engine, OpenVino(precision="bf16"))


def test_bf16_is_refused_where_no_stage_would_use_it(pfd_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_capabilities", lambda: ["FP32", "BF16"])
    with pytest.raises(BackendError, match="only a U-Net is computed in bf16, and this engine has none"):
        load(pfd_engine, OpenVino(precision="bf16"))


@pytest.mark.parametrize("settings", [{"threads": 0}, {"threads": "2"}, {"precision": "fp16"}, {"shapes": 0}])
def test_settings_openvino_would_misread_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(settings))} must be "):
        OpenVino(**settings)


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture
def image(tmp_path: Path) -> Path:
    Image.fromarray(photo(1, 40, 50)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def call(engine: Path, *arguments: str | Path) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, ["run", "--engine", str(engine), *map(str, arguments)])


@needs_bf16
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_command_says_what_ran(tiny_engine: Path, image: Path, precision: str) -> None:
    options = ("--cpu-precision", precision, "--threads", "1", "--workers", "2", "--format", "jsonl")
    result = call(tiny_engine, image, "--backend", "openvino", *options)
    assert result.exit_code == 0, result.output
    name = json.loads(result.stdout)["backend"]
    assert name.startswith("openvino 20")
    assert name.endswith(": CPU, fp32" if precision == "fp32" else ": CPU, U-Net in bf16")
    assert f"backend: {name}\n" in result.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--cpu-precision", "bf16"], "an option of the backend openvino, not of auto"),
        (["--backend", "onnxruntime", "--cpu-precision", "fp32"], "not of onnxruntime"),
        (
            ["--backend", "openvino", "--provider", "CPUExecutionProvider"],
            "--provider is an option of the backends onnxruntime-gpu",
        ),
        (["--backend", "openvino", "--cpu-precision", "fp16"], "'fp16' is not one of"),
    ],
)
def test_the_command_refuses_what_does_not_belong_together(
    tiny_engine: Path, image: Path, options: list[str], says: str
) -> None:
    refused = call(tiny_engine, image, *options)
    assert refused.exit_code == 2
    assert says in refused.stderr
    assert "Traceback" not in refused.stderr


def fresh(code: str, *arguments: str | Path) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_auto_never_takes_it_and_does_not_even_import_it(tiny_engine: Path) -> None:
    code = (
        "import sys, diffiqa\n"
        "scorer = diffiqa.load(sys.argv[1])\n"
        "print(scorer.info.backend.split()[0], 'openvino' in sys.modules)"
    )
    assert fresh(code, tiny_engine) == "onnxruntime False"


@needs_openvino
def test_nobody_is_told_that_it_runs(tiny_engine: Path) -> None:
    code = (
        "import sys, diffiqa\n"
        "diffiqa.load(sys.argv[1], diffiqa.OpenVino())\n"
        "told = {name for name in sys.modules if name.partition('.')[0] == 'openvino_telemetry'}\n"
        "from openvino import convert_model\n"  # and those who convert models in the same process still can
        "print(told)"
    )
    assert fresh(code, tiny_engine) == "set()"


@pytest.mark.parametrize(
    "before", ["absent", None, ModuleType("openvino_telemetry")], ids=["absent", "forbidden", "here"]
)
def test_what_others_know_of_the_telemetry_is_as_before_the_import(
    before: str | ModuleType | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "openvino.py").write_text("import sys\nseen = sys.modules.get('openvino_telemetry', 'absent')\n")
    monkeypatch.syspath_prepend(tmp_path)
    loaded: dict[str, Any] = sys.modules
    for name, known in (("openvino", "absent"), ("openvino_telemetry", before)):
        monkeypatch.setitem(loaded, name, known)  # whatever happens to it, it will be as it is now
        if known == "absent":
            del loaded[name]
    names = {*loaded, "openvino"} - (set() if before else {"openvino_telemetry"})
    assert _openvino().seen is None
    assert loaded.get("openvino_telemetry", "absent") == (before or "absent")
    assert {*loaded} == names
