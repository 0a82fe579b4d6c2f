"""`score`, as a notebook calls it: it returns what was scored, and prints nothing."""

from pathlib import Path

import pytest
from PIL import Image

from diffiqa import Options, Scorer
from diffiqa.errors import UsageError
from diffiqa.runtime.command.api import score

from ...tiny import photo


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for index, name in enumerate(["a.png", "b.png", "c.png"]):
        Image.fromarray(photo(index, 40, 50)).save(folder / name)
    return folder


def test_a_folder_gives_records_and_nothing_is_printed(
    scorer: Scorer, images: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = score(scorer, images, sort="score", descending=True)
    scores = [record.score or 0 for record in done.records]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert (done.kept, done.changed, done.failed) == (0, 0, 0)
    assert done.seconds > 0
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in images.parent.iterdir()] == ["images"]


def test_an_engine_directory_will_do_and_options_reach_it(tiny_engine: Path, images: Path) -> None:
    (record,) = score(tiny_engine, [images / "a.png"], options=Options(seed=3, seeds=2)).records
    assert (record.seed, record.seeds) == (3, 2)


def test_a_name_that_no_file_can_have_is_a_failure(scorer: Scorer) -> None:
    (record,) = score(scorer, ["a\0b.png"]).records
    assert record.score is None
    assert "null byte" in (record.error or "")


def test_files_are_written_and_a_second_call_resumes(scorer: Scorer, images: Path, tmp_path: Path) -> None:
    said: list[str] = []
    file, report, pictures = tmp_path / "s.csv", tmp_path / "r.html", tmp_path / "pictures"
    first = score(scorer, [images / "a.png", "gone.png"], output=file, report=report, intermediates=pictures)
    assert (len(first.records), first.failed) == (2, 1)
    assert "a.png" in report.read_text(encoding="utf-8")
    assert len(list(pictures.iterdir())) == 7
    assert first.outputs.file == file
    second = score(scorer, str(images), output=file, resume=True, say=said.append)
    assert (second.kept, second.changed, len(second.records)) == (1, 0, 3)
    assert second.records[0] == first.records[0]
    Image.fromarray(photo(9, 40, 50)).save(images / "a.png")
    third = score(scorer, str(images), output=file, resume=True, say=said.append)
    assert (third.kept, third.changed) == (2, 1)
    assert said == ["1 picture has changed since the earlier run: scored again"]


def test_contradictions_are_refused_before_an_engine_is_loaded(images: Path) -> None:
    with pytest.raises(UsageError, match="--resume continues a file"):
        score("no engine", images, resume=True)
    with pytest.raises(UsageError, match="is one of the images"):
        score("no engine", images, output=images / "a.png")
    with pytest.raises(UsageError, match="no images found"):
        score("no engine", [])
    with pytest.raises(UsageError, match="'xml' is none of table, jsonl, json, csv"):
        score("no engine", images, form="xml")
