"""The tables of docs/evaluation.md, from what stands beside the model that ships. `figures/tables.py` puts them in."""

import csv
import json
import statistics
from pathlib import Path
from typing import Any

from diffiqa.bench.report import table

MINI = Path(__file__).parents[1] / "models" / "mini"
PFD_MINI = MINI.with_name("pfd-mini")
SETS = {"clive": "CLIVE", "test": "BIQ2021, *test*", "validation": "BIQ2021, *validation*"}
WHO = {  # in people.json: in the table
    "loop": "**`mini`, whole loop, both branches**",
    "loop, vcg": "`mini`, whole loop, VCG alone",
    "loop, vda": "`mini`, whole loop, VDA alone",
    "vda": "`mini`, VDA alone, without restorations",
    "ridge": "ridge on the bare encoder",
    "BRISQUE": "BRISQUE 0.2.0 of PyPI",
    "PIQE": "pypiqe 1.2 of PyPI",
}


def people(_results: Path) -> str:
    """Return how far scores agree with people: a row for each program and set."""
    found = _mini("people")
    rows = [
        [WHO[who], title, f"{row['images']:,}", *(_interval(row[name]) for name in ("srcc", "plcc"))]
        for key, title in SETS.items()
        for who in WHO
        if (row := found[key].get(who))
    ]
    return table(["who", "on", "images", "SRCC (95 %)", "PLCC, raw (95 %)"], rows)


def opinions(_results: Path) -> str:
    """Return how far `mini`'s opinions are off: on its reference by cross-validation, and on a set it never saw."""
    found = _mini("clive")["opinions"]
    labels = f"1 is a label of {found['worst']:g}, 5 one of {found['best']:g}"
    rows = [
        ["its reference, each image by a map that has not seen it", f"{found['stated']:.2f}", "50"],
        [f"CLIVE, {found['images']} by lot; {labels}", f"{found['error']:.2f}", f"{found['percentile']:.0f}"],
    ]
    return table(["on", "root mean square error of opinions, 1 to 5", "median percentile"], rows)


def damage(_results: Path) -> str:
    """Return how well the score orders levels of each distortion, and originals and damaged versions."""
    found = _mini("evaluation")
    levels = sorted((row for row in found["levels"] if row["ordered"]), key=lambda row: row["median"])
    rows = [[row["distortion"].replace("_", " "), str(row["references"]), f"{row['median']:.2f}"] for row in levels]
    good = sum(row["median"] <= -0.9 + 1e-9 for row in levels)
    originals = found["originals"]
    rows.append([f"**at −0.9 or below: {good} of {len(levels)}**", "", ""])
    share = originals["higher"] / originals["compared"]
    rows.append([f"**the original has the higher score: {share:.1%} of {originals['compared']} pairs**", "", ""])
    return table(["distortion", "photographs", "median Spearman of score and level"], rows)


def restored(_results: Path) -> str:
    """Return the gain in PSNR by distortion, over levels 1 to 2 and 3 to 5."""
    with (MINI / "gains.csv").open(newline="", encoding="utf-8") as file:
        found = [row for row in csv.DictReader(file) if row["gain_db"]]
    rows = []
    for name in dict.fromkeys(row["distortion"] for row in found):
        cells = []
        for levels in ((1, 2), (3, 4, 5)):
            gains = [float(r["gain_db"]) for r in found if r["distortion"] == name and int(r["level"]) in levels]
            cells.append(f"{statistics.fmean(gains):+.1f}" if gains else "–")
        rows.append([name.replace("_", " "), *cells])
    return table(["distortion", "levels 1 and 2, dB", "levels 3 to 5, dB"], rows)


def pfd_people(_results: Path) -> str:
    """Return how far `pfd-mini`'s scores agree with people, with the loop and without it."""
    found = _read(PFD_MINI / "people.json")
    rows = []
    for key, title in SETS.items():
        if key not in found:
            continue
        loop, without = found[key]["loop"], found[key]["without"]
        rows += [
            [f"**{title}**", f"{loop['images']:,}", *(_interval(loop[name]) for name in ("srcc", "plcc", "srcc_gain"))],
            [f"{title}, without the loop", "", *(_interval(without[name]) for name in ("srcc", "plcc")), ""],
        ]
    return table(["on", "images", "SRCC (95 %)", "PLCC, raw (95 %)", "gain in SRCC by the loop"], rows)


def pfd_named(_results: Path) -> str:
    """Return how often `pfd-mini` names damage right."""
    found = _read(PFD_MINI / "people.json")["damage"]
    rows = [[word, f"{share:.0%}"] for word, share in found["words"].items()]
    return table(["damage", "named right"], [*rows, ["**all**", f"**{_interval(found['right'])}**"]])


def papers(results: Path) -> str:
    """Return what others have published, with where it stands."""
    found = _read(results / "people-papers.json")
    rows = [[row["who"], row["trained"], row["on"], f"{row['srcc']:.3f}", row["source"]] for row in found]
    return table(["who", "trained on", "judged on", "SRCC", "as stated in"], rows)


def _interval(values: list[float]) -> str:
    middle, low, high = values
    return f"{middle:.3f} ({low:.3f}–{high:.3f})"


def _mini(name: str) -> Any:
    return _read(MINI / f"{name}.json")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
