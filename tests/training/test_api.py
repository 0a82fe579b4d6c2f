"""The functions behind `iqa-train`: what they are given reaches the run, and what a run says reaches the caller."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from diffiqa.data.rate import Amount
from diffiqa.data.splits import Split
from diffiqa.engine.codec import encode
from diffiqa.errors import BackendError
from diffiqa.tests.tiny import TINY
from diffiqa.training import api
from diffiqa.training.cli import train

from .runs import write_photos
from .test_commands import toml

Calls = list[SimpleNamespace]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Record what is called in place of hours of work."""
    found: Calls = []

    def recorder(name: str) -> Callable[..., Any]:
        def record(*arguments: Any, **options: Any) -> Any:
            found.append(SimpleNamespace(name=name, arguments=arguments, options=options))
            return SimpleNamespace(step=7, verdict={"srcc": 0.5})

        return record

    for place in ("restore.run_restore", "pretrain.run_pretrain", "score.run_score", "ablate.ablate_recipes"):
        monkeypatch.setattr(f"diffiqa.training.{place}", recorder(place.partition(".")[0]))
    monkeypatch.setattr("diffiqa.data.rate.rate_photographs", recorder("rate"))
    return found


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """Six pictures of as many contents; the file is called labels.csv, its parts are in split.json."""
    names = [f"photos/{path.name}" for path in write_photos(tmp_path / "photos", count=6, side=8)]
    file = tmp_path / "labels.csv"
    file.write_text("image,score,distortion\n" + "".join(f"{name},{i},blur\n" for i, name in enumerate(names)))
    parts = {"training": names[:3], "validation": names[3:5], "test": names[5:]}
    (tmp_path / "split.json").write_text(json.dumps({"dataset": "labels", "seed": None, "parts": parts}))
    return file


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "run.toml"
    file.write_text(f"model = {toml(encode(TINY))}\nseed = 1\noptimisation = {{steps = 9, batch = 2}}\n")
    return file


@pytest.mark.parametrize("command", ["pretrain", "score", "ablate"])
def test_parts_and_bundles_reach_the_run(
    command: str, config: Path, labels: Path, tmp_path: Path, calls: Calls
) -> None:
    given: dict[str, Any] = {"recipes": [config]} if command == "ablate" else {"start": "start.safetensors"}
    if command != "pretrain":
        given |= {"unet": "u.safetensors", "vit": Path("v.safetensors"), "resnet": "r.safetensors"}
    said: list[str] = []
    getattr(api, command)(
        config,
        tmp_path / "out",
        data=labels,
        split=str(tmp_path / "split.json"),
        lower_better=True,
        cache="cache",
        device="cpu",
        resume=True,
        threads=3,
        say=said.append,
        **given,
    )
    (call,) = calls
    _, *parts, folder = call.arguments
    if command == "ablate":
        assert list(parts[0]) == ["train", "validation", "test"]
        parts = list(parts[0].values())
    stems = [[int(item.path.stem[-1]) for item in part] for part in parts]
    assert stems == [[0, 1, 2], [3, 4], [5]][: len(parts)]
    assert [item.quality for item in parts[0]] == pytest.approx([1, 0.8, 0.6])
    assert (folder, call.options["cache"]) == (tmp_path / "out", Path("cache"))
    for option in {"start", "unet", "vit", "resnet"} & set(given):
        assert call.options[option] == Path(given[option])
    conduct = call.options["conduct"]
    assert (conduct.device, conduct.resume, conduct.threads) == ("cpu", True, 3)
    conduct.progress(4, 9, 0.25, 1e-3)
    assert said == ["step 4 of 9: loss 0.25000, learning rate 1.00e-03"]


def test_without_a_split_one_is_drawn_and_the_first_process_writes_it(
    config: Path, labels: Path, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    api.score(config, tmp_path / "out", data=labels)
    assert not (tmp_path / "out").exists()
    monkeypatch.setenv("RANK", "0")
    api.score(config, tmp_path / "out", data=labels)
    split = Split.read(tmp_path / "out" / "split.json")
    trained = [[item.path.name for item in call.arguments[1]] for call in calls]
    assert trained == [[Path(name).name for name in split.parts["train"]]] * 2


def test_restoring_takes_photographs_of_several_folders(config: Path, tmp_path: Path, calls: Calls) -> None:
    config.write_text(config.read_text() + "crop = 16\n")
    folders = [tmp_path / name for name in ("a", "b", "c")]
    paths = [write_photos(folder, count=2, side=8) for folder in folders]
    api.restore(str(config), tmp_path / "out", data=folders[:2], held_out=folders[2:], start="s.safetensors")
    (call,) = calls
    assert [sorted(found) for found in call.arguments[1:3]] == [paths[0] + paths[1], paths[2]]
    assert call.options["start"] == Path("s.safetensors")


def test_the_command_says_what_a_run_ended_with_unless_it_is_quiet(
    config: Path, labels: Path, tmp_path: Path, calls: Calls
) -> None:
    args = ["score", "--config", str(config), "--data", str(labels), "-o", str(tmp_path / "out")]
    said = CliRunner().invoke(train, args)
    assert said.stdout == f"{tmp_path / 'out' / 'model.safetensors'}: weights of step 7; last validation: srcc 0.5000\n"
    quiet = CliRunner().invoke(train, [*args, "-q"])
    assert (quiet.exit_code, quiet.output) == (0, "")
    assert len(calls) == 2


def test_rating_has_its_amounts_for_training_and_for_what_is_held_out(tmp_path: Path, calls: Calls) -> None:
    for part in ("train", "validation", "test"):
        write_photos(tmp_path / "photos" / part, count=1, side=8)
    args = ["rate", "--photos", str(tmp_path / "photos"), "-o", str(tmp_path / "out"), "--seed", "3", "--side", "180"]
    result = CliRunner().invoke(train, [*args, "--train", "4", "1", "--one-level", "--held-out", "1", "2"])
    assert result.exit_code == 0, result.output
    (call,) = calls
    held_out = Amount(1, 2)
    assert call.options["amounts"] == {"train": Amount(4, 1, True), "validation": held_out, "test": held_out}
    assert (call.options["seed"], call.options["side"]) == (3, 180)
    assert [path.parent.name for paths in call.arguments[0].values() for path in paths] == [
        "train",
        "validation",
        "test",
    ]


@pytest.mark.parametrize("command", ["restore", "pretrain", "score", "ablate"])
def test_a_missing_matplotlib_ends_a_run_before_it_begins(
    command: str, config: Path, labels: Path, tmp_path: Path, calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run ends with a chart: hours later, the error would come too late."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    data = [labels.parent / "photos"] if command == "restore" else labels
    options: dict[str, Any] = {"recipes": [config]} if command == "ablate" else {}
    with pytest.raises(BackendError, match=r"pip install 'diffiqa\[train\]'"):
        getattr(api, command)(config, tmp_path / "out", data=data, **options)
    assert not calls
