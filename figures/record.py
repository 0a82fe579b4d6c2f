"""What every script here writes beside its figures: the machine, the versions, the commit."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffiqa.bench.machine import describe
from diffiqa.runtime.host.onnx_stage import available_cpus

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "figures" / "results"


def write(name: str, figures: dict[str, Any]) -> None:
    """Write `results/NAME.json` and print the figures."""
    RESULTS.mkdir(exist_ok=True)
    machine = asdict(describe(available_cpus()))
    text = json.dumps({"machine": machine, "load_1min_at_end": round(os.getloadavg()[0], 2), **figures}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def run_apart(script: str, *arguments: str | Path) -> list[str]:
    """Run a script in a process of its own, and return the words that it prints."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
