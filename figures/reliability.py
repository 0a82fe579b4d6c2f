"""The table of docs/reliability.md, from what crashes.py, kills.py, fuzz.py, soak.py and serving.py recorded."""

import json
from pathlib import Path
from typing import Any

COMMANDS = {
    "run_and_resume": "`iqa-run`, `--resume`",
    "export": "`iqa-export`",
    "export_where_names_cannot_change_places": "`iqa-export` where two names cannot change places in one step",
    "quantise_in_place": "`iqa-quantise --force`",
    "build": "`iqa-build`",
    "calibrate": "`iqa-calibrate`",
    "train": "`iqa-train`",
}


def reliability(results: Path) -> str:
    """Return one row for each thing that was tried."""
    names = ("crashes", "kills", "fuzz", "soak", "serving-flood", "serving-schema")
    crashes, kills, fuzz, soak, flood, schema = (_read(results / f"{name}.json") for name in names)
    rows = []
    for name, found in crashes.get("commands", {}).items():
        planted = f"{found['power_cuts']:,} power cuts, {found['failures']:,} failing writes, syncs and renames"
        rows.append((COMMANDS[name], planted, f"{found['lost']} lost or half"))
    for name, found in kills.items():
        if name in {"run", "export"}:
            ends = "records" if name == "run" else "exports"
            what = f"{found['kills']} × kill -9, {found['reported']:,} {ends} reported"
            rows.append((f"`iqa-{name}`", what, f"{found['lost']} lost, {found['half']} half"))
    for name, found in fuzz.get("readers", {}).items():
        planted = f"{found['inputs']:,} inputs of a fuzzer in {found['seconds']} s"
        rows.append((f"reader: {name}", planted, f"{found['tracebacks']} tracebacks, {found['hangs']} hangs"))
    for name in ("run", "serve"):
        if found := soak.get(name):
            kept = "; ".join(
                f"{what.replace('memory_mib', 'memory in MiB')} {found[what]['first']:g} → {found[what]['last']:g}"
                for what in ("memory_mib", "descriptors", "threads")
            )
            planted = f"soak: {found['images']:,} images, {found['failed']} of them bad"
            rows.append((f"`iqa-{name}`", planted, f"{found['scored'] + found['failed']:,} records; {kept}"))
    if flood:
        answers, (first, last) = flood["answers"], flood["most_mib_by_half"]
        planted = f"{sum(answers.values()):,} requests of {flood['clients']} clients at a queue of {flood['queue']}"
        kinds = {"200": "scored", "503": "told to try again"}
        found = ", ".join(f"{count:,} {kinds.get(status, status)}" for status, count in sorted(answers.items()))
        rows.append(("`iqa-serve`", planted, f"{found}; memory in MiB {first:.1f} → {last:.1f}"))
    if schema:
        planted = f"{sum(schema['answers'].values()):,} requests that schemathesis made in {schema['seconds']:.0f} s"
        rows.append(("`iqa-serve`", planted, f"{schema['faults']} errors of its own, {schema['hangs']} hangs"))
    lines = ["| what | tried | found |", "|---|---|---|", *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines)


def _read(file: Path) -> dict[str, Any]:
    """Return what was recorded; nothing where nothing was yet."""
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return found
