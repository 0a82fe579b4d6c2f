"""What export merges is exact: each deployed stage, still in PyTorch and float64, equals the model it came from."""

import dataclasses

import pytest
import torch
from torch import nn

from diffiqa.engine.manifest import StageName
from diffiqa.export.pytorch import reference
from diffiqa.export.stages import StagePlan, stage_plans
from diffiqa.model.config import PRESETS, ModelConfig, Norm, Pixels, UNetConfig
from diffiqa.model.network import DiffV2IQA, build

from ..tiny import TINY, perturbed

GROUPED = dataclasses.replace(
    TINY,
    name="grouped",
    unet=UNetConfig(width=8, multipliers=(1, 2, 2), blocks=1, attention_levels=(2,), norm=Norm.GROUP, groups=4),
)
NORMALISED = dataclasses.replace(TINY, name="normalised", pixels=Pixels((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def in_float64(model: DiffV2IQA, plan: StagePlan, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    inputs = tuple(x.double() for x in plan.draw(2, (32, 48), torch.Generator().manual_seed(seed)))
    with torch.no_grad():
        merged = plan.module.double()(*inputs)
        expected = reference(model.double(), plan.name, inputs)
    return list(merged if isinstance(merged, tuple) else (merged,)), list(expected)


# Group norm is the U-Net's alone, and other pixels are merged into the two encoders.
@pytest.mark.parametrize(
    ("config", "index"), [*((TINY, i) for i in range(4)), (GROUPED, 0), (NORMALISED, 1), (NORMALISED, 3)]
)
def test_merged_stage_equals_the_model(config: ModelConfig, index: int) -> None:
    model = perturbed(build(config, seed=3), seed=4)
    plan = list(stage_plans(model))[index]
    merged, expected = in_float64(model, plan, seed=5)
    for have, want in zip(merged, expected, strict=True):
        # The merged weights are stored in float32, so float64 arithmetic shows their rounding: a few 1e-7.
        torch.testing.assert_close(have, want, rtol=0, atol=3e-6)


def test_other_pixels_reach_both_encoders_as_their_training_program_made_them() -> None:
    plain, model = perturbed(build(TINY, seed=3), seed=4).double(), build(NORMALISED, seed=0).double()
    model.load_state_dict(plain.state_dict())
    pixels = torch.rand(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(6)).double()
    mean, std = (
        torch.tensor(values).double().reshape(3, 1, 1) for values in (NORMALISED.pixels.mean, NORMALISED.pixels.std)
    )
    with torch.no_grad():
        have, want, without = model(pixels * 2 - 1), plain((pixels - mean) / std), plain(pixels * 2 - 1)
    for one, other, third in zip((have.vcg, have.vda), (want.vcg, want.vda), (without.vcg, without.vda), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)  # the factors are stored in float32
        assert (one - third).abs().max() > 1e-4


def test_the_inputs_of_a_check_depend_on_the_seed_and_on_nothing_else() -> None:
    for plan in stage_plans(build(TINY, seed=3)):
        one, same, other = (plan.draw(2, (32, 48), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert all(map(torch.equal, one, same))
        assert not any(map(torch.equal, one, other))


def test_checks_are_on_pictures_and_on_states_of_the_loop() -> None:
    plans = {plan.name: plan for plan in stage_plans(build(TINY, seed=3))}
    y, condition, level = plans[StageName.UNET].draw(8, (64, 96), torch.Generator().manual_seed(7))
    assert set(level.flatten().tolist()) <= set(TINY.schedule.coefficients.noise_level.tolist())
    assert len(set(level.flatten().tolist())) > 2
    left = (y - condition * level[..., None, None]).std(dim=(1, 2, 3))
    torch.testing.assert_close(left, (1 - level[:, 0] ** 2).sqrt(), rtol=0.05, atol=0.01)
    (crops,) = plans[StageName.VDA].draw(2, (32, 32), torch.Generator().manual_seed(7))
    noise = (crops - crops[:, 1:2]).flatten(2).std(dim=2).mean(dim=0)
    assert noise[1] == 0 < noise[0] < noise[2] < noise[3]  # y_t2 is noisier than y_t1
    for pictures in (condition, crops[:, 1]):
        assert pictures.abs().max() <= 1
        assert pictures.std() > 0.2
        step = (pictures[..., 1:] - pictures[..., :-1]).abs()
        assert step.median() < 0.8 * step.std()  # smooth, with edges: a photograph has 0.4, white noise 1.2


def test_merging_leaves_the_model_as_it_was() -> None:
    model = perturbed(build(TINY, seed=3), seed=4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    list(stage_plans(model))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_batch_norms_that_follow_a_linear_map_are_gone() -> None:
    plans = {plan.name: plan for plan in stage_plans(build(TINY, seed=3))}
    assert not [m for m in plans[StageName.VDA].module.modules() if isinstance(m, nn.BatchNorm2d)]
    unet = plans[StageName.UNET].module
    left = {name.split(".")[-2] for name, m in unet.named_modules() if isinstance(m, nn.BatchNorm2d)}
    kept = [name for name, m in unet.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert left == {"block"}
    assert all("block1" in name or "final_conv" in name for name in kept)


def test_the_squeeze_convolutions_are_one() -> None:
    plans = {plan.name: plan for plan in stage_plans(build(TINY, seed=3))}
    head = plans[StageName.VCG].module
    convs = [m for m in head.branch.squeeze if isinstance(m, nn.Conv2d)]  # type: ignore[union-attr]
    assert [(c.in_channels, c.out_channels) for c in convs] == [(TINY.vcg.channels, 16)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "stages"),
    [("maniqa", ["vit", "vcg"]), ("mini", ["unet", "vit", "vcg", "vda"])],
)
def test_a_model_has_the_stages_its_parts_need(name: str, stages: list[str]) -> None:
    with torch.device("meta"):
        model = DiffV2IQA(PRESETS[name])
    from diffiqa.export.engine import plan_names

    assert list(plan_names(model.config)) == stages
