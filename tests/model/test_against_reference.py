"""The PyTorch network against `reference.py`: two implementations of one definition, by different hands.

The modules run in float64, as the reference does, so that all that is left between them is the order of sums: 1e-9 of
the largest number is far above that, and far below what any change of a definition makes (an epsilon of 1e-5 for 1e-6
in a layer norm is 5e-6). Every weight and statistic is random: initial zeros and ones hide mistakes.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffiqa.engine.noise import NoiseField
from diffiqa.engine.sampling import Sampling
from diffiqa.engine.schedule import Kind, Schedule, Taps
from diffiqa.model.config import PRESETS, ModelConfig, Norm, SwinConfig, UNetConfig, VCGConfig, VDAConfig, ViTConfig
from diffiqa.model.network import DiffV2IQA, build
from diffiqa.model.resnet import ResNet
from diffiqa.model.unet import UNet
from diffiqa.model.vit import ViT
from diffiqa.runtime.host.sampler import restore

from . import reference as ref
from .comparing import Array, Weights, agree, images, randomised

TOLERANCE = 1e-9

LEVELS3 = UNetConfig(width=8, multipliers=(1, 2, 2), blocks=2, attention_levels=(1,), groups=4)
LEVELS5 = UNetConfig(width=4, multipliers=(1, 2, 4, 8, 8), blocks=2, attention_levels=(3,), groups=2)
SWIN = SwinConfig(layers=2, blocks=2, heads=4, window=4, mlp=24)
VCG = VCGConfig(
    vit=ViTConfig(patch=8, width=12, heads=3, mlp=20),
    selection={Kind.DIS: (0, 1, 3), Kind.Y0: (1, 2), Kind.T1: (3,), Kind.T2: (0,)},
    noise_code=5,
    squeeze=(20, 16),
    swin=SWIN,
)
VDA = VDAConfig(resnet_width=4, resnet_blocks=(1, 2, 1, 1), classes=24, width=6)
SMALL = ModelConfig(
    name="small",
    unet=LEVELS3,
    schedule=Schedule(steps=6),
    taps=Taps(t1=2, t2=4),
    crop=64,
    grid=8,
    vcg=VCG,
    vda=VDA,
)
MANIQA = replace(
    SMALL,
    name="small-maniqa",
    unet=None,
    vda=None,
    vcg=replace(VCG, selection={Kind.DIS: (0, 1, 2, 3)}, noise_code=0, squeeze=(16,)),
)


def agree_scores(actual: tuple[Tensor, Tensor, Tensor], expected: ref.Scored) -> None:
    assert (expected[1] > 0).mean() > 0.05, "dead score head: choose another seed"
    assert ((expected[2] > 0.01) & (expected[2] < 0.99)).mean() > 0.3, "saturated weight head: choose another seed"
    for what, ours, theirs in zip(("score", "score map", "weight map"), actual, expected, strict=True):
        agree(ours, theirs, what)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# The U-Net


@pytest.mark.parametrize("norm", list(Norm))
@pytest.mark.parametrize(
    ("config", "height", "width"),
    [(LEVELS3, 12, 20), (LEVELS5, 16, 32), (replace(LEVELS3, attention_levels=(0, 2), blocks=1), 8, 4)],
    ids=["three levels", "five levels", "other attention"],
)
def test_unet_is_sr3s_with_either_norm(config: UNetConfig, height: int, width: int, norm: Norm) -> None:
    config = replace(config, norm=norm)
    net, random = randomised(UNet(config), 1), np.random.default_rng(1)
    weights = Weights(net)
    y, condition = random.standard_normal((2, 3, height, width)), images(random, 2, 3, height, width)
    level = random.uniform(0.05, 1, (2, 1))
    expected = ref.unet(weights, config, y, condition, level)
    agree(net(torch.from_numpy(y), torch.from_numpy(condition), torch.from_numpy(level)), expected)
    assert not weights.unread()


def test_unet_embeds_the_continuous_level_as_sines_then_cosines() -> None:
    net = randomised(UNet(LEVELS3), 3)
    seen: list[Tensor] = []
    mlp = net.get_submodule("noise_level_mlp.1")
    handle = mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    level = np.array([[1.0], [0.37], [0.001]])
    zeros = torch.zeros(3, 3, 4, 4, dtype=torch.float64)
    net(zeros, zeros, torch.from_numpy(level))
    handle.remove()
    frequencies = 1e4 ** -(np.arange(4) / 4)
    agree(seen[0].reshape(3, 8), np.hstack([np.sin(level * frequencies), np.cos(level * frequencies)]))


@pytest.mark.parametrize("norm", list(Norm))
def test_unet_images_of_a_batch_do_not_meet(norm: Norm) -> None:
    net, random = randomised(UNet(replace(LEVELS3, norm=norm)), 4), np.random.default_rng(4)
    y, condition = (torch.from_numpy(random.standard_normal((2, 3, 8, 8))) for _ in range(2))
    level = torch.tensor([[0.2], [0.9]], dtype=torch.float64)
    alone = torch.cat([net(y[n : n + 1], condition[n : n + 1], level[n : n + 1]) for n in range(2)])
    agree(net(y, condition, level), alone.numpy())


def test_unet_has_the_published_size_and_cost() -> None:
    with torch.device("meta"):
        net, y = UNet(UNetConfig()).eval(), torch.zeros(1, 3, 224, 224)
        with FlopCounterMode(display=False) as counter:
            net(y, y, torch.zeros(1, 1))
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(97.8, abs=0.05)
    assert counter.get_total_flops() / 2e9 == pytest.approx(143.6, abs=0.05)


class TorchDenoiser:
    """A float64 U-Net behind the loop's float32 buffers."""

    def __init__(self, net: UNet, condition: Array) -> None:
        self.y = np.empty(condition.shape, np.float32)
        self.noise = np.empty(condition.shape, np.float32)
        self._net, self._condition = net, torch.from_numpy(condition[None])

    def __call__(self, noise_level: float) -> None:
        y = torch.from_numpy(self.y.astype(np.float64)[None])
        level = torch.tensor([[noise_level]], dtype=torch.float64)
        self.noise[...] = self._net(y, self._condition, level)[0].numpy()


def test_six_steps_of_restoration_with_a_unet_and_their_taps() -> None:
    random, schedule, taps = np.random.default_rng(5), Schedule(steps=6), Taps(t1=2, t2=4)
    net = randomised(UNet(LEVELS3), 5)
    # A prediction as small as this one leaves most estimates of the last steps between the ends of the clamp.
    net.get_parameter("final_conv.block.3.weight").mul_(0.3)
    weights, condition = Weights(net), images(random, 3, 8, 12)
    field = NoiseField(5, (8, 12))
    rows = Sampling.trained(schedule).rows(schedule, taps, tuple(Kind))
    restored = restore(TorchDenoiser(net, condition), field, rows)

    z32 = np.empty((3, 8, 12), np.float32)
    bars, states, inside = ref.alpha_bars(6), {}, {}
    field.fill(6, z32)
    y = z32.astype(np.float64)
    for i in (5, 4, 3, 2, 1, 0):
        eps = ref.unet(weights, LEVELS3, y[None], condition[None], np.full((1, 1), math.sqrt(bars[i])))[0]
        field.fill(i, z32)
        y, x0 = ref.sampling_step(bars, i, y, eps, z32.astype(np.float64))
        states[i], inside[i] = y, (np.abs(x0) < 1).mean()
    assert 0.2 < inside[0] < 1
    assert set(restored) == {Kind.Y0, Kind.T1, Kind.T2}
    for kind, i in ((Kind.Y0, 0), (Kind.T1, 2), (Kind.T2, 4)):
        # The state is float32, and the first estimate multiplies its rounding by 1/√ᾱ ≈ 120.
        np.testing.assert_allclose(restored[kind], states[i], rtol=0, atol=5e-5, err_msg=kind)


# The ViT


@pytest.mark.parametrize("layers", [(0, 1, 2, 3), (1, 3), (2,)], ids=repr)
def test_vit_gives_timms_blocks_without_the_class_token(layers: tuple[int, ...]) -> None:
    net, random = randomised(ViT(VCG.vit, image=32, blocks=4), 1), np.random.default_rng(1)
    pictures = images(random, 3, 3, 32, 32)
    agree(net(torch.from_numpy(pictures), layers), ref.vit(Weights(net, "vit."), "vit", VCG.vit, pictures, layers))


def test_vit_ends_with_its_last_block() -> None:
    net, pictures = randomised(ViT(VCG.vit, image=16, blocks=3), 3), np.zeros((1, 3, 16, 16))
    weights = Weights(net, "vit.")
    ref.vit(weights, "vit", VCG.vit, pictures, (2,))
    assert not weights.unread()


# The ResNet


@pytest.mark.parametrize("blocks", [(2, 1, 3, 1), (1, 2, 1, 2)], ids=repr)
def test_resnet_strides_in_its_3x3_convolutions(blocks: tuple[int, ...]) -> None:
    net, random = randomised(ResNet(4, blocks, 10), 1), np.random.default_rng(1)
    weights, pictures = Weights(net, "resnet."), images(random, 2, 3, 64, 96)
    agree(net(torch.from_numpy(pictures)), ref.resnet(weights, "resnet", 4, blocks, pictures))
    assert not weights.unread()


# TAB


@pytest.mark.parametrize("channels", [1, 16, 64, 104])
def test_tab_reads_its_transposed_result_as_if_it_were_not(channels: int) -> None:
    model, random = randomised(build(SMALL, 0), 1), np.random.default_rng(1)
    weights, x = Weights(model), random.standard_normal((2, channels, 64))
    expected = ref.tab(weights, "tabs.1", x)
    agree(model.tabs[1](torch.from_numpy(x)), expected)
    inverse = ref.tab_with_inverse_transpose(weights, "tabs.1", x)
    if channels == 1:  # nothing to transpose
        np.testing.assert_allclose(inverse, expected, rtol=TOLERANCE)
    else:
        assert np.abs(inverse - expected).max() > 0.1


# VCG


def vcg(**changes: object) -> ModelConfig:
    return replace(SMALL, vcg=replace(VCG, **changes))  # type: ignore[arg-type]


def swin(**changes: object) -> ModelConfig:
    return vcg(swin=replace(SWIN, **changes))  # type: ignore[arg-type]


VCG_CASES = {
    "as in the paper": SMALL,
    "three windows a side": replace(SMALL, crop=96, grid=12),
    "window of 2, shift of 1": swin(window=2),
    "one window block": swin(blocks=1),
    "three layers of four blocks": swin(layers=3, blocks=4),
    "scale of 0.13": swin(scale=0.13),
    "no TAB": replace(SMALL, tabs=0),
    "three TABs": replace(SMALL, tabs=3),
    "one squeeze": vcg(squeeze=(16,)),
    "three squeezes": vcg(squeeze=(30, 10, 8)),
    "no noise code": vcg(noise_code=0),
    "kinds named in another order": vcg(selection=dict(reversed(VCG.selection.items()))),
    "equal ratio": vcg(selection=dict.fromkeys(Kind, (0, 2))),
    "without y_t2": vcg(selection={Kind.DIS: (0, 1, 3), Kind.Y0: (2,), Kind.T1: (3,)}),
    "only dis and y_t2": vcg(selection={Kind.DIS: (1,), Kind.T2: (3,)}),
    "no VDA": replace(SMALL, vda=None),
    "no VDA, no y_t1": replace(vcg(selection={Kind.DIS: (0, 1), Kind.Y0: (2,), Kind.T2: (3,)}), vda=None),
    "no VDA, dis alone": MANIQA,
}


@pytest.mark.parametrize("name", VCG_CASES)
def test_vcg_is_its_definition(name: str) -> None:
    config = VCG_CASES[name]
    model, random = randomised(build(config, 0), 2), np.random.default_rng(2)
    weights = Weights(model)
    assert config.vcg
    maps = random.standard_normal((2, len(config.kinds), len(config.vcg.layers), config.tokens, config.vcg.vit.width))
    agree_scores(model.vcg_scores(torch.from_numpy(maps)), ref.vcg_scores(weights, config, maps))
    assert not {name for name in weights.unread() if not name.startswith(("unet.", "vcg.vit.", "vda."))}


@pytest.mark.parametrize("name", ["as in the paper", "without y_t2", "no VDA, no y_t1", "no VDA, dis alone"])
def test_vit_maps_hold_every_kind_and_the_union_of_layers(name: str) -> None:
    config = VCG_CASES[name]
    model, random = randomised(build(config, 0), 2), np.random.default_rng(2)
    pictures = images(random, 2, len(config.kinds), 3, 64, 64)
    agree(model.vit_maps(torch.from_numpy(pictures)), ref.vit_maps(Weights(model), config, pictures))


def test_vcg_from_images_to_score() -> None:
    model, random = randomised(build(SMALL, 0), 2), np.random.default_rng(2)
    weights, pictures = Weights(model), images(random, 2, 4, 3, 64, 64)
    expected = ref.vcg_scores(weights, SMALL, ref.vit_maps(weights, SMALL, pictures))
    agree_scores(model.vcg_scores(model.vit_maps(torch.from_numpy(pictures))), expected)
    assert not {name for name in weights.unread() if not name.startswith(("unet.", "vda."))}


def test_swin_masks_with_minus_100_and_not_with_infinity() -> None:
    model, random = randomised(build(SMALL, 0), 2), np.random.default_rng(2)
    for name, table in model.state_dict().items():
        if name.endswith("relative_position_bias_table"):
            table.mul_(40)  # large enough for a masked token to win all the same
    maps = random.standard_normal((2, 4, 4, 64, 12))
    agree_scores(model.vcg_scores(torch.from_numpy(maps)), ref.vcg_scores(Weights(model), SMALL, maps))


def test_vcg_over_the_distorted_image_without_code_is_maniqa() -> None:
    model, random = randomised(build(MANIQA, 0), 2), np.random.default_rng(2)
    weights, pictures = Weights(model), images(random, 3, 3, 64, 64)
    expected = ref.maniqa(weights, MANIQA, pictures)
    score, _, _ = model.vcg_scores(model.vit_maps(torch.from_numpy(pictures)[:, None]))
    agree(score, expected)
    assert not weights.unread()


def test_maniqas_preset_has_no_other_kind_and_no_code() -> None:
    config = PRESETS["maniqa"]
    assert config.kinds == (Kind.DIS,)
    assert config.vcg
    assert (config.vcg.channels, config.vcg.squeeze) == (3072, (768,))


def test_papers_map_has_6912_channels() -> None:
    config = PRESETS["paper"].vcg
    assert config
    assert (config.channels, config.squeeze, config.layers) == (6912, (2304, 768), (6, 7, 8, 9))


# VDA


def vda(query: Kind, key: Kind, value: Kind) -> ModelConfig:
    return replace(SMALL, vda=replace(VDA, query=query, key=key, value=value))


def vda_alone(query: Kind, key: Kind, value: Kind) -> ModelConfig:
    return replace(vda(query, key, value), vcg=None)


RESTORED = (Kind.Y0, Kind.T1, Kind.T2)
ROLES = (RESTORED, (Kind.T1, Kind.T2, Kind.Y0), (Kind.T2, Kind.Y0, Kind.T1))  # each kind in each of the three
VDA_CASES = (
    {f"q={q} k={k} v={v}": vda(q, k, v) for q, k, v in ROLES}
    | {"no VCG": vda_alone(*RESTORED), "no VCG, no TAB": replace(vda_alone(*RESTORED), tabs=0)}
    | {"no VCG, no y_t1": vda_alone(Kind.Y0, Kind.T2, Kind.T2), "no VCG, y_0": vda_alone(Kind.Y0, Kind.Y0, Kind.Y0)}
)


@pytest.mark.parametrize("name", VDA_CASES)
def test_vda_is_its_definition(name: str) -> None:
    config = VDA_CASES[name]
    model, random = randomised(build(config, 0), 2), np.random.default_rng(2)
    weights, pictures = Weights(model), images(random, 2, len(config.kinds), 3, 64, 64)
    agree_scores(model.vda_scores(torch.from_numpy(pictures)), ref.vda_scores(weights, config, pictures))
    assert not {name for name in weights.unread() if not name.startswith(("unet.", "vcg."))}


def test_by_default_the_noisier_tap_is_the_value() -> None:
    assert (VDAConfig().query, VDAConfig().key, VDAConfig().value) == RESTORED


def test_every_assignment_of_query_key_and_value_gives_another_score() -> None:
    pictures = torch.from_numpy(images(np.random.default_rng(2), 1, 4, 3, 64, 64))
    scores = [
        randomised(build(vda(*kinds), 0), 2).vda_scores(pictures)[0].item()
        for kinds in itertools.permutations(RESTORED)
    ]
    assert np.diff(sorted(scores)).min() > 1e-6


# Both


def test_both_branches_use_the_same_tabs() -> None:
    model, random = randomised(build(SMALL, 0), 2), np.random.default_rng(2)
    assert {name.split(".")[0] for name in Weights(model) if "tab" in name.split(".")[0]} == {"tabs"}
    maps = torch.from_numpy(random.standard_normal((1, 4, 4, 64, 12)))
    pictures = torch.from_numpy(images(random, 1, 4, 3, 64, 64))
    before = model.vcg_scores(maps)[1], model.vda_scores(pictures)[1]
    model.get_parameter("tabs.0.v.bias").add_(0.5)
    for old, new in zip(before, (model.vcg_scores(maps)[1], model.vda_scores(pictures)[1]), strict=True):
        assert (old - new).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("config", "missing"),
    [
        (SMALL, set()),
        (VCG_CASES["no VDA"], {"vda"}),
        (VDA_CASES["no VCG"], {"vcg"}),
        (MANIQA, {"unet", "vda"}),
    ],
    ids=["all", "no VDA", "no VCG", "maniqa"],
)
def test_a_part_that_is_ablated_has_no_weights(config: ModelConfig, missing: set[str]) -> None:
    model: DiffV2IQA = build(config, 1)
    assert {name.split(".")[0] for name in model.state_dict()} == {"unet", "tabs", "vcg", "vda"} - missing
    for part in ("unet", "vcg", "vda"):
        assert (getattr(model, part) is None) == (part in missing)


def test_a_model_is_built_in_eval_mode_from_its_seed() -> None:
    one, same, other = (build(SMALL, seed) for seed in (1, 1, 2))
    assert not any(module.training for module in one.modules())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
