"""The README's tables of figures, made from `results/*.json`: rewrites them in place, or with `--check` compares.

    python figures/tables.py [--check] [--readme FILE]

A table stands between two comments in the README. The first names what makes it:

    <!-- table: figures -->                     the table of single figures, from the JSON of the scripts here
    <!-- table: precision -->                   the table of precisions, from that of precision.py
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
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    text = given.readme.read_text(encoding="utf-8")
    try:
        made, changed = remake(text, given.results)
    except (OSError, KeyError, ValueError, DiffiqaError) as exc:
        sys.exit(f"{given.readme}: a table cannot be made: {type(exc).__name__}: {exc}")
    if given.check and changed:
        sys.exit(f"{given.readme} differs from {given.results}: {', '.join(changed)}; run python figures/tables.py")
    if not given.check:
        given.readme.write_text(made, encoding="utf-8")


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
    eight, verify = load("precision-speed"), load("precision-verify")
    full_bytes = load("precision-sizes")["bytes"].values()
    soaked = read(results / "bench-mini-soak.json")
    soak = soaked.soak
    assert soak is not None
    spin = {(case["condition"], case["side"]): case["ratio"] for case in load("score-spin")["cases"]}
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
    sizes: dict[tuple[int, int], list[float]] = {}
    for sample in overhead["samples"]:
        sizes.setdefault(tuple(sample["size"]), []).append(sample["seconds"])
    small, larger = (statistics.median(seconds) for seconds in sizes.values())
    gib = max(p["peak_memory_gib"] for p in presets.values())
    rows = [
        [
            "export of `paper`, `authors`, verification included",
            f"{presets['paper']['seconds']:.0f} s, {presets['authors']['seconds']:.0f} s; {gib:.1f} GiB at most",
        ],
        ["largest difference from PyTorch: U-Net noise, scores", ", ".join(f"{max(e):.1e}" for e in errors)],
        ["`mini`, 9 crops, 224×224; 384×320", f"{small:.1f} s; {larger:.1f} s"],
        ["the same, share of time outside ONNX Runtime", f"{overhead['overhead_percent_median']:.2f} %"],
        [
            "`--spin`, a `mini` U-Net step at 112×112, 224×224: time beside without",
            "; ".join(f"{who} {spin[who, 112]:.2f}, {spin[who, 224]:.2f}" for who in dict.fromkeys(w for w, _ in spin)),
        ],
        ["`mini`, fresh process to first score", f"{load('score-startup')['first_score_seconds_median']:.1f} s"],
        [
            "`paper`, 224×224, 50 steps",
            f"{full['samples'][0]['seconds']:.0f} s, {full['overhead_percent_median']:.2f} % outside ONNX Runtime",
        ],
        [
            "the same, peak memory of the process",
            f"{full_memory['peak_mib'] / 1024:.1f} GiB, engine {full_memory['engine_mib'] / 1024:.1f} GiB",
        ],
        [
            "its U-Net step in int8, beside float32",
            f"{eight['cpu_time_over_fp32']:.1f}× less CPU time, {eight['speed_over_fp32']:.1f}× faster, "
            f"{eight['bytes']['int8'] / eight['bytes']['fp32']:.0%} of the size",
        ],
        [
            "its U-Net step beside ONNX Runtime's default settings: float32, OpenVINO bf16, int8",
            ", ".join(f"{eight['speed_over_defaults'][name]:.2f}×" for name in ("fp32", "openvino bf16", "int8")),
        ],
        [
            "all its stages in int8, beside float32",
            f"{sum(b['int8'] for b in full_bytes) / sum(b['fp32'] for b in full_bytes):.0%} of the size",
        ],
        [
            f"`iqa-verify --precision fp16`, {verify['images']} images of 176×176, `mini`",
            f"{verify['seconds'] / 60:.1f} min",
        ],
        [
            f"`mini`, {soaked.cases[0].name}: memory over {soak.images:,} images; time of the later half",
            f"{soak.resident_mib[0]:.0f} MiB, at the end {soak.resident_mib[-1]:.0f}; {soak.drift:+.1%}",
        ],
        [
            "resident memory over 1,000 images of five sizes",
            f"{memory['resident_mib'][0]:.0f} MiB, growth {memory['growth_percent_after_image_150']:.2f} %",
        ],
        [
            "a 24-megapixel JPEG, `mini`, 4 crops",
            f"{large['peak_mib_above_a_small_image']} MiB above a small image's peak",
        ],
    ]
    return report.table(["what", "measured"], rows)


def precision(results: Path) -> str:
    """Return a row per precision of the trained `mini`: scores beside float32, sizes, and time where it was taken."""
    found, engines = _read(results, "precision"), _read(results, "precision-engines")["bytes"]
    rows = []
    for name, row in found["precisions"].items():
        sizes = row.get("bytes")
        reference = found["precisions"]["fp32"]["bytes"]
        left = max(row.get("share_of_macs_in_float32", {}).values(), default=None)
        rows.append(
            [
                f"`{name}`",
                str(row["images"]),
                "" if name == "fp32" else f"{row['mean_drift']:.1e}",
                "" if name == "fp32" else f"{row['max_drift']:.1e}",
                "" if name == "fp32" else f"{row['srcc_with_fp32']:.5f}",
                f"{row['srcc_with_labels']:.3f}",
                "" if left is None else f"{left:.2g}",
                f"{sum(sizes.values()) / sum(reference.values()):.0%}" if sizes else "–",
                f"{sum(engines[name].values()) / 1e6:.1f} MB" if name in engines else "",
                f"{row['speed_over_fp32']:.1f}×" if "speed_over_fp32" in row else "1" if name == "fp32" else "emulated",
            ]
        )
    head = [
        "precision",
        "pictures",
        "mean change of score",
        "worst",
        "SRCC with `fp32`",
        "SRCC with labels",
        "MACs in float32, worst stage",
    ]
    return report.table([*head, "size", "RTX engines", "CPU speed"], rows)


def _read(results: Path, name: str) -> Any:
    """Return what a script here has recorded."""
    return json.loads((results / f"{name}.json").read_text(encoding="utf-8"))


SINGLE: dict[str, Callable[[Path], str]] = {"figures": figures, "precision": precision}


if __name__ == "__main__":
    main()
