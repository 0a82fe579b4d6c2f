"""What trains PFD-IQA: losses against their definition, the mask, the teacher."""

import math

import numpy as np
import pytest
import torch

from diffiqa.model.pfd.config import PfdConfig
from diffiqa.model.pfd.network import build
from diffiqa.model.pfd.training import Targets, Teacher, losses, soft_cross_entropy, soft_levels

from ..comparing import Weights, images, randomised
from . import reference as ref
from .small import LITE0, SMALL


def test_losses_are_their_definition() -> None:
    """In eval mode, where no mask is drawn: score of the whole loop, noise on the teacher's features, soft labels."""
    model, random = randomised(build(SMALL, 0), 1), np.random.default_rng(1)
    crops, teacher = images(random, 3, 3, 64, 64), random.standard_normal((3, 16, 4, 4))
    quality = random.uniform(0, 1, 3) + np.array([0, 0, 3])  # one of them beyond the bend of SmoothL1
    labels_d, labels_q = random.dirichlet([1] * 3, 3), random.dirichlet([1] * 2, 3)
    drawing = torch.Generator().manual_seed(4)
    drawn = torch.randn(2, 3, 16, 4, 4, generator=drawing).numpy().astype(np.float64)
    steps = torch.randint(1000, (3,), generator=drawing).tolist()
    targets = Targets(*(torch.from_numpy(x) for x in (quality, labels_d, labels_q)))
    with torch.no_grad():
        seen = model.encoder(torch.from_numpy(crops))
        found = losses(model, seen, torch.from_numpy(teacher), targets, torch.Generator().manual_seed(4))

    w = Weights(model)
    score, p_d, p_q = ref.whole(w, SMALL, crops, drawn[0])
    off = np.abs(score - quality)
    assert off.min() < 1 < off.max()
    wanted = {"scores": score, "score": np.where(off < 1, off**2 / 2, off - 0.5)}
    prior = ref.prior(w, "prior", SMALL, ref.encoder(w, "encoder", SMALL, crops)[1])
    errors = []
    for n, t in enumerate(steps):
        bar = math.prod(1 - (1e-4 + (0.02 - 1e-4) * k / 999) for k in range(t + 1))
        noisy = math.sqrt(bar) * teacher[n] + math.sqrt(1 - bar) * drawn[1, n]
        eps = ref.denoiser(w, "denoiser", SMALL, noisy[None], prior.condition[n : n + 1], t)[0]
        errors.append(((eps - drawn[1, n]) ** 2).mean())
    wanted["noise"] = np.array(errors)
    wanted["distortions"] = -(labels_d * np.log(p_d)).sum(axis=1)
    wanted["levels"] = -(labels_q * np.log(p_q)).sum(axis=1)
    for name, value in wanted.items():
        np.testing.assert_allclose(getattr(found, name).numpy(), value, rtol=1e-9, err_msg=name)


@pytest.mark.parametrize("config", [SMALL, LITE0], ids=["vit", "lite0"])
def test_every_weight_learns_and_the_teacher_does_not(config: PfdConfig) -> None:
    model, teacher = build(config, 1).train(), Teacher(config)
    crops = torch.rand(4, 3, 64, 64) * 2 - 1
    _, features = teacher(crops)
    targets = Targets(torch.rand(4), torch.full((4, 3), 1 / 3), soft_levels(torch.rand(4), 2))
    found = losses(model, model.encoder(crops), features, targets, torch.Generator().manual_seed(1))
    sum((found.score, found.noise, found.distortions, found.levels)).sum().backward()  # type: ignore[union-attr]
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teachers_weights_are_a_students() -> None:
    teacher, student = Teacher(LITE0).state_dict(), build(LITE0, 1).state_dict()
    assert all(student[name].shape == tensor.shape for name, tensor in teacher.items())
    assert {name.partition(".")[0] for name in teacher} == {"encoder", "decoder"}


def test_masks_drop_whole_channels_in_training_alone() -> None:
    model = build(SMALL, 1)
    seen: list[torch.Tensor] = []
    for part in (model.prior.distortions, model.prior.levels):
        part.conv1.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    features = torch.rand(64, 16, 4, 4) + 1
    model.prior(features)
    assert all(torch.equal(x, features) for x in seen)
    seen.clear()
    torch.manual_seed(0)
    model.train().prior(features)
    for x in seen:
        ratio = x / features
        assert torch.equal(ratio.amin(dim=(2, 3)), ratio.amax(dim=(2, 3)))  # a channel is dropped or kept as a whole
        assert ratio.mean() == pytest.approx(1, abs=0.1)  # what is kept makes up for what is dropped
        assert (ratio == 0).float().mean() == pytest.approx(SMALL.mask_ratio, abs=0.05)
    assert not torch.equal(seen[0], seen[1])  # each task has a mask of its own


def test_soft_levels_share_a_quality_between_neighbours() -> None:
    found = soft_levels(torch.tensor([0.0, 0.1, 0.5, 0.9, 1.2]), 5)
    wanted = [[1, 0, 0, 0, 0], [0.6, 0.4, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0.4, 0.6], [0, 0, 0, 0, 1]]
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float32), atol=1e-6, rtol=0)


def test_a_row_without_labels_loses_nothing() -> None:
    assert soft_cross_entropy(torch.rand(2, 3), torch.zeros(2, 3)).tolist() == [0, 0]
