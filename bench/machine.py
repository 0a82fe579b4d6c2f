"""The machine, and what else ran on it. Linux answers all of this; on other systems it is None."""

import os
import platform
import re
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..runtime.host.onnx_stage import available_cpus
from .results import Load, Machine

_PACKAGES = (
    *("diffiqa", "numpy", "onnxruntime", "onnxruntime-gpu", "onnx", "pillow", "torch", "openvino"),
    *("tensorrt", "tensorrt-rtx", "cuda-core"),
)
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def describe(threads: int) -> Machine:
    """Return the machine, its software, and the commit of this checkout."""
    found = _read("/proc/cpuinfo")
    name, flags = (re.search(rf"^{key}\s*: (.*)$", found, re.MULTILINE) for key in ("model name", "flags"))
    present = flags[1].split() if flags else []
    memory = re.search(r"^MemTotal:\s+(\d+)", _read("/proc/meminfo"), re.MULTILINE)
    return Machine(
        cpu=name[1] if name else platform.processor() or platform.machine(),
        features=tuple(feature for feature in _FEATURES if feature in present),
        cpus=available_cpus(),
        threads=threads,
        memory_mib=int(memory[1]) // 1024 if memory else None,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        packages={package: text for package in _PACKAGES if (text := _version(package))},
        commit=_commit(),
    )


def peak_mib() -> float | None:
    """Return the peak memory of this process."""
    # Not from getrusage: there a process inherits the peak of its parent.
    return _status_mib("VmHWM")


def resident_mib() -> float | None:
    """Return the memory of this process now."""
    return _status_mib("VmRSS")


class Watch:
    """Adds up, over `with` blocks, the CPU time that others took on the CPUs of this process."""

    def __init__(self) -> None:
        self._load_before = _load()
        self._others = self._all = 0.0
        self._throttled = 0
        self._known = _busy() is not None
        self._start: tuple[float, float, float, int] | None = None

    def __enter__(self) -> None:
        self._start = (_busy() or 0.0, time.process_time(), time.monotonic(), _throttles() or 0)

    def __exit__(self, *_exception: object) -> None:
        assert self._start  # noqa: S101 — entered
        busy, own, wall, throttles = self._start
        elapsed = time.monotonic() - wall
        spent, own = (_busy() or 0.0) - busy, time.process_time() - own
        if spent < own / 2:  # some containers show counters that stand still
            self._known = False
        self._others += max(0.0, spent - own)
        self._all += elapsed * len(_affinity())
        self._throttled += (_throttles() or 0) - throttles

    @property
    def found(self) -> Load:
        """What was seen so far."""
        others = min(1.0, self._others / self._all) if self._known and self._all else None
        throttled = self._throttled if _throttles() is not None else None
        return Load(self._load_before, _load(), others, throttled)


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _busy() -> float | None:
    """Return the seconds for which our CPUs were busy since the system started, stolen time included."""
    cpus, total, seen = _affinity(), 0, False
    for line in _read("/proc/stat").splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cpus:
            user, nice, system, _idle, _wait, irq, softirq, steal = (int(field) for field in fields[:8])
            total, seen = total + user + nice + system + irq + softirq + steal, True
    return total / os.sysconf("SC_CLK_TCK") if seen else None


def _throttles() -> int | None:
    """Return how often a thermal limit or the cgroup's quota stopped our CPUs; None if nothing counts it."""
    counts = [
        _read(f"/sys/devices/system/cpu/cpu{cpu}/thermal_throttle/{kind}_throttle_count").strip()
        for cpu in _affinity()
        for kind in ("core", "package")
    ]
    for path in ("/sys/fs/cgroup/cpu.stat", "/sys/fs/cgroup/cpu/cpu.stat"):
        counts += re.findall(r"^nr_throttled (\d+)$", _read(path), re.MULTILINE)
    known = [int(count) for count in counts if count.isdigit()]
    return sum(known) if known else None


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def _status_mib(key: str) -> float | None:
    found = re.search(rf"^{key}:\s+(\d+)", _read("/proc/self/status"), re.MULTILINE)
    return round(int(found[1]) / 1024, 1) if found else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():  # installed: a repository further up is not ours
        return None
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        found = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)  # noqa: S603
    except OSError:
        return None
    return found.stdout.strip() or None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
