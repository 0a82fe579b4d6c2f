"""What a score means to a person: the percentile that SciPy counts, and references that cannot be used are refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from diffiqa.engine.codec import encode
from diffiqa.engine.manifest import MANIFEST, ScoreMeaning, open_engine, read_manifest
from diffiqa.engine.monotone import Monotone
from diffiqa.engine.reference import PERCENTS, Reference, percent_text, read_reference
from diffiqa.errors import DatasetError, EngineError

SCORES = np.random.default_rng(5).beta(2, 3, 400)
REFERENCE = Reference(
    name="a set",
    images=len(SCORES),
    crops=9,
    mode="whole",
    quantiles=tuple(np.percentile(SCORES, PERCENTS).tolist()),
    opinions=Monotone((0.2, 0.8), (2.0, 4.0)),
    error=0.5,
    weights="ab" * 8,
    scoring="cd" * 8,
)
MEANING = ScoreMeaning(1.0, 1.0, "Quality.", trained=True, reference=REFERENCE)


def test_a_percentile_is_the_share_of_images_with_a_lower_score() -> None:
    for score in (-1.0, 0.05, *SCORES[:5].tolist(), 0.6, 2.0):
        assert MEANING.percentile(score) == pytest.approx(stats.percentileofscore(SCORES, score, "mean"), abs=0.5)


def test_where_lower_scores_are_better_both_turn_round() -> None:
    turned = dataclasses.replace(
        REFERENCE,
        quantiles=tuple(np.percentile(-SCORES, PERCENTS).tolist()),
        opinions=Monotone((-0.8, -0.2), (2.0, 4.0)),
    )
    meaning = dataclasses.replace(MEANING, higher_is_better=False, reference=turned)
    assert meaning.percentile(0.3) == pytest.approx(100 - (MEANING.percentile(0.3) or 0), abs=1e-9)
    assert [meaning.opinion(score) for score in (0.1, 0.2, 0.5, 0.9)] == pytest.approx([4, 4, 3, 2])


def test_without_a_reference_there_is_neither() -> None:
    bare = dataclasses.replace(MEANING, reference=None)
    assert (bare.percentile(0.5), bare.opinion(0.5)) == (None, None)


def test_percent_is_rounded_down() -> None:
    assert [percent_text(value) for value in (99.9, 100.0, None, float("nan"))] == ["99 %", "100 %", "", ""]


def test_other_crops_or_another_mode_are_said() -> None:
    assert REFERENCE.caveat(9, "whole") is None
    assert "not for --crops 4 --mode whole" in str(REFERENCE.caveat(4, "whole"))
    assert "not for --crops 9 --mode crop" in str(REFERENCE.caveat(9, "crop"))


def changed(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.update(values)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed(images=99), "needs 100 images at least, not 99"),
        (changed(quantiles=[0.1, 0.2]), "must have 101 quantiles"),
        (lambda d: d["quantiles"].reverse(), "quantiles that fall"),
        (changed(quantiles=[0.5] * 101), "quantiles that are all equal"),
        (lambda d: d["quantiles"].__setitem__(3, None), r"quantiles\[3\] must be a finite number"),
        (changed(opinions={"inputs": [0, 1], "outputs": [4, 2]}), "has outputs that fall"),
        (changed(opinions={"inputs": [0, 1], "outputs": [0, 5]}), "opinions beyond 1 to 5"),
        (changed(opinions={"inputs": [0], "outputs": [3], "slope_beyond": 1}), "goes on beyond its ends"),
        (changed(opinions={"inputs": [], "outputs": []}), "as many outputs as inputs"),
        (changed(error=-0.1), "negative error"),
        (changed(name="a\x1b[31m"), "printable"),
        (changed(surprise=1), "unknown entries: 'surprise'"),
        (lambda d: d.pop("weights"), "lacks 'weights'"),
    ],
)
def test_refuses_a_reference_that_cannot_be_one(
    change: Callable[[dict[str, Any]], object], says: str, tmp_path: Path, tiny_engine: Path
) -> None:
    data = encode(REFERENCE)
    change(data)
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(DatasetError, match=says):
        read_reference(tmp_path / "r.json")
    manifest = json.loads((tiny_engine / MANIFEST).read_text())
    manifest["score"]["reference"] = data
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(EngineError, match=says):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b"[" * 10**5])
def test_refuses_a_damaged_file(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(text)
    with pytest.raises(DatasetError, match="cannot be used as a reference"):
        read_reference(tmp_path / "r.json")
    with pytest.raises(DatasetError, match="No such file"):
        read_reference(tmp_path / "gone.json")


def test_a_manifest_carries_it_and_keeps_its_engine_id(tiny_engine: Path, tmp_path: Path) -> None:
    manifest = open_engine(tiny_engine).manifest
    assert '"reference"' not in manifest.to_json()
    with_it = dataclasses.replace(manifest, score=dataclasses.replace(manifest.score, reference=REFERENCE))
    (tmp_path / MANIFEST).write_text(with_it.to_json())
    assert read_manifest(tmp_path) == with_it
    assert with_it.engine_id == manifest.engine_id
