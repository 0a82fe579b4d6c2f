"""PFD-IQA's modules against `reference.py` in float64, module by module and as a whole."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffiqa.engine.crops import crop_grid
from diffiqa.engine.noise import philox4x32
from diffiqa.engine.schedule import Ddim
from diffiqa.model.config import Norm
from diffiqa.model.pfd.config import Fusion, PfdConfig, Prompts
from diffiqa.model.pfd.decoder import Decoder
from diffiqa.model.pfd.denoiser import Denoiser
from diffiqa.model.pfd.encoder import make_encoder
from diffiqa.model.pfd.network import PfdIQA, build
from diffiqa.model.pfd.prior import Prior

from ..comparing import Array, Weights, images, randomised
from ..comparing import agree as agree_within
from . import reference as ref
from .small import LITE0, LITE2, SMALL

CASES = {
    "as in the preset": SMALL,
    "GroupNorm": replace(SMALL, norm=Norm.GROUP),
    "fused by a convolution": replace(SMALL, fusion=Fusion.CONCAT),
    "without alignment": replace(SMALL, alignment=False),
    "without cross-attention": replace(SMALL, cross_attention=False),
    "learned prompts": replace(SMALL, prompts=Prompts.LEARNED),
    "other steps": replace(SMALL, schedule=Ddim(timesteps=(450, 70))),
    "no step": replace(SMALL, schedule=Ddim(timesteps=()), alignment=False),
    "Lite0": LITE0,
    "Lite2": LITE2,
}


def agree(actual: Tensor, expected: Array, what: str = "output") -> None:
    agree_within(actual, expected, what, tolerance=1e-10)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def maps(random: np.random.Generator, c: PfdConfig, count: int = 2) -> Array:
    return random.standard_normal((count, c.width, c.grid, c.grid)) + random.standard_normal((count, c.width, 1, 1))


@pytest.mark.parametrize("config", [SMALL, replace(SMALL, blocks=3, heads=4), LITE0, LITE2])
def test_encoder(config: PfdConfig) -> None:
    net, random = randomised(make_encoder(config), 1), np.random.default_rng(1)
    net.double()
    weights, pictures = Weights(net, "encoder."), images(random, 2, 3, 64, 64)
    cls, features = net(torch.from_numpy(pictures))
    expected_cls, expected_features = ref.encoder(weights, "encoder", config, pictures)
    agree(cls, expected_cls, "class vector")
    agree(features, expected_features, "features")
    assert not weights.unread()


@pytest.mark.parametrize("name", ["as in the preset", "GroupNorm", "fused by a convolution", "learned prompts"])
def test_prior(name: str) -> None:
    config = CASES[name]
    net, random = randomised(Prior(config), 2), np.random.default_rng(2)
    weights, features = Weights(net, "prior."), maps(random, config)
    found, expected = net(torch.from_numpy(features)), ref.prior(weights, "prior", config, features)
    for what, actual, wanted in zip(found._fields, found, expected, strict=True):
        agree(actual, wanted, what)
    assert tuple(found.condition.shape) == (2, 2, config.width)
    assert 0.05 < found.gamma.min() < found.gamma.max() < 0.95
    assert abs(found.gamma - 0.5).max() > 0.05  # else γ and 1 − γ are one
    assert not weights.unread()


@pytest.mark.parametrize("name", ["as in the preset", "GroupNorm", "without cross-attention"])
def test_denoiser(name: str) -> None:
    config = CASES[name]
    net, random = randomised(Denoiser(config), 3), np.random.default_rng(3)
    weights, y, condition = (
        Weights(net, "denoiser."),
        maps(random, config),
        random.standard_normal((2, 2, config.width)),
    )
    for timestep in (0, 400):
        t = torch.full((2,), float(timestep))
        expected = ref.denoiser(weights, "denoiser", config, y, condition, timestep)
        agree(net(torch.from_numpy(y), torch.from_numpy(condition), t), expected, f"t = {timestep}")
    assert not weights.unread()


def test_decoder() -> None:
    net, random = randomised(Decoder(SMALL), 4), np.random.default_rng(4)
    weights, features, cls = Weights(net, "decoder."), maps(random, SMALL, 3), random.standard_normal((3, SMALL.width))
    expected = ref.decoder(weights, "decoder", SMALL, features, cls)
    agree(net(torch.from_numpy(features), torch.from_numpy(cls)), expected)
    assert not weights.unread()


@pytest.mark.parametrize("name", CASES)
def test_from_crops_to_scores(name: str) -> None:
    config = CASES[name]
    model, random = randomised(build(config, 0), 5), np.random.default_rng(5)
    weights, crops, noise = Weights(model), images(random, 2, 3, 64, 64), maps(random, config)
    found = model(torch.from_numpy(crops), torch.from_numpy(noise))
    for what, actual, wanted in zip(found._fields, found, ref.whole(weights, config, crops, noise), strict=True):
        agree(actual, wanted, what)
    assert {name for name in weights.unread() if not name.startswith("denoiser.")} == set()
    assert bool(weights.unread()) == (not config.schedule.timesteps)


def test_rows_of_the_schedule_are_those_of_the_design() -> None:
    schedule = Ddim()
    table = schedule.coefficients
    assert table.noise_level.tolist() == [0, 100, 200, 300, 400]
    np.testing.assert_allclose(
        np.sqrt(schedule.alpha_bar[[0, 100, 200, 300, 400]]), [0.9999, 0.9461, 0.8102, 0.6277, 0.4400], atol=6e-5
    )
    np.testing.assert_allclose(table.x0_to_mean, [1, 0.9707, 0.4986, 0.3375, 0.2463], atol=6e-5)
    np.testing.assert_allclose(table.y_to_mean, [0, 0.0309, 0.5524, 0.7531, 0.8669], atol=6e-5)
    assert not table.sigma.any()
    for i, (t, following) in enumerate(itertools.pairwise([*schedule.timesteps, None])):
        assert t is not None
        row = table.y_to_x0, table.noise_to_x0, table.x0_to_mean, table.y_to_mean
        np.testing.assert_allclose([column[4 - i] for column in row], ref.ddim_row(t, following), rtol=2e-7, atol=0)


def test_the_loop_ends_at_the_features_if_the_noise_is_known() -> None:
    """DDIM is exact for a denoiser that is right: the refined features are then those the noise was added to."""
    random = np.random.default_rng(6)
    clean, eps = (torch.from_numpy(maps(random, SMALL)) for _ in range(2))
    model = build(SMALL, 0).double()
    model.denoiser.forward = lambda y, condition, timestep: eps  # type: ignore[method-assign]
    bar = float(SMALL.schedule.alpha_bar[400])
    y = bar**0.5 * clean + (1 - bar) ** 0.5 * eps
    ones = torch.ones(2, 1).double()
    found = ref.Prior(*(ones,) * 3, y, ones)  # type: ignore[arg-type]
    torch.testing.assert_close(model.refine(found, eps), clean, atol=1e-6, rtol=0)  # type: ignore[arg-type]


def test_score_cuts_crops_draws_each_its_noise_and_takes_the_mean() -> None:
    model, random = randomised(build(SMALL, 0), 7), np.random.default_rng(7)
    pictures = images(random, 2, 3, 80, 100)
    found = model.score(torch.from_numpy(pictures), seed=9, crops=4)
    each = []
    for lane, crop in enumerate(crop_grid(80, 100, 64, 4)):
        noise = philox_normals(9, lane, len(SMALL.schedule.timesteps), SMALL.width * SMALL.grid**2)
        noise = np.broadcast_to(noise.reshape(1, SMALL.width, SMALL.grid, SMALL.grid), (2, SMALL.width, 4, 4))
        window = pictures[..., crop.top : crop.top + 64, crop.left : crop.left + 64]
        each.append(ref.whole(Weights(model), SMALL, window, noise))
    for what, actual, wanted in zip(found._fields, found, zip(*each, strict=True), strict=True):
        agree_within(actual, np.mean(wanted, axis=0), what, tolerance=1e-6)  # the noise is float32
    assert not torch.equal(found.score, model.score(torch.from_numpy(pictures), seed=10).score)


def philox_normals(seed: int, lane: int, step: int, count: int) -> Array:
    """The noise of a state from engine/noise.py's first sentences."""
    words = philox4x32((np.arange(count // 4).astype(np.uint64), step, lane, 0), (seed, 0))
    u = [((word >> np.uint64(9)).astype(np.float64) + 0.5) * 2**-23 for word in words]
    pairs = [(np.sqrt(-2 * np.log(u[k])), 2 * np.pi * u[k + 1]) for k in (0, 2)]
    out: Array = np.stack([f(a) * r for r, a in pairs for f in (np.cos, np.sin)], axis=1).ravel()
    return out


def test_a_batch_is_its_crops() -> None:
    model, random = randomised(build(LITE0, 0), 8), np.random.default_rng(8)
    crops, noise = torch.from_numpy(images(random, 2, 3, 64, 64)), torch.from_numpy(maps(random, LITE0))
    together = model(crops, noise)
    for n in range(2):
        for whole, alone in zip(together, model(crops[n : n + 1], noise[n : n + 1]), strict=True):
            torch.testing.assert_close(alone[0], whole[n], atol=1e-10, rtol=0)


def test_a_model_is_built_in_eval_mode_from_its_seed() -> None:
    one, same, other = (build(SMALL, seed) for seed in (1, 1, 2))
    assert isinstance(one, PfdIQA)
    assert not any(module.training for module in one.modules())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
