"""The GPU of a benchmark, by NVML: what it is, what its data sheet promises, and its state during the run."""

import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from ..errors import first_line
from .results import Gpu, GpuLoad

T = TypeVar("T")

# NVIDIA's data sheets: TFLOP/s of dense fp16 products with float32 sums, GB/s of memory. By the driver's name of the
# GPU, which must match exactly: A10G, RTX 4090 D and those of laptops are other GPUs.
SHEETS = {
    "H200": (989.4, 4800.0),
    "H100 80GB HBM3": (989.4, 3350.0),
    "H100 PCIe": (756.0, 2000.0),
    "A100-SXM4-80GB": (312.0, 2039.0),
    "A100-SXM4-40GB": (312.0, 1555.0),
    "A100 80GB PCIe": (312.0, 1935.0),
    "A100-PCIE-40GB": (312.0, 1555.0),
    "L40S": (362.0, 864.0),
    "L4": (121.0, 300.0),
    "A10": (125.0, 600.0),
    "T4": (65.0, 320.0),
    "RTX 4090": (165.2, 1008.0),
    "RTX 3090": (71.0, 936.0),
}
POWER_LIMIT, POWER_REASON = "power limit", "sw_power_cap"  # our name of it, and NVML's among its reasons
# No reasons to doubt figures: the GPU was idle at that moment, or somebody fixed the clocks on purpose.
_HARMLESS = {"none", "gpu_idle", "applications_clocks_setting"}


class Nvml:
    """NVML through cuda.core. Any call may raise anything: a driver may lack it, or refuse it."""

    def __init__(self, ordinal: int) -> None:
        from cuda.core import Device, system
        from cuda.core.system.typing import FieldId

        self._cuda, self._system, self._fields = Device(ordinal), system, FieldId
        self._device = self._cuda.to_system_device()  # NVML counts GPUs that CUDA_VISIBLE_DEVICES hides
        d = self._device
        self._numbers: dict[str, Callable[[], float]] = {
            "memory_mib": lambda: d.memory_info.total / 2**20,
            "used_mib": lambda: d.memory_info.used / 2**20,
            "power_limit_watts": lambda: self._field("DEV_POWER_CURRENT_LIMIT") / 1e3,
            "sm_clock_mhz": lambda: d.get_clock("sm").get_current_mhz(),
            "memory_clock_mhz": lambda: d.get_clock("memory").get_current_mhz(),
            "max_sm_clock_mhz": lambda: d.get_clock("sm").get_max_mhz(),
            "max_memory_clock_mhz": lambda: d.get_clock("memory").get_max_mhz(),
            "celsius": lambda: float(d.temperature.get_sensor()),
            "joules": lambda: self._field("DEV_TOTAL_ENERGY_CONSUMPTION") / 1e3,
        }

    def number(self, what: str) -> float:
        """Return a figure by its name in `Gpu` or `GpuLoad`, or "joules" since the driver began."""
        return float(self._numbers[what]())

    def driver(self) -> str:
        """Return the kernel driver's version, which nvidia-smi shows."""
        return ".".join(map(str, self._system.get_kernel_mode_driver_version()))

    def compute_capability(self) -> str:
        """Return it as text, such as "9.0"."""
        found = self._cuda.compute_capability
        return f"{found.major}.{found.minor}"

    def held_back(self) -> dict[str, float]:
        """Return for how many seconds each limit has lowered the clocks since the driver began."""
        counters = {
            POWER_LIMIT: "DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP",
            "temperature limit": "DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN",
            "overheating": "DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN",
            "power brake": "DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN",
        }
        found, refusal = {}, None
        for limit, field in counters.items():
            try:
                found[limit] = self._field(field) / 1e9  # nvml.h has nanoseconds
            except Exception as exc:  # some GPUs count some of them
                refusal = exc
        if refusal and not found:
            raise refusal
        return found

    def reasons(self) -> list[str]:
        """Return why the clocks are not at their maximum now, as NVML calls it."""
        return [str(reason) for reason in self._device.current_clock_event_reasons]

    def processes(self) -> dict[int, str]:
        """Return the names of processes that compute here, by number; a container may hide their names."""

        def name(number: int) -> str:
            try:
                return str(self._system.get_process_name(number)).rpartition("/")[2]
            except Exception:  # of somebody else, or gone
                return "unknown"

        return {int(p.pid): name(p.pid) for p in self._device.compute_running_processes}

    def _field(self, name: str) -> float:
        return float(self._device.get_field_values([getattr(self._fields, name)])[0].value)


class GpuWatch:
    """Watches a GPU over `with` blocks. Make it before this process uses the GPU.

    Counters are read at both ends of a block. `glance` reads clocks, temperature and memory, as the GPU is idle at both
    ends. `refused` has the reason for every figure that NVML did not give.
    """

    def __init__(self, ordinal: int) -> None:
        self.refused: dict[str, str] = {}
        self._sensors = self._ask("GPU (description, clocks, power, temperature)", lambda: Nvml(ordinal))
        self._processes = self._of("other processes on the GPU", lambda s: s.processes())
        self._own: set[int] = set()
        self._before = set(self._processes or ())
        self._readings: dict[str, list[float]] = {
            name: [] for name in ("celsius", "sm_clock_mhz", "memory_clock_mhz", "used_mib")
        }
        self._reasons: dict[str, None] = {}
        self._held: dict[str, float] | None = None
        self._seconds = 0.0
        self._start: tuple[float, dict[str, float] | None] = (0.0, None)

    def opened(self) -> None:
        """Find out which process is ours: in a container its number is another. Call it once ours computes there."""
        self._own = set(self._now_there()) - self._before

    def joules(self) -> float | None:
        """Return the energy the GPU has spent since the driver began."""
        return self._number("joules")

    def __enter__(self) -> None:
        self._start = time.monotonic(), self._of("clock limits", lambda s: s.held_back())

    def __exit__(self, *_exception: object) -> None:
        start, before = self._start
        self._seconds += time.monotonic() - start
        after = self._of("clock limits", lambda s: s.held_back()) if before is not None else None
        if before is not None and after is not None:
            held = self._held or {}
            self._held = {limit: held.get(limit, 0.0) + after[limit] - before[limit] for limit in before & after.keys()}
        self._now_there()

    def glance(self) -> None:
        """Read clocks, what lowers them, temperature and memory. Call it while the GPU works."""
        for name, readings in self._readings.items():
            if (value := self._number(name)) is not None:
                readings.append(value)
        self._reasons |= dict.fromkeys(self._of("clock event reasons", lambda s: s.reasons()) or ())

    def found(self, name: str) -> Gpu:
        """Return the GPU of this name, and all readings."""
        tflops, gbs = sheet(name) or (None, None)
        if tflops is None:
            self.refused["share of the data sheet's peak"] = f"no figures of NVIDIA's are listed here for {name}"
        figures = ("memory_mib", "power_limit_watts", "max_sm_clock_mhz", "max_memory_clock_mhz")
        described = {figure: self._number(figure) for figure in figures}
        others = None
        if self._processes is not None:
            there = {number: who for number, who in self._processes.items() if number not in self._own}
            others = tuple(f"{who} ({number})" for number, who in there.items())
        shares = self._held and {limit: min(1.0, s / max(self._seconds, 1e-9)) for limit, s in self._held.items()}
        return Gpu(
            name=name,
            compute_capability=self._of("GPU compute capability", lambda s: s.compute_capability()),
            driver=self._of("GPU driver", lambda s: s.driver()),
            sheet_tflops=tflops,
            sheet_gbs=gbs,
            load=GpuLoad(
                **{what: tuple(readings) for what, readings in self._readings.items()},
                held_back=shares,
                reasons=tuple(reason for reason in self._reasons if reason not in _HARMLESS),
                others=others,
            ),
            **described,
        )

    def _now_there(self) -> Mapping[int, str]:
        """Return the processes that compute there now, and remember them."""
        if self._processes is None:
            return {}
        now = self._of("other processes on the GPU", lambda s: s.processes()) or {}
        self._processes = {**self._processes, **now}
        return now

    def _number(self, what: str) -> float | None:
        return self._of(f"GPU {what}", lambda s: s.number(what))

    def _of(self, what: str, read: Callable[[Nvml], T]) -> T | None:
        sensors = self._sensors
        return self._ask(what, lambda: read(sensors)) if sensors is not None else None

    def _ask(self, what: str, read: Callable[[], T]) -> T | None:
        try:
            return read()
        except Exception as exc:  # of NVML, of cuda.core, or no library: the run goes on without this figure
            self.refused.setdefault(what, f"NVML: {type(exc).__name__}: {first_line(exc)}")
            return None


def sheet(name: str) -> tuple[float, float] | None:
    """Return TFLOP/s and GB/s from the data sheet of a GPU, if it is listed."""
    words = [word for word in name.split() if word not in {"NVIDIA", "GeForce", "Tesla"}]
    return SHEETS.get(" ".join(words))
