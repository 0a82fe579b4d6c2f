"""Training PFD-IQA: what frozen blocks see, the ridge that a teacher begins as, damage by name, whole runs."""

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

from diffiqa.data.distortions import DISTORTIONS
from diffiqa.data.pictures import read_pixels
from diffiqa.engine.agreement import srcc
from diffiqa.engine.codec import encode
from diffiqa.engine.pixels import to_plane
from diffiqa.evaluation.correlation import agreement, spread
from diffiqa.model.lite import LITE0 as VARIANT
from diffiqa.model.lite import Lite
from diffiqa.model.network import build as build_diff
from diffiqa.model.pfd.checkpoint import load
from diffiqa.model.pfd.config import Backbone, Words
from diffiqa.model.pfd.network import build
from diffiqa.training.cli import train
from diffiqa.training.config import Optimisation, PfdTrainConfig
from diffiqa.training.loop import QUIETLY
from diffiqa.training.pfd import (
    WORDS,
    Data,
    TeacherTask,
    begin_as_ridge,
    damaged,
    judge,
    lite_of,
    severity,
    teach,
    word_of,
)
from diffiqa.training.pfd_features import Picture, SeenPictures, encoded, finished, look, turned

from ..model.comparing import randomised
from ..model.lite_goldens import fill
from ..model.pfd.small import LITE0
from ..tiny import TINY, photo
from .runs import CPU, write_photos
from .test_commands import toml

MODEL = dataclasses.replace(LITE0, words=Words())
CONFIG = PfdTrainConfig(MODEL, 1, Optimisation(3, 3), Optimisation(2, 4), damaged=4, damaged_places=2)


@pytest.mark.parametrize("encoder", [Backbone.LITE0, Backbone.LITE2])
def test_rows_finished_are_what_the_encoder_returns(encoder: Backbone) -> None:
    model = build(dataclasses.replace(MODEL, encoder=encoder), 1)
    randomised(model.encoder, 1)
    own = lite_of(model.float())
    crops = torch.rand(3, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        rows = torch.from_numpy(look(own.lite, crops.numpy()))
        of_maps, _ = seen = finished(own, rows)
        for found, wanted in zip(encoded(own, seen), own(crops), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_maps, rows[:, : own.lite.variant.features], rtol=1e-4, atol=1e-4)


def test_a_turned_row_has_its_maps_mirrored_and_its_moments_as_they_were() -> None:
    rng = np.random.default_rng(0)
    maps = rng.standard_normal((8, 176, 4, 4)).astype(np.float16)
    moments = rng.standard_normal((8, VARIANT.features)).astype(np.float16)
    rows, mirrored = (np.concatenate([moments, x.reshape(8, -1)], axis=1) for x in (maps, maps[..., ::-1]))
    found = turned(rows, VARIANT, rng)
    assert found.dtype == np.float32
    kinds = [
        (bool((row == as_is).all()), bool((row == turn).all()))
        for row, as_is, turn in zip(found, rows, mirrored, strict=True)
    ]
    assert set(kinds) == {(True, False), (False, True)}


def test_a_step_of_the_teacher_takes_as_many_crops_as_it_is_told(tmp_path: Path) -> None:
    model, path = build(MODEL, 1), write_photos(tmp_path, count=1, side=200)[0]
    seen = SeenPictures(lite_of(model).lite, MODEL, tmp_path / "cache", crops=4, seed=1)
    pictures = seen.fill([Picture(path, 0.5)], print)
    for told, taken in ((0, 4), (3, 3)):
        config = dataclasses.replace(CONFIG, teacher_crops=told)
        task = TeacherTask(config, model, seen, Data(pictures, (), (), ()))
        rows = [task.sample(step, 0).arrays[0] for step in range(8)]
        assert {len(row) for row in rows} == {taken}
        assert len({row[0, : VARIANT.features].tobytes() for row in rows}) > 1  # by lot
        assert all(len({row.tobytes() for row in some}) == taken for some in rows)  # none twice


@pytest.mark.parametrize("left", [0, 60, -2])  # bytes
def test_what_is_cut_off_in_the_cache_is_made_anew(left: int, tmp_path: Path) -> None:
    seen = SeenPictures(lite_of(build(MODEL, 1)).lite, MODEL, tmp_path / "cache", crops=2, seed=1)
    pictures = [Picture(path, 0.5) for path in write_photos(tmp_path, count=2, side=80)]
    said: list[str] = []
    assert seen.fill(pictures, said.append) == pictures
    assert said == []
    file = seen.file(pictures[1])
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    assert seen.fill(pictures, said.append) == pictures
    assert len(said) == 1
    assert said[0].startswith(f"{file} is damaged, and is made anew: ")
    assert file.read_bytes() == whole


def test_a_teacher_begins_as_a_ridge(tmp_path: Path) -> None:
    model = build(MODEL, 1)
    encoder = lite_of(model)
    encoder.lite.load_state_dict(fill(Lite(VARIANT)).state_dict())
    pictures = [Picture(path, i / 5) for i, path in enumerate(write_photos(tmp_path, count=6, side=80))]
    seen = SeenPictures(encoder.lite, MODEL, tmp_path / "cache", crops=4, seed=1)
    assert seen.fill(pictures, print) == pictures
    begin_as_ridge(model, seen, pictures, 0.5)
    found = judge(model, seen, pictures, CPU, denoised=False).scores
    x = np.stack([seen(p)[:, : VARIANT.features].astype(np.float64).mean(0) for p in pictures])
    x = (x - x.mean(0)) / np.maximum(x.std(0, ddof=1), 1e-3)
    y = np.array([p.quality for p in pictures])
    kernel = x @ x.T / VARIANT.features
    wanted = y.mean() + kernel @ np.linalg.solve(kernel + 0.5 * np.eye(6), y - y.mean())
    np.testing.assert_allclose(found, wanted, atol=2e-3)
    with torch.no_grad():
        rows = torch.from_numpy(seen(pictures[0]).astype(np.float32))
        _, features = encoded(encoder, finished(encoder, rows))
    assert 0.3 < float(features.std()) < 3


def test_a_share_of_what_the_teacher_learned_is_kept(tmp_path: Path) -> None:
    pictures = [Picture(path, i / 5) for i, path in enumerate(write_photos(tmp_path, count=6, side=80))]

    def taught(share: float) -> dict[str, Tensor]:
        model = build(MODEL, 1)
        seen = SeenPictures(lite_of(model).lite, MODEL, tmp_path / "cache", crops=4, seed=1)
        seen.fill(pictures, print)
        config = dataclasses.replace(CONFIG, teacher_share=share)
        data = Data(pictures, [], pictures, [])
        return teach(config, model, seen, data, tmp_path / f"{share}", CPU, QUIETLY).weights

    begun, half, learned = map(taught, (0.0, 0.5, 1.0))
    moved = [name for name, value in learned.items() if not torch.equal(value, begun[name])]
    assert any(name.startswith("encoder.lite._conv_head") for name in moved)
    for name in moved:
        torch.testing.assert_close(half[name], (begun[name] + learned[name]) / 2)


def test_every_distortion_has_one_word_and_every_word_is_liqes() -> None:
    assert sorted(kind for kinds in WORDS.values() for kind in kinds) == sorted(DISTORTIONS)
    assert tuple(WORDS) == Words().distortions


def test_good_pictures_are_damaged_by_words_in_turn(tmp_path: Path) -> None:
    pictures = [Picture(tmp_path / f"{i}.png", i / 99) for i in range(100)]
    found = damaged(pictures, 33, 1)
    assert found == damaged(pictures[::-1], 33, 1) != damaged(pictures, 33, 2)
    assert len({p.path for p in found}) == 33
    assert min(p.quality for p in found) >= 0.6
    assert [word_of(p.kind) for p in found] == 3 * list(WORDS)
    assert all(severity(p) > 0 for p in found)  # level 3 of the mean shift changes nothing
    assert {p.level for p in damaged(pictures, 33, 1, 3)} == {3, 4, 5}
    assert damaged(pictures, 0, 1) == []


def test_a_bootstrap_draws_images() -> None:
    random = np.random.default_rng(1)
    a, b = random.standard_normal((2, 60))
    found = agreement(a + b, b)
    value, low, high = found["srcc"]
    assert value == pytest.approx(srcc(a + b, b), abs=1e-4)
    assert 0 < low < value < high < 1
    assert spread(lambda i: float(np.mean(b[i])), 60)[0] == pytest.approx(b.mean(), abs=1e-4)
    low, high = spread(lambda i: float(np.mean(b[i])), 60)[1:]
    assert high - low == pytest.approx(2 * 1.96 * b.std() / 60**0.5, rel=0.1)


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A tiny configuration, prompts, Lite0's weights and fourteen labelled pictures."""
    paths = write_photos(tmp_path / "photos", count=14, side=70)
    for i, path in enumerate(paths):  # the better, the brighter
        Image.fromarray(photo(i, 70, 78)[: 64 if i == 8 else 70, : 64 if i == 8 else 78] // 14 * (i + 1)).save(path)
    names = [f"photos/{path.name}" for path in paths]
    (tmp_path / "labels.csv").write_text("image,score\n" + "".join(f"{name},{i}\n" for i, name in enumerate(names)))
    parts = {"train": names[:2] + names[8:], "validation": names[2:4], "test": names[4:8]}
    (tmp_path / "split.json").write_text(json.dumps({"dataset": "labels", "seed": None, "parts": parts}))
    write_config(tmp_path, CONFIG)
    np.save(tmp_path / "prompts.npy", np.random.default_rng(1).standard_normal((16, 10)).astype(np.float32))
    torch.save(fill(Lite(VARIANT)).state_dict() | {"_fc.bias": torch.zeros(1000)}, tmp_path / "lite0.pth")
    files = {"config": "base.toml", "data": "labels.csv", "split": "split.json", "lite": "lite0.pth"}
    files |= {"prompts": "prompts.npy"}
    options = [text for name, file in files.items() for text in (f"--{name}", str(tmp_path / file))]
    return ["pfd", *options, "-o", str(tmp_path / "out"), "--device", "cpu"]


def write_config(folder: Path, config: PfdTrainConfig) -> None:
    values = encode(config)
    (folder / "base.toml").write_text("".join(f"{name} = {toml(value)}\n" for name, value in values.items()))


def test_a_run_leaves_a_bundle_that_scores_as_it_was_judged(arguments: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 0, result.stderr
    loaded = load(tmp_path / "out" / "model.safetensors")
    assert [source.role for source in loaded.sources] == ["bundle", "prompts", "encoder"]
    assert "2 of its own" in loaded.notes[0]
    assert (tmp_path / "out" / "plot.png").exists()
    for who, run, steps in (("teacher", "out/teacher", "3"), ("student", "out", "2")):
        with (tmp_path / run / "validation.csv").open(newline="") as file:
            assert [row["step"] for row in csv.DictReader(file)] == [steps]
        assert f"the {who}, in {tmp_path / run}\nstep {steps} of {steps}: loss" in result.stderr
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    # After two steps the decoder hardly listens to the features, and so not to the noise in them.
    torch.nn.init.normal_(loaded.model.decoder.layer.multihead_attn.out_proj.weight)
    picture = Picture(tmp_path / "photos" / "photo2.png", 0.5)
    seen = SeenPictures(lite_of(loaded.model).lite, MODEL, tmp_path / "cache", crops=4, seed=1)
    assert seen.fill([picture], print) == [picture]
    found = judge(loaded.model, seen, [picture], CPU)
    whole = seen.crops(picture)
    assert len(whole) == 4

    said = loaded.model.score(torch.from_numpy(to_plane(read_pixels(picture.path)))[None], crops=4)
    np.testing.assert_allclose(found.scores, said.score.numpy(), rtol=5e-3)
    np.testing.assert_allclose(found.distortions, said.distortions.numpy(), atol=2e-2)

    again = CliRunner().invoke(train, [*arguments, "--resume"])
    assert again.exit_code == 0, again.stderr
    after = load(tmp_path / "out" / "model.safetensors").model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.usefixtures("no_charts")
def test_ablations_share_a_teacher_and_end_as_one_table(arguments: list[str], tmp_path: Path) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "a-full.toml").write_text("")
    (recipes / "learned.toml").write_text('[model]\nprompts = "learned"\n')
    (recipes / "none.toml").write_text("[model]\nalignment = false\nschedule = { timesteps = [] }\n")
    result = CliRunner().invoke(train, [*arguments, "--recipes", str(recipes)])
    assert result.exit_code == 0, result.stderr
    table = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert list(table) == ["teacher", "a-full", "learned", "none"]
    assert all(len(row["srcc"]) == 3 for row in table.values())
    assert all(len(table[name]["srcc_gain"]) == 3 for name in ("a-full", "learned", "none"))
    assert (tmp_path / "out" / "learned" / "model.safetensors").exists()
    (recipes / "a-full.toml").write_text("seed = 2\n")
    result = CliRunner().invoke(train, [*arguments, "--recipes", str(recipes), "--resume"])
    assert result.exit_code == 2
    assert "a-full must change the model alone, and changes seed was 1, is 2" in result.stderr


def cut(folder: Path) -> None:
    path = folder / "photos" / "photo9.png"
    path.write_bytes(path.read_bytes()[:200])


def other_family(folder: Path) -> None:
    torch.save(build_diff(TINY, 1).state_dict(), folder / "lite0.pth")


def narrow(folder: Path) -> None:
    np.save(folder / "prompts.npy", np.ones((16, 9), np.float32))


def of_vit(folder: Path) -> None:
    text = (folder / "base.toml").read_text()
    (folder / "base.toml").write_text(text.replace('encoder = "lite0"', 'encoder = "vit"'))


def gone(folder: Path) -> None:
    (folder / "photos" / "photo9.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (narrow, "are 9 wide, model 'small' wants 10"),
        (other_family, "wants an encoder of efficientnet-lite-pytorch"),
        (of_vit, "model.encoder must be lite0 or lite2"),
        (gone, "photo9.png"),
    ],
)
def test_what_cannot_be_trained_is_named(
    spoil: Callable[[Path], None], words: str, arguments: list[str], tmp_path: Path
) -> None:
    spoil(tmp_path)
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.usefixtures("no_charts")
def test_a_picture_that_was_cut_off_is_left_out_and_named(arguments: list[str], tmp_path: Path) -> None:
    cut(tmp_path)
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 0, result.stderr
    assert "left out: " in result.stderr
    assert "photo9.png" in result.stderr


def test_constant_prompts_must_be_given(arguments: list[str]) -> None:
    place = arguments.index("--prompts")
    result = CliRunner().invoke(train, arguments[:place] + arguments[place + 2 :])
    assert result.exit_code == 2
    assert "give the file that iqa-prompts makes, with --prompts" in result.stderr
