"""Fuzzes every reader of untrusted files: `python figures/fuzz.py [--seconds 60] [--record]`.

`tests/fuzz/targets.py` has the readers. It exits with 1 if anything is found, and says in which folder it lies. With
`--record` it writes what was found into figures/results/fuzz.json, beside what is there of other readers.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import RESULTS, write

from diffiqa.tests.fuzz.targets import TARGETS


def fuzz(name: str, seconds: int, folder: Path) -> dict[str, Any]:
    """Fuzz one reader in a process of its own."""
    command = [sys.executable, "-m", "diffiqa.tests.fuzz.targets", name, str(seconds), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    inputs = re.search(r"stat::number_of_executed_units: (\d+)", done.stderr)
    covered = re.findall(r"cov: (\d+)", done.stderr)
    if inputs is None or not covered:
        sys.exit(f"{name}: the fuzzer did not end by itself:\n{done.stderr[-2000:]}")
    kinds = [path.name.partition("-")[0] for path in (folder / "finds").iterdir() if path.suffix != ".bin"]
    hangs = sum(kind in {"slow", "timeout"} for kind in kinds)
    found = {"seconds": seconds, "inputs": int(inputs[1]), "branches": int(covered[-1])}
    return {**found, "tracebacks": len(kinds) - hangs, "hangs": hangs}


def main() -> None:
    """Fuzz all readers, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*TARGETS, []], default=[])
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    found = {}
    for name in asked.names or TARGETS:
        found[name] = fuzz(name, asked.seconds, folder / name)
        print(name, found[name], flush=True)
    if asked.record:
        before = json.loads((RESULTS / "fuzz.json").read_text(encoding="utf-8"))["readers"]
        write("fuzz", {"readers": {name: (before | found)[name] for name in TARGETS if name in before | found}})
    if any(one["tracebacks"] or one["hangs"] for one in found.values()):
        sys.exit(f"look into {folder}/*/finds")


if __name__ == "__main__":
    main()
