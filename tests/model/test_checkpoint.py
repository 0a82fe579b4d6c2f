"""Loading a model from our bundles and from other people's files, small versions of both."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from diffiqa.engine.codec import encode
from diffiqa.engine.manifest import Source
from diffiqa.engine.schedule import Kind
from diffiqa.errors import CheckpointError, ConfigError, DiffiqaError, OutputError, UsageError
from diffiqa.model import checkpoint, hub
from diffiqa.model.bundle import save_bundle
from diffiqa.model.checkpoint import Origin, Setting, load
from diffiqa.model.config import (
    PRESETS,
    Labels,
    ModelConfig,
    Norm,
    SwinConfig,
    UNetConfig,
    VCGConfig,
    VDAConfig,
    ViTConfig,
)
from diffiqa.model.network import DiffV2IQA, build, count_parameters
from diffiqa.model.unet import UNet

Weights = dict[str, Tensor]

SEED = 7
FULL = dict(PRESETS)

TINY = ModelConfig(
    name="paper",
    unet=UNetConfig(width=8, multipliers=(1, 2), blocks=1, attention_levels=(1,), groups=4),
    crop=32,
    grid=4,
    vcg=VCGConfig(
        vit=ViTConfig(patch=8, width=8, heads=2, mlp=16),
        selection={Kind.DIS: (1, 2), Kind.Y0: (1,), Kind.T1: (2,), Kind.T2: (2,)},
        noise_code=3,
        squeeze=(12, 8),
        swin=SwinConfig(heads=2, window=2, mlp=8),
    ),
    vda=VDAConfig(resnet_width=4, resnet_blocks=(1, 1, 1, 1), classes=10, width=4),
)
assert TINY.vcg is not None
assert TINY.unet is not None
AUTHORS = replace(TINY, name="authors", unet=replace(TINY.unet, norm=Norm.GROUP))
MANIQA = replace(
    TINY,
    name="maniqa",
    unet=None,
    vda=None,
    vcg=replace(TINY.vcg, selection={Kind.DIS: (1, 2)}, noise_code=0, squeeze=(8,)),
)
CUSTOM = replace(TINY, name="custom", unet=replace(TINY.unet, width=4))


@pytest.fixture(autouse=True)
def _tiny_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The presets by their real names, at a size that loads in milliseconds."""
    monkeypatch.delitem(PRESETS, "mini")
    for config in (TINY, AUTHORS, MANIQA):
        monkeypatch.setitem(PRESETS, config.name, config)


# ---- other people's files: our tensors under their names, and what they carry along ----

SCHEDULE = """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
    posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2"""

THEIR_NAMES = {
    "vcg.vit.": "vit.",
    "tabs.0.q.": "tablock1.0.c_q.",
    "tabs.0.k.": "tablock1.0.c_k.",
    "tabs.0.v.": "tablock1.0.c_v.",
    "tabs.1.q.": "tablock1.1.c_q.",
    "tabs.1.k.": "tablock1.1.c_k.",
    "tabs.1.v.": "tablock1.1.c_v.",
    "vcg.squeeze.0.": "conv1.",
    "vcg.swin1.": "swintransformer1.",
    "vcg.tabs2.0.q.": "tablock2.0.c_q.",
    "vcg.tabs2.0.k.": "tablock2.0.c_k.",
    "vcg.tabs2.0.v.": "tablock2.0.c_v.",
    "vcg.tabs2.1.q.": "tablock2.1.c_q.",
    "vcg.tabs2.1.k.": "tablock2.1.c_k.",
    "vcg.tabs2.1.v.": "tablock2.1.c_v.",
    "vcg.halve.": "conv2.",
    "vcg.swin2.": "swintransformer2.",
    "vcg.score.0.": "fc_score.0.",
    "vcg.score.3.": "fc_score.3.",
    "vcg.weight.0.": "fc_weight.0.",
    "vcg.weight.3.": "fc_weight.3.",
    # only in the authors' network
    "vcg.noise_codes": "noise_levels",
    "vcg.squeeze.1.": "conv3.",
    "vda.resnet.": "res.",
    "vda.rtab.residual.": "qa.x_linear.",
    "vda.rtab.q.": "qa.c_q.",
    "vda.rtab.k.": "qa.c_k.",
    "vda.rtab.v.": "qa.c_v.",
    "vda.widen.": "conv_s1.",
    "vda.score.0.": "fc_score1.0.",
    "vda.score.3.": "fc_score1.3.",
    "vda.weight.0.": "fc_weight1.0.",
    "vda.weight.3.": "fc_weight1.3.",
}


def iqa_file(model: DiffV2IQA) -> Weights:
    """The scoring part of a model as the authors (or MANIQA) save it, with all they carry along unused."""
    out = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith("unet."):
            ((ours, theirs),) = ((o, t) for o, t in THEIR_NAMES.items() if name.startswith(o))
            out[theirs + name.removeprefix(ours)] = tensor[None] if theirs == "noise_levels" else tensor
    for name in ("swintransformer1.downsample.weight", "swintransformer2.downsample.bias", "vit.norm.weight"):
        out[name] = torch.ones(8)
    out["vit.head.bias"] = torch.full((1000,), torch.nan)  # nobody reads it, so it may be anything
    out["vit.blocks.3.attn.qkv.weight"] = torch.ones(24, 8)
    out["swintransformer1.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 4, 4)
    out["swintransformer1.layers.0.blocks.1.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
    if "noise_levels" in out:
        out |= {"noise_embedding.weight": torch.ones(4, 3), "bn1.running_var": torch.ones(12)}
        out |= {"rq_score.0.weight": torch.ones(4, 4)}
    return out


def sr3_file(model: DiffV2IQA, steps: int = 2000, prefix: str = "denoise_fn.") -> Weights:
    """The U-Net of a model as SR3 saves it."""
    out = {name: torch.full((steps,), -torch.inf) for name in SCHEDULE.split()}
    assert model.unet is not None
    return out | {prefix + name: tensor for name, tensor in model.unet.state_dict().items()}


def vit_file(model: DiffV2IQA) -> Weights:
    assert model.vcg is not None
    return dict(model.vcg.vit.state_dict()) | {"norm.weight": torch.ones(8), "head.weight": torch.ones(5, 8)}


def resnet_file(model: DiffV2IQA) -> Weights:
    """Like torchvision's older files, without BatchNorm's counters."""
    assert model.vda is not None
    weights = model.vda.resnet.state_dict()
    return {name: tensor for name, tensor in weights.items() if not name.endswith("num_batches_tracked")}


def on_meta(config: ModelConfig) -> DiffV2IQA:
    with torch.device("meta"):
        return DiffV2IQA(config)


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def assert_same(model: DiffV2IQA, expected: DiffV2IQA, *prefixes: str) -> None:
    ours, theirs = model.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        if name.startswith(prefixes or ("",)):
            assert torch.equal(tensor, theirs[name]), name


def refusal(*args: Any, error: type[DiffiqaError] = CheckpointError, **options: Any) -> str:
    with pytest.raises(error) as info:
        load(*args, **options)
    return str(info.value)


# ---- bundles ----


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_bundle_restores_every_tensor_the_configuration_and_the_provenance(tmp_path: Path, suffix: str) -> None:
    model = build(CUSTOM, SEED)
    origin = Source("iqa", "epoch60.pt", 5, "ab" * 32, "MANIQA")
    path = tmp_path / f"model{suffix}"
    save_bundle(model, path, sources=[origin], notes=["a note"])
    loaded = load(path)
    assert_same(loaded.model, model)
    assert loaded.model.config == CUSTOM
    assert not loaded.model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in loaded.model.parameters())
    assert loaded.notes == ("a note",)
    itself, before = loaded.sources
    assert before == origin
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert itself == Source("bundle", path.name, path.stat().st_size, digest, "diffiqa bundle")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_half_bundle_stores_float16_and_loads_float32(tmp_path: Path, suffix: str) -> None:
    model = build(TINY, SEED)
    whole, half = tmp_path / f"whole{suffix}", tmp_path / f"half{suffix}"
    save_bundle(model, whole)
    save_bundle(model, half, half=True)
    floats = sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())
    # Entries of a ZIP archive are aligned to 64 bytes, the header of safetensors counts offsets in digits.
    assert whole.stat().st_size - half.stat().st_size == pytest.approx(2 * floats, rel=0.1)
    loaded = load(half).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor.half().float() if tensor.is_floating_point() else tensor)


def test_loaded_model_scores_like_the_one_that_was_saved(tmp_path: Path) -> None:
    # Also shows that no table of Swin was left on the meta device the model is built on.
    model = build(TINY, SEED)
    save_bundle(model, tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt").model
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    images = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(SEED))
    with torch.no_grad():
        assert torch.equal(loaded(images).total, model(images).total)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_same_model_gives_the_same_bytes_under_any_name(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        save_bundle(build(TINY, SEED), tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_model_outlives_its_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    save_bundle(build(TINY, SEED), path)
    loaded = load(path).model
    os.truncate(path, 0)  # with tensors still mapped, reading them now would kill the process
    assert_same(loaded, build(TINY, SEED))


def test_failed_save_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.pt"
    path.write_bytes(b"old")

    def full_disk(content: object, file: Any) -> None:
        file.write(b"half a file")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OutputError, match="no space left"):
        save_bundle(build(TINY, SEED), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_save_into_a_missing_folder_is_an_output_error(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        save_bundle(build(TINY, SEED), tmp_path / "nowhere" / f"m{suffix}")


def test_save_refuses_other_suffixes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.safetensors or \.pt"):
        save_bundle(build(TINY, SEED), tmp_path / "model.onnx")


@pytest.mark.parametrize(("value", "half"), [(torch.nan, False), (torch.inf, False), (70000.0, True)])
def test_save_refuses_weights_that_would_not_be_finite(tmp_path: Path, value: float, half: bool) -> None:
    model = build(TINY, SEED)
    with torch.no_grad():
        model.tabs[0].get_parameter("q.bias")[3] = value
    with pytest.raises(CheckpointError, match=r"tabs\.0\.q\.bias"):
        save_bundle(model, tmp_path / "m.pt", half=half)
    assert list(tmp_path.iterdir()) == []


def raw_bundle(path: Path, description: dict[str, Any], weights: Weights | None = None) -> Path:
    weights = dict(build(TINY, SEED).state_dict()) if weights is None else weights
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(weights, path, {"diffiqa": json.dumps(description)})
        return path
    rest = {key: value for key, value in description.items() if key != "format"}
    return saved(path, {"diffiqa_format": description.get("format"), **rest, "weights": weights})


@pytest.mark.parametrize(
    ("suffix", "description", "message"),
    [
        (".pt", {"format": 4, "config": {}, "from": "the future"}, "format 4; this version reads 3"),
        (".safetensors", {"format": 4, "config": {}}, "format 4; this version reads 3"),
        (".pt", {"config": encode(TINY)}, "format None"),
        (".safetensors", {"format": 1}, "lacks 'config'"),
        (".pt", {"format": 1, "config": encode(TINY), "code": "x"}, "unknown entries: 'code'"),
        (".pt", {"format": 1, "config": encode(TINY) | {"tabs": "many"}}, "config.tabs must be a whole number"),
        (".safetensors", {"format": 1, "config": encode(TINY) | {"tabs": 99}}, "tabs must be between 0 and 8"),
        (".safetensors", {"format": 1, "config": encode(TINY), "notes": ["\x1b[2J"]}, "not plain text"),
    ],
)
def test_bundle_with_a_wrong_description_is_refused(
    tmp_path: Path, suffix: str, description: dict[str, Any], message: str
) -> None:
    path = raw_bundle(tmp_path / f"m{suffix}", description)
    assert message in refusal(path)


def doubling() -> list[Any]:
    """2^60 items, in 60 lists."""
    out: list[Any] = []
    for _ in range(60):
        out = [out, out]
    return out


def endless() -> list[Any]:
    out: list[Any] = []
    out.append(out)
    return out


@pytest.mark.parametrize(
    "config",
    [doubling(), endless(), torch.zeros(2), {1: 2}, {"a": {(): 1}}],
    ids=["doubling", "endless", "tensor", "number as key", "tuple as key"],
)
def test_bundle_whose_description_is_not_plain_data_is_refused(tmp_path: Path, config: Any) -> None:
    path = raw_bundle(tmp_path / "m.pt", {"format": 1, "config": config})
    assert "not plain data" in refusal(path)


def test_safetensors_description_that_is_no_json_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[" * 100_000, "[1]"):
        safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors", {"diffiqa": text})
        assert "damaged diffiqa bundle" in refusal(tmp_path / "m.safetensors")


GIANT = replace(FULL["maniqa"], name="giant", tabs=8, grid=128, crop=1024)  # eight TABs of (16384 × 16384) × 3: 26 TB


def test_giant_configuration_is_refused_by_shape_without_allocating(tmp_path: Path) -> None:
    path = raw_bundle(tmp_path / "m.safetensors", {"format": 1, "config": encode(GIANT)})
    message = refusal(path)
    assert "tabs.0.q.weight is (16, 16), must be (16384, 16384)" in message


def test_giant_tensors_made_of_one_number_are_refused_without_allocating(tmp_path: Path) -> None:
    one = torch.zeros(1)
    weights = {name: one.expand(t.shape) for name, t in on_meta(GIANT).state_dict().items()}
    path = raw_bundle(tmp_path / "m.pt", {"format": 1, "config": encode(GIANT)}, weights)
    assert "more numbers than the file has bytes" in refusal(path)


def test_configuration_with_giant_swin_tables_is_refused(tmp_path: Path) -> None:
    assert GIANT.vcg is not None
    swin = replace(GIANT.vcg.swin, window=64, layers=16, blocks=16)
    config = replace(GIANT, vcg=replace(GIANT.vcg, swin=swin))
    path = raw_bundle(tmp_path / "m.safetensors", {"format": 1, "config": encode(config)})
    assert "tables of its Swin windows would take" in refusal(path)


def test_no_preset_comes_near_the_limit_for_swin_tables() -> None:
    for config in FULL.values():
        held = sum(b.nbytes for b in on_meta(config).buffers() if not b.is_meta)
        assert 0 < held < checkpoint.MAX_SWIN_TABLE_BYTES / 20


def test_hole_in_a_bundle_is_damage_that_no_seed_mends(tmp_path: Path) -> None:
    weights = {n: t for n, t in build(TINY, SEED).state_dict().items() if not n.startswith("unet.")}
    path = raw_bundle(tmp_path / "m.pt", {"format": 1, "config": encode(TINY)}, weights)
    for seed in (None, 0):
        assert "unet.noise_level_mlp.1.weight, " in refusal(path, seed=seed)


def test_preset_wins_over_the_configuration_of_a_bundle_and_that_is_noted(tmp_path: Path) -> None:
    config = replace(TINY, name="slow", vda_weight=5.0)
    save_bundle(build(config, SEED), tmp_path / "m.pt")
    loaded = load(tmp_path / "m.pt", preset="paper")
    assert loaded.model.config == TINY
    assert loaded.notes == ("m.pt: its configuration 'slow' gives way to preset 'paper'",)


def test_part_with_its_own_file_replaces_that_of_a_bundle(tmp_path: Path) -> None:
    old, new = build(AUTHORS, 1), build(AUTHORS, 2)
    history = [Source("iqa", "a.pt", 1, "00", "x"), Source("unet", "b.pth", 1, "11", "SR3 U-Net")]
    save_bundle(old, tmp_path / "m.pt", sources=history)
    unet = saved(tmp_path / "I5_E2_gen.pth", sr3_file(new))
    loaded = load(tmp_path / "m.pt", unet=unet)
    assert_same(loaded.model, new, "unet.")
    assert_same(loaded.model, old, "tabs.", "vcg.", "vda.")
    assert [(s.role, s.name) for s in loaded.sources] == [("bundle", "m.pt"), ("unet", unet.name), ("iqa", "a.pt")]
    assert f"{unet.name}: its U-Net replaces that of m.pt" in loaded.notes


def test_part_can_be_taken_from_a_bundle(tmp_path: Path) -> None:
    old, new = build(TINY, 1), build(TINY, 2)
    save_bundle(old, tmp_path / "old.pt")
    save_bundle(new, tmp_path / "new.safetensors")
    loaded = load(tmp_path / "old.pt", vit=tmp_path / "new.safetensors")
    assert_same(loaded.model, new, "vcg.vit.")
    assert_same(loaded.model, old, "unet.", "tabs.", "vcg.swin", "vda.")
    assert "new.safetensors: only its ViT is used" in loaded.notes


# ---- the authors' files ----


@pytest.mark.parametrize("config", [AUTHORS, TINY], ids=["GroupNorm is authors", "BatchNorm is paper"])
def test_authors_network_with_its_unet_loads_and_tells_the_preset(tmp_path: Path, config: ModelConfig) -> None:
    model = build(config, SEED)
    iqa = saved(tmp_path / "epoch60.pt", iqa_file(model))
    unet = saved(tmp_path / "I796000_E1733_gen.pth", sr3_file(model))
    loaded = load(iqa, unet=unet)
    assert loaded.model.config == config
    assert_same(loaded.model, model)
    assert [(s.role, s.name, s.format) for s in loaded.sources] == [
        ("iqa", iqa.name, "Diff-V²-IQA authors' network"),
        ("unet", unet.name, "SR3 U-Net"),
    ]
    for source, path in zip(loaded.sources, (iqa, unet), strict=True):
        assert source.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert source.bytes == path.stat().st_size
    text = "\n".join(loaded.notes)
    assert "not used: ViT blocks from 3 on, after the last one that is read (tensors: 1, numbers: 192)" in text
    assert "final norm and head, which nothing reads (tensors: 2, numbers: 1,008)" in text
    assert "strided convolutions of the Swin stages" in text
    assert "layers the authors left in and never call (tensors: 3, numbers: 40)" in text
    assert "(tensors: 12, numbers: 24,000)" in text
    assert "trained with 2000 diffusion steps, sampled here with 50" in text


def test_authors_network_without_its_unet_says_which_file_is_needed(tmp_path: Path) -> None:
    iqa = saved(tmp_path / "epoch60.pt", iqa_file(build(AUTHORS, SEED)))
    message = refusal(iqa)
    assert "--unet" in message
    assert "_gen.pth" in message


def test_maniqa_loads_alone(tmp_path: Path) -> None:
    model = build(MANIQA, SEED)
    loaded = load(saved(tmp_path / "ckpt_koniq10k.pt", iqa_file(model)))
    assert loaded.model.config == MANIQA
    assert_same(loaded.model, model)
    assert [(s.role, s.format) for s in loaded.sources] == [("iqa", "MANIQA")]
    assert any("0.8 is assumed" in note and note.endswith("--swin-scale 0.13)") for note in loaded.notes)


def test_a_file_beside_the_checkpoint_says_what_weights_cannot_and_a_program_wins_over_it(tmp_path: Path) -> None:
    model = build(MANIQA, SEED)
    path = saved(tmp_path / "maniqa.pt", iqa_file(model))
    (tmp_path / "maniqa.toml").write_text("swin-scale = 0.13\nscore-range = [0, 100]\n")
    loaded = load(path, options={"score-range": (1, 5)})
    assert loaded.model.config.vcg is not None
    assert loaded.model.config.vcg.swin.scale == 0.13
    assert loaded.model.config.labels == Labels(1, 5)
    assert {(s.name, s.value, s.where) for s in loaded.settings if s.origin is Origin.GIVEN} == {
        ("swin-scale", "0.13", "maniqa.toml"),
        ("score-range", "1,5", ""),
    }
    assert not any("is assumed" in note for note in loaded.notes)
    elsewhere = tmp_path / "other.toml"
    elsewhere.write_text("swin-scale = 0.5\n")
    other = load(path, options_file=elsewhere).model.config
    assert other.vcg is not None
    assert (other.vcg.swin.scale, other.labels) == (0.5, Labels())  # the file beside is not read then


def test_what_was_read_and_assumed_is_told_apart(tmp_path: Path) -> None:
    def by(origin: Origin, *args: Any, **options: Any) -> list[str]:
        return [s.name for s in load(*args, **options).settings if s.origin is origin]

    iqa, unet = (saved(tmp_path / n, f(build(AUTHORS, SEED))) for n, f in (("a.pt", iqa_file), ("u.pth", sr3_file)))
    assert by(Origin.READ, iqa, unet=unet) == ["model", "U-Net"]
    assert by(Origin.ASSUMED, iqa, unet=unet)[:5] == ["swin-scale", "branch-weights", "steps", "taps", "norm-groups"]
    save_bundle(build(AUTHORS, SEED), tmp_path / "m.pt")
    assert by(Origin.ASSUMED, tmp_path / "m.pt") == []
    assert by(Origin.GIVEN, tmp_path / "m.pt", preset="authors") == ["model"]
    assert "swin-scale" in by(Origin.ASSUMED, tmp_path / "m.pt", preset="authors")


def test_maniqa_of_march_2022_brings_the_scale_of_its_code(tmp_path: Path) -> None:
    model = build(MANIQA, SEED)
    names = {name.replace("tablock", "channel_attn"): tensor for name, tensor in iqa_file(model).items()}
    loaded = load(saved(tmp_path / "manna.pt", names))
    assert_same(loaded.model, model)
    assert loaded.model.config.vcg is not None
    assert loaded.model.config.vcg.swin.scale == 0.13
    assert Setting(Origin.READ, "swin-scale", "0.13") in loaded.settings
    assert not any("assumed" in note for note in loaded.notes)


def test_checkpoint_of_lightning_loads(tmp_path: Path) -> None:
    model = build(MANIQA, SEED)
    weights = {f"model.{name}": tensor for name, tensor in iqa_file(model).items()}
    weights["criterion.weight"] = torch.ones(1)
    content = {"state_dict": weights, "hyper_parameters": {"lr": 1e-5}, "callbacks": {}, "epoch": 3}
    loaded = load(saved(tmp_path / "last.ckpt", content))
    assert_same(loaded.model, model)
    assert "last.ckpt: tensors beside those under model. ignored: criterion.weight" in loaded.notes
    assert any(note.endswith("ignored: hyper_parameters, callbacks, epoch") for note in loaded.notes)


@pytest.mark.parametrize("inside", [True, False], ids=["under a prefix", "as an entry"])
def test_moving_average_is_taken_and_that_is_said(tmp_path: Path, inside: bool) -> None:
    raw, average = iqa_file(build(MANIQA, 1)), iqa_file(build(MANIQA, 2))
    prefixed = {f"net.{n}": t for n, t in raw.items()} | {f"net_ema.{n}": t for n, t in average.items()}
    loaded = load(saved(tmp_path / "m.pt", prefixed if inside else {"net": raw, "params_ema": average}))
    assert_same(loaded.model, build(MANIQA, 2))
    key = "net_ema" if inside else "params_ema"
    assert f"m.pt: the moving average of its weights is taken ({key})" in loaded.notes


def test_folder_of_shards_loads(tmp_path: Path) -> None:
    model = build(MANIQA, SEED)
    weights = {name: tensor.contiguous() for name, tensor in iqa_file(model).items()}
    shards = {"a.safetensors": list(weights)[:40], "b.safetensors": list(weights)[40:]}
    for shard, names in shards.items():
        safetensors.torch.save_file({name: weights[name] for name in names}, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: shard for shard, names in shards.items() for name in names}}))
    tmp_path.with_name(f"{tmp_path.name}.toml").write_text("swin-scale = 0.13")
    loaded = load(tmp_path)
    assert_same(loaded.model, model)
    assert loaded.sources[0].name == index.name
    assert any(s.name == "swin-scale" and s.origin is Origin.GIVEN for s in loaded.settings)


def test_address_on_the_hub_loads_and_the_commit_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m.pt", iqa_file(build(MANIQA, SEED)))
    monkeypatch.setattr(hub, "fetch", lambda url: (path, f"downloaded from {url}, commit ab"))
    loaded = load(Path("hf://owner/name/m.pt"))
    assert loaded.sources[0].name == "m.pt"
    assert any(note.startswith("m.pt: downloaded from hf:") and note.endswith("commit ab") for note in loaded.notes)


OTHER_SIZE = UNetConfig(width=6, multipliers=(1, 3, 2), blocks=2, attention_levels=(0, 2), norm=Norm.GROUP, groups=2)


def test_sr3_unet_of_another_size_brings_its_size(tmp_path: Path) -> None:
    made = replace(AUTHORS, unet=OTHER_SIZE)
    model = build(made, SEED)
    iqa, unet = saved(tmp_path / "iqa.pt", iqa_file(model)), saved(tmp_path / "u.pth", sr3_file(model))
    for preset, options, groups in ((None, {}, 2), ("authors", {"norm-groups": 3}, 3)):
        loaded = load(iqa, unet=unet, preset=preset, options=options)
        assert loaded.model.config == replace(made, unet=replace(OTHER_SIZE, groups=groups))
        assert_same(loaded.model, model)
    size = "6 channels × 1-3-2, 2 residual blocks a level, attention at 1/1, 1/4, group norm"
    assert Setting(Origin.READ, "U-Net", size) in loaded.settings


def test_sr3_unet_of_another_size_replaces_that_of_a_bundle(tmp_path: Path) -> None:
    save_bundle(build(AUTHORS, SEED), tmp_path / "m.pt")
    other = build(replace(AUTHORS, unet=OTHER_SIZE), 1)
    loaded = load(tmp_path / "m.pt", unet=saved(tmp_path / "u.pth", sr3_file(other)))
    assert_same(loaded.model, other, "unet.")
    assert not any("gives way" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"multipliers": (1, 1, 1, 1, 1, 1)}, "of another size: 6 channels × 1-1-1-1-1-1, .* must be 2 to 5 numbers"),
        ({"width": 2}, "of another size: 2 channels .* must be an even number between 4 and 1024"),
    ],
)
def test_sr3_unet_of_a_size_that_ours_cannot_have_is_refused_in_one_sentence(
    tmp_path: Path, change: dict[str, Any], why: str
) -> None:
    with torch.device("meta"):
        sizes = UNet(replace(OTHER_SIZE, groups=1, **change)).state_dict()
    weights = {f"denoise_fn.{name}": torch.zeros(tensor.shape) for name, tensor in sizes.items()}
    iqa = saved(tmp_path / "iqa.pt", iqa_file(build(AUTHORS, SEED)))
    message = refusal(iqa, unet=saved(tmp_path / "u.pth", weights))
    assert re.search(rf"u\.pth is an SR3 U-Net {why}", message), message
    assert "\n" not in message
    assert "block1" not in message


def test_sr3_unets_of_another_kind_are_refused_in_one_sentence(tmp_path: Path) -> None:
    iqa = saved(tmp_path / "iqa.pt", iqa_file(build(AUTHORS, SEED)))
    plain = sr3_file(build(AUTHORS, SEED))
    name = "denoise_fn.downs.1.res_block.noise_func.noise_func.0.weight"
    affine = plain | {name: torch.ones(2 * plain[name].shape[0], 8)}
    single = plain | {"denoise_fn.downs.0.weight": torch.ones(8, 3, 3, 3)}
    ddpm = {
        n.replace("noise_level_mlp", "time_mlp").replace("noise_func.noise_func.0", "mlp.1"): t
        for n, t in plain.items()
    }
    for weights, why in (
        (affine, "trained with use_affine_level, which is not supported"),
        (single, "an SR3 U-Net with 3 input channels; one that restores has 6"),
        (ddpm, "the U-Net of SR3's DDPM variant, which is told the number of the step"),
    ):
        message = refusal(iqa, unet=saved(tmp_path / "u.pth", weights))
        assert why in message
        assert "\n" not in message


def test_maniqa_has_no_use_for_a_unet(tmp_path: Path) -> None:
    maniqa = saved(tmp_path / "maniqa.pt", iqa_file(build(MANIQA, SEED)))
    unet = saved(tmp_path / "unet.pth", sr3_file(build(AUTHORS, SEED)))
    assert "model 'maniqa' has no U-Net: leave out --unet" in refusal(maniqa, unet=unet)


@pytest.mark.parametrize("prefix", ["denoise_fn.", "", "module.denoise_fn.", "denoise_fn.module."])
def test_unet_is_found_under_any_prefix_it_is_saved_with(tmp_path: Path, prefix: str) -> None:
    model = build(AUTHORS, SEED)
    iqa = saved(tmp_path / "iqa.pt", iqa_file(model))
    unet = saved(tmp_path / "unet.pth", sr3_file(model, steps=50, prefix=prefix))
    loaded = load(iqa, unet=unet)
    assert_same(loaded.model, model)
    assert not any("diffusion steps" in note for note in loaded.notes)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "params", "net"])
def test_wrapped_weights_are_unwrapped(tmp_path: Path, wrapper: str) -> None:
    model = build(MANIQA, SEED)
    weights = {f"module.module.{name}": tensor for name, tensor in iqa_file(model).items()}
    content = {"epoch": 60, "optimizer": {"state": {}}, "best": torch.zeros(1), wrapper: weights | {"version": 3}}
    loaded = load(saved(tmp_path / "m.pt", content))
    assert_same(loaded.model, model)
    assert "m.pt: entries beside the weights ignored: epoch, optimizer, best, version" in loaded.notes


def test_safetensors_and_legacy_files_of_the_authors_load(tmp_path: Path) -> None:
    model = build(AUTHORS, SEED)
    iqa = tmp_path / "iqa.weights"  # recognised by content, whatever the name
    safetensors.torch.save_file({n: t.contiguous() for n, t in iqa_file(model).items()}, iqa)
    unet = saved(tmp_path / "unet", sr3_file(model), _use_new_zipfile_serialization=False)
    assert_same(load(iqa, unet=unet).model, model)


def test_plain_state_dict_of_ours_loads(tmp_path: Path) -> None:
    model = build(AUTHORS, SEED)
    loaded = load(saved(tmp_path / "m.pt", model.state_dict()))
    assert loaded.model.config == AUTHORS
    assert_same(loaded.model, model)
    assert loaded.sources[0].format == "diffiqa weights without configuration"


@pytest.mark.parametrize(
    ("make", "words", "option"),
    [(sr3_file, "U-Net", "--unet"), (vit_file, "ViT", "--vit"), (resnet_file, "ResNet", "--resnet")],
)
def test_part_given_as_checkpoint_is_refused_with_how_to_use_it(
    tmp_path: Path, make: Callable[[DiffV2IQA], Weights], words: str, option: str
) -> None:
    message = refusal(saved(tmp_path / "part.pth", make(build(AUTHORS, SEED))))
    assert f"only a part, the {words}" in message
    assert f"give it with {option}" in message
    assert "iqa convert --preset paper --vit VIT --resnet RESNET --seed 0 -o start.safetensors" in message


def test_file_given_with_the_wrong_option_is_refused(tmp_path: Path) -> None:
    model = build(AUTHORS, SEED)
    save_bundle(model, tmp_path / "m.pt")
    vit = saved(tmp_path / "vit.pth", vit_file(model))
    assert "given with --unet, has no U-Net: it is timm ViT" in refusal(tmp_path / "m.pt", unet=vit)


def test_optimizer_state_is_recognised(tmp_path: Path) -> None:
    adam = {"state": {0: {"step": 1, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-5, "params": [0]}]}
    content = {"epoch": 1, "iter": 2, "scheduler": None, "optimizer": adam}
    path = saved(tmp_path / "I2_E1_opt.pth", content)
    message = refusal(path)
    assert "state of an optimizer" in message
    assert "I2_E1_gen.pth" in message


def test_unknown_network_is_refused_by_its_names(tmp_path: Path) -> None:
    path = saved(tmp_path / "bert.pt", {"encoder.layer.0.weight": torch.ones(1)})
    assert "some other network: encoder.layer.0.weight" in refusal(path)


# ---- parts and a seed ----


def test_seed_starts_a_model_from_pretrained_parts(tmp_path: Path) -> None:
    donor, initial = build(TINY, 1), build(TINY, SEED)
    vit = saved(tmp_path / "vit.pth", vit_file(donor))
    resnet = saved(tmp_path / "resnet.pth", resnet_file(donor), _use_new_zipfile_serialization=False)
    loaded = load(None, vit=vit, resnet=resnet, preset="paper", seed=SEED)
    assert_same(loaded.model, donor, "vcg.vit.", "vda.resnet.")
    assert_same(loaded.model, initial, "unet.", "tabs.", "vcg.swin", "vda.rtab")
    assert [s.role for s in loaded.sources] == ["vit", "resnet", "seed", "seed", "seed", "seed"]
    untrained = [s for s in loaded.sources if s.role == "seed"]
    assert [s.name for s in untrained] == ["U-Net", "shared attention blocks", "VCG head", "VDA head"]
    given = sum(p.numel() for n, p in donor.named_parameters() if n.startswith(("vcg.vit.", "vda.resnet.")))
    assert sum(s.bytes for s in untrained) == 4 * (count_parameters(donor) - given)
    assert donor.unet is not None
    unet = count_parameters(donor.unet)
    assert f"untrained: U-Net, {unet:,} parameters with the initial values of seed {SEED}" in loaded.notes


def test_bundle_stays_untrained_until_the_part_is_given(tmp_path: Path) -> None:
    donor = build(AUTHORS, 1)
    iqa = saved(tmp_path / "iqa.pt", iqa_file(donor))
    first = load(iqa, preset="authors", seed=SEED)
    assert [s.role for s in first.sources] == ["iqa", "seed"]
    save_bundle(first.model, tmp_path / "m.pt", sources=first.sources, notes=first.notes)
    again = load(tmp_path / "m.pt")
    assert [s.role for s in again.sources] == ["bundle", "iqa", "seed"]
    assert again.notes == first.notes
    whole = load(tmp_path / "m.pt", unet=saved(tmp_path / "unet.pth", sr3_file(donor)))
    assert [s.role for s in whole.sources] == ["bundle", "unet", "iqa"]
    assert not any("untrained" in note for note in whole.notes)
    assert_same(whole.model, donor)


def test_untrained_part_taken_from_a_bundle_stays_marked(tmp_path: Path) -> None:
    donor = build(AUTHORS, 1)
    half = load(saved(tmp_path / "iqa.pt", iqa_file(donor)), preset="authors", seed=SEED)
    save_bundle(half.model, tmp_path / "half.pt", sources=half.sources, notes=half.notes)
    save_bundle(donor, tmp_path / "whole.pt")
    loaded = load(tmp_path / "whole.pt", unet=tmp_path / "half.pt")
    assert [s.role for s in loaded.sources] == ["bundle", "unet", "seed"]
    assert any(note.startswith("untrained: U-Net") for note in loaded.notes)
    trained = load(tmp_path / "whole.pt", vit=tmp_path / "half.pt")
    assert [s.role for s in trained.sources] == ["bundle", "vit"]


def test_seed_does_not_make_up_the_rest_of_a_part(tmp_path: Path) -> None:
    # GroupNorm's weights have the names and shapes of BatchNorm's: only the missing statistics tell.
    unet = saved(tmp_path / "unet.pth", sr3_file(build(AUTHORS, SEED)))
    message = refusal(None, unet=unet, preset="paper", seed=SEED)
    assert "running_mean" in message
    assert "Preset 'authors' fits: --preset authors" in message


@pytest.mark.parametrize("options", [{}, {"preset": "paper"}, {"seed": 0}])
def test_without_checkpoint_a_preset_and_a_seed_are_needed(options: dict[str, Any]) -> None:
    assert "a preset and a seed" in refusal(None, error=UsageError, **options)


def test_preset_must_be_chosen_where_weights_do_not_decide(tmp_path: Path) -> None:
    iqa = saved(tmp_path / "iqa.pt", iqa_file(build(AUTHORS, SEED)))
    assert "fit presets paper and authors" in refusal(iqa, seed=SEED, error=UsageError)


def test_unknown_preset_is_refused(tmp_path: Path) -> None:
    assert "there is no preset 'best'" in refusal(None, preset="best", seed=0, error=ConfigError)


# ---- weights that do not fit ----


def test_everything_that_does_not_fit_is_reported_at_once(tmp_path: Path) -> None:
    weights = dict(build(TINY, SEED).state_dict())
    for i in range(12):
        weights[f"vcg.extra.{i}"] = torch.ones(1)
    del weights["tabs.0.q.bias"]
    weights["tabs.0.q.weight"] = torch.ones(3, 3)
    weights["tabs.1.v.bias"] = torch.ones(16, dtype=torch.int64)
    weights["unet.\x1b[31m"] = torch.ones(1)
    path = raw_bundle(tmp_path / "m.pt", {"format": 1, "config": encode(TINY)}, weights)
    message = refusal(path)
    assert "does not fit model 'paper'" in message
    assert "missing (1): tabs.0.q.bias\n" in message
    assert "unknown to this model (13): vcg.extra.0, vcg.extra.1" in message
    assert "vcg.extra.7 … and 5 more\n" in message
    assert "of another shape (1): tabs.0.q.weight is (3, 3), must be (16, 16)\n" in message
    assert "of another type (1): tabs.1.v.bias is torch.int64, must be torch.float32" in message
    assert "\x1b" not in message


@pytest.mark.parametrize(("made", "asked"), [(AUTHORS, "paper"), (TINY, "authors"), (MANIQA, "authors")])
def test_preset_that_fits_is_suggested(tmp_path: Path, made: ModelConfig, asked: str) -> None:
    path = saved(tmp_path / "m.pt", build(made, SEED).state_dict())
    assert f"Preset {made.name!r} fits: --preset {made.name}" in refusal(path, preset=asked)


def test_closest_preset_is_suggested_where_none_fits(tmp_path: Path) -> None:
    weights = {**build(AUTHORS, SEED).state_dict(), "unet.ema": torch.ones(1)}
    message = refusal(saved(tmp_path / "m.pt", weights), preset="paper")
    assert "Preset 'authors' is closer (tensors that do not fit: 1): --preset authors" in message


def test_vit_of_another_kind_is_refused(tmp_path: Path) -> None:
    # A tensor inside a block that is used means another computation: not to be ignored like the head.
    model = build(MANIQA, SEED)
    path = saved(tmp_path / "m.pt", iqa_file(model) | {"vit.blocks.1.ls1.gamma": torch.ones(8)})
    assert "unknown to this model (1): vcg.vit.blocks.1.ls1.gamma" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_floating_types_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    model = build(TINY, SEED)
    weights = {n: t.to(dtype) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    loaded = load(saved(tmp_path / "m.pt", weights), preset="paper").model.state_dict()
    for name, tensor in weights.items():
        assert loaded[name].dtype == model.state_dict()[name].dtype
        assert torch.equal(loaded[name], tensor.to(loaded[name].dtype))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_weights_that_are_not_finite_in_float32_are_refused(tmp_path: Path, value: float) -> None:
    weights = dict(build(TINY, SEED).state_dict())
    weights["vcg.halve.bias"] = torch.tensor([0.0, value, 0.0, 0.0], dtype=torch.float64)
    message = refusal(saved(tmp_path / "m.pt", weights), preset="paper")
    assert "NaN, infinite or beyond float32: vcg.halve.bias" in message


def test_same_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    weights = iqa_file(build(MANIQA, SEED))
    path = saved(tmp_path / "m.pt", weights | {"module.conv1.bias": torch.ones(8)})
    assert "conv1.bias twice" in refusal(path)
    unet = sr3_file(build(AUTHORS, SEED))
    path = saved(tmp_path / "u.pt", unet | {"downs.0.bias": torch.ones(8)})
    assert "there twice" in refusal(None, unet=path, preset="authors", seed=0)


def test_sparse_and_quantized_tensors_are_refused(tmp_path: Path) -> None:
    for tensor in (torch.eye(3).to_sparse(), torch.empty(3, device="meta")):
        assert "not a plain dense tensor" in refusal(saved(tmp_path / "m.pt", {"conv1.weight": tensor}))
