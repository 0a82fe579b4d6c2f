"""`iqa-run`: every image gets a record, whatever happens to the others or to the process."""

import csv
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from diffiqa import Scorer
from diffiqa.cli import main
from diffiqa.engine.manifest import MANIFEST, read_manifest
from diffiqa.engine.monotone import Monotone
from diffiqa.engine.sampling import Fast, Sampling
from diffiqa.runtime.command.recordfile import read_records
from diffiqa.runtime.command.records import Format, to_line
from diffiqa.runtime.host import onnx_stage
from diffiqa.runtime.host.onnx_stage import OnnxRuntime, OnnxStage

from ...tiny import photo


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five good images, two bad ones, and something that is no image at all."""
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    for index, name in enumerate(["a.png", "b.jpg", "c.bmp", "deep/d.webp", "deep/e.tiff"]):
        Image.fromarray(photo(index, 40 + index, 50)).save(images / name)
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:200])
    (images / "empty.jpg").write_bytes(b"")
    (images / "notes.txt").write_text("no image")
    return images


def call(engine: Path, *arguments: str | Path, stdin: str | None = None) -> Result:
    wide = {"COLUMNS": "200"}
    return CliRunner(env=wide).invoke(main, ["run", "--engine", str(engine), *map(str, arguments)], input=stdin)


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_folder_gives_one_record_per_image_and_exit_code_1_for_the_bad_ones(tiny_engine: Path, folder: Path) -> None:
    result = call(tiny_engine, folder, "--format", "jsonl")
    records = {Path(r["image"]).name: r for r in lines(result.stdout)}
    assert result.exit_code == 1
    assert sorted(records) == ["a.png", "b.jpg", "broken.png", "c.bmp", "d.webp", "e.tiff", "empty.jpg"]
    failed = {name for name, r in records.items() if r["status"] == "error"}
    assert failed == {"broken.png", "empty.jpg"}
    assert all(name in records[name]["error"] for name in failed)
    assert all(records[name]["score"] is None for name in failed)


@pytest.mark.parametrize("form", ["jsonl", "table"])
def test_an_engine_whose_drift_was_accepted_says_so(tiny_engine: Path, folder: Path, tmp_path: Path, form: str) -> None:
    engine = shutil.copytree(tiny_engine, tmp_path / "engine")
    text = json.loads((engine / "manifest.json").read_text())
    next(check for check in text["stages"][3]["checks"] if check["output"] == "score")["max_abs_error"] = 0.25
    (engine / "manifest.json").write_text(json.dumps(text))
    result = call(engine, folder / "a.png", "--format", form)
    assert result.exit_code == 0
    assert "ACCEPTED DRIFT: this engine differs from PyTorch in score of vda by 0.25 where " in result.stderr
    assert "DRIFT" not in call(tiny_engine, folder / "a.png", "--format", form).stderr


def test_all_good_is_exit_code_0_and_records_carry_what_the_score_depends_on(
    tiny_engine: Path, folder: Path, scorer: Scorer
) -> None:
    result = call(tiny_engine, folder / "a.png", "--seed", "3", "--seeds", "2", "--crops", "4", "--format", "jsonl")
    (record,) = lines(result.stdout)
    assert result.exit_code == 0
    assert record["engine"] == scorer.info.engine
    assert (record["seed"], record["seeds"], record["mode"], record["crops"]) == (3, 2, "whole", 4)
    assert (record["width"], record["height"]) == (50, 40)
    assert record["score"] == pytest.approx(0.5 * record["vcg"] + 1.5 * record["vda"])
    assert record["spread"] > 0
    assert record["seconds"] > 0


def test_threads_that_wait_busily_give_the_same_scores(
    tiny_engine: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    class Watched(OnnxStage):
        def __init__(self, path: Path, settings: OnnxRuntime) -> None:
            seen.append(settings.spinning)
            super().__init__(path, settings)

    monkeypatch.setattr(onnx_stage, "OnnxStage", Watched)
    arguments = (folder / "a.png", "--threads", "2", "--format", "jsonl")
    waiting, spinning = (call(tiny_engine, *arguments, *more) for more in ((), ("--spin",)))
    assert [spinning.exit_code, waiting.exit_code] == [0, 0]
    assert lines(spinning.stdout)[0]["score"] == lines(waiting.stdout)[0]["score"]
    assert seen == [False] * 4 + [True] * 4
    refused = call(tiny_engine, *arguments, "--spin", "--backend", "openvino")
    assert refused.exit_code == 2
    assert "--spin is an option of the backend onnxruntime, not of openvino" in refused.stderr


def test_names_of_files_globs_and_standard_input(tiny_engine: Path, folder: Path) -> None:
    by_glob = lines(call(tiny_engine, f"{folder}/**/*.??*", "--format", "jsonl").stdout)
    listed = f"{folder}/b.jpg\n{folder}/a.png\n"
    by_list = lines(call(tiny_engine, "-", "--format", "jsonl", stdin=listed).stdout)
    assert {"d.webp", "a.png"} <= {Path(r["image"]).name for r in by_glob}
    assert [r["image"] for r in by_list] == listed.split()


def test_a_missing_name_is_a_failed_record_not_the_end(tiny_engine: Path, folder: Path) -> None:
    result = call(tiny_engine, folder / "gone.png", folder / "a.png", "--format", "jsonl")
    assert [r["status"] for r in lines(result.stdout)] == ["error", "ok"]
    assert result.exit_code == 1


def test_formats_hold_the_same_scores(tiny_engine: Path, folder: Path, tmp_path: Path) -> None:
    scores = []
    for form in ("jsonl", "json", "csv"):
        file = tmp_path / f"scores.{form}"
        assert call(tiny_engine, folder / "a.png", folder / "b.jpg", "-o", file, "-q").exit_code == 0
        text = file.read_text()
        rows = lines(text) if form == "jsonl" else json.loads(text) if form == "json" else None
        if rows is None:
            rows = list(csv.DictReader(text.splitlines()))
        scores.append([float(row["score"]) for row in rows])
    assert scores[0] == scores[1] == scores[2]


def test_sorting_top_and_bottom(tiny_engine: Path, folder: Path) -> None:
    good = [folder / "a.png", folder / "b.jpg", folder / "c.bmp"]
    up = [r["score"] for r in lines(call(tiny_engine, *good, "--sort", "score", "--format", "jsonl").stdout)]
    top = [r["score"] for r in lines(call(tiny_engine, *good, "--top", "1", "--format", "jsonl").stdout)]
    bottom = [r["score"] for r in lines(call(tiny_engine, *good, "--bottom", "2", "--format", "jsonl").stdout)]
    assert up == sorted(up)
    assert top == up[-1:]
    assert bottom == up[:2]


def test_a_table_says_what_scores_mean(tiny_engine: Path, folder: Path) -> None:
    out = call(tiny_engine, folder / "a.png", "--format", "table").stdout
    assert "higher is better" in out
    assert "a.png" in out
    assert "1 scored" in out


def test_resume_scores_only_what_is_missing_and_retries_errors(tiny_engine: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    first = call(tiny_engine, folder / "a.png", folder / "empty.jpg", "-o", file, "-q")
    assert first.exit_code == 1
    (before,) = [r for r in lines(file.read_text()) if r["status"] == "ok"]
    (folder / "empty.jpg").write_bytes((folder / "b.jpg").read_bytes())
    assert "--resume" in call(tiny_engine, folder / "a.png", "-o", file).stderr
    again = call(tiny_engine, folder / "a.png", folder / "empty.jpg", folder / "c.bmp", "-o", file, "--resume", "-q")
    records = lines(file.read_text())
    assert again.exit_code == 0
    assert [Path(r["image"]).name for r in records] == ["a.png", "empty.jpg", "c.bmp"]
    assert records[0] == before  # kept, not scored again: even its time is the same


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_resume_scores_a_picture_that_changed_again_and_says_so(
    tiny_engine: Path, folder: Path, tmp_path: Path, form: str
) -> None:
    file = tmp_path / f"scores.{form}"
    names = [folder / "a.png", folder / "b.jpg", folder / "c.bmp"]
    call(tiny_engine, *names, "-o", file)
    before = read_records(file, Format(form))
    names[0].write_bytes(names[1].read_bytes())
    Image.open(names[1]).save(names[1].with_suffix(".png"))
    names[1].with_suffix(".png").replace(names[1])  # another file of the same pixels
    names[2].unlink()
    again = call(tiny_engine, *names, "-o", file, "--resume")
    assert again.exit_code == 0
    assert "1 picture has changed since the earlier run: scored again\n" in again.stderr
    assert "3 scored (2 by an earlier run)" in again.stderr
    after = read_records(file, Format(form))
    assert [record.image for record in after] == [str(name) for name in names]
    assert (after[0].score, after[0].digest) == (before[1].score, before[1].digest)
    assert after[1:] == before[1:]  # the same pixels, and what cannot be read now: its score is kept
    assert "changed" not in call(tiny_engine, *names, "-o", file, "--resume").stderr


def test_resume_with_other_settings_is_refused(tiny_engine: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    call(tiny_engine, folder / "a.png", "-o", file, "-q")
    result = call(tiny_engine, folder / "a.png", "-o", file, "--resume", "--seed", "1")
    assert result.exit_code == 2
    assert "seed 0, now 1" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--engine", "nowhere", "x.png"], "does not exist; make an engine directory"),
        (["--engine", "ENGINE", "x.png", "--resume"], "name it with -o"),
        (["--engine", "ENGINE", "x.png", "-o", "scores.txt"], "--format"),
        (["--engine", "ENGINE", "x.png", "-o", "no/such/folder/scores.csv"], "scores.csv"),
        (["--engine", "ENGINE", "x.png", "--provider", "Magic"], "has no Magic"),
        (["--engine", "ENGINE", "https://example.org/a.png"], "is an address, not a file: iqa-run --shards reads"),
        (["--engine", "ENGINE", "-"], "leave out find's -print0"),
    ],
)
def test_what_cannot_run_at_all_is_exit_code_2_and_one_line(tiny_engine: Path, arguments: list[str], says: str) -> None:
    named = [str(tiny_engine) if a == "ENGINE" else a for a in arguments]
    result = CliRunner().invoke(main, ["run", *named], input="a.png\0b.png\0")
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_scores_with_other_steps_never_mix_in_a_file(tiny_engine: Path, folder: Path, tmp_path: Path) -> None:
    """A file of an earlier version, whose settings say nothing of steps, goes on with all steps alone."""
    file, four = tmp_path / "all.jsonl", ("--steps", "4")
    call(tiny_engine, folder / "a.png", "-o", file, "-q")
    assert "sampling" not in lines(file.read_text())[0]["settings"]
    refused = call(tiny_engine, folder / "c.bmp", "-o", file, "--resume", *four)
    assert refused.exit_code == 2
    assert "other settings (sampling all steps, now 4:ancestral)" in refused.stderr
    again = call(tiny_engine, folder / "a.png", folder / "c.bmp", "-o", file, "--resume", "--steps", "6", "-q")
    assert again.exit_code == 0, again.stderr
    assert len(lines(file.read_text())) == 2

    csv_file = tmp_path / "four.csv"
    call(tiny_engine, folder / "a.png", "-o", csv_file, "-q", *four)
    with csv_file.open() as stream:
        (row,) = csv.DictReader(stream)
    assert "sampling=4:ancestral" in row["settings"]
    assert row["notes"] == "4 of 6 steps, ancestral"
    for other in ((), ("--steps", "5"), (*four, "--sampler", "ddim"), (*four, "--sampler", "ddim:1")):
        refused = call(tiny_engine, folder / "c.bmp", "-o", csv_file, "--resume", *other)
        assert refused.exit_code == 2
        assert "sampling 4:ancestral, now " in refused.stderr
    assert call(tiny_engine, folder / "c.bmp", "-o", csv_file, "--resume", "-q", *four).exit_code == 0


def test_fast_scores_of_another_calibration_do_not_mix(tiny_engine: Path, folder: Path, tmp_path: Path) -> None:
    engine, file = Path(shutil.copytree(tiny_engine, tmp_path / "engine")), tmp_path / "fast.jsonl"
    manifest = read_manifest(engine)

    def calibrated(offset: float) -> None:
        fast = Fast(Sampling((0, 2, 5)), Monotone((0.0,), (offset,), slope_beyond=1), 40)
        (engine / MANIFEST).write_text(dataclasses.replace(manifest, fast=fast).to_json())

    assert "no fast sampling yet" in call(engine, folder / "a.png", "--fast").stderr
    calibrated(0.25)
    assert call(engine, folder / "a.png", "-o", file, "-q", "--fast").exit_code == 0
    plain = lines(call(engine, folder / "a.png", "--steps", "3", "--format", "jsonl").stdout)[0]["score"]
    (record,) = lines(file.read_text())
    assert record["score"] == pytest.approx(plain + 0.25)
    assert call(engine, folder / "c.bmp", "-o", file, "--resume", "-q", "--fast").exit_code == 0
    assert "sampling fast:" in call(engine, folder / "c.bmp", "-o", file, "--resume", "--steps", "3").stderr
    calibrated(0.5)
    refused = call(engine, folder / "b.jpg", "-o", file, "--resume", "--fast")
    assert refused.exit_code == 2
    assert "was begun with other settings (sampling fast:" in refused.stderr


def test_the_table_says_once_what_all_images_have_in_common(tiny_engine: Path, folder: Path) -> None:
    shown = call(tiny_engine, folder / "a.png", folder / "c.bmp", "--steps", "4", "--format", "table").stdout
    assert shown.count("4 of 6 steps") == 1
    assert "all: 4 of 6 steps, ancestral" in shown


def test_the_report_says_how_many_steps_were_taken(tiny_engine: Path, folder: Path, tmp_path: Path) -> None:
    call(tiny_engine, folder / "a.png", "--steps", "4", "--report", tmp_path / "r.html", "-q")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "4 of 6 steps, ancestral" in page
    assert "makes of the image in 4 steps" in page


@pytest.mark.parametrize(
    ("outputs", "says"),
    [
        (["--report", "IMAGE"], "is one of the images"),
        (["-o", "IMAGE", "--force", "--format", "csv"], "is one of the images"),
        (["-o", "x.csv", "--report", "x.csv"], "cannot be both"),
        (["--save-intermediates", "FOLDER"], "holds images that are scored"),
        (["-o", "x.csv", "--top", "2"], "a file (-o) always gets every record"),
        (["--descending"], "--descending needs --sort"),
    ],
)
def test_outputs_never_overwrite_images_or_each_other(
    tiny_engine: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, outputs: list[str], says: str
) -> None:
    monkeypatch.chdir(folder.parent)
    before = (folder / "a.png").read_bytes()
    named = [{"IMAGE": "images/a.png", "FOLDER": "images"}.get(part, part) for part in outputs]
    result = call(tiny_engine, "images/a.png", *named)
    assert result.exit_code == 2, result.output
    assert says in result.stderr
    assert (folder / "a.png").read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == ["images"]


def test_old_results_stay_when_the_run_cannot_start(tiny_engine: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    call(tiny_engine, folder / "a.png", "-o", file, "-q")
    before = file.read_text()
    result = call(tiny_engine, folder / "a.png", "-o", file, "--force", "--report", tmp_path / "no" / "r.html")
    assert result.exit_code == 2
    assert file.read_text() == before


@pytest.mark.parametrize("form", ["table", "json", "jsonl", "csv file"])
def test_an_interrupted_run_shows_what_it_scored(tiny_engine: Path, tmp_path: Path, form: str) -> None:
    names = [tmp_path / f"{i:03}.png" for i in range(200)]
    for i, name in enumerate(names):
        Image.fromarray(photo(i % 5, 48, 48)).save(name)
    report = tmp_path / "pictures"
    arguments: list[str | Path] = [*names, "--format", form, "--save-intermediates", report]
    if form == "csv file":
        arguments[-3:-2] = ["csv", "-o", tmp_path / "scores"]
    process = subprocess.Popen(
        command(tiny_engine, *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and (not report.exists() or len(list(report.iterdir())) < 15):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 130, stderr
    if form == "csv file":
        assert len(read_records(tmp_path / "scores", Format.CSV)) >= 2
        assert not (tmp_path / "scores.partial").exists()
    elif form == "json":
        assert len(json.loads(stdout)) >= 2
    else:
        assert stdout.count("000.png") == stdout.count("001.png") == 1


def test_closed_standard_output_is_no_bug_of_ours(tiny_engine: Path, folder: Path) -> None:
    line = " ".join(f"'{part}'" for part in command(tiny_engine, folder / "a.png"))
    result = subprocess.run(f"{line} >&-", shell=True, capture_output=True, text=True, check=False)  # noqa: S602
    assert result.returncode == 0, result.stderr


def test_a_flipped_byte_in_the_engine_is_refused(tiny_engine: Path, folder: Path, tmp_path: Path) -> None:
    import shutil

    engine = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    stage = engine / "onnx" / "vit.onnx"
    data = bytearray(stage.read_bytes())
    data[-10] ^= 4
    stage.write_bytes(data)
    result = call(engine, folder / "a.png")
    assert result.exit_code == 2
    assert "vit.onnx was changed after export" in result.stderr


def test_report_and_intermediates_are_written(tiny_engine: Path, folder: Path, tmp_path: Path) -> None:
    report, pictures = tmp_path / "report.html", tmp_path / "pictures"
    result = call(
        tiny_engine, folder, "-o", tmp_path / "s.csv", "--report", report, "--save-intermediates", pictures, "-q"
    )
    assert result.exit_code == 1
    page = report.read_text(encoding="utf-8")
    assert "a.png" in page
    assert "broken.png" in page
    saved = sorted(path.name for path in pictures.iterdir())
    assert len(saved) == 5 * 7
    (original,) = [path for path in pictures.iterdir() if path.name.startswith("a-") and ".dis." in path.name]
    np.testing.assert_array_equal(np.asarray(Image.open(original)), photo(0, 40, 50))


def command(engine: Path, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "diffiqa.cli", "run", "--engine", str(engine), *map(str, arguments)]


@pytest.mark.parametrize(("number", "form"), [(signal.SIGKILL, "csv"), (signal.SIGINT, "jsonl")])
def test_a_run_ended_at_any_moment_resumes_without_losing_or_repeating_a_record(
    tiny_engine: Path, tmp_path: Path, number: signal.Signals, form: str
) -> None:
    seed = 5
    names = [tmp_path / f"{i:02}.png" for i in range(24)]
    for i, name in enumerate(names):
        Image.fromarray(photo(i, 48, 48)).save(name)
    file = tmp_path / f"scores.{form}"
    journal = tmp_path / "scores.csv.partial" if form == "csv" else file
    generator = random.Random(seed)  # noqa: S311 — moments, not secrets
    kept: list[str] = []
    for _ in range(2):
        process = subprocess.Popen(
            [*command(tiny_engine, *names, "-o", file, "--resume", "-q")], stderr=subprocess.PIPE
        )
        target = len(kept) + generator.randint(3, 9)
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < target):
            time.sleep(0.005)
        process.send_signal(number)
        stderr = process.communicate(timeout=30)[1].decode()
        assert process.returncode == (130 if number is signal.SIGINT else -9), stderr
        assert "Traceback" not in stderr
        now = journal.read_text().splitlines()
        assert now[: len(kept)] == kept
        kept = [line for line in now if line.endswith("}")]
    final = subprocess.run(command(tiny_engine, *names, "-o", file, "--resume", "-q"), check=False)
    assert final.returncode == 0
    records = read_records(file, Format(form))
    assert [to_line(record, Format.JSONL).decode().rstrip("\n") for record in records[: len(kept)]] == kept
    assert [record.image for record in records] == [str(name) for name in names]
    assert {record.status for record in records} == {"ok"}


def test_a_reader_that_goes_away_ends_the_run_quietly(tiny_engine: Path, folder: Path) -> None:
    full = " ".join(f"'{part}'" for part in command(tiny_engine, folder, "--format", "jsonl"))
    result = subprocess.run(f"{full} | head -n 1", shell=True, capture_output=True, text=True, check=False)  # noqa: S602
    assert len(result.stdout.splitlines()) == 1
    assert result.stderr == ""


def test_a_full_disk_is_named_and_what_was_written_stays_whole(tiny_engine: Path, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    limit = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)); "
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "from diffiqa.cli import main; main(sys.argv[1:])"
    )
    arguments = ["run", "--engine", str(tiny_engine), str(folder), "-o", str(file), "-q"]
    result = subprocess.run([sys.executable, "-c", limit, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "scores.jsonl" in result.stderr
    assert "Traceback" not in result.stderr
    records = lines(file.read_text())
    assert 0 < len(records) < 7


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_to_write_is_named(tiny_engine: Path, folder: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    result = call(tiny_engine, folder / "a.png", "-o", locked / "scores.csv")
    assert result.exit_code == 2
    assert "scores.csv" in result.stderr
