"""Full-size export: seconds, peak memory, agreement with PyTorch, parameters. Writes results/export.json."""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

from record import run_apart, write

CHILD = """
import resource, sys
from diffiqa.cli import export
try:
    export(sys.argv[1:])
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(used.ru_maxrss, used.ru_utime + used.ru_stime)
"""


def main() -> None:
    """Export `paper` and `authors`, and record what it took."""
    presets = {}
    for preset in ("paper", "authors"):
        with tempfile.TemporaryDirectory() as folder:
            presets[preset] = exported(Path(folder) / "engine", "--preset", preset, "--seed", "0")
    write("export", {"presets": presets})


def exported(target: Path, *weights: str | Path) -> dict[str, Any]:
    """Export weights, given as to the command, in a process of its own, and return what it took."""
    start = time.perf_counter()
    *_, memory, used = run_apart(CHILD, *weights, "-o", target, "-q")
    seconds = time.perf_counter() - start
    manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(float(used), 1),
        "peak_memory_gib": round(int(memory) / 2**20, 2),
        "stages": {
            stage["name"]: {
                "parameters": stage["parameters"],
                "gmacs": round(stage["macs"] / 1e9, 2),
                "megabytes": round(stage["file"]["bytes"] / 1e6, 1),
                "max_abs_error": {
                    output: max(c["max_abs_error"] for c in stage["checks"] if c["output"] == output)
                    for output in {c["output"] for c in stage["checks"]}
                },
            }
            for stage in manifest["stages"]
        },
    }


if __name__ == "__main__":
    main()
