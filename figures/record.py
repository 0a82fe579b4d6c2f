"""What scripts here share: calls timed in turn, PSNR, and what is written beside figures: machine, versions, commit."""

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

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


def seconds_in_turn(
    calls: Mapping[str, Callable[[], object]], rounds: int, *, warm: int = 1, repeats: int = 1, pause: float = 0.0
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Return wall and processor seconds of each call, by round: what slows the machine then slows all of them alike.

    A call is made `repeats` times in a row. `warm` rounds more come first, and do not count. `pause` is in seconds.
    """
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(warm + rounds):
        for name, call in calls.items():
            time.sleep(pause)
            start, used = time.perf_counter(), time.process_time()
            for _ in range(repeats):
                call()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - used)
    wall, cpu = ({name: spent[warm:] for name, spent in each.items()} for each in (wall, cpu))
    return wall, cpu


def psnr(want: Any, have: Any) -> float:
    """Return the PSNR of images in [-1, 1], in dB."""
    error = float(np.square(want - have, dtype=np.float64).mean())
    return 10 * math.log10(4 / error) if error else math.inf


def run_apart(script: str, *arguments: str | Path) -> list[str]:
    """Run a script in a process of its own, and return the words that it prints."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
