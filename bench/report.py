"""The tables of a benchmark as Markdown: what `iqa-bench` prints, and what the README shows."""

import re
import statistics
from collections.abc import Callable, Sequence

from .results import Gpu, Results, plural
from .stats import summarise
from .verdict import judge_results, ratios

NONE = "–"
WITHOUT_GRAPHS = "without CUDA graphs"  # nobody can look inside one
_NUMBER = re.compile(rf"[+-]?[\d.,]+(e-?\d+)?%?|{NONE}|")


def to_markdown(results: Results) -> str:
    """Return the whole report."""
    verdict = "\n".join(f"- {line}" for line in judge_results(results).lines)
    parts = [f"## {results.engine.model} on {results.where}", _facts(results), f"**Verdict**\n\n{verdict}"]
    for title, make in TABLES.items():
        if table := make(results):
            parts.append(f"### {title[:1].upper()}{title[1:]}\n\n{table}")
    missing = "\n".join(f"- {figure}: {why}" for figure, why in results.not_measured.items())
    if missing:
        parts.append(f"### Not measured here\n\n{missing}")
    return "\n\n".join(parts) + "\n"


def throughput(results: Results) -> str:
    """Return a row per case: what a newcomer asks for."""
    on_gpu = results.gpu is not None
    head = ["image", "crops", "steps", "workers", *["batch"] * on_gpu, "images/s", "crops/s", "seconds per image"]
    head += ["GFLOP/s", "of peak", *["of data sheet"] * on_gpu]
    rows = []
    for case in results.measured:
        seconds, rate = case.end_to_end_summary.median, case.gflops()
        counts = [case.crops, case.steps, case.workers, *[case.batch] * on_gpu]
        speeds = [1 / seconds, case.crops / seconds, seconds, rate]
        shares = [results.mfu(rate), *[results.sheet_mfu(rate)] * on_gpu]
        row = [f"{case.width}×{case.height}", *map(str, counts), *map(number, speeds), *map(percent, shares)]
        rows.append(row)
    return table(head, rows)


def gpu(results: Results) -> str:
    """Return a row per case on a GPU: where the time of an image goes, and what graphs save."""
    head = ["case", "H2D, ms", "compute, ms", "D2H, ms", "host launching with graphs, ms"]
    head += ["host launching without graphs, ms (may hold waiting)", "GPU idle"]
    head += ["time without graphs, with = 1", "J per image", "buffers, MiB"]
    rows = []
    for case in results.measured:
        if not (d := case.device):
            continue
        ms = [_ms(samples) for samples in (d.upload, case.computing, d.download, *d.launching)]
        joules = statistics.fmean(d.joules) if d.joules else None  # the counter is slow: a single sample says little
        more = case.without_graph
        ratio = f"{more:.2f}" if more else NONE
        rows.append([case.name, *ms, percent(case.idle), ratio, number(joules), number(d.buffers_mib)])
    return table(head, rows)


def latency(results: Results) -> str:
    """Return a row per case and kind of sample, in milliseconds."""
    head = ["case", "ms per image", "samples", "min", "mean", "median", "p90", "p95", "p99", "CV", "later half"]
    rows = []
    for case in results.measured:
        drift = f"{case.stability.drift:+.1%}"
        for name, s, later in (
            ("files in, scores out", case.end_to_end_summary, NONE),
            ("compute", case.compute_summary, drift),
        ):
            times = [number(1e3 * seconds) for seconds in (s.minimum, s.mean, s.median, s.p90, s.p95, s.p99)]
            rows.append([case.name, name, str(s.count), *times, percent(s.cv), later])
    return table(head, rows)


def stages(results: Results) -> str:
    """Return a row per stage of every case, and one for what no network takes."""
    head = ["case", "stage", "calls", "ms per image", "ms per call", "share", "GFLOP/s", "of peak", "CV"]
    if results.gpu:
        head[1] = f"stage, {WITHOUT_GRAPHS}"
    rows = []
    for case in results.measured:
        whole = statistics.median(case.whole)
        for name, samples in case.stages.items():
            summary, rate = summarise(samples), case.gflops(name)
            calls = case.work[name].calls if name in case.work else None
            ms, share = 1e3 * summary.median, summary.median / whole
            times = [number(ms), number(ms * case.batch / calls if calls else None), percent(share)]
            rates = [number(rate), percent(results.mfu(rate)), percent(summary.cv)]
            rows.append([case.name, name, str(calls) if calls else NONE, *times, *rates])
        outside = case.outside
        row = [case.name, "outside networks", NONE, number(1e3 * outside * whole), NONE, percent(outside), *[NONE] * 3]
        rows.append(row)
    return table(head, rows)


def step_times(results: Results) -> str:
    """Return a row per case: a U-Net call in milliseconds, over the schedule."""
    rows = []
    for case in results.measured:
        if case.step_seconds:
            steps = summarise([1e3 * statistics.median(samples) for samples in case.step_seconds])
            first = 1e3 * statistics.median(case.step_seconds[0])
            cells = [case.step_ms, steps.minimum, steps.median, steps.p90, steps.p99, first]
            rows.append([case.name, *map(number, cells)])
    step = f"ms/step, {WITHOUT_GRAPHS}" if results.gpu else "ms/step"
    return table(["case", step, "fastest step", "median step", "p90", "p99", "first step"], rows)


def startup(results: Results) -> str:
    """Return a row per part of a fresh process's start: medians."""
    if not results.starts:
        return ""
    parts = {
        "interpreter": "interpreter",
        "imports": "imports",
        "check of the engine's files": "check",
        "loading the networks": "load",
        "first score": "first_score",
        "second score": "second_score",
        "a later score": "later_score",
    }
    rows = []
    for text, part in parts.items():
        seconds = [getattr(start, part) for start in results.starts]
        if None not in seconds:
            rows.append([text, _ms(seconds)])
    peaks = [start.peak_mib for start in results.starts if start.peak_mib is not None]
    if peaks:
        rows.append(["peak memory after the first score, MiB", number(statistics.median(peaks))])
    return table([f"start of a fresh process, median of {len(results.starts)}", "ms"], rows)


def soak(results: Results) -> str:
    """Return how latency and memory changed over many images."""
    if not results.soak or len(results.soak.seconds) < 2:
        return ""
    resident = results.soak.resident_mib
    rows = [["images", str(results.soak.images)], ["later half of them took", f"{results.soak.drift:+.1%}"]]
    if len(resident) > 1:
        rows.append(["resident memory, first and last reading, MiB", f"{number(resident[0])}, {number(resident[-1])}"])
    return table(["soak", ""], rows)


def peers(results: Results) -> str:
    """Return a row per contender and case; a time is shown only where the scores agree."""
    head = ["who", "precision", "case", "ms per image", "CV", "time, ours = 1", "mean score difference", "ready in s"]
    head.append("peak MiB")
    found = {(ratio.peer, ratio.case): ratio.times for ratio in ratios(results)}
    rows = []
    for index, peer in enumerate(results.peers):
        who = f"{peer.name} ({peer.version})" if peer.version else peer.name
        what = f"{'skipped' if peer.skipped else 'does not count'}: {peer.problem}" if peer.problem else None
        if not any(case.seconds for case in peer.cases):
            cells = [what or "not reached", *[NONE] * 4]
            rows.append([who, peer.precision, *cells, number(peer.ready_seconds), number(peer.peak_mib)])
        for case in peer.cases:
            if not case.seconds:
                continue
            summary = summarise(case.seconds)
            ratio = 1.0 if index == 0 else found.get((peer.name, case.case))
            drift = "0" if index == 0 else f"{case.drift:.1e}" if case.drift is not None else NONE
            cells = [number(1e3 * summary.median), percent(summary.cv), f"{ratio:.2f}" if ratio else NONE, drift]
            name = f"{case.case}; {what}" if what else case.case
            rows.append([who, peer.precision, name, *cells, number(peer.ready_seconds), number(peer.peak_mib)])
    return table(head, rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "throughput": throughput,
    "latency": latency,
    "GPU": gpu,
    "stages": stages,
    "steps": step_times,
    "startup": startup,
    "soak": soak,
    "peers": peers,
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table; nothing if it would have no rows. Columns of numbers align right."""
    if not rows:
        return ""
    right = [all(_NUMBER.fullmatch(row[column]) for row in rows) for column in range(len(head))]
    lines = [head, ["--:" if r else "---" for r in right], *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines
    )


def number(value: float | None) -> str:
    """Return three digits that count, without an exponent."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    digits = max(0, 2 - int(f"{value:e}".split("e")[1]))
    return f"{value:,.{min(digits, 6)}f}"


def percent(share: float | None) -> str:
    """Return a share in percent, with a decimal where it is small."""
    if share is None:
        return NONE
    return f"{share:.1%}" if abs(share) < 0.1 else f"{share:.0%}"


def _ms(samples: Sequence[float]) -> str:
    return number(1e3 * statistics.median(samples)) if samples else NONE


def _facts(results: Results) -> str:
    m, ceilings = results.machine, results.ceilings
    packages = ", ".join(f"{name} {text}" for name, text in m.packages.items())
    cpus = f"{plural(m.cpus, 'CPU')} ({', '.join(m.features) or 'features unknown'})"
    facts = [
        *(_of_gpu(results.gpu) if results.gpu else []),
        f"{m.cpu}: {cpus}" if results.gpu else f"{plural(m.threads, 'thread')} on {cpus}",
        f"{results.engine.backend}; {packages}; Python {m.python}, {m.system}",
        f"engine {results.engine.id}, {results.created}" + (f", commit {m.commit}" if m.commit else ""),
    ]
    probed = []
    if results.peak_gflops:
        probed.append(f"matrix product {number(results.peak_gflops)} GFLOP/s in {ceilings.dtype}")
    if results.peak_gbs:
        probed.append(f"copy {number(results.peak_gbs)} GB/s")
    if probed:
        count = max(len(ceilings.matmul_gflops), len(ceilings.copy_gbs))
        facts.append(f"ceilings measured in this run, medians of {count}: {', '.join(probed)}")
    busy = f"other processes used {results.load.others:.0%} of the CPUs" if results.load.others is not None else ""
    load = (
        f"load {results.load.load_before} before, {results.load.load_after} after" if results.load.load_before else ""
    )
    facts += ["; ".join(filter(None, (busy, load)))] if busy or load else []
    if results.overhead is not None:
        facts.append(f"reading the clock took {results.overhead:.3%} of computing")
    facts += [f"left out: {text}" for text in results.left_out]
    return "\n".join(f"- {fact}" for fact in facts)


def _of_gpu(found: Gpu) -> list[str]:
    """Return what is known of a GPU."""
    load = found.load
    clocks = [
        f"{name} clock {number(statistics.median(readings))} of {number(most)} MHz"
        for name, readings, most in (
            ("SM", load.sm_clock_mhz, found.max_sm_clock_mhz),
            ("memory", load.memory_clock_mhz, found.max_memory_clock_mhz),
        )
        if readings
    ]
    described = {
        "compute capability {}": found.compute_capability,
        "driver {}": found.driver,
        "{} MiB": found.memory_mib and number(found.memory_mib),
        "power limit {} W": found.power_limit_watts and number(found.power_limit_watts),
    }
    seen = [*clocks]
    if load.celsius:
        seen.append(f"{number(max(load.celsius))} °C at most")
    if load.used_mib:
        seen.append(f"{number(max(load.used_mib))} MiB of its memory in use")
    sheet = f"data sheet: {number(found.sheet_tflops)} TFLOP/s of dense fp16 products, {number(found.sheet_gbs)} GB/s"
    return [
        ", ".join([found.name, *(text.format(value) for text, value in described.items() if value)]),
        *([", ".join(seen)] if seen else []),
        *([sheet] if found.sheet_tflops else []),
    ]
