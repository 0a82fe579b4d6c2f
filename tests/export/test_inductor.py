"""Builds by PyTorch's compiler on a CPU: the same scores as ONNX Runtime's, and machine code of nobody else's."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import diffiqa
from diffiqa import cli
from diffiqa.engine.manifest import Build, Library, Precision, ShapeRange, open_engine, read_manifest
from diffiqa.engine.seal import SEAL
from diffiqa.errors import BackendError, EngineError, ExportError, ImageError, UsageError
from diffiqa.export import inductor
from diffiqa.export.builds import BuildOptions, build_engines
from diffiqa.export.engine import export_engine
from diffiqa.model.checkpoint import Loaded
from diffiqa.model.network import build
from diffiqa.runtime.inductor import Package, cpu_target
from diffiqa.tests.tiny import TINY, perturbed, photo

OPTIONS = BuildOptions(Library.INDUCTOR, sizes=("32x32",))
SCORES = 2e-6

pytestmark = [
    pytest.mark.minutes,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of PyTorch needs a C++ compiler"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Build]:
    """A tiny engine with a float32 build for this CPU: without VCG, which takes as long to compile as all else."""
    path = tmp_path_factory.mktemp("built") / "engine"
    export_engine(Loaded(perturbed(build(dataclasses.replace(TINY, vcg=None), seed=1), seed=2), (), ()), path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(path.parent / "state"))
        made, stages = build_engines(path, OPTIONS)
        assert build_engines(path, OPTIONS) == (made, [])
    assert len(stages) == 2
    return path, made


@pytest.fixture(autouse=True)
def account(built: tuple[Path, Build], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(built[0].parent / "state"))


@pytest.fixture
def engine(built: tuple[Path, Build], tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(built[0], tmp_path / "engine")
    return tmp_path / "engine"


def test_a_build_says_what_it_is_and_how_far_it_is_from_the_original(built: tuple[Path, Build]) -> None:
    path, made = built
    assert (made.version, made.precision, made.batches) == (torch.__version__, Precision.FP32, ("1",))
    assert made.compute_capabilities == (cpu_target(),)
    assert read_manifest(path).builds == (made,)
    for stage in made.stages:
        assert stage.file.path == f"inductor/{made.key}/{stage.name}.pt2"
        assert {check.output for check in stage.drift} == {spec.name for spec in stage.outputs}
        assert all(0 <= check.max_abs_error <= 2e-5 * check.max_abs_reference for check in stage.drift)
    log = (path / made.log.path).read_text()
    assert "unet: profile0 (y 1×3×32×32; condition 1×3×32×32; noise_level 1×1) took " in log
    assert sorted(file.name for file in (path / "inductor" / made.key).iterdir()) == sorted(
        ["build.log", "plan.json", SEAL, "unet.pt2", "vda.pt2"]
    )


def test_it_scores_as_onnx_runtime_does(built: tuple[Path, Build]) -> None:
    path, made = built
    options = diffiqa.Options(crops=3, mode=diffiqa.Mode.CROP)
    images = [photo(seed, 48, 56) for seed in range(2)]
    with diffiqa.load(path, diffiqa.Inductor(threads=1)) as ours, diffiqa.load(path, diffiqa.OnnxRuntime()) as theirs:
        assert ours.info.backend == f"inductor {made.version} fp32: CPU"
        for image in images:
            found, wanted = ours.score(image, options), theirs.score(image, options)
            assert found.vda == pytest.approx(wanted.vda, abs=SCORES)
            assert wanted.vda is not None
            assert wanted.vda > 100 * SCORES
            assert ours.score(image, options).score == found.score


def test_a_form_leaves_the_list_of_its_inputs_alone(built: tuple[Path, Build]) -> None:
    vda = built[1].stages[-1]
    form, given = Package(built[0] / vda.file.path, None).form(0), [torch.ones(vda.profiles[0]["images"].minimum)]
    first, second = (form(given)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert len(given) == 1


def test_iqa_run_takes_it_and_auto_does_not(built: tuple[Path, Build], tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(photo(1, 40, 40)).save(tmp_path / "a.png")
    for name, says in (("inductor", "backend: inductor "), ("auto", "backend: onnxruntime ")):
        command = ["run", "--engine", str(built[0]), str(tmp_path / "a.png"), "--mode", "crop", "--backend", name]
        done = CliRunner().invoke(cli.main, command)
        assert done.exit_code == 0, done.output
        assert says in done.stderr


def test_a_size_that_was_not_built_names_the_command(built: tuple[Path, Build]) -> None:
    with diffiqa.load(built[0], diffiqa.Inductor()) as scorer, pytest.raises(ImageError) as caught:
        scorer.score(photo(1, 48, 64))
    says = str(caught.value)
    assert "this build's U-Net takes no images of 64×48; use tile or crop mode" in says
    assert says.endswith("--target inductor --precision fp32 --batch 1 --sizes 32x32,48x64 --compute-capability cpu")


def test_machine_code_of_another_account_is_not_loaded(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(engine.parent / "elsewhere"))
    with pytest.raises(EngineError, match=r"not made here by this account.*iqa-build.*--force"):
        diffiqa.load(engine, diffiqa.Inductor())


def test_a_build_for_other_cpus_or_another_torch_is_refused(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffiqa.runtime.host.inductor_stage.cpu_target", lambda: "cpu-00000000")
    with pytest.raises(EngineError, match=r"for a CPU with other features.*--compute-capability cpu"):
        diffiqa.load(engine, diffiqa.Inductor())
    monkeypatch.undo()
    monkeypatch.setattr(torch, "__version__", "2.9.0")
    with pytest.raises(EngineError, match=r"made by inductor .*, and 2\.9\.0 is installed"):
        diffiqa.load(engine, diffiqa.Inductor())


def test_a_changed_package_is_refused_before_it_is_loaded(engine: Path, built: tuple[Path, Build]) -> None:
    file = engine / built[1].stages[0].file.path
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(EngineError, match="SHA-256 differs"):
        diffiqa.load(engine, diffiqa.Inductor())


def test_code_that_computes_something_else_is_not_recorded(built: tuple[Path, Build], tmp_path: Path) -> None:
    """As torch 2.13 does, without a word, where free sizes meet weights that it laid out itself."""
    maker = inductor.InductorMaker(())
    directory = open_engine(built[0])
    vda = directory.manifest.stages[-1]

    class Off:
        def form(self, _profile: int) -> object:
            return lambda inputs: [torch.full(spec.at({"B": 1}), 0.3) for spec in vda.outputs]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inductor, "Package", lambda *_: Off())
        maker._engine = directory
        span = built_span((1, 4, 3, 32, 32))
        with pytest.raises(ExportError, match=r"vda, output score.*code that torch compiled \(profile0\) differs"):
            maker._compare(vda, {spec.name: "float32" for spec in (*vda.inputs, *vda.outputs)}, span, tmp_path)


def built_span(shape: tuple[int, ...]) -> tuple[dict[str, ShapeRange], ...]:
    return ({"images": ShapeRange(shape, shape, shape)},)


def test_no_compiler_is_said_plainly(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(BackendError, match=r"needs a C\+\+ compiler, and g\+\+ is not here"):
        build_engines(engine, dataclasses.replace(OPTIONS, batches=("2",)))
    assert len(read_manifest(engine).builds) == 1


def test_what_it_cannot_build_for_is_refused(engine: Path) -> None:
    with pytest.raises(UsageError, match="builds for the machine it runs on"):
        build_engines(engine, dataclasses.replace(OPTIONS, compute_capabilities=("8.9",)))


def test_scoring_with_other_backends_imports_no_torch(built: tuple[Path, Build]) -> None:
    code = "import sys, diffiqa; diffiqa.load(sys.argv[1], diffiqa.OnnxRuntime()); print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code, str(built[0])], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_iqa_verify_judges_it_beside_the_onnx_stages(built: tuple[Path, Build], tmp_path: Path) -> None:
    from PIL import Image

    for seed in range(2):
        Image.fromarray(photo(seed, 40, 40)).save(tmp_path / f"{seed}.png")
    command = ["verify", "--engine", str(built[0]), str(tmp_path), "--mode", "crop", "--crops", "2", "--seeds", "1"]
    done = CliRunner().invoke(cli.main, [*command, "--backend", "inductor", "--json", str(tmp_path / "found.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["candidate"]["id"].endswith(f"+{built[1].key}")
    assert found["candidate"]["cast"] == "fp32"
    refused = CliRunner().invoke(cli.main, [*command, "--backend", "inductor", "--precision", "fp16"])
    assert "a build has a plan of its own" in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("precision", Precision)
def test_free_sizes_and_every_precision(tiny_engine: Path, tmp_path: Path, precision: Precision) -> None:
    path = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    options = BuildOptions(Library.INDUCTOR, precision, batches=("1", "1:2:4"), sizes=("32x32", "32x32:64x64:96x96"))
    made, _ = build_engines(path, options)
    assert [len(stage.profiles) for stage in made.stages] == [3, 2, 2, 2]
    image = photo(3, 80, 64)
    with diffiqa.load(path, diffiqa.Inductor()) as ours, diffiqa.load(path, diffiqa.OnnxRuntime()) as theirs:
        near = {Precision.FP32: SCORES, Precision.FP16: 2e-3, Precision.BF16: 2e-2}[precision]
        assert ours.score(image).score == pytest.approx(theirs.score(image).score, abs=near)
