"""Contenders score as ours does: PyTorch's loop for a GPU runs on the CPU here, the rest on what there is.

`pytest -m gpu tests/bench/test_contenders.py` tries every way of PyTorch's on a GPU; not run where it was written.
"""

import copy
import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from diffiqa.bench import contenders
from diffiqa.bench.contenders import (
    OURS,
    PEERS,
    DefaultStage,
    Ground,
    Missing,
    Place,
    openvino_nncf,
    ours,
    peers_for,
    place_of,
)
from diffiqa.bench.peers import EXACT
from diffiqa.bench.torch_loop import TorchScorer, Way, normals
from diffiqa.bench.workload import generate
from diffiqa.engine.crops import CropPlaces
from diffiqa.engine.manifest import Manifest, open_engine
from diffiqa.engine.noise import WEYL, NoiseField, split_seed
from diffiqa.engine.pixels import Sides, TapForm, to_plane
from diffiqa.engine.schedule import Kind
from diffiqa.errors import UsageError
from diffiqa.model.bundle import save_bundle
from diffiqa.model.config import Norm
from diffiqa.model.network import DiffV2IQA, build
from diffiqa.runtime.backends import BACKENDS, OnnxOnGpu, TensorRt
from diffiqa.runtime.gpu.onnx_stage import CUDA
from diffiqa.runtime.host.onnx_stage import OnnxRuntime, providers_here
from diffiqa.runtime.host.stages import OnHost, load_stages
from diffiqa.runtime.images import read_for
from diffiqa.runtime.results import Mode, Options
from diffiqa.runtime.scorer import Scorer

from ..fake_device import FakeLayer
from ..tiny import TINY, perturbed, photo

CPU = torch.device("cpu")
SUMS = 1e-6  # of a score near 1: what another order of sums may change
HALVES = 2**-7  # what 16 bits may: bfloat16 has 8 of precision, and the CPU's autocast keeps no sums in float32
PNG = 2**-6  # what 8 bits between restoring and scoring may


@pytest.fixture(scope="module")
def manifest(tiny_engine: Path) -> Manifest:
    return open_engine(tiny_engine).manifest


@pytest.fixture(scope="module")
def ckpt(tiny_model: DiffV2IQA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_bundle(tiny_model, path)
    return path


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(photo(7, 45, 70)).save(path)
    return path


def restored_and_scored(model: DiffV2IQA, pixels: Any, options: Options) -> float:
    """Return the score of the model's own plain loop."""
    image = torch.from_numpy(to_plane(pixels))[None]
    return model.score(image, options.seed, options.crops or TINY.crop).total.item()


# ------------------------------------------------------------------------------------------- PyTorch's loop for a GPU


@pytest.mark.parametrize("seed", [0, 5, 2**40 + 3])
def test_noise_is_that_of_every_backend(seed: int) -> None:
    low, high = split_seed(seed)
    keys = [[(low + i * WEYL[0]) % 2**32, (high + i * WEYL[1]) % 2**32] for i in range(10)]
    steps = torch.tensor([[1], [2], [4000]])
    found = normals(torch.tensor(keys), torch.arange(3 * 8 * 12 // 4), steps).reshape(3, 3, 8, 12).numpy()
    field, expected = NoiseField(seed, (8, 12)), np.empty((3, 8, 12), np.float32)
    for index, step in enumerate(steps.flatten().tolist()):
        field.fill(step, expected)
        np.testing.assert_allclose(found[index], expected, atol=2e-6)


@pytest.mark.parametrize(("height", "width", "crops"), [(32, 32, 1), (45, 70, 5), (64, 64, 9)])
def test_scores_are_ours(
    scorer: Scorer, tiny_model: DiffV2IQA, manifest: Manifest, height: int, width: int, crops: int
) -> None:
    torch_scorer = TorchScorer(tiny_model, CPU)
    for seed in (0, 2**33):
        pixels, options = photo(height, height, width), Options(crops=crops, seed=seed)
        assert torch_scorer.score(pixels, manifest, options) == pytest.approx(
            scorer.score(pixels, options).score, abs=SUMS
        )


def test_restorations_as_trained_and_random_crops_are_ours(
    tiny_engine: Path, tiny_model: DiffV2IQA, manifest: Manifest
) -> None:
    crop = replace(manifest.crop, places=CropPlaces.RANDOM)
    trained = replace(manifest, crop=crop, tap_form=TapForm.PNG8, sides=Sides.RESIZED)
    ours = Scorer(trained, load_stages(open_engine(tiny_engine), OnnxRuntime(threads=1)), backend="test")
    pixels, options = photo(6, 45, 70), Options(crops=3, seed=4)
    image = read_for(pixels, trained)
    found = TorchScorer(tiny_model, CPU).score(image.pixels, trained, options, image.restored_from)
    # Sums in another order may round a value between two bytes to the other.
    assert found == pytest.approx(ours.score(pixels, options).score, abs=2e-5)
    assert abs(found - TorchScorer(tiny_model, CPU).score(image.pixels, manifest, options)) > 2e-4


def test_floating_point_pixels_are_taken_as_they_are(scorer: Scorer, tiny_model: DiffV2IQA, manifest: Manifest) -> None:
    pixels = photo(1, 40, 40).astype(np.float32) / 255
    found = TorchScorer(tiny_model, CPU).score(pixels, manifest, Options(crops=1))
    assert found == pytest.approx(scorer.score(pixels, Options(crops=1)).score, abs=SUMS)


def test_another_number_of_steps_is_followed(scorer: Scorer, tiny_model: DiffV2IQA, manifest: Manifest) -> None:
    torch_scorer, pixels, all_steps = TorchScorer(tiny_model, CPU), photo(2, 40, 48), Options(crops=2)
    few = replace(all_steps, steps=4)
    found = torch_scorer.score(pixels, manifest, few)
    assert found == pytest.approx(scorer.score(pixels, few).score, abs=SUMS)
    assert torch_scorer.score(pixels, manifest, all_steps) != found


@pytest.mark.parametrize(("norm", "dtype"), [(Norm.BATCH, torch.bfloat16), (Norm.GROUP, torch.float16)])
def test_16_bits_round_a_score_and_no_more(manifest: Manifest, norm: Norm, dtype: torch.dtype) -> None:
    assert TINY.unet
    model = perturbed(build(replace(TINY, unet=replace(TINY.unet, norm=norm, groups=4)), seed=1), seed=2)
    pixels, options = photo(3, 40, 48), Options(crops=2)
    exact = restored_and_scored(model, pixels, options)
    assert TorchScorer(model, CPU).score(pixels, manifest, options) == pytest.approx(exact, abs=SUMS)
    rounded = TorchScorer(model, CPU, dtype).score(pixels, manifest, options)
    assert SUMS < abs(rounded - exact) < HALVES


def test_the_model_it_was_made_from_stays_as_it_was(tiny_model: DiffV2IQA) -> None:
    model = copy.deepcopy(tiny_model)
    TorchScorer(model, CPU, torch.bfloat16)
    for (name, before), after in zip(tiny_model.state_dict().items(), model.state_dict().values(), strict=True):
        assert before.dtype == after.dtype, name
        assert before.stride() == after.stride(), name
        assert torch.equal(before, after), name


def test_a_model_that_restores_nothing_is_scored_from_the_image_alone(manifest: Manifest) -> None:
    assert TINY.vcg
    vcg = replace(TINY.vcg, selection={Kind.DIS: (0, 1)})
    model = perturbed(build(replace(TINY, unet=None, vda=None, vcg=vcg), seed=1), seed=2)
    alone = replace(manifest, kinds=model.config.kinds, alignment=1)
    pixels, options = photo(4, 45, 70), Options(crops=3)
    found = TorchScorer(model, CPU).score(pixels, alone, options)
    assert found == pytest.approx(restored_and_scored(model, pixels, options), abs=SUMS)


def test_what_this_loop_does_not_do_is_refused(tiny_model: DiffV2IQA, manifest: Manifest) -> None:
    with pytest.raises(UsageError, match="800×700 pixels are more than this peer restores"):
        TorchScorer(tiny_model, CPU).score(photo(1, 700, 800), manifest, Options())
    with pytest.raises(UsageError, match="this sampler makes taps of its result"):
        TorchScorer(tiny_model, CPU).score(photo(1, 32, 32), manifest, Options(sampler="ddim"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own imports
@pytest.mark.parametrize(("way", "dtype"), [(Way.COMPILED, torch.bfloat16), (Way.TENSORRT, torch.float32)])
def test_compilers_get_each_network_whole(
    monkeypatch: pytest.MonkeyPatch, tiny_model: DiffV2IQA, manifest: Manifest, way: Way, dtype: torch.dtype
) -> None:
    compile_, asked, options = torch.compile, [], []

    def traced(function: Callable[..., Any], *, dynamic: bool, fullgraph: bool, **how: Any) -> Callable[..., Any]:
        asked.append(how.get("mode") or how["backend"])
        options.append(how.get("options", {}))
        if way is Way.TENSORRT:  # what is compiled is the same: tracing it again would show no more
            return function
        compiled: Callable[..., Any] = compile_(function, backend="eager", dynamic=dynamic, fullgraph=fullgraph)
        return compiled

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    compiled = TorchScorer(tiny_model, CPU, dtype, way)
    monkeypatch.undo()
    network = "max-autotune" if way is Way.COMPILED else "torch_tensorrt"
    assert asked == ["max-autotune", network, network]
    if way is Way.TENSORRT:  # of few operators too
        assert [option.get("min_block_size") for option in options] == [None, 1, 1]
    pixels, wanted = photo(5, 40, 48), Options(crops=2)
    eager = TorchScorer(tiny_model, CPU, dtype).score(pixels, manifest, wanted)
    with torch._dynamo.config.patch(error_on_recompile=True):  # once for all steps
        for _ in range(2):
            found = compiled.score(pixels, manifest, wanted)
            assert found == pytest.approx(eager, abs=SUMS if dtype == torch.float32 else HALVES)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("way", Way)
def test_every_way_scores_as_ours_on_a_gpu(
    scorer: Scorer, tiny_engine: Path, ckpt: Path, picture: Path, way: Way, dtype: torch.dtype
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch has no GPU")
    name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    ground = Ground(tiny_engine, ckpt, OnnxOnGpu())
    try:
        score, _version = contenders.torch_networks(ground, precision=name, way=way)
    except Missing as reason:
        pytest.skip(str(reason))
    for seed in (0, 1, 0):  # the second captures or replays, the third must not see what the others left
        options = Options(crops=9, seed=seed)
        expected = scorer.score(picture, options).score
        assert score(picture, options) == pytest.approx(expected, abs=EXACT if dtype == torch.float32 else HALVES)


# --------------------------------------------------------------------------------------------------- contenders


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have PyTorch's contenders for a GPU run on the CPU."""
    monkeypatch.setattr(contenders, "_torch_device", lambda _ground: CPU)


@pytest.mark.parametrize(
    ("place", "name", "allowed"),
    [
        (Place.CPU, "torch eager", SUMS),
        (Place.CPU, "torch eager, bf16", HALVES),
        (Place.CPU, "plain loop", PNG),
        (Place.GPU, "torch eager, bf16", HALVES),  # the plain loop is the same in both places
    ],
)
def test_peers_of_both_places_score_files_as_ours(
    monkeypatch: pytest.MonkeyPatch,
    scorer: Scorer,
    tiny_engine: Path,
    ckpt: Path,
    picture: Path,
    place: Place,
    name: str,
    allowed: float,
) -> None:
    peer = next(peer for peer in PEERS if peer.name == name)
    assert place in peer.places
    on_cpu(monkeypatch)
    ground = Ground(tiny_engine, ckpt, OnnxRuntime(1))
    if place is Place.GPU:
        ground = replace(ground, backend=OnnxOnGpu())
    score, version = peer.make(ground)
    assert version == f"torch {torch.__version__}"
    for options in (Options(crops=3, seed=4), Options(crops=3, seed=4, steps=4)):
        expected = scorer.score(picture, options).score
        assert score(picture, options) == pytest.approx(expected, abs=allowed)


@pytest.mark.parametrize(("threads", "asked"), [(None, 0), (2, 2)])
def test_a_stage_with_default_settings_changes_threads_at_most(
    monkeypatch: pytest.MonkeyPatch, tiny_engine: Path, threads: int | None, asked: int
) -> None:
    directory, given = open_engine(tiny_engine), []

    class Session(onnxruntime.InferenceSession):  # type: ignore[misc, unused-ignore]
        def __init__(self, path: Path, options: Any, **how: Any) -> None:
            given.append((options.intra_op_num_threads, how))
            super().__init__(path, options, **how)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    DefaultStage(directory.file(directory.manifest.stages[0].file), threads=threads)
    assert given == [(asked, {"providers": [("CPUExecutionProvider", {})]})]


def test_onnxruntime_as_its_examples_have_it_scores_as_ours(tiny_engine: Path, scorer: Scorer, picture: Path) -> None:
    score, _version = contenders.onnxruntime_default(Ground(tiny_engine, None, OnnxRuntime(1)))
    expected = scorer.score(picture, Options(crops=2)).score
    assert score(picture, Options(crops=2)) == pytest.approx(expected, abs=SUMS)


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_ours_on_a_gpu_is_what_load_runs(
    tiny_build: Path, fake_gpu: FakeLayer, scorer: Scorer, picture: Path, cuda_graph: bool
) -> None:
    ground = Ground(tiny_build, None, TensorRt(cuda_graph=cuda_graph))
    score, version = OURS.make(ground)
    assert version == "tensorrt-rtx 1.7 fp32"
    expected = scorer.score(picture, Options(crops=2, seed=3)).score
    for _ in range(3):
        assert score(picture, Options(crops=2, seed=3)) == pytest.approx(expected, abs=1e-5)
    assert bool(fake_gpu.graphs) is cuda_graph


@pytest.mark.parametrize("spinning", [True, False])
def test_ours_waits_as_it_is_told(monkeypatch: pytest.MonkeyPatch, tiny_engine: Path, spinning: bool) -> None:
    asked: list[OnnxRuntime] = []

    def loaded(settings: OnnxRuntime, _directory: object) -> OnHost:
        asked.append(settings)
        return OnHost({}, "onnxruntime 1.0: CPU")

    monkeypatch.setattr(OnnxRuntime, "load", loaded)
    OURS.make(Ground(tiny_engine, None, OnnxRuntime(2, spinning=spinning)))
    assert [(settings.threads, settings.spinning) for settings in asked] == [(2, spinning)]


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for GPUs")
def test_pytorch_without_a_gpu_is_missing_not_slow(tiny_engine: Path, ckpt: Path) -> None:
    ground = Ground(tiny_engine, ckpt, TensorRt())
    found = [peer for peer in peers_for("tensorrt") if peer.weights]
    assert len(found) == 10
    for peer in found:
        with pytest.raises(Missing, match="is built for the CPU alone"):
            peer.make(ground)


@pytest.mark.skipif(CUDA in providers_here(), reason="this onnxruntime is built for GPUs")
def test_onnxruntime_without_a_gpu_is_missing_not_slow(monkeypatch: pytest.MonkeyPatch, tiny_engine: Path) -> None:
    monkeypatch.setattr(contenders, "load_library", lambda library: SimpleNamespace(library=library))
    ground = Ground(tiny_engine, None, TensorRt())
    found = [peer for peer in peers_for("tensorrt") if not peer.weights]
    assert len(found) == 4
    for peer in found:
        with pytest.raises(Missing, match=r"this onnxruntime has no .*; put the package onnxruntime-gpu in the place"):
            peer.make(ground)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="tensorrt is installed")
def test_onnxruntimes_tensorrt_needs_tensorrt(tiny_engine: Path) -> None:
    with pytest.raises(Missing, match="tensorrt is not installed"):
        contenders.onnxruntime_tensorrt(Ground(tiny_engine, None, TensorRt()), fp16=True)


@pytest.mark.skipif(importlib.util.find_spec("torch_tensorrt") is not None, reason="torch_tensorrt is installed")
def test_torch_tensorrt_is_missing_by_name(monkeypatch: pytest.MonkeyPatch, tiny_engine: Path, ckpt: Path) -> None:
    on_cpu(monkeypatch)
    with pytest.raises(Missing, match="torch_tensorrt is not installed"):
        contenders.torch_networks(Ground(tiny_engine, ckpt, TensorRt()), precision="fp16", way="Torch-TensorRT")


def test_torch_tensorrt_replays_cuda_graphs(monkeypatch: pytest.MonkeyPatch, tiny_engine: Path, ckpt: Path) -> None:
    asked: list[bool] = []
    fake = ModuleType("torch_tensorrt")
    vars(fake).update(__version__="2.0", runtime=SimpleNamespace(set_cudagraphs_mode=asked.append))
    monkeypatch.setitem(sys.modules, "torch_tensorrt", fake)
    monkeypatch.setattr(torch, "compile", lambda function, **_how: function)
    on_cpu(monkeypatch)
    ground = Ground(tiny_engine, ckpt, TensorRt())
    _score, version = contenders.torch_networks(ground, precision="fp32", way="CUDA graph")
    assert not asked
    _score, version = contenders.torch_networks(ground, precision="fp32", way="Torch-TensorRT")
    assert asked == [True]
    assert version == f"torch {torch.__version__}, torch_tensorrt 2.0"


# ------------------------------------------------------------------------------------------------------ the choice


@pytest.mark.parametrize("place", Place)
def test_peers_without_tiles_take_whole_images_alone(place: Place) -> None:
    on_gpu = {peer.name for peer in PEERS if peer.name.lower().startswith("torch")}
    whole = {"plain loop"} | (on_gpu if place is Place.GPU else set())
    for mode in Mode:
        without = {peer.name for peer in PEERS if not peer.takes(mode, place)}
        assert without == (set() if mode is Mode.WHOLE else whole)


def test_every_peer_of_pytorch_names_a_way_and_a_precision_that_there_is() -> None:
    asked = [peer for peer in PEERS if getattr(peer.make, "func", None) is contenders.torch_networks]
    assert len(asked) == 10
    for peer in asked:
        assert isinstance(peer.make, functools.partial)
        assert peer.make.keywords["way"] in list(Way)
        assert peer.make.keywords["precision"] == peer.precision


def test_peers_run_where_ours_does() -> None:
    on_host = [peer.name for peer in peers_for("onnxruntime")]
    assert on_host == [peer.name for peer in peers_for("openvino")]
    assert on_host == [
        "onnxruntime, default settings",
        "openvino",
        "openvino, bf16",
        "openvino, NNCF",
        "torch eager",
        "torch eager, bf16",
        "torch.compile",
        "torch.compile, bf16",
        "plain loop",
    ]
    for name, kind in BACKENDS.items():
        assert all(place_of(kind) in peer.places for peer in peers_for(name))
    assert {peer.name for peer in PEERS} == set(on_host) | {peer.name for peer in peers_for("tensorrt")}


def test_a_backend_is_no_peer_of_itself() -> None:
    beside = {peer.name for peer in peers_for("tensorrt")}
    assert beside - {peer.name for peer in peers_for("onnxruntime-gpu")} == {"onnxruntime-gpu"}


def test_peers_are_given_in_the_order_asked_for() -> None:
    assert [peer.name for peer in peers_for("tensorrt", ["plain loop", "torch eager"])] == ["plain loop", "torch eager"]


@pytest.mark.parametrize(
    ("backend", "name", "says"),
    [
        ("onnxruntime", "magic", "there is no peer 'magic'; choose from: onnxruntime, default settings; "),
        ("tensorrt", "openvino", "the peer 'openvino' runs on the CPU, and --backend tensorrt on a GPU; choose from: "),
        ("openvino", "torch eager, fp16", "runs on a GPU, and --backend openvino on the CPU; choose from: "),
        ("onnxruntime-gpu", "onnxruntime-gpu", "the peer 'onnxruntime-gpu' is --backend onnxruntime-gpu itself; "),
    ],
)
def test_a_peer_that_cannot_run_beside_ours_is_refused_by_name(backend: str, name: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        peers_for(backend, ["torch eager", name])
    assert says in str(caught.value)


def test_ours_is_exact_in_float32_alone() -> None:
    assert OURS.exact
    assert not replace(OURS, precision="fp16").exact


def test_nncf_is_named_where_it_is_missing(tiny_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setitem(sys.modules, "nncf", None)
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    with pytest.raises(Missing, match="nncf is not installed; install it with: pip install nncf"):
        openvino_nncf(Ground(tiny_engine, None))


def test_nncf_quantises_the_unet_alone(tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    pytest.importorskip("nncf")
    picture = generate(tmp_path, [(48, 48)], 1, 0).by_size[48, 48][0]
    options = Options(crops=1)
    (rounded, version), (exact, _) = (make(Ground(tiny_engine, None)) for make in (openvino_nncf, ours))
    assert "nncf" in version
    assert 0 < abs(rounded(picture, options) - exact(picture, options)) < 0.05
