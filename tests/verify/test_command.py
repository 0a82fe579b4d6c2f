"""`iqa-verify`: good candidates pass, harmful ones are caught, saved ones are judged alike, errors say what to do."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from diffiqa import cli
from diffiqa.calibration.quantise import Number, Recipe, quantise_engine
from diffiqa.engine.manifest import MANIFEST, Precision, StageName, read_manifest
from diffiqa.engine.monotone import Monotone
from diffiqa.engine.sampling import Fast, Sampler, Sampling, TapRule
from diffiqa.errors import UsageError
from diffiqa.export.precision import PrecisionPlan, plan_stage, read_plan
from diffiqa.model.bundle import save_bundle
from diffiqa.model.network import DiffV2IQA, build
from diffiqa.runtime.host.onnx_stage import OnnxRuntime
from diffiqa.runtime.results import Options
from diffiqa.runtime.scorer import load
from diffiqa.verify.api import load_emulated, verify, verify_saved
from diffiqa.verify.limits import make_limits
from diffiqa.verify.report import to_json
from diffiqa.verify.sides import Given, open_verified, reference_side

from ..tiny import TINY
from .verify_engines import edited, pictures, plant_large_range, scale_weights

# Three pictures and a network that was never trained: their order is no matter of precision.
CALM = ("--limit", "srcc=none", "--limit", "plcc=none", "--threads", "1")


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.main, ["verify", *map(str, arguments)])


def refused(result: Result, *says: str) -> bool:
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.exit_code == 2, result.output
    assert len(lines) == 1, result.stderr
    return all(word in lines[0] for word in says)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures(tmp_path_factory.mktemp("pictures") / "in", 3)


@pytest.fixture(scope="module")
def saved(tiny_engine: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of an fp16 run, with its JSON and page beside them."""
    out = tmp_path_factory.mktemp("verified")
    files = ("--save", out / "kept", "--json", out / "a.json", "--html", out / "a.html")
    result = call("--engine", tiny_engine, "--precision", "fp16", images, *CALM, *files)
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def large_range(tiny_engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edited(tiny_engine, tmp_path_factory.mktemp("planted") / "engine", StageName.UNET, plant_large_range)


def test_a_sound_plan_is_within_limits_and_every_figure_is_written(saved: Path) -> None:
    data = json.loads((saved / "a.json").read_text())
    assert data["within"] is True
    assert len(data["images"]) == 3
    first = data["images"][0]
    assert [len(first[name]) for name in ("noise", "state", "forced")] == [6, 6, 6]
    assert set(first["taps"]) == {"y0", "t1", "t2"}
    assert set(first["heads"]) == {"vit", "vcg", "vda"}
    assert set(first["scores"]) == {"score", "vcg", "vda"}
    assert 0 < first["forced"][0]["mean"] < first["forced"][0]["quantile"] < first["forced"][0]["max"] < 0.05
    assert data["images"][2]["forced"] == []  # only the first two by default
    assert data["loop"]["spread"] > 0
    assert data["loop"]["repeat"] is data["loop"]["order"] is True


def test_the_function_returns_what_the_command_writes(saved: Path, tiny_engine: Path, images: Path) -> None:
    lifted = {"srcc": None, "plcc": None}
    result = verify(tiny_engine, [images], precision="fp16", limits=lifted, threads=1)
    assert (result.within, result.culprits) == (True, None)
    assert to_json(result.findings, result.checks) == (saved / "a.json").read_text()
    assert verify_saved(saved / "kept", limits=lifted, engine=tiny_engine, precision="fp16") == result
    stricter = verify_saved(saved / "kept", limits={**lifted, "score": 0.0})
    assert [check.name for check in stricter.checks if not check.within] == ["score"]


def test_an_emulated_scorer_scores_as_the_candidate(saved: Path, tiny_engine: Path) -> None:
    scorer, plan = load_emulated(tiny_engine, precision="fp16", threads=1)
    assert plan.precision is Precision.FP16
    for image in json.loads((saved / "a.json").read_text())["images"]:
        assert scorer.score(image["name"]).score == pytest.approx(image["scores"]["score"][1], rel=1e-12)


def test_names_that_the_function_does_not_know_are_refused(tiny_engine: Path, images: Path) -> None:
    with pytest.raises(UsageError, match="fp16"):
        verify(tiny_engine, [images], precision="fp17")
    with pytest.raises(UsageError, match="srcc"):
        verify(tiny_engine, [images], precision="fp16", limits={"sroc": 1.0})


def test_the_page_is_one_file_without_scripts_and_with_curves(saved: Path) -> None:
    page = (saved / "a.html").read_text(encoding="utf-8")
    assert page.count('<svg class="plot"') == 4
    assert page.count("<polyline") == page.count('<span class="key') >= 12
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=", page)
    assert "http" not in page.replace("http-equiv", "")
    assert "score-mean" in page
    assert "nan" not in page


def test_a_tensor_beyond_the_range_of_fp16_is_caught(large_range: Path, images: Path, tmp_path: Path) -> None:
    arguments = ("--engine", large_range, images, *CALM)
    result = call(*arguments, "--precision", "fp16", "--html", tmp_path / "a.html", "--json", tmp_path / "a.json")
    assert result.exit_code == 1, result.output
    assert "NaN or Inf in the noise of step 5" in result.stdout
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["within"] is False
    assert data["images"][0]["noise"][0]["max"] is None
    assert "∞" in (tmp_path / "a.html").read_text(encoding="utf-8")
    # bf16 has the range of float32. It rounds coarsely: 1.2 of the little that seeds move an untrained model's score.
    inside = call(*arguments, "--precision", "bf16", "--limit", "spread=2")
    assert inside.exit_code == 0, inside.output


def test_a_plan_that_rounds_the_score_reduction_is_caught(tiny_engine: Path, images: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_engine)
    made = [plan_stage(onnx.load(tiny_engine / s.file.path), s, Precision.BF16) for s in manifest.stages]
    careful = PrecisionPlan(1, Precision.BF16, tuple(made))
    careless = dataclasses.replace(careful, stages=tuple(dataclasses.replace(s, float32=()) for s in made))
    drift = {}
    for name, plan in (("careful", careful), ("careless", careless)):
        (tmp_path / f"{name}.json").write_text(plan.to_json())
        files = ("--plan", tmp_path / f"{name}.json", "--json", tmp_path / f"{name}.out", "--save", tmp_path / name)
        call("--engine", tiny_engine, images, *CALM, *files, "--seeds", "1", "--forced", "0")
        checks = json.loads((tmp_path / f"{name}.out").read_text())["checks"]
        drift[name] = next(check["value"] for check in checks if check["name"] == "branch")
    assert drift["careless"] > drift["careful"]
    limit = f"branch={(drift['careless'] + drift['careful']) / 2}"
    for name, code in (("careful", 0), ("careless", 1)):
        assert call("--saved", tmp_path / name, *CALM, "--limit", limit).exit_code == code


def test_an_engine_is_verified_against_another(tiny_engine: Path, images: Path, tmp_path: Path) -> None:
    same = shutil.copytree(tiny_engine, tmp_path / "same")
    result = call("--engine", same, "--against", tiny_engine, images / "0.png", *CALM)
    assert result.exit_code == 0, result.output
    off = edited(tiny_engine, tmp_path / "off", StageName.VDA, scale_weights)
    result = call("--engine", off, "--against", tiny_engine, images / "0.png", *CALM, "--limit", "branch=1e-6")
    assert result.exit_code == 1, result.output
    assert "vda" in result.stdout


@pytest.mark.parametrize("recipe", [Recipe(), Recipe.of("fp8")], ids=lambda recipe: recipe.number)
def test_an_8_bit_engine_is_verified_against_its_float32_one(
    tiny_engine: Path, calibration_folder: Path, images: Path, tmp_path: Path, recipe: Recipe
) -> None:
    quantise_engine(tiny_engine, tmp_path / "eight", calibration_folder, recipe)
    kept, file = tmp_path / "kept", tmp_path / "a.json"
    arguments: tuple[str | Path, ...] = ("--engine", tmp_path / "eight", "--against", tiny_engine, images / "0.png")
    result = call(*arguments, *CALM, "--seeds", "1", "--json", file, "--save", kept)
    assert result.exit_code == 0, result.output
    checks = {check["name"]: check["value"] for check in json.loads(file.read_text())["checks"]}
    assert checks["score-mean"] > 0
    assert refused(call("--saved", kept, "--precision", "bf16"), "another engine", recipe.number, "bf16")


@pytest.mark.parametrize("number", Number)
def test_the_rest_of_an_8_bit_engine_is_rounded_as_a_build_would_be(
    tiny_engine: Path, calibration_folder: Path, images: Path, tmp_path: Path, number: Number
) -> None:
    """Beside float32 by the limits of 8 bits, beside itself by those of fp16: its 8 bits are on both sides then."""
    quantise_engine(tiny_engine, tmp_path / "eight", calibration_folder, Recipe.of(number, "tensorrt"))
    allowed, drift = {}, {}
    for name, against in (("float32", ("--against", tiny_engine)), ("itself", ())):
        file = tmp_path / f"{name}.json"
        arguments: tuple[str | Path, ...] = ("--engine", tmp_path / "eight", *against, images / "0.png", *CALM)
        result = call(*arguments, "--precision", "fp16", "--seeds", "1", "--json", file)
        assert result.exit_code in {0, 1}, result.output
        (check,) = (check for check in json.loads(file.read_text())["checks"] if check["name"] == "unet-mean")
        allowed[name], drift[name] = check["limit"], check["value"]
    assert allowed == {
        "float32": make_limits(number, {}, 1)["unet-mean"],
        "itself": make_limits("fp16", {}, 1)["unet-mean"],
    }
    assert 0 < drift["itself"] < drift["float32"]


def test_what_is_quantised_for_onnx_runtime_is_not_rounded_for_tensorrt(
    tiny_engine: Path, calibration_folder: Path, images: Path, tmp_path: Path
) -> None:
    quantise_engine(tiny_engine, tmp_path / "eight", calibration_folder, Recipe())
    result = call("--engine", tmp_path / "eight", "--against", tiny_engine, images, "--precision", "fp16")
    assert refused(result, "quantised for ONNX Runtime", "iqa-quantise --target tensorrt")


def test_an_engine_is_verified_against_its_checkpoint(
    tiny_model: DiffV2IQA, tiny_engine: Path, images: Path, tmp_path: Path
) -> None:
    bundle = tmp_path / "tiny.safetensors"
    save_bundle(tiny_model, bundle)
    arguments = ("--engine", tiny_engine, "--against", bundle, images / "0.png", *CALM)
    assert refused(call(*arguments), "other weights", "--any-weights")
    result = call(*arguments, "--any-weights")
    assert result.exit_code == 0, result.output
    assert "in PyTorch" in result.stdout


def test_a_checkpoint_is_known_by_its_weights(tiny_model: DiffV2IQA, tiny_engine: Path, tmp_path: Path) -> None:
    ids = []
    for name, model in (("a", tiny_model), ("b", tiny_model), ("c", build(TINY, seed=3))):
        save_bundle(model, tmp_path / f"{name}.safetensors")
        given = Given(tiny_engine, tmp_path / f"{name}.safetensors", any_weights=True)
        ids.append(reference_side(given, open_verified(tiny_engine), OnnxRuntime()).party.id)
    assert ids[0] == ids[1] != ids[2]
    assert {len(known) for known in ids} == {len(read_manifest(tiny_engine).engine_id)} == {16}


def test_saved_results_are_judged_the_same_without_a_run(saved: Path, tiny_engine: Path, tmp_path: Path) -> None:
    again = call("--saved", saved / "kept", *CALM[:4], "--json", tmp_path / "b.json")
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "b.json").read_text()) == json.loads((saved / "a.json").read_text())
    assert call("--saved", saved / "kept", *CALM[:4], "--engine", tiny_engine).exit_code == 0
    stricter = call("--saved", saved / "kept", *CALM[:4], "--limit", "unet-max=1e-6")
    assert stricter.exit_code == 1
    assert "beyond: unet-max\n  unet-max: largest error of the noise in one step" in stricter.stdout
    half = call("--saved", saved / "kept", *CALM[:4], "--quantile", "0.5", "--json", tmp_path / "half.json")
    assert half.exit_code == 0, half.output
    data = json.loads((tmp_path / "half.json").read_text())
    noise = data["images"][0]["noise"][0]
    assert data["quantile"] == 0.5
    assert noise["quantile"] == noise["median"] > 0


def test_saved_results_of_another_engine_are_refused(saved: Path, tiny_engine: Path, large_range: Path) -> None:
    mine, other = (read_manifest(path).engine_id for path in (tiny_engine, large_range))
    result = call("--saved", saved / "kept", "--engine", large_range)
    assert refused(result, "another engine", mine, other)
    assert refused(call("--saved", saved / "kept", "--precision", "bf16"), "fp16", "bf16")
    plans = [load_emulated(tiny_engine, precision=precision)[1] for precision in ("fp16", "bf16")]
    assert verify_saved(saved / "kept", engine=tiny_engine, plan=plans[0]).findings.images
    with pytest.raises(UsageError, match=rf"another engine: {mine}\+.*, while the plan is {mine}\+"):
        verify_saved(saved / "kept", engine=tiny_engine, plan=plans[1])


def test_saved_results_hold_the_images_and_no_pickle(saved: Path) -> None:
    with np.load(saved / "kept" / "0001.npz", allow_pickle=False) as arrays:
        assert arrays["image"].shape == (3, 40, 48)
        assert {"reference.noise", "candidate.noise", "answers.noise", "candidate.crops"} <= set(arrays)


def test_the_span_of_saved_scores_is_that_of_their_engine(saved: Path, tmp_path: Path) -> None:
    kept = shutil.copytree(saved / "kept", tmp_path / "kept")
    index = json.loads((kept / "verify.json").read_text())
    index["manifest"]["score"] |= {"minimum": -2.0, "nominal_maximum": 5.0}
    (kept / "verify.json").write_text(json.dumps(index))
    assert verify_saved(kept).findings.span == 7


@pytest.mark.parametrize("harm", ["index", "array", "missing", "empty"])
def test_damaged_saved_results_are_named(saved: Path, tmp_path: Path, harm: str) -> None:
    kept = shutil.copytree(saved / "kept", tmp_path / "kept")
    if harm == "index":
        (kept / "verify.json").write_text("{")
    elif harm == "array":
        (kept / "0002.npz").write_bytes(b"PK\x03\x04" + b"0" * 100)
    elif harm == "missing":
        (kept / "0002.npz").unlink()
    else:
        (kept / "verify.json").unlink()
    assert refused(call("--saved", kept), "save again")


def test_fail_fast_ends_at_the_first_image_beyond(tiny_engine: Path, images: Path, tmp_path: Path) -> None:
    arguments = ("--engine", tiny_engine, "--precision", "fp16", images, *CALM, "--limit", "unet-max=0")
    result = call(*arguments, "--fail-fast", "--json", tmp_path / "a.json")
    assert result.exit_code == 1, result.output
    data = json.loads((tmp_path / "a.json").read_text())
    assert (len(data["images"]), data["asked"]) == (1, 3)
    assert "2 of 3 images were not compared" in result.stdout


def test_bad_sets_of_images_are_named_with_the_way_out(tiny_engine: Path, images: Path, tmp_path: Path) -> None:
    fp16 = ("--engine", tiny_engine, "--precision", "fp16")
    black = tmp_path / "black"
    black.mkdir()
    for name in "ab":
        Image.new("RGB", (40, 40)).save(black / f"{name}.png")
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in "ab":
        shutil.copy(images / "0.png", twice / f"{name}.png")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    assert refused(call(*fp16), "no images")
    assert refused(call(*fp16, images / "0.png", "--limit", "srcc=0.9"), "srcc compares the order of images")
    assert refused(call(*fp16, black), "all 2 images are black", "photographs")
    assert refused(call(*fp16, twice), "same picture")
    assert refused(call(*fp16, images, broken), "broken.png", "leave it out")
    assert call(*fp16, images / "0.png", *CALM[-2:]).exit_code == 0
    assert call(*fp16, images, black, *CALM).exit_code == 0  # some may be


def test_bad_engines_are_named_with_the_way_out(tiny_engine: Path, images: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(tiny_engine, tmp_path / "bare")
    shutil.rmtree(bare / "onnx")
    assert refused(call("--engine", bare, "--precision", "fp16", images), "no ONNX stages", "export")
    other = shutil.copytree(tiny_engine, tmp_path / "other")
    manifest = read_manifest(other)
    schedule = dataclasses.replace(manifest.schedule, steps=7)
    (other / MANIFEST).write_text(dataclasses.replace(manifest, schedule=schedule).to_json())
    assert refused(call("--engine", other, "--against", tiny_engine, images), "not the same model", "schedule")
    assert refused(call("--engine", tiny_engine, images), "nothing to compare", "--precision", "--against")


def test_a_plan_for_another_engine_is_refused(
    tiny_engine: Path, large_range: Path, images: Path, tmp_path: Path
) -> None:
    manifest = read_manifest(large_range)
    made = [plan_stage(onnx.load(large_range / s.file.path), s, Precision.FP16) for s in manifest.stages]
    plan = tmp_path / "plan.json"
    plan.write_text(PrecisionPlan(1, Precision.FP16, tuple(made)).to_json())
    assert read_plan(plan).precision is Precision.FP16
    assert refused(call("--engine", tiny_engine, "--plan", plan, images), "another onnx/unet.onnx")


def test_options_that_contradict_each_other_are_refused(tiny_engine: Path, saved: Path, tmp_path: Path) -> None:
    assert refused(call("--saved", saved / "kept", "--device", "0"), "--device needs a run")
    kept = saved / "kept"
    assert refused(call(), "--engine", "--saved")
    assert refused(call("--saved", kept, "a.png"), "leave IMAGES out")
    assert refused(call("--saved", kept, "--save", tmp_path / "x"), "--save")
    assert refused(call("--engine", tiny_engine, "--against", tiny_engine, "--bisect", tmp_path / "p"), "--plan")
    assert refused(call("--engine", tiny_engine, "--precision", "fp16", "--json", tmp_path / "no" / "a.json"), "folder")


def test_a_folder_that_holds_something_is_not_saved_into(tiny_engine: Path, images: Path, saved: Path) -> None:
    arguments = ("--engine", tiny_engine, "--precision", "fp16", images, *CALM)
    assert refused(call(*arguments, "--save", saved / "kept"), "not empty")


@pytest.fixture
def fast(tiny_engine: Path, tmp_path: Path) -> Path:
    engine = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    sampling = Sampling((1, 3, 5), Sampler.DDIM, taps=TapRule.RENOISED)  # its last step is not the trained loop's
    quick = Fast(sampling, Monotone((0.0,), (0.0,), slope_beyond=1), 40)
    (engine / MANIFEST).write_text(dataclasses.replace(read_manifest(engine), fast=quick).to_json())
    return engine


def test_fast_is_judged_against_all_steps_by_limits_of_its_own(fast: Path, images: Path, tmp_path: Path) -> None:
    lifted = [
        word
        for name in ("spread", "score-mean", "tap-psnr", "tap-mean", "maps-mean")
        for word in ("--limit", f"{name}=none")
    ]
    result = call("--engine", fast, "--fast", images, *CALM, *lifted, "--json", tmp_path / "a.json")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["candidate"]["id"].startswith(f"{data['reference']['id']}+fast:")
    assert "3 of 6 steps" in data["candidate"]["label"]
    with load(fast) as scorer:
        for found in data["images"]:
            assert [len(found[name]) for name in ("noise", "state", "forced", "heads")] == [0, 0, 0, 0]
            want, have = (scorer.score(found["name"], Options(fast=way)).score for way in (False, True))
            assert found["scores"]["score"] == pytest.approx([want, have], abs=1e-6)
    checked = {check["name"]: check for check in data["checks"]}
    assert checked["score"]["limit"] == make_limits("fast", {}, 3)["score"]
    assert all(checked[name]["within"] for name in ("repeat", "order", "batch"))


def test_a_fast_sampling_with_a_wrong_correction_is_caught(fast: Path, images: Path) -> None:
    manifest = read_manifest(fast)
    assert manifest.fast
    wrong = dataclasses.replace(manifest.fast, correction=Monotone((0.0,), (0.2,), slope_beyond=1))
    (fast / MANIFEST).write_text(dataclasses.replace(manifest, fast=wrong).to_json())
    result = call("--engine", fast, "--fast", images, *CALM)
    assert result.exit_code == 1
    assert "score-mean" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--bisect", "plan.json", "--precision", "fp16"], "need a candidate with the reference's steps"),
        (["--save", "kept"], "need a candidate with the reference's steps"),
    ],
)
def test_fast_goes_without_what_compares_steps(
    fast: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(call("--engine", fast, "--fast", images, *arguments), says)


def test_fast_of_an_engine_that_has_none_names_the_command(tiny_engine: Path, images: Path) -> None:
    assert refused(call("--engine", tiny_engine, "--fast", images), "make one with: iqa-calibrate")
