"""What weights cannot tell: values from texts, programs and TOML files, and where they end up in a configuration."""

from pathlib import Path

import numpy as np
import pytest

from diffiqa.engine.manifest import Manifest
from diffiqa.errors import ConfigError
from diffiqa.export.engine import manifest_of
from diffiqa.model.checkpoint import Loaded
from diffiqa.model.config import PRESETS, Better, ModelConfig, Pixels
from diffiqa.model.network import DiffV2IQA
from diffiqa.model.options import MAX_BYTES, OPTIONS, apply, as_text, parse_options, read_options

from ..tiny import TINY

FILE = """
swin-scale = 0.13
branch-weights = [0, 1]   # VDA alone, as the published code ends
steps = 8
taps = [2, 4]
score-range = [1, 5]
better = "lower"
mean = 0.485
std = [0.229, 0.224, 0.225]
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.toml"
    path.write_text(FILE)
    return path


def manifest(config: ModelConfig) -> Manifest:
    model = DiffV2IQA(TINY)
    model.config = config
    return manifest_of(Loaded(model, (), ()), ())


def test_a_file_says_the_same_as_the_command_line(file: Path) -> None:
    given = {
        "swin-scale": "0.13",
        "branch-weights": "0,1",
        "steps": "8",
        "taps": "2, 4",
        "score-range": "1,5",
        "better": "lower",
        "mean": "0.485",
        "std": "0.229,0.224,0.225",
    }
    config = apply(TINY, read_options(file))
    assert config == apply(TINY, parse_options(given))
    assert config.vcg is not None
    assert config.vcg.swin.scale == 0.13
    assert (config.vcg_weight, config.vda_weight) == (0, 1)
    assert (config.schedule.steps, config.taps.t1, config.taps.t2) == (8, 2, 4)
    assert config.pixels == Pixels((0.485, 0.485, 0.485), (0.229, 0.224, 0.225))
    assert config.labels.better is Better.LOWER


def test_labels_of_another_range_and_direction_are_said_by_the_engine() -> None:
    known = manifest(apply(TINY, parse_options({"score-range": (1, 5), "better": "lower"}))).score
    assert (known.minimum, known.nominal_maximum, known.higher_is_better) == (1, 5, False)
    untrained = manifest(apply(TINY, parse_options({"score-range": "0,100"}))).score
    assert untrained.meaning.endswith("training labels, 0 (worst) to 100 (best).")
    assert known.meaning.endswith("training labels, 5 (worst) to 1 (best).")
    assert manifest(TINY).score.meaning.endswith("scaled to 0 … 1.")


OTHER = {  # than in the preset `authors`
    "swin-scale": "0.13",
    "branch-weights": "1,5",
    "steps": "60",
    "taps": "3,4",
    "norm-groups": "16",
    "score-range": "0,100",
    "tap-form": "clamped",
    "sides": "padded",
    "image-form": "squashed",
    "crop-places": "grid",
    "crop-count": "8",
    "better": "lower",
    "mean": "0.25,0.5,0.75",
    "std": "0.25,0.5,0.75",
}


def test_every_option_reads_what_it_shows_and_changes_its_own_entries_alone() -> None:
    for option in OPTIONS:
        config = PRESETS["authors"]
        assert apply(config, parse_options({option.name: as_text(option.values(config))})) == config
        changed = apply(config, parse_options({option.name: OTHER[option.name]}))
        assert as_text(option.values(changed)) == OTHER[option.name]
        assert [o.name for o in OPTIONS if o.values(changed) != o.values(config)] == [option.name]


def test_values_of_another_kind_are_refused() -> None:
    cases: list[tuple[str, object]] = [
        ("swin-scale", "strong"),
        ("swin-scale", float("nan")),
        ("swin-scale", "1e400"),
        ("swin-scale", [0.1, 0.2]),
        ("branch-weights", "1"),
        ("branch-weights", "1,2,3"),
        ("steps", 8.5),
        ("steps", True),
        ("steps", "9" * 5000),
        ("taps", {"t1": 5}),
        ("better", "worse"),
        ("mean", [0.4, 0.5]),
        ("std", ""),
    ]
    for name, value in cases:
        with pytest.raises(ConfigError, match=rf"^{name} must be [A-Zh].*, not "):
            parse_options({name: value})


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"steps": 4}, "taps must be different step indices"),
        ({"score-range": "5,1"}, "labels.minimum must be below"),
        ({"std": 0}, "std above 0"),
        ({"branch-weights": "-1,1"}, "must not be negative"),
    ],
)
def test_values_that_no_model_has_are_refused_by_the_configuration(options: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        apply(PRESETS["authors"], parse_options(options))


@pytest.mark.parametrize(
    ("preset", "name"),
    [("maniqa", "steps"), ("maniqa", "taps"), ("maniqa", "branch-weights"), ("paper", "norm-groups")],
)
def test_an_option_that_a_model_has_no_use_for_is_refused(preset: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"model {preset!r} has no use for {name}; leave it out"):
        apply(PRESETS[preset], parse_options({name: "1,2" if name != "steps" and "-g" not in name else "20"}))


@pytest.mark.parametrize(("wrong", "right"), [("swin_scale", "swin-scale"), ("tabs", "taps"), ("x", "mean")])
def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path, wrong: str, right: str) -> None:
    path = tmp_path / "m.toml"
    path.write_text(f'"{wrong}" = 1\n')
    with pytest.raises(ConfigError) as caught:
        read_options(path)
    assert str(caught.value).startswith(f"{path}: there is no option '{wrong}'; the nearest is ")
    if wrong != "x":
        assert str(caught.value).endswith(right)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    large = tmp_path / "large.toml"
    large.write_bytes(b"#" * (MAX_BYTES + 1))
    for path, why in (
        (tmp_path / "none.toml", "No such file"),
        (tmp_path, "directory"),
        (large, "more than 65536 bytes"),
    ):
        with pytest.raises(ConfigError, match=why):
            read_options(path)


DAMAGE = [b"[", b"\xff", b"=", b'"', b"\n", b"[[a]]", b"9" * 400]


def test_damaged_files_end_in_one_clear_error_or_in_options(tmp_path: Path) -> None:
    generator, path = np.random.default_rng(17), tmp_path / "m.toml"
    refused = 0
    for _ in range(80):
        data = bytearray(FILE.encode())
        for _ in range(generator.integers(1, 5)):
            place = int(generator.integers(len(data)))
            data[place : place + int(generator.integers(4))] = DAMAGE[generator.integers(len(DAMAGE))]
        path.write_bytes(data)
        try:
            apply(TINY, read_options(path))
        except ConfigError as exc:
            refused += 1
            assert len(str(exc)) < 600  # noqa: PT017
            assert "\n" not in str(exc)  # noqa: PT017
    assert refused > 40
    path.write_text("a = " + "[" * 20_000)
    with pytest.raises(ConfigError, match="cannot read the options"):
        read_options(path)
