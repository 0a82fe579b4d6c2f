"""A verification as text: JSON, and the table on a terminal."""

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..engine.atomic import writing
from ..engine.codec import encode
from ..runtime.command.table import printable
from ..runtime.selftest import Tested
from .bisect import Culprits
from .figures import Findings
from .limits import RULES, LimitCheck, is_within
from .scores import NOT_TRIED, ScoresFound

SCHEMA = 1
EXPLANATIONS = 5  # that are shown


def to_json(findings: Findings, checks: Sequence[LimitCheck]) -> str:
    """Return everything measured, and the verdict. NaN and infinity become null: JSON does not have them."""
    return _json(is_within(checks), {"checks": encode(tuple(checks)), **encode(findings)})


def scores_to_json(found: ScoresFound) -> str:
    """Return a comparison of scores."""
    return _json(found.within, encode(found))


def self_test_to_json(tested: Tested) -> str:
    """Return what a self-test found."""
    answers = [{**encode(answer), "within": answer.within} for answer in tested.answers]
    return _json(tested.within, {**encode(tested), "answers": answers})


def show_self_test(tested: Tested, stream: TextIO) -> None:
    """Print a row for each answer, and the verdict."""
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 200)
    console.print(Text(f"engine {tested.engine}, {printable(tested.backend)}, {tested.seconds:.1f} s"))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("picture", "answer", "model", "here", "difference", "allowed", "verdict"):
        table.add_column(title, justify="left" if title == "answer" else "right", no_wrap=True)
    for each in tested.answers:
        numbers = (f"{each.expected:.6f}", f"{each.found:.6f}", f"{abs(each.found - each.expected):.1e}")
        verdict = Text("ok") if each.within else Text("beyond", "bold red")
        table.add_row(str(each.picture), each.name, *numbers, f"{each.allowed:.1e}", verdict)
    console.print(table)
    if tested.within:
        console.print(Text(f"The model's answers, as {tested.precision} gives them."))
        return
    console.print(Text("NOT THE MODEL'S ANSWERS: do not use scores of this library and build on this machine", "red"))


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises OutputError."""
    with writing(path, "; choose another name") as stream:
        stream.write(text.encode("utf-8", "backslashreplace"))


def show(findings: Findings, checks: Sequence[LimitCheck], stream: TextIO) -> None:
    """Print what was compared, a row for each limit, and the verdict."""
    # In a file or pipe, names are not folded: somebody may search for them.
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 200)
    console.print(Text(f"reference  {printable(findings.reference.label)}  ({findings.reference.id})"))
    console.print(Text(f"candidate  {printable(findings.candidate.label)}  ({findings.candidate.id})"))
    if not findings.trained:
        console.print(Text("UNTRAINED ENGINE: its scores mean nothing, and neither does their order", "bold yellow"))
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("limit", "measured", "allowed", "verdict"):
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
    if missing := findings.asked - len(findings.images):
        text = f"ended at the first image beyond a limit: {missing} of {findings.asked} images were not compared"
        console.print(Text(text))
    console.print(Text(verdict(checks), "bold"))
    for check in checks:
        if not check.within and check.name in RULES:
            console.print(Text(f"  {check.name}: {RULES[check.name].about}"))


def show_scores(found: ScoresFound, stream: TextIO) -> None:
    """Print how far your program's scores are from ours, what explains that, and the verdict."""
    d, say = found.distance, partial(print, file=stream)
    others = f"; scores of other images: {found.unused}" if found.unused else ""
    say(f"{found.images} images, engine {found.engine}{others}")
    say(f"  SRCC {number(d.srcc)}, PLCC {number(d.plcc)}")
    say(f"  difference: {number(d.mean)} on average, {number(d.largest)} at most, at {printable(d.worst)}")
    say(
        f"  root mean square {number(d.root)}, allowed {number(found.allowed)}; "
        f"spread over seeds {number(found.spread)}"
    )
    if found.within:
        say("the engine says what your program says")
        return
    best = found.explanations[:EXPLANATIONS]
    if found.tried_on:
        say(f"tried on {found.tried_on} of the images; what is left of the difference:")
    for one in best:
        say(f"  {number(one.left):>8}  {one.what}" + (f"  [{one.option}]" if one.option else ""))
    enough = [one.what for one in found.explanations if one.enough]
    if enough[1:]:
        say(f"several causes would do, the likeliest is {enough[0]}; more images, of unlike quality, tell them apart")
    elif enough:
        say(f"explained by: {enough[0]}")
    else:
        say(f"nothing that was tried explains the difference; not tried: {NOT_TRIED}")


def show_culprits(culprits: Culprits, path: Path, stream: TextIO) -> None:
    """Print the nodes that a bisection found, and what the plan with them, in `path`, reaches."""
    nodes = [f"  {group.stage}: {name} ({op})" for group in culprits.groups for name, op in group.nodes]
    lines = [f"\n{len(nodes)} nodes must be float32 (found in {culprits.trials} trials):", *nodes]
    if not culprits.minimal:
        lines.append("All trials were used, so fewer nodes may be enough: search on with more --trials.")
    print(*lines, f"{path}: the plan with these nodes in float32 is {verdict(culprits.checks)}", sep="\n", file=stream)


def verdict(checks: Sequence[LimitCheck]) -> str:
    """Return the verdict over all limits."""
    beyond = [check.name for check in checks if not check.within]
    return f"beyond: {', '.join(beyond)}" if beyond else "within all limits"


def verdict_of(check: LimitCheck, good: str = "", bad: str = "") -> Text:
    """Return a check's verdict in a word."""
    if check.within and check.value is None:
        return Text("not judged")
    return Text("within", good) if check.within else Text("beyond", bad)


def allowed(check: LimitCheck) -> str:
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


def _json(within: bool, found: dict[str, Any]) -> str:
    data = _finite({"schema": SCHEMA, "within": within, **found})
    return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
