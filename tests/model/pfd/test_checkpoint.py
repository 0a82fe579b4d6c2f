"""Bundles of PFD-IQA, encoders of other programs, and the two systems told apart."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from diffiqa.engine.manifest import Source
from diffiqa.engine.schedule import Ddim
from diffiqa.errors import CheckpointError, ConfigError, UsageError
from diffiqa.export.cli import convert
from diffiqa.model import lite
from diffiqa.model.bundle import save_bundle
from diffiqa.model.checkpoint import Loaded
from diffiqa.model.checkpoint import load as load_diff
from diffiqa.model.network import build as build_diff
from diffiqa.model.pfd.checkpoint import LoadedPfd, PfdBundle, begin, load, load_either
from diffiqa.model.pfd.config import PFD_PRESETS, PfdConfig, Prompts, Words, pfd_preset
from diffiqa.model.pfd.network import PfdIQA, build
from diffiqa.model.pfd.prompts import PromptSet

from ...tiny import TINY
from ..lite_goldens import fill
from .small import LITE0, LITE2, SMALL

save = partial(save_bundle, kind=PfdBundle)


def same(a: PfdIQA, b: PfdIQA) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(x == y and torch.equal(s, t) for (x, s), (y, t) in pairs)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("config", [SMALL, replace(LITE0, prompts=Prompts.LEARNED)], ids=["vit", "lite0, learned"])
def test_a_bundle_comes_back_as_it_was(config: PfdConfig, suffix: str, tmp_path: Path) -> None:
    model, origin = build(config, 1), Source("prompts", "p.safetensors", 5, "0" * 64, "prompts")
    save(model, path := tmp_path / f"m{suffix}", sources=[origin], notes=["a note"])
    loaded = load(path)
    assert loaded.model.config == config
    assert same(loaded.model, model)
    assert not loaded.model.training
    assert loaded.model.prior.levels.prompts.requires_grad == (config.prompts is Prompts.LEARNED)
    assert loaded.sources[1:] == (origin,)
    assert loaded.notes == ("a note",)
    images = torch.rand(1, 3, 64, 80) * 2 - 1
    assert torch.equal(loaded.model.score(images).score, model.score(images).score)


def test_each_system_refuses_the_other_by_name(tmp_path: Path) -> None:
    save(build(SMALL, 1), pfd := tmp_path / "pfd.safetensors")
    save_bundle(build_diff(TINY, 1), diff := tmp_path / "diff.safetensors")
    with pytest.raises(CheckpointError, match=r"pfd\.safetensors is a PFD-IQA checkpoint; this command wants a Diff"):
        load_diff(pfd)
    with pytest.raises(CheckpointError, match=r"diff\.safetensors is a Diff-V²-IQA checkpoint; this command wants a P"):
        load(diff)
    torch.save(build_diff(TINY, 1).state_dict(), plain := tmp_path / "plain.pt")
    with pytest.raises(CheckpointError, match="is a Diff-V²-IQA checkpoint; this command wants a PFD-IQA checkpoint"):
        load(plain)


def test_commands_for_both_systems_take_either_and_refuse_options_of_the_other(tmp_path: Path) -> None:
    model = build(SMALL, 1)
    save(model, pfd := tmp_path / "pfd.safetensors", sources=[Source("prompts", "p", 1, "0" * 64, "words")])
    save_bundle(build_diff(TINY, 1), diff := tmp_path / "diff.safetensors")
    assert isinstance(load_either(diff), Loaded)
    result = CliRunner().invoke(convert, ["--ckpt", str(pfd), "--half", "-o", str(half := tmp_path / "half.pt")])
    assert result.exit_code == 0, result.output
    found = load_either(half)
    assert isinstance(found, LoadedPfd)
    assert [source.role for source in found.sources] == ["bundle", "bundle", "prompts"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name], tensor.half().to(tensor.dtype), atol=0, rtol=0)
    for given, message in (
        ({"ckpt": pfd, "unet": diff}, "pfd.safetensors is PFD-IQA, which takes no --unet"),
        ({"ckpt": pfd, "options": {"mean": 0.5, "crop-count": 9}}, "which takes no --mean, --crop-count$"),
        ({"ckpt": pfd, "options_file": diff}, "which takes no --options$"),
        ({"ckpt": pfd, "preset": "mini"}, "which takes no --preset"),
        ({"ckpt": pfd, "preset": "pfd-mini", "seed": 0}, "give --seed N, and no checkpoint"),
        ({"ckpt": None, "preset": "pfd-mini"}, "give --seed N, and no checkpoint"),
    ):
        with pytest.raises(UsageError, match=message):
            load_either(**given)


def deiqt(model: PfdIQA) -> dict[str, Tensor]:
    """A model's encoder and decoder under the names of DEIQT's program."""
    out = {}
    for name, tensor in model.state_dict().items():
        part, _, rest = name.partition(".")
        if part == "encoder":
            out[rest] = tensor
        elif part == "decoder":
            first, _, last = rest.partition(".")
            named = {
                "panels": "bunch_embedding",
                "layer": f"bunch_decoder.layers.0.{last}",
                "head": f"heads.{last}",
            }
            out[f"head.{named[first]}"] = tensor
    return out


def part(model: PfdIQA, prefix: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name.startswith(prefix)}


def test_deiqts_weights_fit_under_their_names(tmp_path: Path) -> None:
    theirs, ours = build(SMALL, 1), build(SMALL, 2)
    torch.save({"model": deiqt(theirs), "epoch": 8}, path := tmp_path / "deiqt.pth")
    begun = begin(SMALL, 2, encoder=path)
    for prefix, origin in (("encoder.", theirs), ("decoder.", theirs), ("prior.", ours), ("denoiser.", ours)):
        found, wanted = part(begun.model, prefix), part(origin, prefix)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert [(s.role, s.name, s.format) for s in begun.sources] == [("encoder", "deiqt.pth", "DEIQT")]
    assert begun.notes == ("untrained: initial values of seed 2, but for decoder and encoder",)
    with pytest.raises(CheckpointError, match="DEIQT's network, a part of PFD-IQA; this command wants Diff-V²-IQA"):
        load_diff(path)


def test_names_of_deiqt_are_those_of_its_full_size() -> None:
    with torch.device("meta"):
        names = deiqt(PfdIQA(PFD_PRESETS["pfd-paper"]))
    shapes = {name: tuple(tensor.shape) for name, tensor in names.items()}
    assert shapes["pos_embed"] == (1, 196, 384)
    assert shapes["blocks.11.gamma_2"] == (384,)
    assert shapes["head.bunch_decoder.layers.0.multihead_attn.in_proj_weight"] == (1152, 384)
    assert shapes["head.bunch_decoder.layers.0.linear1.weight"] == (1536, 384)
    assert shapes["head.bunch_embedding"] == (1, 6, 384)
    assert shapes["head.heads.weight"] == (1, 384)
    assert "head.heads.bias" not in shapes


def test_an_encoder_may_come_alone_with_its_classifier(tmp_path: Path) -> None:
    alone = {name: tensor for name, tensor in deiqt(build(SMALL, 1)).items() if not name.startswith("head.")}
    torch.save(
        alone | {"head.weight": torch.zeros(10, 16), "head.bias": torch.zeros(10)}, path := tmp_path / "deit.pth"
    )
    begun = begin(SMALL, 2, encoder=path)
    assert torch.equal(begun.model.get_parameter("encoder.pos_embed"), alone["pos_embed"])
    assert torch.equal(begun.model.decoder.panels, build(SMALL, 2).decoder.panels)
    assert begun.notes[0].endswith("but for encoder")
    assert "the classifier of DeiT" in begun.notes[1]

    torch.save(
        fill(lite.Lite(lite.LITE0)).state_dict() | {"_fc.bias": torch.zeros(1000)}, path := tmp_path / "lite0.pth"
    )
    begun = begin(LITE0, 2, encoder=path)
    assert torch.equal(
        begun.model.get_parameter("encoder.lite._conv_stem.weight"), fill(lite.Lite(lite.LITE0))._conv_stem.weight
    )
    with pytest.raises(CheckpointError, match=r"has 16 blocks, and EfficientNet-Lite2, which .* wants, has 21"):
        begin(LITE2, 2, encoder=path)
    own = "encoder.project.weight"
    assert torch.equal(begun.model.get_parameter(own), build(LITE0, 2).get_parameter(own))


REFUSED: dict[str, tuple[PfdConfig, Callable[[dict[str, Tensor]], object], str]] = {
    "the other encoder": (LITE0, lambda w: w, "is DEIQT; model 'small' wants an encoder of efficientnet-lite-pytorch"),
    "a tensor is missing": (SMALL, lambda w: w.pop("norm.bias"), r"missing \(1\): encoder.norm.bias"),
    "of another depth": (replace(SMALL, blocks=1), lambda w: w, r"unknown to this model \(14\)"),
    "of another width": (replace(SMALL, width=32), lambda w: w, "pos_embed is .1, 16, 16., must be .1, 16, 32."),
    "not finite": (SMALL, lambda w: w.update(pos_embed=w["pos_embed"] / 0), "NaN, infinite"),
    "a stranger": (SMALL, lambda w: [w.pop(name) for name in list(w) if "blocks" in name], "is some other network"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_an_encoder_that_does_not_fit(name: str, tmp_path: Path) -> None:
    config, change, message = REFUSED[name]
    weights = deiqt(build(SMALL, 1))
    change(weights)
    torch.save(weights, path := tmp_path / "deiqt.pth")
    with pytest.raises(CheckpointError, match=message):
        begin(config, 1, encoder=path)


def test_refuses_a_bundle_whose_numbers_are_not_in_the_file(tmp_path: Path) -> None:
    save(build(SMALL, 1), path := tmp_path / "m.pt")
    content = torch.load(path, weights_only=True)
    content["config"]["schedule"]["train_steps"] = 10000
    content["weights"]["denoiser.time.weight"] = torch.zeros(1).expand(10000, 16)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="more numbers than the file has bytes"):
        load(path)


def test_a_run_begins_with_prompts(tmp_path: Path) -> None:
    words = Words(("blur", "rain"), ("bad", "fair", "good"))
    rows = torch.nn.functional.normalize(torch.rand(5, 10), dim=1)
    source = Source("prompts", "p.safetensors", 1, "0" * 64, "prompts")
    learned = replace(SMALL, prompts=Prompts.LEARNED)
    begun = begin(learned, 1, prompts=PromptSet(words, rows[:2], rows[2:], source))
    assert (begun.model.config.words, begun.model.config.prompts) == (words, Prompts.CONSTANT)
    assert torch.equal(begun.model.prior.distortions.prompts, rows[:2])
    assert torch.equal(begun.model.prior.levels.prompts, rows[2:])
    assert begun.sources == (source,)
    assert begun.notes == ("untrained: initial values of seed 1, but for the prompts",)
    with pytest.raises(ConfigError, match=r"from p\.safetensors are 10 wide, model 'small' wants 11: take those of"):
        begin(replace(SMALL, prompt_width=11), 1, prompts=PromptSet(words, rows[:2], rows[2:], source))


def test_refuses_a_configuration_that_cannot_be_built() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"width": 18}, "width must be a multiple of 4, heads"),
        ({"crop": 72}, "crop must be a multiple of patch"),
        ({"crop": 48, "encoder": LITE0.encoder}, "multiple of 32 for Lite"),
        ({"patch": 8, "encoder": LITE0.encoder}, "patch must be 16"),
        ({"schedule": Ddim(timesteps=(100, 200))}, "timesteps must fall"),
        ({"schedule": Ddim(timesteps=(1000, 0))}, "timesteps must fall"),
        ({"schedule": Ddim(beta_end=1.0)}, "betas must rise between 0 and 1"),
        ({"mask_ratio": 1.0}, "mask_ratio"),
        ({"temperature": 0.0}, "temperature"),
        ({"panels": 0}, "sizes"),
        ({"blocks": 99}, "blocks"),
        ({"decoder_eps": 1.0}, "decoder_eps"),
        ({"name": "a b"}, "name must be"),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            replace(SMALL, **changes)


def test_presets_go_by_name_and_both_have_maps_of_14x14() -> None:
    assert pfd_preset("pfd-paper").grid == pfd_preset("pfd-mini").grid == 14
    with pytest.raises(ConfigError, match="no PFD-IQA preset 'paper'; choose from pfd-paper, pfd-mini"):
        pfd_preset("paper")
