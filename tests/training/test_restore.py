"""Algorithm 1: what the U-Net is shown, what it is asked for, and that it learns."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffiqa.data.distortions import DISTORTIONS, LEVELS, Distortion
from diffiqa.data.pictures import Pictures
from diffiqa.engine.pixels import to_plane
from diffiqa.engine.schedule import Schedule
from diffiqa.errors import ConfigError, DatasetError
from diffiqa.model.config import ModelConfig, preset
from diffiqa.tests.tiny import photo
from diffiqa.training.config import Loss, Optimisation, RestoreConfig, parse_config, read_config
from diffiqa.training.loop import Conduct, train
from diffiqa.training.restore import (
    Gain,
    distorted_crop,
    draw_level,
    drifting,
    level_borders,
    restoration_gains,
    run_restore,
    write_gains,
)

from .runs import CPU, MODEL, restore_config, run, task_of, write_photos

pytestmark = pytest.mark.usefixtures("no_charts")


@pytest.fixture
def two_kinds(monkeypatch: pytest.MonkeyPatch) -> dict[int, Distortion]:
    """Restoring crops of all 25 distortions would take most of this file's time."""
    few = {number: DISTORTIONS[number] for number in (1, 10)}
    monkeypatch.setattr("diffiqa.training.restore.DISTORTIONS", few)
    return few


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_photos(tmp_path_factory.mktemp("photos"))


def test_noise_levels_are_uniform_in_intervals_of_equal_chance() -> None:
    """The distribution function is linear between borders, 1/T in each interval: largest deviation as Kolmogorov's."""
    borders = level_borders(Schedule(steps=8))
    draw = np.random.default_rng(1)
    levels = np.sort([draw_level(draw, borders) for _ in range(20_000)])
    expected = np.interp(levels, borders[::-1], np.linspace(0, 1, 9))
    deviation = np.abs(expected - (np.arange(20_000) + 0.5) / 20_000).max()
    assert deviation < 1.63 / 20_000**0.5  # exceeded by chance in 1 of 100 seeds
    assert borders[0] == 1
    assert len(borders) == 9


def test_noise_is_added_at_the_level_and_asked_for(photos: list[Path], tmp_path: Path) -> None:
    task = task_of(restore_config(), photos, tmp_path)
    condition, reference, noise, level = (torch.from_numpy(array)[None] for array in task.sample(4, 1).arrays)
    seen = {}

    def perfect(y: Tensor, shown: Tensor, at: Tensor) -> Tensor:
        seen["condition"] = shown
        return (y - at[:, :, None, None] * reference) / (1 - at[:, :, None, None] ** 2).sqrt()

    batch = (condition, reference, noise, level)
    assert task.losses(perfect, batch).item() < 1e-6
    assert torch.equal(seen["condition"], condition)


def test_drift_is_smooth_and_of_the_strength_asked_for() -> None:
    draw = np.random.default_rng(1)
    errors = np.stack([drifting(64, 0.3, draw) for _ in range(400)]).astype(float)
    assert 0.2 < errors.std() < 0.3  # bicubic interpolation lowers what lies between its points
    assert abs(errors.mean()) < 0.03
    assert np.abs(np.diff(errors, axis=3)).mean() < 0.05 * errors.std()
    assert 0.1 < errors.mean(axis=(2, 3)).std() < 0.3  # white noise: 0.3 / 64
    assert not drifting(16, 0.0, draw).any()


def test_larger_crops_drift_in_waves_of_the_same_length_too() -> None:
    """Waves of 32 to 64 pixels hold a good share of the drift of any crop: what one size teaches, another must not."""
    shares = {}
    for side in (64, 160):
        draw = np.random.default_rng(2)
        power = np.zeros((side, side))
        for _ in range(200):
            power += (np.abs(np.fft.fft2(drifting(side, 0.3, draw).astype(float))) ** 2).sum(axis=0)
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side)))
        shares[side] = power[(frequency > 1 / 64) & (frequency < 1 / 32)].sum() / power.sum()
    assert shares[160] > 0.05
    assert shares[64] > 0.05


def test_drift_is_part_of_the_noise_that_is_asked_for(photos: list[Path], tmp_path: Path) -> None:
    plain, drifts = (task_of(restore_config(drift=drift), photos, tmp_path) for drift in (0.0, 0.5))
    *_, white, _ = plain.sample(3, 1).arrays
    *_, noise, _ = drifts.sample(3, 1).arrays
    difference = (noise - white).astype(float)
    assert difference.any()
    assert np.abs(np.diff(difference, axis=2)).max() < np.abs(np.diff(white, axis=2)).max() / 4
    with pytest.raises(ConfigError, match="drift must be between 0 and 1"):
        restore_config(drift=1.5)


@pytest.mark.parametrize(("loss", "expected"), [(Loss.L1, 0.5), (Loss.L2, 0.25)])
def test_loss_is_the_mean_distance_of_each_element(
    loss: Loss, expected: float, photos: list[Path], tmp_path: Path
) -> None:
    task = task_of(restore_config(loss=loss), photos, tmp_path)
    noise = torch.zeros(2, 3, 4, 4)
    noise[1] = 0.5
    batch = (noise, noise, noise, torch.full((2, 1), 0.7))
    losses = task.losses(lambda y, *_: torch.zeros_like(y), batch)
    assert losses.tolist() == [0.0, expected]


def test_samples_depend_on_seed_step_and_index_alone(photos: list[Path], tmp_path: Path) -> None:
    one, other = (task_of(restore_config(), photos, tmp_path) for _ in range(2))
    one.sample(0, 0)
    again = zip(one.sample(5, 1).arrays, other.sample(5, 1).arrays, strict=True)
    assert all(np.array_equal(a, b) for a, b in again)
    assert not np.array_equal(one.sample(5, 0).arrays[2], one.sample(5, 1).arrays[2])
    reseeded = task_of(restore_config(seed=4), photos, tmp_path)
    assert not np.array_equal(one.sample(5, 0).arrays[2], reseeded.sample(5, 0).arrays[2])


def test_clean_crops_are_their_own_condition(photos: list[Path], tmp_path: Path) -> None:
    task = task_of(restore_config(clean=1.0, composed=0.0), photos, tmp_path)
    condition, reference, *_ = task.sample(0, 0).arrays
    assert np.array_equal(condition, reference)


def test_a_share_of_crops_gets_two_distortions(photos: list[Path], tmp_path: Path) -> None:
    task = task_of(restore_config(clean=0.25, composed=0.25), photos, tmp_path)
    names = [task.sample(step, 0).name for step in range(200)]
    clean, two = sum("none" in name for name in names), sum(name.count("(") == 2 for name in names)
    assert 30 <= clean <= 70  # 50 expected, standard deviation 6
    assert 30 <= two <= 70


@pytest.mark.parametrize(("top", "left"), [(0, 0), (20, 9), (48, 64)], ids=["corner", "inside", "far corner"])
def test_every_distortion_keeps_a_crop_in_place(top: int, left: int) -> None:
    picture = photo(5, 64, 80)
    for number in DISTORTIONS:
        draw = np.random.default_rng(number)
        condition, reference = distorted_crop(picture, top, left, 16, 8, ((number, 5),), draw)
        assert condition.shape == reference.shape == (3, 16, 16)
        assert np.array_equal(reference, to_plane(picture[top : top + 16, left : left + 16]))
        assert np.allclose((condition + 1) * 127.5, np.rint((condition + 1) * 127.5), atol=1e-4)


def test_overfitting_two_crops_lowers_the_loss_by_a_lot(tmp_path: Path) -> None:
    photos = write_photos(tmp_path / "photos", count=2, side=16)
    for path, picture in zip(photos, (photo(8, 16, 16), photo(9, 16, 16)), strict=True):
        Image.fromarray(picture).save(path)
    config = restore_config(
        optimisation=Optimisation(steps=90, batch=8, learning_rate=8e-3, warmup_steps=5, ema_decay=0.9),
        loss=Loss.L2,
        clean=1.0,
        composed=0.0,
    )
    config = dataclasses.replace(
        config, reporting=dataclasses.replace(config.reporting, log_every=15, checkpoint_every=1000)
    )
    run(config, photos, tmp_path / "run")
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()[1:]
    losses = [float(row.split(",")[1]) for row in rows]
    assert losses[-1] < 0.35 * losses[0]


def test_gains_have_a_row_for_each_level_and_one_without_distortion(
    photos: list[Path], tmp_path: Path, two_kinds: dict[int, Distortion]
) -> None:
    config = restore_config(validation_crops=2)
    task = task_of(config, photos, tmp_path)
    task.model.eval()
    gains = restoration_gains(task.model, task.photos, config, CPU.device)
    assert [(g.number, g.level) for g in gains] == [(0, 0), *((n, level) for n in two_kinds for level in LEVELS)]
    assert gains[0].before_db is None
    again = restoration_gains(task.model, task.photos, config, CPU.device)
    assert gains == again
    write_gains(tmp_path / "gains.csv", gains)
    assert (tmp_path / "gains.csv").read_text().splitlines()[1].startswith("0,none,0,,")


def test_gain_is_the_difference_in_psnr() -> None:
    assert Gain(1, "blur", 3, 20.0, 21.5).gain_db == 1.5


@pytest.mark.usefixtures("two_kinds")
def test_a_finished_run_leaves_a_bundle_whose_heads_are_marked_untrained(photos: list[Path], tmp_path: Path) -> None:
    from diffiqa.model.checkpoint import load

    config = restore_config(validation_crops=1)
    config = dataclasses.replace(config, optimisation=dataclasses.replace(config.optimisation, steps=2))
    run_restore(config, photos[:2], photos[2:], tmp_path / "run", conduct=Conduct("cpu"))
    loaded = load(tmp_path / "run" / "model.safetensors")
    roles = {source.name: source.role for source in loaded.sources[1:]}
    assert roles["U-Net"] == "unet"
    assert roles["VCG head"] == "seed"
    assert loaded.model.config == MODEL
    assert (tmp_path / "run" / "gains.csv").exists()


def test_fixed_statistics_are_used_in_training_and_stay_as_they_were(photos: list[Path], tmp_path: Path) -> None:
    """What is optimised is then what samples: the same answer for an element, whatever is in its batch."""
    assert MODEL.unet
    model = dataclasses.replace(MODEL, unet=dataclasses.replace(MODEL.unet, dropout=0.0))
    task = task_of(restore_config(model=model, fixed_statistics=True), photos, tmp_path)
    before = {name: value.clone() for name, value in task.network.state_dict().items()}
    train(task, task.config, tmp_path / "run", CPU, Conduct())
    task.train_mode()
    changed = {name for name, value in task.network.state_dict().items() if not torch.equal(value, before[name])}
    statistics = {name for name in before if "running_" in name or "num_batches" in name}
    assert statistics
    assert not changed & statistics
    assert changed
    batch = [
        torch.from_numpy(np.stack(arrays)) for arrays in zip(*(task.sample(0, k).arrays for k in (0, 1)), strict=True)
    ]
    together = task.losses(task.network, batch)
    alone = torch.cat([task.losses(task.network, [array[k : k + 1] for array in batch]) for k in (0, 1)])
    torch.testing.assert_close(together, alone)
    with pytest.raises(ConfigError, match="fixed_statistics are those a run begins with"):
        run_restore(task.config, photos[:2], [], tmp_path / "other")


def test_pictures_are_decoded_once_and_small_ones_left_out(tmp_path: Path) -> None:
    paths = write_photos(tmp_path / "photos", count=2, side=40)
    (tmp_path / "photos" / "broken.png").write_bytes(b"no picture")
    everything = [*paths, tmp_path / "photos" / "broken.png"]
    pictures = Pictures(everything, tmp_path / "cache", min_side=32)
    assert len(pictures) == 2
    assert "broken.png" in pictures.skipped[0]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()}
    Pictures(paths, tmp_path / "cache", min_side=32)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").iterdir()} == before
    with pytest.raises(DatasetError, match="smaller than a crop of 64×64"):
        Pictures(paths, tmp_path / "cache", min_side=64)
    assert max(Pictures(paths, tmp_path / "cache", min_side=8, longest_side=24)[0].shape) == 24


def test_config_overrides_single_entries_of_a_preset() -> None:
    data = {
        "preset": "mini",
        "model": {"vda": False, "unet": {"blocks": 2}, "name": "mini-vcg"},
        "seed": 1,
        "optimisation": {"steps": 5, "batch": 2},
    }
    model = parse_config(RestoreConfig, data).model
    assert model == dataclasses.replace(
        preset("mini"),
        name="mini-vcg",
        vda=None,
        unet=dataclasses.replace(model.unet, blocks=2),  # type: ignore[type-var]
    )
    assert isinstance(model, ModelConfig)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1\n[optimisation]\nsteps = 1\nbatch = 1", "name a model"),
        ('preset = "mini"\n[optimisation]\nsteps = 1\nbatch = 1', "lacks 'seed'"),
        ('preset = "mini"\nseed = 1\nsped = 2\n[optimisation]\nsteps = 1\nbatch = 1', "unknown entries: 'sped'"),
        ('preset = "mini"\nseed = 1\n[optimisation]\nsteps = 1\nbatch = "x"', "optimisation.batch must be a whole"),
        ('preset = "mini"\nseed = 1\n[optimisation]\nsteps = 1\nbatch = 0', "optimisation.batch must be between"),
        ('preset = "mini"\nseed = 1\ncrop = 40\n[optimisation]\nsteps = 1\nbatch = 1', "multiple of 16"),
        ('preset = "large"\nseed = 1\n[optimisation]\nsteps = 1\nbatch = 1', "no preset 'large'"),
        ('preset = "maniqa"\nseed = 1\n[optimisation]\nsteps = 1\nbatch = 1', "has no U-Net"),
        ('preset = "mini"\nloss = "l3"\nseed = 1\n[optimisation]\nsteps = 1\nbatch = 1', "one of l1, l2"),
        ("seed = ", "cannot read"),
    ],
    ids=["model", "missing", "unknown", "type", "range", "aligned", "preset", "no unet", "choice", "toml"],
)
def test_config_errors_name_the_file_and_the_entry(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_config(RestoreConfig, file)
    assert str(file) in str(caught.value)
