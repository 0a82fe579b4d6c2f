"""A verdict as JSON and as a table on the terminal."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..engine.atomic import replacing
from ..engine.codec import encode
from ..errors import OutputError
from ..runtime.command.table import printable
from .limits import RULES, Check
from .run import Findings

SCHEMA = 1


def to_json(findings: Findings, checks: Sequence[Check]) -> str:
    """Return everything measured, and the verdict. What is not finite is null: JSON has no other word for it."""
    verdict = {"schema": SCHEMA, "within": is_within(checks), "checks": encode(tuple(checks))}
    data = _finite({**verdict, **encode(findings)})
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def is_within(checks: Sequence[Check]) -> bool:
    """Whether no check fails."""
    return all(check.within for check in checks)


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OutputError."""
    try:
        with replacing(path) as stream:
            stream.write(text.encode("utf-8", "backslashreplace"))
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}; choose another name") from exc


def show(findings: Findings, checks: Sequence[Check], stream: TextIO) -> None:
    """Print what was compared, a row for each rule, and the verdict."""
    # In a file or pipe, names are not folded: somebody may search for them.
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 200)
    console.print(Text(f"reference  {printable(findings.reference.label)}  ({findings.reference.id})"))
    console.print(Text(f"candidate  {printable(findings.candidate.label)}  ({findings.candidate.id})"))
    if not findings.trained:
        console.print(Text("UNTRAINED ENGINE · scores mean nothing, and neither does their order", "bold yellow"))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("limit", "measured", "allowed", ""):
        table.add_column(title, justify="left" if title == "limit" else "right", no_wrap=True)
    table.add_column("where", overflow="fold")
    for check in checks:
        table.add_row(
            check.name,
            number(check.value),
            allowed(check),
            verdict_of(check, "green", "red"),
            Text(printable(check.where)),
        )
    console.print(table)
    missing = findings.asked - len(findings.images)
    if missing:
        console.print(
            Text(f"ended at the first image beyond a limit; {missing} of {findings.asked} were not looked at")
        )
    beyond = [check.name for check in checks if not check.within]
    console.print(Text(f"beyond: {', '.join(beyond)}" if beyond else "within all limits", "bold"))


def verdict_of(check: Check, good: str = "", bad: str = "") -> Text:
    """Return a check's verdict in a word."""
    if check.within and check.value is None:
        return Text("not judged")
    return Text("within", good) if check.within else Text("beyond", bad)


def allowed(check: Check) -> str:
    """Return a check's limit with its direction."""
    if check.limit is None:
        return ""
    return f"{'≥' if check.name in RULES and RULES[check.name].floor else '≤'} {check.limit:g}"


def number(value: float | None) -> str:
    """Return a measured value: small ones by their size, those near 1 by what they lack."""
    if value is None or math.isnan(value):
        return "–" if value is None else "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if 0.9 < value < 1:
        return f"{value:.6f}"
    return f"{value:.3g}"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
