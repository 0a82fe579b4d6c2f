import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffiqa.errors import CheckpointError, ConfigError
from diffiqa.export.stages import fold
from diffiqa.model.bundle import save_bundle
from diffiqa.model.checkpoint import load, load_part
from diffiqa.model.config import Encoder, ModelConfig
from diffiqa.model.heads import VDA
from diffiqa.model.lite import HEAD, LITE0, LITE2, Lite, Variant
from diffiqa.model.network import build
from diffiqa.training.start import begin

from ..tiny import TINY
from .lite_goldens import FILE, PICKED, fill, images, published

FEATURES = LITE0.features
LAST = slice(-2 * HEAD, -HEAD)  # means of the last map
VARIANTS = pytest.mark.parametrize("variant", [LITE0, LITE2], ids=lambda variant: variant.name)


def with_lite0(config: ModelConfig = TINY) -> ModelConfig:
    assert config.vda
    return dataclasses.replace(config, vda=dataclasses.replace(config.vda, encoder=Encoder.LITE0))


@VARIANTS
@torch.no_grad()
def test_computes_what_the_published_package_computed(variant: Variant) -> None:
    seen = fill(Lite(variant)).double()(images().double())  # in float32 CPUs differ by 3e-5
    expected = torch.tensor(json.loads(FILE.read_text())[variant.name.lower()], dtype=torch.float64)
    assert expected.std() > 0.1
    torch.testing.assert_close(seen[:, LAST][:, ::80][:, :PICKED], expected, atol=1e-9, rtol=1e-9)


@VARIANTS
@torch.no_grad()
def test_agrees_with_the_published_package_where_it_is_installed(variant: Variant) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = fill(package.EfficientNet.from_name(variant.name.lower(), image_size=224)).double()
    pictures = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    ours = fill(Lite(variant)).double()
    torch.testing.assert_close(ours(pictures)[:, LAST], published(theirs, pictures), atol=1e-9, rtol=1e-9)


@VARIANTS
@torch.no_grad()
def test_features_are_means_and_deviations_of_each_channel(variant: Variant) -> None:
    network = fill(Lite(variant))
    caught: list[Tensor] = []
    network.get_submodule("_blocks.2" if variant is LITE0 else "_blocks.3").register_forward_hook(
        lambda _module, _inputs, out: caught.append(out)
    )
    seen = network(images())
    assert seen.shape == (2, variant.features)
    (first,) = caught
    torch.testing.assert_close(seen[:, :24], first.mean(dim=(2, 3)))
    torch.testing.assert_close(seen[:, 24:48], first.std(dim=(2, 3), correction=0), atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_a_readout_brings_its_examples_to_mean_zero_and_deviation_one() -> None:
    readout = VDA(with_lite0(), with_lite0().vda or pytest.fail("no vda")).readout.eval()
    examples = torch.rand(500, FEATURES) * 7 + 3
    examples[:, 5] = 2.0  # constant: divided by a floor
    readout.fit(examples)
    readout.linear = torch.nn.Identity()  # type: ignore[assignment]
    out = readout(examples)
    assert out[:, :5].mean().abs() < 1e-4
    torch.testing.assert_close(out[:, 6:].std(0), torch.ones(FEATURES - 6))
    assert out[:, 5].abs().max() < 1e-3


@torch.no_grad()
def test_folding_changes_no_score_and_not_the_model() -> None:
    model = build(with_lite0(), 3)
    assert model.vda
    fill(model.vda.lite0)
    pictures = torch.rand(2, len(model.config.kinds), 3, TINY.crop, TINY.crop) * 2 - 1
    model.vda.readout.fit(model.vda.encode(pictures).flatten(0, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold(model.vda)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    expected = model.vda(pictures, model.tabs).score
    torch.testing.assert_close(folded(pictures, model.tabs).score, expected, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # What the encoder saw stands for the pictures.
    torch.testing.assert_close(model.vda(model.vda.encode(pictures), model.tabs).score, expected)


def package_file(folder: Path) -> Path:
    weights = fill(Lite(LITE0)).state_dict() | {"_fc.weight": torch.zeros(1000, HEAD), "_fc.bias": torch.zeros(1000)}
    path = folder / "efficientnet-lite0.pth"
    torch.save(weights, path)
    return path


def test_a_run_begins_with_the_packages_file(tmp_path: Path) -> None:
    begun = begin(with_lite0(), 1, {package_file(tmp_path): ("lite0",)})
    assert begun.model.vda
    assert torch.equal(begun.model.vda.lite0._conv_head.weight, fill(Lite(LITE0))._conv_head.weight)
    (source,) = [source for source in begun.sources if source.role == "lite0"]
    assert (source.name, source.format) == ("efficientnet-lite0.pth", "efficientnet-lite-pytorch")


def test_the_packages_file_replaces_the_encoder_of_a_bundle(tmp_path: Path) -> None:
    bundle = tmp_path / "model.safetensors"
    save_bundle(build(with_lite0(), 1), bundle)
    loaded = load(bundle, lite0=package_file(tmp_path))
    assert loaded.model.vda
    assert torch.equal(loaded.model.vda.lite0._conv_stem.weight, fill(Lite(LITE0))._conv_stem.weight)
    assert any("the classifier of EfficientNet-Lite" in note for note in loaded.notes)


def test_refuses_an_encoder_that_the_model_has_not(tmp_path: Path) -> None:
    bundle = tmp_path / "model.safetensors"
    save_bundle(build(TINY, 1), bundle)
    with pytest.raises(CheckpointError, match=r"has no EfficientNet-Lite0: leave out --lite0"):
        load(bundle, lite0=package_file(tmp_path))
    with pytest.raises(CheckpointError, match=r"has no ResNet: it is efficientnet-lite-pytorch"):
        load_part(package_file(tmp_path), "resnet")


@torch.no_grad()
def test_a_vit_for_smaller_patches_sees_the_picture_reduced(tmp_path: Path) -> None:
    assert TINY.vcg
    half = dataclasses.replace(TINY.vcg, vit=dataclasses.replace(TINY.vcg.vit, patch=TINY.vcg.vit.patch * 2))
    larger = dataclasses.replace(TINY, crop=TINY.crop * 2, vcg=half)
    save_bundle(build(TINY, 1), tmp_path / "small.safetensors")
    begun = begin(larger, 2, {tmp_path / "small.safetensors": ("vit",)}).model
    small = load(tmp_path / "small.safetensors").model
    pictures = torch.rand(1, 1, 3, larger.crop, larger.crop) * 2 - 1
    reduced = torch.nn.functional.avg_pool2d(pictures[:, 0], 2)[:, None]
    torch.testing.assert_close(begun.vit_maps(pictures), small.vit_maps(reduced), atol=1e-5, rtol=1e-5)


def test_refuses_an_unknown_encoder() -> None:
    from diffiqa.engine.codec import decode, encode

    values = encode(with_lite0())
    values["vda"]["encoder"] = "vgg"
    with pytest.raises(ConfigError, match="one of resnet, lite0"):
        decode(ModelConfig, values, "configuration", ConfigError)
