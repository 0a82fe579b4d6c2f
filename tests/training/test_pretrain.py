"""Pretraining the backbones: what they see, what they learn, and what of them a later run takes over."""

import csv
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffiqa.data.pictures import Pictures
from diffiqa.errors import CheckpointError, ConfigError, DatasetError
from diffiqa.model.checkpoint import load
from diffiqa.model.network import build
from diffiqa.tests.tiny import TINY, photo
from diffiqa.training.config import Optimisation, PretrainConfig, Reporting
from diffiqa.training.loop import Conduct, train
from diffiqa.training.pretrain import PretrainTask, run_pretrain
from diffiqa.training.score import Rated, run_score

from .runs import CPU
from .test_score import score_config

pytestmark = pytest.mark.usefixtures("no_charts")

MODEL = dataclasses.replace(TINY, dropout=0.0)
ON_CPU = Conduct("cpu")


def config(**changes: Any) -> PretrainConfig:
    base = PretrainConfig(
        model=MODEL,
        seed=5,
        optimisation=Optimisation(steps=4, batch=3, learning_rate=3e-3, ema_decay=0.5),
        validate_every=2,
        validation_crops=2,
        reporting=Reporting(log_every=1, checkpoint_every=2),
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> list[Rated]:
    """Return photographs as they are (score 1), darkened (0.5) and covered with noise (0)."""
    folder = tmp_path_factory.mktemp("pictures")
    found = []
    for seed in range(4):
        pixels = photo(seed, 44, 52)
        noise = np.random.default_rng(seed).integers(-90, 90, pixels.shape)
        noisy = np.clip(pixels.astype(int) + noise, 0, 255).astype(np.uint8)
        versions = {"": pixels, "darken": pixels // 3, "noise": noisy}
        for index, (name, version) in enumerate(versions.items()):
            path = folder / f"{seed}-{name}.png"
            Image.fromarray(version).save(path)
            found.append(Rated(path, 1 - index / 2, name))
    return found


def task_of(config: PretrainConfig, rated: list[Rated], cache: Path) -> PretrainTask:
    sets = [
        (Pictures([r.path for r in part], cache, min_side=config.model.crop, enlarge=True), part)
        for part in (rated[:9], rated[9:])
    ]
    return PretrainTask(config, build(config.model, config.seed), sets[0], sets[1])


def test_crops_are_turned_and_mirrored_into_all_eight_positions(rated: list[Rated], tmp_path: Path) -> None:
    task = task_of(config(), rated, tmp_path)
    pixels = task.training[0][0]
    found = set()
    for step in range(600):
        crop, label, kind = task.sample(step, 0).arrays
        name = task.sample(step, 0).name
        if not name.startswith(f"{rated[0].path} "):
            continue
        assert (label[0], kind[0]) == (1, 0)
        top, left = (int(word.strip(",")) for word in name.split() if word.strip(",").isdigit())
        window = pixels[top : top + 32, left : left + 32].transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        positions = [np.rot90(side, turn, (1, 2)) for side in (window, window[:, :, ::-1]) for turn in range(4)]
        (match,) = [index for index, position in enumerate(positions) if np.allclose(crop, position, atol=1e-6)]
        found.add(match)
    assert found == set(range(8))


def test_the_loss_is_the_squared_error_and_the_weighted_cross_entropy_of_each_backbone(
    rated: list[Rated], tmp_path: Path
) -> None:
    task = task_of(config(distortion_weight=0.25), rated, tmp_path)
    task.network.eval()
    samples = [task.sample(0, index) for index in range(3)]
    batch = [torch.from_numpy(np.stack(arrays)) for arrays in zip(*(s.arrays for s in samples), strict=True)]
    with torch.no_grad():
        losses = task.losses(task.network, batch)
        expected = torch.zeros(3)
        for score, logits in task.backbones(batch[0]):
            right = F.log_softmax(logits, 1)[range(3), batch[2][:, 0].long()]
            expected += (score - batch[1][:, 0]) ** 2 - 0.25 * right
    assert len(task.backbones.parts) == 2
    assert torch.allclose(losses, expected, atol=1e-6)


@pytest.mark.parametrize("part", ["vit", "resnet"])
def test_each_backbone_learns_to_tell_noise_and_darkness_from_originals(
    part: str, rated: list[Rated], tmp_path: Path
) -> None:
    plan = Optimisation(steps=60, batch=9, learning_rate=3e-3, ema_decay=0.5)
    chosen = config(optimisation=plan, vit=part == "vit", resnet=part == "resnet", validate_every=60)
    result = train(task_of(chosen, rated, tmp_path / "cache"), chosen, tmp_path / "run", CPU)
    with (tmp_path / "run" / "log.csv").open() as stream:
        losses = [float(row["loss"]) for row in csv.DictReader(stream)]
    assert losses[-1] < 0.5 * losses[0]
    assert result.verdict
    assert result.verdict["srcc"] > 0.8  # a photograph it has not seen


def test_a_run_leaves_backbones_that_a_score_run_begins_with(rated: list[Rated], tmp_path: Path) -> None:
    run_pretrain(config(resnet=False), rated[:9], rated[9:], tmp_path / "vit", conduct=ON_CPU)
    run_pretrain(config(vit=False), rated[:9], rated[9:], tmp_path / "resnet", conduct=ON_CPU)
    made = {part: tmp_path / part / "model.safetensors" for part in ("vit", "resnet")}
    for part, file in made.items():
        loaded = load(file)
        trained = {source.role for source in loaded.sources if source.role != "seed"}
        assert trained == {"bundle", part}
        seeded = build(MODEL, 5).state_dict()
        prefix = {"vit": "vcg.vit.", "resnet": "vda.resnet."}[part]
        moved = {name for name, value in loaded.model.state_dict().items() if not torch.equal(value, seeded[name])}
        assert moved
        assert all(name.startswith(prefix) for name in moved)
    frozen = score_config(rates=dataclasses.replace(score_config().rates, vit=0.0, resnet=0.0))
    folder = tmp_path / "score"
    run_score(frozen, rated[:9], rated[9:], folder, vit=made["vit"], resnet=made["resnet"], conduct=ON_CPU)
    weights = load(folder / "model.safetensors").model.state_dict()
    for part, prefix in (("vit", "vcg.vit."), ("resnet", "vda.resnet.")):
        taught = load(made[part]).model.state_dict()
        assert all(torch.equal(weights[name], taught[name]) for name in taught if name.startswith(prefix))


def test_a_run_goes_on_with_the_backbones_of_another(rated: list[Rated], tmp_path: Path) -> None:
    run_pretrain(config(), rated[:9], rated[9:], tmp_path / "first", conduct=ON_CPU)
    first = tmp_path / "first" / "model.safetensors"
    still = dataclasses.replace(config().optimisation, learning_rate=1e-12, weight_decay=0.0)
    goes_on = config(optimisation=still, vit=False)
    run_pretrain(goes_on, rated[:9], rated[9:], tmp_path / "second", start=first, conduct=ON_CPU)
    before, after = (load(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert {source.role for source in after.sources} == {
        "bundle",
        "seed",
        "resnet",
    }  # the ViT was neither wanted nor taken
    theirs, ours = before.model.state_dict(), after.model.state_dict()
    weights = [name for name, value in theirs.items() if name.startswith("vda.resnet.") and value.is_floating_point()]
    assert all(torch.allclose(theirs[name], ours[name], atol=1e-6) for name in weights if "running" not in name)


def test_a_bundle_without_the_wanted_backbone_is_refused(rated: list[Rated], tmp_path: Path) -> None:
    run_pretrain(config(vit=False), rated[:9], rated[9:], tmp_path / "resnet", conduct=ON_CPU)
    file = tmp_path / "resnet" / "model.safetensors"
    with pytest.raises(CheckpointError, match="has no trained"):
        run_pretrain(config(), rated[:9], rated[9:], tmp_path / "run", start=file, conduct=ON_CPU)


def test_labels_without_distortions_are_refused(rated: list[Rated], tmp_path: Path) -> None:
    plain = [Rated(r.path, r.quality) for r in rated]
    with pytest.raises(DatasetError, match="column `distortion`"):
        task_of(config(), plain, tmp_path)


def test_a_backbone_the_model_lacks_is_refused(rated: list[Rated], tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, vda=None)
    with pytest.raises(ConfigError, match="no resnet to pretrain"):
        run_pretrain(config(model=model), rated[:9], rated[9:], tmp_path / "run", conduct=ON_CPU)
    with pytest.raises(ConfigError, match="vit or resnet"):
        config(vit=False, resnet=False)
