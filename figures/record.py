"""What every benchmark writes beside its figures: the machine, the versions, the commit."""

import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffiqa.runtime.host.onnx_stage import available_cpus

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "figures" / "results"


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line.split(":", 1)[1].split() for line in lines if line.startswith("flags"))
    except (OSError, StopIteration):
        cpu, flags = platform.processor(), []
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
    return {
        "cpu": cpu,
        "features": [flag for flag in wanted if flag in flags],
        "cpus": available_cpus(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in ("diffiqa", "numpy", "onnx", "onnxruntime", "pillow", "torch")},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip(),
    }


def write(name: str, figures: dict[str, Any]) -> None:
    """Write `results/NAME.json` and print the figures."""
    load = os.getloadavg()[0]
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": machine(), "load_1min_at_end": round(load, 2), **figures}, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
