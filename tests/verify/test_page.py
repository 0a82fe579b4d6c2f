"""The page: every number in its place, in elements that HTML has."""

import dataclasses
import math
from html.parser import HTMLParser
from typing import Any

from diffiqa.verify.figures import Difference
from diffiqa.verify.limits import judge
from diffiqa.verify.page import render

from .test_limits import LIFTED, figures, findings

ELEMENTS = {"html", "head", "meta", "title", "style", "body", "header", "main", "h1", "h2", "p", "div", "section"}
ELEMENTS |= {"dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td", "bdi", "strong", "span", "details"}
ELEMENTS |= {"figure", "figcaption", "summary", "b", "svg", "line", "text", "polyline", "circle"}


class Reader(HTMLParser):
    """Tables as rows of texts, all other texts one after the other, and the classes that elements have."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.texts: list[str] = []
        self.classes: set[tuple[str, str]] = set()
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ELEMENTS, tag
        self.classes |= {(tag, value or "") for name, value in attrs if name == "class"}
        if tag != "meta":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            assert self.open[-2] in {"thead", "tbody"}
            self.tables[-1].append([])
        if tag in {"th", "td"}:
            assert self.open[-2] == "tr"
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data
        elif not {"svg", "style"} & set(self.open) and data.strip():
            self.texts.append(data)


def difference(times: float) -> Difference:
    """Return one whose parts all differ, and grow together."""
    return Difference(
        max=0.08 * times,
        mean=0.01 * times,
        median=0.005 * times,
        quantile=0.04 * times,
        cosine=1 - 0.001 * times,
        psnr=60 - 10 * times,
        largest=1.0,
        not_finite=round(times),
    )


ONE, TWO, THREE = map(difference, (1, 2, 3))
IMAGES = (
    figures(
        "<a>", noise=(ONE, TWO), state=(ONE, THREE), forced=(TWO, ONE), taps={"y0": ONE}, maps=TWO, heads={"vit": ONE}
    ),
    figures(
        "b", noise=(THREE, TWO), state=(ONE, TWO), forced=(ONE, ONE), taps={"y0": THREE}, maps=ONE, heads={"vit": TWO}
    ),
)
FINDINGS = findings(IMAGES)
CHECKS = judge(FINDINGS, LIFTED | {"score": 0.1, "unet-max": 0.1})


def test_every_number_stands_in_its_row_and_column() -> None:
    verdict, noise, cosines, psnr, state, taps, scores = Reader(render(FINDINGS, CHECKS)).tables
    about = "largest error of the noise in one step, given the reference's inputs"
    assert verdict == [
        ["Limit", "What", "Measured", "Allowed", "Verdict", "Where"],
        ["finite", "every number is finite", "–", "", "beyond", "<a>: NaN or Inf in the noise of step 1"],
        ["unet-max", about, "0.16", "≤ 0.1", "beyond", "<a>, step 1"],
        ["score", "error of the score", "0.0001", "≤ 0.1", "within", "<a>"],
    ]
    one, whole = "one step: ", "whole run: "
    assert noise == [
        ["Step", *(one + n for n in ("largest", "99% quantile", "mean", "median")), whole + "largest", whole + "mean"],
        ["1", "0.16", "0.08", "0.015", "0.0075", "0.24", "0.02"],
        ["0", "0.08", "0.04", "0.01", "0.005", "0.16", "0.02"],
    ]
    assert cosines == [["Step", "one step", "whole run"], ["1", "0.002", "0.003"], ["0", "0.001", "0.002"]]
    assert psnr == [["Step", "one step", "whole run"], ["1", "45", "40"], ["0", "50", "40"]]
    assert state == [
        ["Step", "largest", "99% quantile", "mean", "median"],
        ["1", "0.08", "0.04", "0.01", "0.005"],
        ["0", "0.24", "0.12", "0.025", "0.0125"],
    ]
    assert taps == [
        ["Tensor", "Largest", "99%", "Mean", "Median", "Cosine", "PSNR, dB", "NaN, Inf"],
        ["tap y0", "0.24", "0.12", "0.03", "0.015", "0.997000", "30", "4"],
        ["ViT maps", "0.16", "0.08", "0.02", "0.01", "0.998000", "40", "3"],
        ["vit, given the reference’s inputs", "0.16", "0.08", "0.02", "0.01", "0.998000", "40", "3"],
    ]
    parts = (": reference", ": candidate", ": difference")
    numbers = ["0.5000", "0.5001", "0.0001", *["0.2500", "0.2500", "5e-05"] * 2]
    titles = ["Image", *(name + part for name in ("score", "vcg", "vda") for part in parts)]
    assert scores == [titles, ["<a>", *numbers], ["b", *numbers]]


def test_titles_and_legends_say_what_is_shown() -> None:
    texts = Reader(render(FINDINGS, CHECKS)).texts
    head = "Beyond limits: engine"
    party = ["Reference", "engine (id)", "Candidate", "engine (id)"]
    assert texts[:2] == [head, head]
    assert texts[2].startswith("tiny, 2 of 2 images. Written 20")
    assert texts[3:9] == [*party, "Verdict", "The loop, step by step"]
    table = "The same as a table"
    errors = ["largest", "99% quantile", "mean", "median"]
    both = ["one step", "whole run", table]
    assert texts[10:] == [
        *("Noise that the network predicts: error", *(f"one step: {name}" for name in errors)),
        *("whole run: largest", "whole run: mean", table),
        *("The same: distance of the cosine from 1", *both, "The same: PSNR, dB", *both),
        *("State that each step starts from, in the whole run: error", *errors, table),
        *("Taps and stages, worst image", "Scores"),
    ]


def test_what_needs_a_look_has_a_class_of_the_style_sheet() -> None:
    within = Reader(render(FINDINGS, [check for check in CHECKS if check.within]))
    assert within.texts[0] == "Within limits: engine"
    assert ("tr", "beyond") not in within.classes
    untrained = Reader(render(dataclasses.replace(FINDINGS, trained=False), CHECKS))
    assert "This engine is untrained: its scores mean nothing, and neither does their order." in untrained.texts
    assert {
        ("tr", "beyond"),
        ("td", "verdict"),
        ("td", "left"),
        ("th", "left"),
        ("div", "warning"),
    } <= untrained.classes
    layout = {("table", "numbers"), ("div", "wide"), ("div", "scroll"), ("dl", "small"), ("p", "quiet")}
    assert layout <= untrained.classes


def test_what_was_not_measured_is_left_out() -> None:
    scores_only: dict[str, Any] = {"noise": (), "state": (), "forced": (), "taps": {}, "maps": None, "heads": {}}
    bare = Reader(render(findings([dataclasses.replace(IMAGES[0], **scores_only)]), []))
    assert [texts for texts in bare.texts if "loop" in texts or "Taps" in texts] == []
    assert len(bare.tables) == 2
    equal = dataclasses.replace(ONE, max=0.0, mean=0.0, median=0.0, quantile=0.0, cosine=1.0, psnr=math.inf)
    same: dict[str, Any] = {"noise": (equal,), "state": (equal,), "forced": ()}
    texts = Reader(render(findings([dataclasses.replace(IMAGES[0], **same)]), [])).texts
    assert sum(text.endswith(": no difference, or nothing that can be drawn.") for text in texts) == 4
