"""The part of docs/gpu.md, and a table for the README, that are made of what `scripts/gpu-check` wrote on a card.

`figures/tables.py` puts them between the comments in the documents, and checks that they are the JSON's. Steps name
their figures as people should read them: numbers become lines, dictionaries become rows, and lists stay in the JSON.
"""

import json
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffiqa.bench.report import NONE, number, percent, table

FILE = "gpu-check.json"  # in figures/results
RATE = "share of a large product"  # the column that all times of a U-Net step have
NEVER = """**diffiqa has not run on a GPU yet.** Whoever has an NVIDIA card can make this page in a quarter of an hour:

```sh
scripts/gpu-check --out out/gpu-check
scripts/gpu-check --report out/gpu-check/gpu-check.json
```

It needs a checkout, PyTorch with CUDA, and the packages of the extras `cuda` and `export`; no network, and nothing
installed of diffiqa. The second command writes the page, also for several files: one for each run of some steps."""


def publish(files: Sequence[Path], root: Path) -> None:
    """Keep what the files say as one, and make the documents' tables of it. Of a step run twice the last counts."""
    found: dict[str, Any] = {}
    for file in files:
        try:
            run = json.loads(file.read_text(encoding="utf-8"))
            if run["dry"] or run["device"] != "cuda":
                sys.exit(f"error: {file} was not made on a GPU, so it says nothing of one")
            card, steps = run["machine"]["card"]["name"], dict(run["steps"])
        except (OSError, ValueError, KeyError, TypeError) as exc:
            sys.exit(f"error: {file} is not what scripts/gpu-check writes on a card: {exc!r}")
        if found and found["machine"]["card"]["name"] != card:
            sys.exit(f"error: {file} is of another card than {files[0]}")
        known = found.get("steps", {})
        ran = {name: step for name, step in steps.items() if "seconds" in step or name not in known}
        found = run | {"steps": known | ran}
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    (root / "figures" / "results" / FILE).write_text(text, encoding="utf-8")
    sys.argv = ["tables.py", str(root / "docs" / "gpu.md"), str(root / "README.md")]
    runpy.run_path(str(root / "figures" / "tables.py"), run_name="__main__")


def gpu(results: Path) -> str:
    """Return the sections of docs/gpu.md; without figures, how to get them."""
    from diffiqa.figures.gpu.check import STEPS  # not above: figures/tables.py reads this file everywhere

    run = _read(results)
    if run is None:
        return NEVER
    parts = {"The card": _card(run), "What ran": _ran(run["steps"], {step.name: step.shows for step in STEPS})}
    parts["One step of the U-Net"] = _step_times(run["steps"])
    for step in STEPS:
        figures = run["steps"].get(step.name, {}).get("figures", {})
        rows = {name: row for name, row in figures.items() if isinstance(row, dict) and RATE not in row}
        lines = [
            f"- {name}: {value:.3g}" if isinstance(value, float) else f"- {name}: {value}"
            for name, value in figures.items()
            if isinstance(value, int | float | str)
        ]
        text = "\n\n".join(filter(None, (_table(rows), "\n".join(lines))))
        parts[step.name.capitalize()] = text and f"{step.shows[:1].upper()}{step.shows[1:]}.\n\n{text}"
    return "\n\n".join(f"## {title}\n\n{text}" for title, text in parts.items() if text)


def gpu_speed(results: Path) -> str:
    """Return the README's table: what a card takes."""
    run = _read(results)
    if run is None:
        return "Not measured yet: [how to](docs/gpu.md)."
    score, rows = run["steps"].get("score", {}).get("figures", {}), []
    for label, what in (("one crop", "one image"), ("8 images of one crop", "8 images at a time, each")):
        if label in score:
            rows.append([f"full size (`paper`), fp16, {what} of 224×224", f"{score[label]['ms per image']:.0f} ms"])
    if times := _times(run["steps"]):
        rows.append(
            ["the U-Net's best step: share of a large fp16 product", percent(max(r[RATE] for r in times.values()))]
        )
    return table([run["machine"]["card"]["name"], "measured"], rows)


def _read(results: Path) -> Any:
    file = results / FILE
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def _card(run: Any) -> str:
    machine = run["machine"]
    shown = ("torch", "triton", "cuda-core", "cuda-bindings", "onnxruntime-gpu", "onnxruntime", "tensorrt")
    versions = [f"{name} {machine['packages'][name]}" for name in shown if name in machine["packages"]]
    lines = [
        ", ".join(f"{name} {value}" for name, value in machine["card"].items()).removeprefix("name "),
        ", ".join([*versions, f"Python {machine['python']}", machine["system"]]),
        f"{machine['cpus']} cores of {machine['cpu']}",
        f"{run['started'][:10]}, commit {machine['commit'] or NONE}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _ran(steps: Mapping[str, Any], shows: Mapping[str, str]) -> str:
    rows = []
    for name, step in steps.items():
        checks = step.get("checks", {})
        bad = [check for check, verdict in checks.items() if not verdict["ok"]]
        good = f"{len(checks) - len(bad)} of {len(checks)}" if checks else ""
        said = "; ".join(filter(None, (*bad, step.get("why", ""))))
        rows.append([f"`{name}`", shows.get(name, ""), step["status"], good, said, number(step.get("seconds"))])
    return table(["step", "shows", "result", "checks", "wrong", "seconds"], rows)


def _times(steps: Mapping[str, Any]) -> dict[str, Any]:
    """Return all times of one U-Net step, of whatever step of ours."""
    found = {name: row for step in steps.values() for name, row in step.get("figures", {}).items()}
    return {name: row for name, row in found.items() if isinstance(row, dict) and RATE in row}


def _step_times(steps: Mapping[str, Any]) -> str:
    times = _times(steps)
    best: dict[str, float] = {}
    for name, row in sorted(times.items(), key=lambda item: float(item[1]["ms"])):
        best.setdefault(name.rpartition(", ")[2], row["ms"])
    rows = {name: row | {"time, best = 1": row["ms"] / best[name.rpartition(", ")[2]]} for name, row in times.items()}
    text = "Full size (`paper`), 224×224, seeded weights, beside a product of 8192×8192 in fp16 in the same process."
    return f"{text}\n\n{_table(rows)}" if rows else ""


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of rows by name; a column is a key that some row has."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))

    def cell(key: str, value: Any) -> str:
        return str(value) if isinstance(value, int) else percent(value) if key.startswith("share") else number(value)

    return table(["", *columns], [[name, *(cell(key, row.get(key)) for key in columns)] for name, row in rows.items()])
