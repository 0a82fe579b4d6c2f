"""What a terminal shows: readable at any width, clear about what the numbers mean, plain where it is no terminal."""

import io
import re
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len

from diffiqa.engine.manifest import ScoreMeaning
from diffiqa.runtime.command.records import Record, Status
from diffiqa.runtime.command.table import Progress, printable, rate_text, show_table, summary_line

MEANING = ScoreMeaning(0.5, 0.5, "Quality on the scale of the labels.", trained=True)
UNTRAINED = replace(MEANING, meaning="The scores mean nothing.", trained=False)


def scored(image: str, score: float, **values: Any) -> Record:
    numbers = {"vcg": score, "vda": score / 2, "width": 1024, "height": 768, "seconds": 12.345}
    return Record(image=image, status=Status.OK, score=score, engine="e", settings="", **numbers | values)


def failed(image: str, error: str) -> Record:
    return Record(image=image, status=Status.ERROR, error=error, engine="e", settings="")


RECORDS = [
    scored("photos/2024/holiday/pristine.png", 0.81234),
    scored("blur.jpg", -0.1, notes=("alpha over white",)),
    failed("broken.png", "broken.png is truncated; copy it again"),
    scored("日本語/画像.png", 12.5, spread=0.01),
]
SUMMARY = summary_line(RECORDS, seconds=8)


class Terminal(io.TextIOWrapper):
    def __init__(self, encoding: str = "utf-8", *, terminal: bool = True) -> None:
        super().__init__(io.BytesIO(), encoding, newline="\n", write_through=True)
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def text(self) -> str:
        self.seek(0)
        return self.read()


@pytest.fixture(autouse=True)
def _colour_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)


def shown(
    records: list[Record] = RECORDS, meaning: ScoreMeaning = MEANING, *, terminal: bool = False, encoding: str = "utf-8"
) -> str:
    stream = Terminal(encoding, terminal=terminal)
    show_table(records, meaning, SUMMARY, stream)
    return stream.text()


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_table_fits_and_loses_no_name_score_or_error(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = shown()
    assert max(cell_len(line) for line in text.splitlines()) <= width
    for score in ("0.8123", "-0.1000", "12.5000"):
        assert re.search(rf"(?<![\d.-]){score}(?!\d)", text)
    for part in ("alpha over white", "broken.png is truncated; copy it again", MEANING.meaning, SUMMARY):
        assert squeezed(part) in squeezed(text)
    folded = "".join(line.split()[0] for line in text.splitlines())  # the names, which go on in the next row
    assert all(record.image in folded for record in RECORDS if record.score is not None)


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (40, ["image", "score"]),
        (80, ["image", "score", "VCG", "VDA", "spread", "size", "time"]),
        (200, ["image", "score", "VCG", "VDA", "spread", "size", "time"]),
    ],
)
def test_columns_give_way_to_names(monkeypatch: pytest.MonkeyPatch, width: int, columns: list[str]) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert shown().splitlines()[0].split() == columns


def test_wide_table_leaves_names_whole_and_scores_aligned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    scores = [re.match(r"(\S+) +-?\d+\.\d{4}(?= )", line) for line in shown().splitlines()]
    rows = [match for match in scores if match]
    assert [row[1] for row in rows] == ["photos/2024/holiday/pristine.png", "blur.jpg", "日本語/画像.png"]
    assert len({cell_len(row[0]) for row in rows}) == 1


def test_columns_nobody_has_are_left_out() -> None:
    text = shown([scored("a.png", 0.5, vda=None)])
    assert text.split()[:5] == ["image", "score", "VCG", "size", "time"]


def test_direction_range_and_meaning_stand_below() -> None:
    assert "Score: higher is better · 0 to about 1 · Quality on the scale of the labels." in shown()
    reverse = replace(MEANING, higher_is_better=False, minimum=-1.5, nominal_maximum=100)
    assert "Score: lower is better · -1.5 to about 100 ·" in shown(meaning=reverse)


def test_untrained_engine_has_a_line_of_its_own() -> None:
    assert "UNTRAINED ENGINE · The scores mean nothing." in shown(meaning=UNTRAINED).splitlines()
    assert "UNTRAINED" not in shown()


def test_failure_is_red_and_named_once() -> None:
    assert "\x1b[31mfailed: broken.png is truncated; copy it again\x1b[0m" in shown(terminal=True)
    assert "failed: b.png: no memory" in shown([failed("b.png", "no memory")])


def test_nothing_but_failures_and_nothing_at_all_are_shown_without_a_table() -> None:
    assert shown([failed("b.png", "no memory")]).startswith("failed: ")
    assert shown([]).startswith("Score: ")


@pytest.mark.parametrize(
    ("terminal", "variable", "value"),
    [(False, "TERM", "xterm"), (True, "NO_COLOR", "1"), (True, "TERM", "dumb"), (False, "FORCE_COLOR", "1")],
    ids=["no terminal", "NO_COLOR", "dumb terminal", "a file despite FORCE_COLOR"],
)
def test_no_escape_codes(monkeypatch: pytest.MonkeyPatch, terminal: bool, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    assert "\x1b" not in shown(meaning=UNTRAINED, terminal=terminal)


def test_terminal_gets_colours() -> None:
    assert "\x1b[" in shown(terminal=True)


@pytest.mark.parametrize("terminal", [True, False])
def test_hostile_names_command_neither_terminal_nor_markup(terminal: bool) -> None:
    for name in ("a\nb", "\x1b[2J", "\x9b2J", "\r", "\u202egnp.exe", "\udcff", "[red]x[/red]", ":smile:", "[/]"):
        image = f"<{name}>"
        text = shown([scored(image, 0.5, notes=(image,)), failed(image, image)], terminal=terminal)
        assert text.count(printable(image)) == 3
        plain = re.sub(r"\x1b\[[\d;]*m", "", text)
        assert not set(plain) & set(name) - {c for c in name if c.isprintable()} - {"\n"}


def test_printable_leaves_readable_text_alone() -> None:
    assert printable("日本語 é [b] 🦊.png") == "日本語 é [b] 🦊.png"
    assert printable("a\x1b\n\udcff") == r"a\x1b\n\udcff"


def test_terminal_that_cannot_show_a_character_shows_another() -> None:
    text = shown(encoding="ascii", terminal=True)
    assert "0.8123" in text
    assert "1024?768" in text


def test_summary_counts_scores_and_speed() -> None:
    records = [scored(f"{i}.png", score) for i, score in enumerate([0.1, 0.2, 0.6])]
    expected = "3 scored · mean 0.3000, median 0.2000, min 0.1000, max 0.6000"
    assert summary_line(records) == expected
    assert summary_line(records, seconds=1.5) == expected + " · 2.0 images/s"
    resumed = summary_line([*records, failed("b", "e")], seconds=120, kept=2)
    assert resumed == expected.replace("scored", "scored, 1 failed (2 by an earlier run)") + " · 0.5 images/min"
    assert summary_line(records, seconds=1, kept=3) == expected.replace("scored", "scored (3 by an earlier run)")
    assert summary_line([]) == "0 scored"
    assert summary_line([failed("b", "e")], seconds=1) == "0 scored, 1 failed"


def test_speed_has_a_handy_unit() -> None:
    assert [rate_text(x) for x in (12.34, 1, 0.99, 1 / 90)] == [
        "12.3 images/s",
        "1.0 images/s",
        "59.4 images/min",
        "0.7 images/min",
    ]


def test_progress_shows_count_speed_time_left_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    monkeypatch.setenv("COLUMNS", "120")
    stream = Terminal()
    with Progress(10, stream=stream) as progress:
        for name in "wxyz":
            now += 1  # what comparing takes is no part of the speed
            progress.advance(scored(name, 0.5), kept=True)
        now += 90
        progress.advance(scored("a", 0.5))
        now += 90
        progress.advance(failed("b", "e"))
    text = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", stream.text())
    last = [line for line in re.split(r"[\r\n]", text) if "6/10" in line][-1]
    assert re.search(r"6/10 \d+:\d\d:\d\d 0\.7 images/min, 6:00 left 1 failed", last)


@pytest.mark.parametrize(("terminal", "quiet"), [(False, False), (True, True), (False, True)])
def test_progress_is_silent_without_a_terminal_or_on_request(terminal: bool, quiet: bool) -> None:
    stream = Terminal(terminal=terminal)
    with Progress(2, quiet=quiet, stream=stream) as progress:
        progress.advance(scored("a", 0.5))
    assert stream.text() == ""


def test_progress_survives_a_terminal_without_unicode() -> None:
    stream = Terminal("ascii")
    with Progress(2, stream=stream) as progress:
        progress.advance(failed("ü", "e"))
    assert "1 failed" in stream.text()


def test_progress_leaves_standard_output_alone(capsys: pytest.CaptureFixture[str]) -> None:
    stream = Terminal()
    with Progress(2, stream=stream) as progress:
        print("data")  # noqa: T201
        progress.advance(scored("a", 0.5))
    assert capsys.readouterr().out == "data\n"
    assert "data" not in stream.text()


def test_a_column_is_explained_where_it_is_shown_and_named_where_it_has_no_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = [scored("a.png", 0.5, probabilities={"distortions": {"blur": 1.0}, "levels": {"underexposed": 1.0}})]
    monkeypatch.setenv("COLUMNS", "50")
    narrow = squeezed(shown(records))
    assert 'Thecolumn"lookslike"hasnoroom' in narrow
    assert "Lookslike:" not in narrow
    monkeypatch.setenv("COLUMNS", "200")
    wide = squeezed(shown(records))
    assert "hasnoroom" not in wide
    assert "Lookslike:ofeachkind" in wide
