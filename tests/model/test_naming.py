"""Other people's networks at full size, by name and shape alone.

The names are written down here from the published structure of each network, not derived from ours.
"""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffiqa.errors import CheckpointError
from diffiqa.model import checkpoint
from diffiqa.model import naming as foreign
from diffiqa.model.checkpoint import misfits, part_of
from diffiqa.model.config import PRESETS, Encoder, ModelConfig
from diffiqa.model.network import DiffV2IQA, count_parameters

Shapes = dict[str, tuple[int, ...]]
Weights = dict[str, Tensor]


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def conv(name: str, inputs: int, outputs: int, kernel: int = 1) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def batch_norm(name: str, width: int) -> Shapes:
    statistics = {f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}
    return norm(name, width) | statistics | {f"{name}.num_batches_tracked": ()}


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def timm_vit(blocks: int = 12, width: int = 768, mlp: int = 3072, patch: int = 8, tokens: int = 785) -> Shapes:
    """timm's vit_base_patch8_224."""
    out: Shapes = {"cls_token": (1, 1, width), "pos_embed": (1, tokens, width)}
    out |= conv("patch_embed.proj", 3, width, patch)
    for i in range(blocks):
        out |= norm(f"blocks.{i}.norm1", width) | linear(f"blocks.{i}.attn.qkv", width, 3 * width)
        out |= linear(f"blocks.{i}.attn.proj", width, width) | norm(f"blocks.{i}.norm2", width)
        out |= linear(f"blocks.{i}.mlp.fc1", width, mlp) | linear(f"blocks.{i}.mlp.fc2", mlp, width)
    return out | norm("norm", width) | linear("head", width, 1000)


def torchvision_resnet50() -> Shapes:
    out: Shapes = {"conv1.weight": (64, 3, 7, 7)} | batch_norm("bn1", 64)
    inputs = 64
    for layer, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for i in range(blocks):
            name = f"layer{layer}.{i}"
            out |= {f"{name}.conv1.weight": (width, inputs, 1, 1)} | batch_norm(f"{name}.bn1", width)
            out |= {f"{name}.conv2.weight": (width, width, 3, 3)} | batch_norm(f"{name}.bn2", width)
            out |= {f"{name}.conv3.weight": (4 * width, width, 1, 1)} | batch_norm(f"{name}.bn3", 4 * width)
            if i == 0:
                out |= {f"{name}.downsample.0.weight": (4 * width, inputs, 1, 1)}
                out |= batch_norm(f"{name}.downsample.1", 4 * width)
            inputs = 4 * width
    return out | linear("fc", 2048, 1000)


def maniqa_swin(width: int) -> Shapes:
    out = conv("downsample", width, width, 3)  # one for the stage, never called
    for layer in range(2):
        out |= conv(f"layers.{layer}.conv", width, width, 3)
        for block in range(2):
            name = f"layers.{layer}.blocks.{block}"
            out |= norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width)
            out |= {f"{name}.attn.relative_position_bias_table": (49, 4)}
            out |= {f"{name}.attn.relative_position_index": (16, 16)}
            out |= linear(f"{name}.attn.qkv", width, 3 * width) | linear(f"{name}.attn.proj", width, width)
            out |= linear(f"{name}.mlp.fc1", width, 768) | linear(f"{name}.mlp.fc2", 768, width)
        out |= {f"layers.{layer}.blocks.1.attn_mask": (49, 16, 16)}
    return out


def maniqa_head(channels: int, squeezed: int) -> Shapes:
    """All that MANIQA and the authors' network have in common."""
    out = prefixed("vit.", timm_vit()) | conv("conv1", channels, squeezed) | conv("conv2", 768, 384)
    out |= prefixed("swintransformer1.", maniqa_swin(768)) | prefixed("swintransformer2.", maniqa_swin(384))
    for stage in (1, 2):
        for i in (0, 1):
            for letter in "qkv":
                out |= linear(f"tablock{stage}.{i}.c_{letter}", 784, 784)
    for name in ("fc_score", "fc_weight"):
        out |= linear(f"{name}.0", 384, 384) | linear(f"{name}.3", 384, 1)
    return out


def authors_network() -> Shapes:
    out = maniqa_head(6912, 2304) | {"noise_levels": (1, 4, 192), "noise_embedding.weight": (4, 192)}
    out |= batch_norm("bn1", 2304) | conv("conv3", 2304, 768) | prefixed("res.", torchvision_resnet50())
    for name in ("x_linear", "c_q", "c_k", "c_v"):
        out |= linear(f"qa.{name}", 1000, 784)
    out |= conv("conv_s1", 1, 32)
    for name in ("rq_score", "fc_score1", "fc_weight1"):
        out |= linear(f"{name}.0", 32, 32) | linear(f"{name}.3", 32, 1)
    return out


def sr3_schedule(steps: int) -> Shapes:
    names = """betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
        log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
        posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2"""
    return dict.fromkeys(names.split(), (steps,))


def sr3_unet() -> Shapes:
    """SR3's U-Net with the authors' settings: 64 channels, ×1-2-4-8-8, 2 blocks, attention at a sixteenth of 128."""
    widths = [64, 128, 256, 512, 512]

    def stage(name: str, inputs: int, outputs: int, attention: bool) -> Shapes:
        out = linear(f"{name}.res_block.noise_func.noise_func.0", 64, outputs)
        out |= norm(f"{name}.res_block.block1.block.0", inputs)
        out |= conv(f"{name}.res_block.block1.block.3", inputs, outputs, 3)
        out |= norm(f"{name}.res_block.block2.block.0", outputs)
        out |= conv(f"{name}.res_block.block2.block.3", outputs, outputs, 3)
        if inputs != outputs:
            out |= conv(f"{name}.res_block.res_conv", inputs, outputs)
        if attention:
            out |= norm(f"{name}.attn.norm", outputs) | {f"{name}.attn.qkv.weight": (3 * outputs, outputs, 1, 1)}
            out |= conv(f"{name}.attn.out", outputs, outputs)
        return out

    out = linear("noise_level_mlp.1", 64, 256) | linear("noise_level_mlp.3", 256, 64) | conv("downs.0", 6, 64, 3)
    skips, channels, i = [64], 64, 1
    for level, width in enumerate(widths):
        for _ in range(2):
            out |= stage(f"downs.{i}", channels, width, level == 3)
            channels, i = width, i + 1
            skips.append(channels)
        if level < 4:
            out |= conv(f"downs.{i}.conv", channels, channels, 3)
            i += 1
            skips.append(channels)
    out |= stage("mid.0", 512, 512, attention=True) | stage("mid.1", 512, 512, attention=False)
    i = 0
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(3):
            out |= stage(f"ups.{i}", channels + skips.pop(), width, level == 3)
            channels, i = width, i + 1
        if level > 0:
            out |= conv(f"ups.{i}.conv", channels, channels, 3)
            i += 1
    return out | norm("final_conv.block.0", 64) | conv("final_conv.block.3", 64, 3, 3)


def on_meta(shapes: Shapes) -> Weights:
    with torch.device("meta"):
        return {
            name: torch.empty(shape, dtype=torch.int64 if name.endswith(("_tracked", "_index")) else torch.float32)
            for name, shape in shapes.items()
        }


def count(shapes: Shapes, *prefixes: str) -> int:
    """Count parameters, not buffers, whose names start with one of `prefixes`."""
    buffers = ("running_mean", "running_var", "num_batches_tracked", "relative_position_index", "attn_mask")
    return sum(
        torch.Size(shape).numel()
        for name, shape in shapes.items()
        if name.startswith(prefixes or ("",)) and not name.endswith(buffers)
    )


def skeleton(config: ModelConfig) -> Weights:
    with torch.device("meta"):
        return dict(DiffV2IQA(config).state_dict())


def fits(name: str, *files: tuple[foreign.Format, Shapes]) -> list[str]:
    """Check that the files fill the preset exactly; return what was left out."""
    weights: Weights = {}
    left_out = []
    for form, shapes in files:
        assert foreign.recognise(shapes) is form
        own, notes = foreign.adapt(form, on_meta(shapes), vit_blocks=10)
        weights |= own
        left_out += notes
    assert misfits(skeleton(PRESETS[name]), weights) == {}
    return left_out


def test_full_size_authors_network_and_unet_map_completely() -> None:
    files = (foreign.IQA, authors_network()), (foreign.SR3, prefixed("denoise_fn.", sr3_unet()) | sr3_schedule(2000))
    assert fits("authors", *files) == [
        "not used: ViT blocks from 10 on, after the last one that is read (tensors: 24, numbers: 14,175,744)",
        "not used: the ViT's final norm and head, which nothing reads (tensors: 4, numbers: 770,536)",
        "not used: strided convolutions of the Swin stages, which nothing calls (tensors: 4, numbers: 6,636,672)",
        "not used: index and mask tables of Swin, computed here (tensors: 12, numbers: 52,224)",
        "not used: layers the authors left in and never call (tensors: 10, numbers: 11,074)",
        "not used: the diffusion schedule of training, as ours is configured (tensors: 12, numbers: 24,000)",
    ]


def test_full_size_maniqa_maps_completely() -> None:
    left_out = fits("maniqa", (foreign.MANIQA, maniqa_head(3072, 768)))
    assert len(left_out) == 4


def test_full_size_maniqa_of_march_2022_maps_completely() -> None:
    names = {name.replace("tablock", "channel_attn"): shape for name, shape in maniqa_head(3072, 768).items()}
    assert fits("maniqa", (foreign.EARLY_MANIQA, names)) == fits("maniqa", (foreign.MANIQA, maniqa_head(3072, 768)))


def ddpm_unet() -> Shapes:
    """The first layers of SR3's DDPM variant: its blocks have `mlp` where SR3's have `noise_func`."""
    out = {"time_mlp.0.inv_freq": (32,)} | linear("time_mlp.1", 64, 256) | conv("downs.0", 6, 64, 3)
    return out | linear("downs.1.res_block.mlp.1", 64, 64) | norm("downs.1.res_block.block1.block.0", 64)


def test_the_ddpm_variant_is_told_from_sr3() -> None:
    assert foreign.recognise(ddpm_unet()) is foreign.DDPM
    assert foreign.recognise(prefixed("denoise_fn.", ddpm_unet())) is foreign.DDPM
    lookalike = linear("time_mlp.1", 64, 256) | conv("downs.0.0.block1.proj", 64, 64, 3)  # a widespread DDPM's
    assert foreign.recognise(lookalike) is None


MANIQA = maniqa_head(3072, 768)
HERE = Path("m.pt")


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (MANIQA, ""),
        (prefixed("model.", MANIQA) | {"criterion.weight": (1,)}, "model."),
        (prefixed("state.net.module_.", MANIQA), "state.net.module_."),
        (prefixed("model.", MANIQA) | prefixed("model_ema.", MANIQA), "model_ema."),
        (MANIQA | prefixed("ema.", MANIQA), "ema."),
        (prefixed("online_model.", MANIQA) | prefixed("ema_model.", MANIQA) | {"step": ()}, "ema_model."),
        (prefixed("schema.", MANIQA), "schema."),
    ],
)
def test_a_network_is_found_under_the_prefix_of_a_training_program(names: Shapes, prefix: str) -> None:
    assert foreign.find(HERE, names, parts=False) == (foreign.MANIQA, prefix)
    assert foreign.is_average(prefix) == (prefix in {"model_ema.", "ema.", "ema_model."})


def test_two_networks_or_a_strange_one_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"m.pt holds several networks, under student., teacher.: save one"):
        foreign.find(HERE, prefixed("student.", MANIQA) | prefixed("teacher.", MANIQA), parts=False)
    with pytest.raises(CheckpointError, match=r"some other network: a\.b\.c\.d"):
        foreign.find(HERE, {"a.b.c.d": (1,)}, parts=True)


def test_a_part_under_a_prefix_is_taken_where_one_was_asked_for() -> None:
    backbone = prefixed("backbone.", torchvision_resnet50()) | {"quality.weight": (1, 1000)}
    assert foreign.find(HERE, backbone, parts=True) == (foreign.RESNET, "backbone.")
    with pytest.raises(CheckpointError, match="some other network"):  # and not a MANIQA whose rest is missing
        foreign.find(HERE, backbone, parts=False)


def test_full_size_unet_has_the_names_and_size_of_sr3() -> None:
    shapes = sr3_unet()
    assert count(shapes) == 97_807_491
    with torch.device("meta"):
        model = DiffV2IQA(PRESETS["authors"])
    assert model.unet is not None
    assert count_parameters(model.unet) == 97_807_491
    assert {name: tuple(t.shape) for name, t in model.unet.state_dict().items()} == shapes


def test_full_size_timm_vit_maps_but_for_its_end() -> None:
    shapes = timm_vit()
    assert len(shapes) == 152
    assert foreign.recognise(shapes) is foreign.VIT
    own, notes = foreign.adapt(foreign.VIT, on_meta(shapes), vit_blocks=10)
    expected = {n: t for n, t in skeleton(PRESETS["paper"]).items() if part_of(n) == "vit"}
    assert misfits(expected, own) == {}
    assert [note.partition("(")[2] for note in notes] == [
        "tensors: 24, numbers: 14,175,744)",
        "tensors: 4, numbers: 770,536)",
    ]


def test_full_size_torchvision_resnet50_maps_to_its_last_tensor() -> None:
    shapes = torchvision_resnet50()
    assert len(shapes) == 320
    assert count(shapes) == 25_557_032
    assert foreign.recognise(shapes) is foreign.RESNET
    own, notes = foreign.adapt(foreign.RESNET, on_meta(shapes), vit_blocks=10)
    expected = {n: t for n, t in skeleton(PRESETS["paper"]).items() if part_of(n) == "resnet"}
    assert misfits(expected, own) == {}
    assert len(own) == 320
    assert notes == []


def test_what_the_authors_network_has_more_than_ours_is_accounted_for() -> None:
    theirs = authors_network()
    assert count(theirs) == 179_790_901
    with torch.device("meta"):
        model = DiffV2IQA(PRESETS["paper"])
    assert model.unet is not None
    ours = count_parameters(model) - count_parameters(model.unet)
    assert ours == 158_201_484
    cut = {
        "vit.blocks.10.": 7_087_872,
        "vit.blocks.11.": 7_087_872,
        "vit.norm.": 1_536,
        "vit.head.": 769_000,
        "swintransformer1.downsample.": 5_309_184,
        "swintransformer2.downsample.": 1_327_488,
        "bn1.": 4_608,
        "noise_embedding.": 768,
        "rq_score.": 1_089,
    }
    assert {prefix: count(theirs, prefix) for prefix in cut} == cut
    assert count(theirs) - ours == sum(cut.values())


def test_every_part_of_the_model_has_a_name() -> None:
    paper = PRESETS["paper"]
    assert paper.vda
    seeing = dataclasses.replace(paper, vda=dataclasses.replace(paper.vda, encoder=Encoder.LITE0))
    names = skeleton(paper) | skeleton(seeing)
    assert {part_of(name) for name in names} == set(checkpoint.PARTS)
    assert part_of("elsewhere") == ""
