"""Training on opinions: a frozen encoder's features, levels of one window side by side, lots and windows."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffiqa.data.pictures import Pictures
from diffiqa.errors import ConfigError
from diffiqa.model.bundle import save_bundle
from diffiqa.model.checkpoint import load
from diffiqa.model.config import Encoder
from diffiqa.model.network import build
from diffiqa.training.config import VERSIONS, Optimisation, Rates, ScoreConfig
from diffiqa.training.loop import Conduct
from diffiqa.training.score import Rated, ScoreTask, correlation, lot, ranking_loss, run_score
from diffiqa.training.start import average

from .runs import write_photos
from .test_score import MODEL, score_config

pytestmark = pytest.mark.usefixtures("no_charts")

assert MODEL.vda
SEEING = dataclasses.replace(MODEL, vcg=None, vda=dataclasses.replace(MODEL.vda, encoder=Encoder.LITE0))
ON_CPU = Conduct(device="cpu")


def config(**changes: Any) -> ScoreConfig:
    base = score_config(
        model=SEEING,
        optimisation=Optimisation(steps=4, batch=2 + VERSIONS, learning_rate=1e-3, ema_decay=0.5),
        rates=Rates(lite0=0.0),
        restored=False,
        features=True,
        ordered=VERSIONS,
        ranking_weight=0.3,
        correlation_weight=0.3,
    )
    return dataclasses.replace(base, **changes)


@pytest.fixture(scope="module")
def rated(tmp_path_factory: pytest.TempPathFactory) -> list[Rated]:
    paths = write_photos(tmp_path_factory.mktemp("images"), count=5, side=44)
    return [Rated(path, index / 4) for index, path in enumerate(paths)]


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> list[Rated]:
    paths = write_photos(tmp_path_factory.mktemp("versions"), count=2 * VERSIONS, side=44)
    found = []
    for place, path in enumerate(paths):
        window, level = divmod(place, VERSIONS)
        found.append(Rated(path, 1 - level / 10, "blur" if level else "", f"window {window}"))
    return found


def run(chosen: ScoreConfig, rated: list[Rated], versions: list[Rated], folder: Path) -> dict[str, torch.Tensor]:
    run_score(chosen, rated[:3], rated[3:], folder, ordered=versions, conduct=ON_CPU)
    return load(folder / "model.safetensors").model.state_dict()


def test_learning_from_features_is_learning_from_their_crops(
    rated: list[Rated], versions: list[Rated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(config(), rated, versions, tmp_path / "run")
    tasks: list[ScoreTask] = []
    monkeypatch.setattr("diffiqa.training.score.train", lambda task, *_: tasks.append(task))
    with pytest.raises(AttributeError):  # the run ends where training would begin
        run_score(config(), rated[:3], rated[3:], tmp_path / "other", ordered=versions, conduct=ON_CPU)
    (task,) = tasks
    assert task.features
    vda = task.model.vda
    assert vda
    pictures = task.training[0]
    seen = task.features.of(pictures, 0)
    with torch.no_grad():
        expected = vda.encode(torch.from_numpy(task.grid(pictures, 0)))
        np.testing.assert_allclose(seen, expected.numpy(), rtol=2e-3, atol=2e-3)
        np.testing.assert_allclose(task.validate(machine()).row["rmse"], unseen(task), rtol=1e-2)
    everything = np.concatenate([task.features.of(pictures, i)[:, 0] for i in range(len(pictures))]).astype(np.float32)
    np.testing.assert_allclose(vda.readout.mean.numpy(), everything.mean(0), atol=1e-4)


def machine() -> Any:
    from .runs import CPU

    return CPU


def unseen(task: ScoreTask) -> float:
    """Return what validation finds when it looks at the crops themselves."""
    features, task.features = task.features, None
    found = task.validate(machine()).row["rmse"]
    task.features = features
    return found


def test_a_frozen_encoder_stays_and_the_readout_learns(
    rated: list[Rated], versions: list[Rated], tmp_path: Path
) -> None:
    first = run(config(validate_every=1), rated, versions, tmp_path / "a")
    again = run(config(validate_every=1), rated, versions, tmp_path / "b")
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    other = run(config(seed=6, validate_every=1), rated, versions, tmp_path / "c")
    assert not torch.equal(first["vda.readout.linear.weight"], other["vda.readout.linear.weight"])
    # No restoration was seen: the differences to them count nothing.
    assert not any(first[f"vda.rtab.{name}.weight"].any() for name in "qkv")


def test_a_batch_holds_one_windows_versions_side_by_side(
    rated: list[Rated], versions: list[Rated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[ScoreTask] = []
    monkeypatch.setattr("diffiqa.training.score.train", lambda task, *_: tasks.append(task))
    with pytest.raises(AttributeError):
        run_score(config(), rated[:3], rated[3:], tmp_path, ordered=versions, conduct=ON_CPU)
    (task,) = tasks
    of = {str(item.path): item for item in versions}
    for step in range(4):
        group = [task.sample(step, index) for index in range(VERSIONS)]
        shown = [of[sample.name] for sample in group]
        assert len({item.shows for item in shown}) == 1
        assert [sample.arrays[1].tolist() for sample in group] == [[np.float32(i.quality), 0] for i in shown]
        assert len({item.path for item in shown}) == VERSIONS
        assert all(task.sample(step, index).arrays[1][1] == -1 for index in (VERSIONS, VERSIONS + 1))
    own = [task.sample(step, VERSIONS + place).name for step in range(3) for place in range(2)]
    assert {own.count(name) for name in own} == {2}  # three pictures, two places: each twice in three steps


def test_pairs_are_ranked_within_groups_only() -> None:
    scores, labels = torch.tensor([0.0, 1.0, 5.0, 4.0]), torch.tensor([1.0, 0.0, 0.9, 0.8])
    groups = torch.tensor([-1.0, -1.0, 0.0, 0.0])
    alone = ranking_loss(scores[:2], labels[:2], 1.0)
    assert alone == 2.0
    assert ranking_loss(scores, labels, 1.0, groups) == alone / 2  # the second pair is in order by more than the margin


def test_correlation_is_pearsons() -> None:
    random = np.random.default_rng(1)
    a, b = random.standard_normal((2, 50))
    found = correlation(torch.from_numpy(a), torch.from_numpy(b))
    assert float(found) == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert torch.isfinite(correlation(torch.ones(4), torch.arange(4.0)))


def test_a_lot_of_fewer_is_the_beginning_of_one_of_more(rated: list[Rated], versions: list[Rated]) -> None:
    assert lot(rated, 0) == rated
    assert lot(rated, 4)[:2] == lot(rated[::-1], 2)
    assert len({item.shows for item in lot(versions, VERSIONS)}) == 1


def test_the_middle_stands_for_a_picture(rated: list[Rated], tmp_path: Path) -> None:
    whole = Pictures([rated[0].path], tmp_path, min_side=32)[0]
    window = Pictures([rated[0].path], tmp_path, min_side=32, window=34)[0]
    top, left = (length - 34) // 2 if (length := whole.shape[0]) else 0, (whole.shape[1] - 34) // 2
    assert np.array_equal(window, whole[top : top + 34, left : left + 34])


def test_refuses() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rates": Rates()}, "features need"),
        ({"model": MODEL}, "features need"),
        ({"ordered": VERSIONS + 1}, "ordered must be a multiple of 6"),
        ({"ordered": 2 * VERSIONS}, "ordered must be"),
        ({"pictures": -1}, "pictures and validation_pictures"),
        ({"window": 16}, "window must be 0"),
        ({"ridge": -1.0}, "ridge must not be negative"),
        ({"correlation_weight": -0.1}, "correlation_weight"),
    ]
    for changes, message in cases:
        with pytest.raises(ConfigError, match=message):
            config(**changes)


def test_begins_as_a_ridge_regression(
    rated: list[Rated], versions: list[Rated], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[ScoreTask] = []
    monkeypatch.setattr("diffiqa.training.score.train", lambda task, *_: tasks.append(task))
    with pytest.raises(AttributeError):
        run_score(config(ridge=0.5), rated[:4], rated[4:] * 2 + rated[:1], tmp_path, ordered=versions, conduct=ON_CPU)
    (task,) = tasks
    assert task.features
    vda = task.model.vda
    assert vda
    pictures, labels = task.training
    seen = [torch.from_numpy(task.features.of(pictures, i).astype(np.float32)) for i in range(len(pictures))]
    x = np.stack([((one[:, 0] - vda.readout.mean) / vda.readout.deviation).mean(0).numpy() for one in seen]).astype(
        float
    )
    y = np.array(labels)
    gram = x @ x.T / x.shape[1]
    expected = gram @ np.linalg.solve(gram + 0.5 * np.eye(len(x)), y - y.mean()) + y.mean()
    task.model.eval()
    with torch.no_grad():
        found = [float(task.model.vda_scores(one).score.mean()) for one in seen]
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_averages_two_runs(tmp_path: Path) -> None:
    files = []
    for seed in (1, 2):
        files.append(tmp_path / f"{seed}.safetensors")
        save_bundle(build(MODEL, seed), files[-1])
    average((files[0], files[1]), 0.25, tmp_path / "new" / "both.safetensors")
    both = load(tmp_path / "new" / "both.safetensors")
    one, other = (load(file).model.state_dict() for file in files)
    for name, value in both.model.state_dict().items():
        mixed = one[name].float() * 0.75 + other[name].float() * 0.25
        torch.testing.assert_close(value.float(), mixed, atol=1e-6, rtol=1e-6)
    assert all(source.format.startswith("0.75 of ") for source in both.sources if source.role == "vda")
    with pytest.raises(ConfigError, match="between 0 and 1"):
        average((files[0], files[1]), 1.5, tmp_path / "both.safetensors")
    save_bundle(build(dataclasses.replace(MODEL, vcg=None), 1), files[1])
    with pytest.raises(ConfigError, match="of different configurations"):
        average((files[0], files[1]), 0.5, tmp_path / "both.safetensors")
