"""Full-size export: seconds, peak memory, agreement with PyTorch, parameters. Writes results/export.json."""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import write

CHILD = """
import resource, sys
from diffiqa.cli import export
try:
    export(sys.argv[1:])
finally:
    print("peak_kib", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)
"""


def main() -> None:
    """Export `paper` and `authors`, each in a process of its own, and record what it took."""
    presets = {}
    for preset in ("paper", "authors"):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "engine"
            start = time.perf_counter()
            command = [sys.executable, "-c", CHILD, "--preset", preset, "--seed", "0", "-o", str(target), "-q"]
            process = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds = time.perf_counter() - start
            manifest = json.loads((target / "manifest.json").read_text(encoding="utf-8"))
        peak = int(process.stderr.split("peak_kib")[1].split()[0])
        presets[preset] = {
            "seconds": round(seconds, 1),
            "peak_memory_gib": round(peak / 2**20, 2),
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
    write("export", {"presets": presets})


if __name__ == "__main__":
    main()
