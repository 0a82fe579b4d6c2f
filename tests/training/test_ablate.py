"""`iqa-train ablate`: every recipe of the paper's tables can be built, and each run ends as a row of one table."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from diffiqa.engine.codec import encode
from diffiqa.engine.schedule import Kind
from diffiqa.errors import ConfigError
from diffiqa.model.config import PRESETS
from diffiqa.tests.tiny import TINY
from diffiqa.training import ablate as module
from diffiqa.training.ablate import read_recipes
from diffiqa.training.cli import train
from diffiqa.training.config import ScoreConfig, read_config
from diffiqa.training.loop import TrainingError
from diffiqa.training.score import run_score

from .runs import write_photos
from .test_commands import toml

RECIPES = Path(module.__file__).parent / "recipes"
BASE = RECIPES / "mini-score.toml"


def test_every_recipe_changes_the_model_alone() -> None:
    base = read_config(ScoreConfig, BASE)
    recipes = read_recipes(ScoreConfig, BASE, [RECIPES / "ablations"])
    assert len(recipes) > 20
    for name, config in recipes.items():
        assert config.model.name == f"mini-{name}"
        assert dataclasses.replace(config, model=base.model) == base


def test_the_full_recipe_is_the_preset_with_the_weights_that_ship_and_all_others_differ() -> None:
    recipes = read_recipes(ScoreConfig, BASE, [RECIPES / "ablations"])
    models = {name: dataclasses.replace(config.model, name="mini") for name, config in recipes.items()}
    assert models["full"] == dataclasses.replace(PRESETS["mini"], vcg_weight=0.5, vda_weight=1.5)
    assert len({json.dumps(encode(model), sort_keys=True) for model in models.values()}) == len(models)


def test_recipes_say_what_their_tables_do() -> None:
    models = {name: config.model for name, config in read_recipes(ScoreConfig, BASE, [RECIPES / "ablations"]).items()}
    assert models["vii-nothing"].kinds == (Kind.DIS,)
    assert models["viii-vcg"].vda is None
    assert models["viii-vda"].vcg is None
    for name, model in models.items():
        if name.startswith("xi-"):
            assert set(name.removeprefix("xi-").split("-")) == set(model.kinds) - {Kind.DIS}
        if name.startswith("xii-"):
            assert model.vda
            assert f"xii-{model.vda.query}-{model.vda.key}-{model.vda.value}" == name
        if name.startswith("fig10-"):
            assert model.vcg
            assert name.removeprefix("fig10-") == "".join(str(len(model.vcg.selection[kind])) for kind in Kind)


def test_recipes_are_refused_before_any_is_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no recipes"):
        read_recipes(ScoreConfig, BASE, [tmp_path])
    (tmp_path / "one.toml").write_text("[model]\nvcg = false\nvda = false\n")
    with pytest.raises(ConfigError, match=r"one\.toml: .*needs at least one branch"):
        read_recipes(ScoreConfig, BASE, [tmp_path])
    (tmp_path / "one.toml").write_text("")
    with pytest.raises(ConfigError, match="two recipes are called one"):
        read_recipes(ScoreConfig, BASE, [tmp_path, tmp_path / "one.toml"])


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A tiny configuration, two recipes and ten labelled pictures."""
    (tmp_path / "base.toml").write_text(
        f"model = {toml(encode(TINY))}\nseed = 1\nvalidation_crops = 1\noptimisation = {{steps = 1, batch = 2}}\n"
    )
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "full.toml").write_text("")
    (recipes / "vcg.toml").write_text("[model]\nvda = false\n")
    paths = write_photos(tmp_path / "photos", count=8, side=36)
    names = [f"photos/{path.name}" for path in paths]
    (tmp_path / "labels.csv").write_text("image,score\n" + "".join(f"{name},{i}\n" for i, name in enumerate(names)))
    parts = {"train": names[:4], "validation": names[4:6], "test": names[6:]}
    (tmp_path / "split.json").write_text(json.dumps({"dataset": "labels", "seed": None, "parts": parts}))
    given = {"config": "base.toml", "recipes": "recipes", "data": "labels.csv", "split": "split.json"}
    options = [text for name, file in given.items() for text in (f"--{name}", str(tmp_path / file))]
    return ["ablate", *options, "-o", str(tmp_path / "out"), "--device", "cpu"]


def test_each_recipe_is_a_row_and_restorations_are_made_once(arguments: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 0, result.stderr
    table = tmp_path / "out" / "ablation.csv"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["recipe"] for row in rows] == ["full", "vcg"]
    for row in rows:
        assert row["step"] == "1"
        assert row["test_srcc"]
        assert row["recipe"] in result.stdout
        assert (tmp_path / "out" / row["recipe"] / "plot.png").exists()
    assert len(list((tmp_path / "out" / "cache" / "restored").iterdir())) == 8  # both look at the same kinds
    before = table.read_text()
    assert CliRunner().invoke(train, arguments).exit_code == 2  # runs are there, and --resume was not given
    assert CliRunner().invoke(train, [*arguments, "--resume"]).exit_code == 0
    assert table.read_text() == before


def test_a_recipe_that_fails_leaves_a_reason_and_the_rest_goes_on(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: ScoreConfig, *args: object, **options: object) -> object:
        if config.model.name.endswith("full"):
            raise TrainingError("step 1: the loss is not finite")
        return run_score(config, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "run_score", run)
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 1
    with (tmp_path / "out" / "ablation.csv").open(newline="") as file:
        full, vcg = csv.DictReader(file)
    assert full["problem"] == "step 1: the loss is not finite"
    assert vcg["test_srcc"]


def test_several_processes_are_refused(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(train, arguments)
    assert result.exit_code == 2
    assert "ablate is one process" in result.stderr
