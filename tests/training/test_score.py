"""Training the scores: aligned crops, kept restorations, the ranking term, and the best weights by validation."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffiqa.data.pictures import Pictures
from diffiqa.engine.crops import Crop, crop_grid
from diffiqa.engine.manifest import StageName
from diffiqa.engine.pixels import ImageForm, Sides, TapForm, bicubic, squash_planes, to_plane
from diffiqa.engine.schedule import Kind, Schedule, Taps
from diffiqa.errors import CheckpointError, ConfigError, DatasetError, OutputError
from diffiqa.export.stages import StagePlan
from diffiqa.model.checkpoint import load
from diffiqa.model.config import ModelConfig, SwinConfig, UNetConfig, VCGConfig, ViTConfig
from diffiqa.model.network import DiffV2IQA, build
from diffiqa.tests.tiny import TINY, photo
from diffiqa.training.config import Optimisation, Rates, Reporting, ScoreConfig
from diffiqa.training.loop import Conduct, read_checkpoint, train
from diffiqa.training.score import Rated, Restorations, ScoreTask, ranking_loss, restoration_key, run_score
from diffiqa.training.start import weights_digest

from ..model.reference import through_png
from .runs import CPU, restore_config, write_photos

pytestmark = pytest.mark.usefixtures("no_charts")

MODEL = dataclasses.replace(TINY, dropout=0.0)
FEWER_KINDS = VCGConfig(
    vit=ViTConfig(patch=8, width=16, heads=2, mlp=32),
    selection={Kind.DIS: (0,), Kind.Y0: (1,)},
    squeeze=(24, 16),
    swin=SwinConfig(layers=1, heads=2, window=2, mlp=16),
)
PIXELS = photo(1, 36, 44)


def score_config(**changes: Any) -> ScoreConfig:
    base = ScoreConfig(
        model=MODEL,
        seed=5,
        optimisation=Optimisation(steps=6, batch=2, learning_rate=1e-3, ema_decay=0.5),
        validate_every=2,
        validation_crops=2,
        reporting=Reporting(log_every=1, checkpoint_every=2),
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> list[Rated]:
    paths = write_photos(tmp_path_factory.mktemp("images"), count=5, side=44)
    return [Rated(path, index / 4) for index, path in enumerate(paths)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and restorations, each made once: they are kept by what they depend on."""
    return tmp_path_factory.mktemp("cache")


def task_of(config: ScoreConfig, rated: list[Rated], cache: Path) -> ScoreTask:
    model = build(config.model, config.seed)
    restorations = Restorations(model, config.restore_seed, cache / "restored")
    sets = []
    for part in (rated[:3], rated[3:]):
        pictures = Pictures([r.path for r in part], cache / "pictures", min_side=config.model.crop, enlarge=True)
        restorations.fill(pictures, CPU, lambda *_: None)
        sets.append((pictures, [r.quality for r in part]))
    model.unet = None
    return ScoreTask(config, model, restorations, sets[0], sets[1])


def key(pixels: Any = PIXELS, weights: str = "w", config: ModelConfig = MODEL, seed: int = 0) -> str:
    return restoration_key(pixels, weights, config, seed)


def test_the_key_of_a_restoration_changes_with() -> None:
    cases: list[dict[str, Any]] = [
        {"pixels": np.where(np.indices(PIXELS.shape).sum(0) == 0, 255 - PIXELS, PIXELS)},
        {"pixels": PIXELS.reshape(44, 36, 3)},
        {"weights": "v"},
        {"seed": 1},
        {"config": dataclasses.replace(MODEL, unet=UNetConfig(width=16))},
        {"config": dataclasses.replace(MODEL, schedule=Schedule(steps=7))},
        {"config": dataclasses.replace(MODEL, taps=Taps(t1=1, t2=4))},
        {"config": dataclasses.replace(MODEL, vda=None, vcg=FEWER_KINDS)},
        {"config": dataclasses.replace(MODEL, tap_form=TapForm.PNG8)},
    ]
    for changed in cases:
        assert key(**changed) != key()


def test_the_key_does_not_depend_on_the_heads() -> None:
    assert key(config=dataclasses.replace(MODEL, vcg_weight=0.5, dropout=0.3)) == key()


def test_weights_digest_changes_with_a_single_value() -> None:
    unet = build(MODEL, 1).unet
    assert unet is not None
    before = weights_digest(unet.state_dict())
    assert weights_digest(build(MODEL, 1).unet.state_dict()) == before  # type: ignore[union-attr]
    with torch.no_grad():
        next(unet.parameters()).view(-1)[0] += 1e-6
    assert weights_digest(unet.state_dict()) != before


def test_crops_of_all_kinds_lie_at_the_same_place(rated: list[Rated], tmp_path: Path) -> None:
    """Restorations replaced by copies of the image shifted in value only: all kinds must show the same window."""
    task = task_of(score_config(), rated, tmp_path)
    pictures = task.training[0]
    for index in range(len(pictures)):
        plain = pictures[index].transpose(2, 0, 1).astype(np.float32) / 127.5 - 1
        planes = np.stack([plain + shift for shift in (0.25, 0.5, 0.75)]).astype(np.float16)
        np.save(task.restorations.file(pictures, index), planes)
    for step in range(6):
        crop = task.sample(step, 1).arrays[0]
        assert crop.shape == (4, 3, 32, 32)
        for kind, shift in enumerate((0.25, 0.5, 0.75), start=1):
            assert np.allclose(crop[kind], crop[0] + shift, atol=2e-3)  # float16


def test_restorations_are_those_that_scoring_makes(rated: list[Rated], cache: Path) -> None:
    config = score_config()
    task = task_of(config, rated, cache)
    model = build(config.model, config.seed)
    pixels = task.training[0][0]
    height, width = pixels.shape[:2]
    image = torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32) / 127.5 - 1)[None]
    scored = model.score(image, seed=0, crops=1).total
    place = Crop((height - 32) // 2, (width - 32) // 2)
    crop = torch.from_numpy(task.crop(task.training[0], 0, place))[None]
    assert torch.allclose(model(crop).total, scored, atol=1e-3)  # float16


def test_many_restorations_are_computed_by_onnx_runtime_to_the_same_result(
    rated: list[Rated], tiny_model: DiffV2IQA, tiny_engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exported(plan: StagePlan, path: Path, alignment: int) -> None:
        assert (plan.name, alignment) == (StageName.UNET, TINY.unet.alignment)  # type: ignore[union-attr]
        shutil.copy(tiny_engine / "onnx" / "unet.onnx", path)  # exporting it again would take most of this file's time

    monkeypatch.setattr("diffiqa.training.score.export_graph", exported)
    pictures = Pictures([r.path for r in rated], tmp_path / "pictures", min_side=32)
    by_torch = Restorations(tiny_model, 0, tmp_path / "torch")
    by_torch.fill(pictures, CPU, lambda *_: None)
    monkeypatch.setattr("diffiqa.training.score.EXPORT_PAYS", 1)
    monkeypatch.setattr(DiffV2IQA, "restore", None)
    by_onnx = Restorations(tiny_model, 0, tmp_path / "onnx")
    by_onnx.fill(pictures, CPU, lambda *_: None)
    for index in range(len(pictures)):
        a, b = (np.load(made.file(pictures, index)) for made in (by_torch, by_onnx))
        assert a.shape == b.shape == (3, 3, *pictures[index].shape[:2])
        assert np.abs(a.astype(float) - b).max() <= 2e-3  # float16


def test_restorations_are_computed_once(rated: list[Rated], tmp_path: Path) -> None:
    task_of(score_config(), rated, tmp_path)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "restored").iterdir()}
    assert len(files) == 5
    task_of(score_config(), rated, tmp_path)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "restored").iterdir()} == files


def test_processes_that_share_the_work_leave_nothing_out(rated: list[Rated], tmp_path: Path) -> None:
    pictures = Pictures([r.path for r in rated], tmp_path / "pictures", min_side=32)
    restorations = Restorations(build(MODEL, 1), 0, tmp_path / "restored")
    for rank in range(2):  # the second one begins when the first has finished
        restorations.fill(pictures, dataclasses.replace(CPU, rank=rank, world=2), lambda *_: None)
    assert all(restorations.file(pictures, index).exists() for index in range(len(pictures)))


def test_restorations_that_will_not_fit_are_refused_first(
    rated: list[Rated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(OutputError, match=r"0\.0 GB are free"):
        task_of(score_config(), rated, tmp_path)
    assert not list((tmp_path / "restored").iterdir())


def test_ranking_term_by_hand() -> None:
    """Short of the margin: pair (1, 0) by 0.5 − 0.5, (2, 0) by 1 − 0.2, (2, 1) by 0.5 + 0.3."""
    labels, scores = torch.tensor([0.0, 0.5, 1.0]), torch.tensor([0.1, 0.6, 0.3])
    assert ranking_loss(scores, labels, 1.0).item() == pytest.approx((0 + 0.8 + 0.8) / 3)
    assert ranking_loss(scores, labels, 0.0).item() == pytest.approx((0 + 0 + 0.3) / 3)
    assert ranking_loss(labels, labels, 1.0).item() == 0
    assert ranking_loss(scores, torch.ones(3), 1.0).item() == 0  # no pair


@pytest.mark.parametrize(("vcg", "vda"), [(0.5, 2.0), (0.0, 1.5)])
def test_each_branch_answers_for_its_share_of_the_label(
    rated: list[Rated], cache: Path, vcg: float, vda: float
) -> None:
    model = dataclasses.replace(MODEL, vcg_weight=vcg, vda_weight=vda)
    task = task_of(score_config(branch_weight=0.5, model=model), rated, cache)
    task.network.eval()
    samples = [task.sample(0, index).arrays for index in range(3)]
    batch = [torch.from_numpy(np.stack(arrays)) for arrays in zip(*samples, strict=True)]
    with torch.no_grad():
        losses, scores = task.losses(task.network, batch), task.model(batch[0])
    labels = batch[1][:, 0]
    assert scores.vcg is not None
    assert scores.vda is not None
    expected = (vcg * scores.vcg + vda * scores.vda - labels) ** 2
    for weight, score in ((vcg, scores.vcg), (vda, scores.vda)):
        if weight:  # what has none answers for nothing
            expected = expected + 0.5 * ((vcg + vda) * score - labels) ** 2
    assert torch.allclose(losses, expected, atol=1e-6)


def test_both_branches_of_a_fresh_network_score_and_their_sum_is_in_the_label_range() -> None:
    """A branch that starts too high is pushed below 0, and there its ReLU has no gradient: it is 0 from then on."""
    images = torch.from_numpy(np.random.default_rng(5).uniform(-1, 1, (4, len(MODEL.kinds), 3, 32, 32)).astype("f"))
    for seed in range(5):
        with torch.no_grad():
            scores = build(MODEL, seed)(images)
        assert scores.vcg is not None
        assert scores.vda is not None
        assert min(scores.vcg.min(), scores.vda.min()) > 0
        assert 0 < scores.total.min() < scores.total.max() < 1


def test_every_image_is_seen_once_in_each_epoch(rated: list[Rated], cache: Path) -> None:
    task = task_of(score_config(), rated, cache)
    names = [task.sample(place // 2, place % 2).name.partition(" at ")[0] for place in range(12)]
    epochs = [names[start : start + 3] for start in range(0, 12, 3)]
    assert all(len(set(epoch)) == 3 for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_frozen_backbones_keep_weights_and_statistics(rated: list[Rated], cache: Path, tmp_path: Path) -> None:
    config = score_config(rates=Rates(vit=0.0, resnet=0.0))
    task = task_of(config, rated, cache)
    before = {name: tensor.clone() for name, tensor in task.network.state_dict().items()}
    train(task, config, tmp_path / "run", CPU)
    after = read_checkpoint(tmp_path / "run" / "checkpoint.pt")["network"]
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert not any(name.startswith(("vcg.vit.", "vda.resnet.")) for name in moved)
    assert any(name.startswith("vcg.swin1") for name in moved)


def test_rates_scale_the_step_of_a_part(rated: list[Rated], cache: Path) -> None:
    task = task_of(score_config(rates=Rates(vit=0.1)), rated, cache)
    factors = {len(parameters): factor for factor, parameters in task.groups()}
    assert sorted(factors.values()) == [0.1, 1.0, 1.0]
    total = sum(len(parameters) for _, parameters in task.groups())
    assert total == len(list(task.network.parameters()))


@pytest.mark.parametrize(
    ("broken", "labels", "message"),
    [("training", [1.0] * 5, "without different"), ("validation", [0, 1, np.nan, 1, np.nan], "finite")],
)
def test_a_part_without_useful_labels_is_refused(
    broken: str, labels: list[float], message: str, rated: list[Rated], cache: Path
) -> None:
    spoilt = [Rated(r.path, label) for r, label in zip(rated, labels, strict=True)]
    parts = [*spoilt[:3], *rated[3:]] if broken == "training" else [*rated[:3], *spoilt[3:]]
    with pytest.raises(DatasetError, match=f"the {broken} part .*{message}"):
        task_of(score_config(), parts, cache)


def test_training_resumes_to_the_same_curve_and_the_same_best(rated: list[Rated], cache: Path, tmp_path: Path) -> None:
    # When the run is killed, validation.csv has a row of a step after the checkpoint.
    config = score_config(ranking_weight=0.5, reporting=Reporting(log_every=1, checkpoint_every=3))
    whole = train(task_of(config, rated, cache), config, tmp_path / "whole", CPU)
    task = task_of(config, rated, cache)

    class Killed(Exception):  # noqa: N818
        pass

    def progress(step: int, *_: float) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        train(task, config, tmp_path / "cut", CPU, Conduct(progress=progress))
    resumed = train(task_of(config, rated, cache), config, tmp_path / "cut", CPU, Conduct(resume=True))
    assert resumed.step == whole.step
    assert all(torch.equal(resumed.weights[name], whole.weights[name]) for name in whole.weights)
    curves = [
        [row.rpartition(",")[0] for row in (tmp_path / name / "log.csv").read_text().splitlines()]  # without seconds
        for name in ("whole", "cut")
    ]
    assert curves[0] == curves[1]
    logs = [(tmp_path / name / "validation.csv").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]
    assert len(logs[0].splitlines()) == 4


def test_training_fits_a_few_images(rated: list[Rated], cache: Path, tmp_path: Path) -> None:
    plan = Optimisation(steps=60, batch=3, learning_rate=3e-3, ema_decay=0.5)
    config = score_config(optimisation=plan, flip=False, validate_every=60, reporting=Reporting(10, 100))
    train(task_of(config, rated, cache), config, tmp_path / "run", CPU)
    losses = [float(row.split(",")[1]) for row in (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]]
    assert losses[-1] < 0.3 * losses[0]


def test_a_run_leaves_a_bundle_and_keeps_the_unet_it_was_given(rated: list[Rated], tmp_path: Path) -> None:
    from diffiqa.training.restore import run_restore

    restore = restore_config(model=MODEL, validation_crops=1)
    restore = dataclasses.replace(restore, optimisation=dataclasses.replace(restore.optimisation, steps=2))
    run_restore(restore, [r.path for r in rated], [], tmp_path / "unet", conduct=Conduct("cpu"))
    unet = tmp_path / "unet" / "model.safetensors"
    said: list[str] = []
    run_score(
        score_config(), rated[:3], rated[3:], tmp_path / "run", unet=unet, conduct=Conduct("cpu", say=said.append)
    )
    made, given = load(tmp_path / "run" / "model.safetensors"), load(unet)
    assert all(source.role != "seed" for source in made.sources)
    assert weights_digest(made.model.unet.state_dict()) == weights_digest(given.model.unet.state_dict())  # type: ignore[union-attr]
    assert any("of restorations in" in text for text in said)


def test_a_bundle_to_start_from_is_taken_whole_though_its_unet_is_named_too(rated: list[Rated], tmp_path: Path) -> None:
    run_score(score_config(restored=False), rated[:3], rated[3:], tmp_path / "first", conduct=Conduct("cpu"))
    file = tmp_path / "first" / "model.safetensors"
    rates = dataclasses.replace(score_config().rates, vit=0.0, resnet=0.0)
    config = score_config(restored=False, rates=rates)
    run_score(config, rated[:3], rated[3:], tmp_path / "second", start=file, vit=file, conduct=Conduct("cpu"))
    theirs, ours = (load(tmp_path / name / "model.safetensors").model.state_dict() for name in ("first", "second"))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs if name.startswith("vda.resnet."))


def test_a_picture_stands_for_its_restorations_where_there_are_none(rated: list[Rated], cache: Path) -> None:
    config = score_config(restored=False)
    task = task_of(config, rated, cache)
    assert task.sample(0, 0).arrays[0].shape == (1, 3, 32, 32)
    images = torch.from_numpy(np.stack([task.sample(0, index).arrays[0] for index in range(2)]))
    model = build(MODEL, 1)
    with torch.no_grad():
        alone, repeated = model(images), model(images.expand(-1, len(MODEL.kinds), -1, -1, -1))
    for branch in ("total", "vcg", "vda"):
        assert torch.allclose(getattr(alone, branch), getattr(repeated, branch), atol=1e-6)


def test_nothing_is_restored_for_a_run_without_restorations(rated: list[Rated], tmp_path: Path) -> None:
    run_score(score_config(restored=False), rated[:3], rated[3:], tmp_path / "run", conduct=Conduct("cpu"))
    assert not (tmp_path / "run" / "cache" / "restored").exists()


def test_a_unet_of_another_size_is_refused(rated: list[Rated], tmp_path: Path) -> None:
    from diffiqa.model.bundle import save_bundle

    other = dataclasses.replace(MODEL, unet=UNetConfig(width=16, multipliers=(1, 2), attention_levels=(1,)))
    save_bundle(build(other, 1), tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="U-Net does not fit"):
        run_score(score_config(), rated[:3], rated[3:], tmp_path / "run", unet=tmp_path / "other.safetensors")


def test_freezing_everything_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="not all 0"):
        score_config(rates=Rates(0, 0, 0))


@pytest.mark.parametrize("image_form", ImageForm)
def test_training_sees_images_and_restorations_as_scoring_does(
    cache: Path, tmp_path: Path, image_form: ImageForm
) -> None:
    """To the bit, though restorations are kept as float16."""
    rated = [Rated(path, index / 4) for index, path in enumerate(write_photos(tmp_path / "images", 5, side=43))]
    model = dataclasses.replace(MODEL, tap_form=TapForm.PNG8, image_form=image_form, sides=Sides.RESIZED)
    config = score_config(model=model)
    task = task_of(config, rated, cache)
    pictures = task.training[0]
    picture = Image.open(pictures.paths[0])
    resized = np.asarray(picture.resize((48, 40), Image.Resampling.BILINEAR))  # of 51×43, multiples of 4
    condition = torch.from_numpy(to_plane(resized))[None]
    restored = [through_png(plane[0].numpy()) for plane in build(model, config.seed).restore(condition).values()]
    seen = bicubic(np.asarray(picture), *((32, 32) if image_form is ImageForm.SQUASHED else (40, 48)))
    kinds = squash_planes(np.stack(restored), 32) if image_form is ImageForm.SQUASHED else np.stack(restored)
    planes = np.concatenate([to_plane(seen)[None], kinds])
    places = crop_grid(seen.shape[0], seen.shape[1], 32, config.validation_crops)
    for place, crop in zip(places, task.grid(pictures, 0), strict=True):
        rows, columns = slice(place.top, place.top + 32), slice(place.left, place.left + 32)
        np.testing.assert_array_equal(crop, planes[..., rows, columns])
    assert task.sample(0, 0).arrays[0].shape == (4, 3, 32, 32)
