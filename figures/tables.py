"""The tables of figures in the documents, made from `results/*.json`.

    python figures/tables.py [--check] [FILE…]

The script rewrites the tables in place. With `--check` it compares them and changes nothing. Without FILE it takes
README.md and every page of docs/. A table stands between two comments. The first names the function that makes it:

    <!-- table: figures -->                     a table of the functions here, from the JSON of the scripts here
    <!-- table: peers from bench-mini.json -->  a table of `iqa-bench`, from what its --json wrote
    <!-- end of table -->
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from diffiqa.bench import report
from diffiqa.bench.results import read
from diffiqa.errors import DiffiqaError
from diffiqa.figures.gpu.page import gpu, gpu_speed
from diffiqa.figures.people_tables import (
    damage,
    opinions,
    papers,
    people,
    pfd_named,
    pfd_people,
    restored,
)
from diffiqa.figures.pfd import pfd_choices, pfd_cost, pfd_int8
from diffiqa.figures.reliability import reliability

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "figures" / "results"
_BLOCK = re.compile(
    r"(?P<head><!-- table: (?P<name>\w+)(?: from (?P<file>[\w.-]+))? -->\n)"
    r"(?P<body>.*?)(?P<tail><!-- end of table -->)",
    re.DOTALL,
)


def main() -> None:
    """Rewrite or check; exits with 1 where a table differs or cannot be made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", metavar="FILE", nargs="*", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    problems = []
    for document in given.documents or [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = document.read_text(encoding="utf-8")
        try:
            made, changed = remake(text, given.results)
        except (OSError, KeyError, ValueError, DiffiqaError) as exc:
            problems.append(f"{document}: a table cannot be made: {type(exc).__name__}: {exc}")
            continue
        if given.check and changed:
            problems.append(f"{document} differs from {given.results}: {', '.join(changed)}")
        if not given.check and changed:
            document.write_text(made, encoding="utf-8")
    if problems:
        sys.exit("\n".join([*problems, "python figures/tables.py writes the tables anew"]))


def remake(text: str, results: Path) -> tuple[str, list[str]]:
    """Return a document with its tables made anew, and the heads of those that changed."""
    changed = []

    def block(match: re.Match[str]) -> str:
        body = make(match["name"], match["file"], results)
        if body != match["body"]:
            changed.append(match["head"].strip())
        return match["head"] + body + match["tail"]

    if text.count("<!-- table: ") != len(_BLOCK.findall(text)):
        raise ValueError("a <!-- table: … --> comment is not well formed, or has no <!-- end of table -->")
    return _BLOCK.sub(block, text), changed


def make(name: str, file: str | None, results: Path) -> str:
    """Return one table, with an empty line on either side."""
    if file is None and name in SINGLE:
        made = SINGLE[name](results)
    elif file is not None and name in report.TABLES:
        made = report.TABLES[name](read(results / file))
    else:
        raise ValueError(
            f"no table is called {name!r}: there are {', '.join(SINGLE)}, and with a file {', '.join(report.TABLES)}"
        )
    if not made:
        raise ValueError(f"{file} has nothing for a table of {name}")
    return f"\n{made}\n\n"


def figures(results: Path) -> str:
    """Return the table of single figures."""

    load = partial(_read, results)
    presets, overhead, full = load("export")["presets"], load("score-overhead"), load("score-full")
    memory, large, full_memory = load("score-memory"), load("score-large"), load("score-full-memory")
    ways, verify = load("cpu-full")["ways"], load("precision-verify")
    full_bytes = load("precision-sizes")["bytes"].values()
    soaked = read(results / "bench-mini-soak.json")
    soak = soaked.soak
    assert soak is not None
    errors = [
        [
            error
            for p in presets.values()
            for stage in p["stages"].values()
            for name, error in stage["max_abs_error"].items()
            if name == wanted
        ]
        for wanted in ("noise", "score")
    ]
    small, larger = _seconds_per_image(results)
    gib = max(p["peak_memory_gib"] for p in presets.values())
    rows = [
        [
            "export of `paper` and of `authors`, verification included",
            f"{presets['paper']['seconds']:.0f} s and {presets['authors']['seconds']:.0f} s; {gib:.1f} GiB at most",
        ],
        ["largest difference from PyTorch: noise of the U-Net, scores", ", ".join(f"{max(e):.1e}" for e in errors)],
        ["`mini`, 9 crops: 224×224, 384×320", f"{small:.1f} s, {larger:.1f} s"],
        ["the same: share of time outside ONNX Runtime", f"{overhead['overhead_percent_median']:.2f} %"],
        ["`mini`: fresh process to the first score", f"{load('score-startup')['first_score_seconds_median']:.1f} s"],
        [
            "`paper`, 224×224, 50 steps",
            f"{full['samples'][0]['seconds']:.0f} s, {full['overhead_percent_median']:.2f} % outside ONNX Runtime",
        ],
        [
            "the same: peak memory of the process",
            f"{full_memory['peak_mib'] / 1024:.1f} GiB, engine {full_memory['engine_mib'] / 1024:.1f} GiB",
        ],
        [
            "`paper`: one U-Net step in int8 by OpenVINO, beside ONNX Runtime's defaults in float32",
            f"{ways['OpenVINO, int8']['cpu_time']:.1f}× less CPU time, {ways['OpenVINO, int8']['speed']:.1f}× faster",
        ],
        [
            "`paper`: all stages in int8, beside float32",
            f"{sum(b['int8'] for b in full_bytes) / sum(b['fp32'] for b in full_bytes):.0%} of the size",
        ],
        [
            f"`mini`: `iqa-verify --precision fp16` on {verify['images']} images of 176×176",
            f"{verify['seconds'] / 60:.1f} min",
        ],
        [
            f"`mini`, {soaked.cases[0].name}, {soak.images:,} images: memory; change of time in the later half",
            f"{soak.resident_mib[0]:.0f} MiB, at the end {soak.resident_mib[-1]:.0f}; {soak.drift:+.1%}",
        ],
        [
            "`mini`: resident memory over 1,000 images of five sizes",
            f"{memory['resident_mib'][0]:.0f} MiB, growth {memory['growth_percent_after_image_150']:.2f} %",
        ],
        [
            "`mini`, 4 crops: a 24-megapixel JPEG",
            f"{large['peak_mib_above_a_small_image']} MiB above a small image's peak",
        ],
    ]
    return report.table(["what", "measured"], rows)


def speed(results: Path) -> str:
    """Return the README's table: how long a score takes."""
    small, _ = _seconds_per_image(results)
    start, ways = _read(results, "score-startup"), _read(results, "cpu-full")["ways"]
    first, best = (
        statistics.median(ways[name]["seconds"]) for name in ("ONNX Runtime's defaults", "OpenVINO, int8 and bf16")
    )
    rows = [
        ["`mini`, one image of 224×224, 9 crops", f"{small:.1f} s"],
        ["`mini`, new process to first score", f"{start['first_score_seconds_median']:.1f} s"],
        ["full size (`paper`), one of 50 steps at 224×224", f"{first:.1f} s; OpenVINO, int8 and bf16: {best:.2f} s"],
    ]
    return report.table(["what", "measured"], rows)


def shards(results: Path) -> str:
    """Return what shards cost, how they grow, and what random kills left."""
    growth = _read(results, "shards-growth")
    rows = [
        [
            f"scoring {growth['scored']:,} names with a stub: CPU time, start included; memory of driver and worker",
            f"{found['run_cpu_seconds'] / growth['scored'] * 1e6:.0f} µs a name; "
            f"{found['run_mb']:.0f} and {found['run_worker_mb']:.0f} MiB",
        ]
        for found in growth["growth"][-1:]
    ]
    rows += [
        [
            f"planning and merging {found['names']:,.0f} names: time, CPU time, memory",
            f"{found['merge_seconds']:.0f} s, {found['merge_cpu_seconds']:.0f} s, {found['merge_mb']:.0f} MiB",
        ]
        for found in growth["growth"]
    ]
    rows += [
        [
            f"{found['images']:,} images {of}; {found['worker']} workers and {found['driver']} drivers killed",
            "the same files as without" if found["same_files"] else "OTHER FILES",
        ]
        for name, of in (("stub", "of the stub"), ("engine", "with `pfd-mini`"))
        if (results / f"shards-kills-{name}.json").exists()
        for found in [_read(results, f"shards-kills-{name}")]
    ]
    rows += [
        [
            f"`{model}`, one worker{on}: time of an image, without shards = 1",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} in {found['rounds']} rounds)",
        ]
        for model, found in _of_models(results, "shards-overhead")
        for way, on in (("shards", ""), ("ray", " on Ray"))
        if f"{way}_beside_plain_seconds" in found["ratios_by_round"]
        for ratios in [found["ratios_by_round"][f"{way}_beside_plain_seconds"]["without_start"]]
    ]
    return report.table(["what", "measured"], rows)


def serving(results: Path) -> str:
    """Return what the service costs beside the bare scorer."""
    head = ["model", "clients", "images a second, bare scorer", "service", "cost", "p50, p95, p99 of an answer"]
    rows = []
    for model, found in _of_models(results, "serving-cost"):
        alone = statistics.median(bare["scored_a_second"] for bare in found["bare"])
        for cells in zip(*(one["load"] for one in found["rounds"]), strict=True):
            clients = cells[0]["clients"]
            with_it, *waits = (
                statistics.median(cell[what] for cell in cells)
                for what in ("scored_a_second", "p50_ms", "p95_ms", "p99_ms")
            )
            cost = found["cost_beside_bare"][f"scored_a_second, {clients} clients"]
            percentiles = ", ".join(f"{wait:.0f}" for wait in waits) + " ms"
            rows.append([f"`{model}`", f"{clients}", f"{alone:.1f}", f"{with_it:.1f}", f"{cost:.0%}", percentiles])
    return report.table(head, rows)


def thousand(results: Path) -> str:
    """Return what names and shards cost beside scores: what a run on very many GPUs is reckoned from."""
    plan, drive = _read(results, "shards-growth")["growth"][-1], _read(results, "shards-driver")["growth"]
    runs = _read(results, "shards-requests")["runs"]
    few, many, cut_finer = ({"GET": 0, "PUT": 0, **run} for run in runs)

    def difference(more: dict[str, int], less: dict[str, int], of: str) -> str:
        count = more[of] - less[of]
        return ", ".join(f"{n / count:g} {verb}" for verb in ("GET", "PUT") if (n := more[verb] - less[verb]))

    microseconds = plan["plan_cpu_seconds"] / plan["names"] * 1e6
    shards = (drive[-1]["names"] - drive[0]["names"]) / 1000
    per_shard = (drive[-1]["drive_cpu_seconds"] - drive[0]["drive_cpu_seconds"]) / shards * 1e6
    rows = [
        ["planning: CPU time", f"{microseconds:.1f} µs a name, {microseconds * 100 / 60:.0f} minutes for 100,000,000"],
        ["driver: CPU time", f"{per_shard:.0f} µs a shard"],
        [
            f"driver: memory with {drive[0]['names']:,.0f} and {drive[-1]['names']:,.0f} names, in shards of 1000",
            f"{drive[0]['drive_mb']:.0f} and {drive[-1]['drive_mb']:.0f} MiB",
        ],
        [
            "requests to a bucket",
            f"{difference(many, few, 'images')} an image; {difference(cut_finer, many, 'shards')} a shard",
        ],
    ]
    return report.table(["what", "measured"], rows)


def precision(results: Path) -> str:
    """Return a row per precision of the trained `mini`: scores beside float32, sizes, and time where it was taken."""
    found, engines = _read(results, "precision"), _read(results, "precision-engines")["bytes"]
    rows = []
    for name, row in found["precisions"].items():
        left = max(row.get("share_of_macs_in_float32", {}).values(), default=None)
        rows.append(
            [
                f"`{name}`",
                str(row["images"]),
                *_changes(name, row),
                "" if name == "fp32" else f"{row['srcc_with_fp32']:.5f}",
                f"{row['srcc_with_labels']:.3f}",
                "" if left is None else f"{left:.2g}",
                _size(found, row) or report.NONE,
                f"{sum(engines[name].values()) / 1e6:.1f} MB" if name in engines else "",
                _speed(name, row) or "emulated",
            ]
        )
    head = ["precision", "pictures", "mean change of score", "worst", "SRCC with `fp32`", "SRCC with labels"]
    return report.table([*head, "MACs in float32, worst stage", "size", "RTX engines", "CPU speed"], rows)


def precisions(results: Path) -> str:
    """Return the README's table: what precisions, and one step, do to scores and to their speed."""
    rows = [
        [row["way"], str(row["count"]), f"{row['speed']:.1f}×", f"{row['drift']:.2g}"]
        for row in _read(results, "cpu")["rows"]
        if row["count"] > 1 or row["way"] in {"ONNX Runtime, float32", "OpenVINO, bf16"}
    ]
    return report.table(["computed by", "steps", "speed", "mean change of score"], rows)


def steps(results: Path) -> str:
    """Return a row for each way to take fewer steps: speed and scores beside all steps."""
    rows = [
        [
            name,
            " ".join(map(str, way["sampling"]["steps"])),
            f"{way['speed']:.1f}×",
            *(f"{way[figure]:.4f}" for figure in ("drift", "corrected_drift", "corrected_bias", "srcc")),
            f"{way['srcc_with_labels']:.2f}",
            f"{way['psnr_to_all_steps']:.1f} dB",
        ]
        for name, way in _read(results, "steps")["ways"].items()
        if name != "all"
    ]
    head = ["sampler, steps", "steps taken", "speed", "mean change of score", "corrected", "bias left", "SRCC with all"]
    return report.table([*head, "SRCC with labels", "y₀ beside all steps"], rows)


def cpu(results: Path) -> str:
    """Return a row for each number of steps and way on the CPU, of `mini`: speed, and scores beside float32."""
    rows = [
        [
            row["way"],
            str(row["count"]),
            f"{1 / row['seconds_median']:.2f}",
            f"{row['speed']:.1f}×",
            *(f"{row[figure]:.4f}" for figure in ("drift", "corrected_drift", "corrected_bias", "srcc")),
            f"{row['srcc_with_labels']:.3f}",
        ]
        for row in _read(results, "cpu")["rows"]
    ]
    head = ["backend, precision", "steps", "images/s", "speed", "mean change of score", "corrected", "bias left"]
    return report.table([*head, "SRCC with float32 in all steps", "SRCC with labels"], rows)


def cpu_full(results: Path) -> str:
    """Return a row for each way on the CPU, of the full size: speed of a step, and how near restorations stay."""
    found, rows = _read(results, "cpu-full"), []
    for name, way in found["ways"].items():
        low, high = way["middle_half"]
        near = way.get("psnr_to_float32_in_all_steps", {})
        kept = ", ".join(f"{count}: {distance['y0']:.1f} dB" for count, distance in near.items())
        rows.append([name, f"{way['speed']:.2f}×", f"{low:.2f}–{high:.2f}", f"{way['cpu_time']:.2f}×", kept])
    head = ["backend, precision", "speed of a step", "middle half", "less CPU time", "y₀ beside float32, by steps"]
    return report.table(head, rows)


def tried(results: Path) -> str:
    """Return how long a U-Net step took with what was tried, beside the same step without."""
    constants = _read(results, "score-tables")["seconds_per_step_base_over_constant_median"]
    rows = [
        [f"`mini`, {case['side']}×{case['side']}: busy threads, {case['condition']}", f"{case['ratio']:.2f}"]
        for case in _read(results, "score-spin")["cases"]
    ]
    rows.append(["`mini`: all that depends on the step alone as constants", f"{1 / constants:.2f}"])
    rows += [
        [f"`paper`, 224×224: {name}, beside ONNX Runtime's defaults", f"{1 / way['speed']:.2f}"]
        for name, way in _read(results, "cpu-full")["ways"].items()
        if way["speed"] != 1
    ]
    return report.table(["what was tried", "time, without = 1"], rows)


def _seconds_per_image(results: Path) -> list[float]:
    """Return the median seconds of `mini` with 9 crops, for the smaller and the larger image."""
    sizes: dict[tuple[int, int], list[float]] = {}
    for sample in _read(results, "score-overhead")["samples"]:
        sizes.setdefault(tuple(sample["size"]), []).append(sample["seconds"])
    return [statistics.median(seconds) for seconds in sizes.values()]


def _changes(name: str, row: Any) -> list[str]:
    return ["0", "0"] if name == "fp32" else [report.number(row["mean_drift"]), report.number(row["max_drift"])]


def _size(found: Any, row: Any) -> str:
    reference = found["precisions"]["fp32"]["bytes"]
    return f"{sum(row['bytes'].values()) / sum(reference.values()):.0%}" if "bytes" in row else ""


def _speed(name: str, row: Any) -> str:
    return f"{row['speed_over_fp32']:.1f}×" if "speed_over_fp32" in row else "1" if name == "fp32" else ""


def _read(results: Path, name: str) -> Any:
    """Return what a script here has recorded."""
    return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))


def _of_models(results: Path, what: str) -> list[tuple[str, Any]]:
    """Return what a script has recorded of each model, the fastest first."""
    found = [(path.stem.removeprefix(f"{what}-"), _read(results, path.stem)) for path in results.glob(f"{what}-*.json")]
    return sorted(found, key=lambda one: one[0] != "pfd-mini")


SINGLE: dict[str, Callable[[Path], str]] = {
    made.__name__: made
    for made in (
        *(figures, speed, precision, precisions, steps, cpu, cpu_full, tried, gpu, gpu_speed),
        *(shards, thousand, serving),
        *(people, opinions, damage, restored, papers),
        *(pfd_choices, pfd_cost, pfd_int8, pfd_people, pfd_named),
        reliability,
    )
}


if __name__ == "__main__":
    main()
