"""What a benchmark found: raw samples as plain data, the figures that follow from them, and its JSON file."""

import json
import math
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..data.outputs import write_file
from ..engine.codec import decode, encode
from ..errors import UsageError, first_line
from .stats import CV_LIMIT, DEVICE_CV_LIMIT, Stability, Summary, judge, summarise

SCHEMA = 1


@dataclass(frozen=True)
class Machine:
    """What figures depend on besides the program."""

    cpu: str
    features: tuple[str, ...]
    cpus: int  # that this process may use
    threads: int  # that networks ran on
    memory_mib: int | None
    system: str
    python: str
    packages: dict[str, str]
    commit: str | None  # of the checkout that was run, if it is one


@dataclass(frozen=True)
class Load:
    """What else the machine did while our pipeline was measured. None: the system does not say."""

    load_before: float | None
    load_after: float | None
    others: float | None  # CPU time of other processes and of the hypervisor, as a share of all CPU time
    throttled: int | None  # how often a thermal limit or the cgroup's quota stopped the CPUs


@dataclass(frozen=True)
class GpuLoad:
    """What the GPU did while our pipeline was measured: readings during end-to-end samples, as far as NVML has them."""

    celsius: tuple[float, ...]
    sm_clock_mhz: tuple[float, ...]
    memory_clock_mhz: tuple[float, ...]
    used_mib: tuple[float, ...]  # of its memory, by all processes
    held_back: dict[str, float] | None  # limit → share of the time for which it lowered the clocks
    reasons: tuple[str, ...]  # why the clocks were not at their maximum, as NVML calls them
    others: tuple[str, ...] | None  # processes beside ours


@dataclass(frozen=True)
class Gpu:
    """The GPU, and what its data sheet promises: rates of dense fp16 products with float32 sums, and of its memory."""

    name: str
    compute_capability: str | None
    driver: str | None
    memory_mib: float | None
    power_limit_watts: float | None
    max_sm_clock_mhz: float | None
    max_memory_clock_mhz: float | None
    sheet_tflops: float | None
    sheet_gbs: float | None
    load: GpuLoad


@dataclass(frozen=True)
class Engine:
    """The engine that ran."""

    id: str
    model: str
    trained: bool
    backend: str
    stages: dict[str, str]  # SHA-256 of the files


@dataclass(frozen=True)
class Ceilings:
    """Rates of single products and copies: GFLOP/s, GB/s read and written."""

    matmul_gflops: tuple[float, ...]
    copy_gbs: tuple[float, ...]
    dtype: str = "float32"  # of the product


@dataclass(frozen=True)
class Work:
    """What one image costs in a stage."""

    calls: int  # for all images of a batch
    gflop: float  # of an image, counted from the graph
    intensity: float  # FLOP per byte at most: as if weights, inputs and outputs crossed the memory bus once a call


@dataclass(frozen=True)
class DeviceTimes:
    """Where a score's time goes on a GPU, in seconds per image: one value of each per compute sample.

    A device time is the time between two events on the stream; it includes any wait for the host in between. Nobody can
    look inside a CUDA graph, so stages, steps and `kernels` are measured on scores without graphs. Everything else is
    measured on normal scores, with graphs if they are wanted. Graphs hold no copies: those are the same in both.
    """

    upload: tuple[float, ...]
    kernels: tuple[float, ...]  # our own: noise, sampler, crops
    download: tuple[float, ...]
    busy: tuple[float, ...]  # time in which the stream had work, copies included
    wall: tuple[float, ...]  # time of the same scores by the clock
    enqueue: tuple[float, ...]  # the host's time in calls that launch and copy; see `launching`
    plain: tuple[float, ...]  # computing without graphs, in the same round; empty if no graphs are wanted
    enqueue_plain: tuple[float, ...]
    joules: tuple[float, ...]  # one per end-to-end sample; empty if nothing counts them
    buffers_mib: float  # peak of device memory besides the networks' weights
    graphs: int  # captured
    late_allocations: int  # of memory for computing, after the warm-up
    notes: tuple[str, ...]  # of the scores, on graphs and memory that they could not get
    computing: tuple[float, ...] = ()  # `busy` without copies; older files do not have it

    @property
    def launching(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """The host's time to launch with graphs, and without; empty if nothing is scored that way.

        Without graphs it may include waiting: a stream's queue holds about a thousand launches, and when it is full
        every launch waits for room. The host then seems to launch for as long as the GPU is busy.
        """
        return (self.enqueue, self.enqueue_plain) if self.plain and self.graphs else ((), self.enqueue)


@dataclass(frozen=True)
class Case:
    """One combination of image size, crops, steps, workers and batch, and its samples: seconds per image."""

    height: int
    width: int
    crops: int
    steps: int
    workers: int
    mode: str  # of restoration, as carried out
    images: tuple[str, ...]
    end_to_end: tuple[float, ...]  # from files to scores: one sample per round
    compute: tuple[float, ...]  # from pixels to scores: one sample per image (or batch) and round
    stages: dict[str, tuple[float, ...]]  # the part of each compute sample that a stage took; on a GPU, device time
    step_seconds: tuple[tuple[float, ...], ...]  # for each step, in the order run: its U-Net call in every sample
    work: dict[str, Work]  # by stage; empty if it could not be counted
    uncounted: str | None  # why
    batch: int = 1  # images that are restored together
    device: DeviceTimes | None = None  # on a GPU

    @property
    def name(self) -> str:
        """The case in words."""
        text = f"{self.width}×{self.height}, {plural(self.crops, 'crop')}, {plural(self.steps, 'step')}"
        text += f", batch {self.batch}" if self.batch > 1 else ""
        return text if self.workers == 1 else f"{text}, {self.workers} workers"

    # What follows is for cases that have samples: those in `Results.measured`.

    @cached_property
    def end_to_end_summary(self) -> Summary:
        """The summary of the end-to-end samples."""
        return summarise(self.end_to_end)

    @cached_property
    def compute_summary(self) -> Summary:
        """The summary of the compute-only samples."""
        return summarise(self.compute)

    @cached_property
    def stability(self) -> Stability:
        """How far the compute-only median can be trusted."""
        return judge(self.compute, DEVICE_CV_LIMIT if self.device else CV_LIMIT)

    @cached_property
    def whole(self) -> tuple[float, ...]:
        """The whole that the stages are parts of: a compute sample; on a GPU, all work for a score without graphs."""
        if not self.device:
            return self.compute
        d = self.device
        return tuple(map(math.fsum, zip(*self.stages.values(), d.upload, d.kernels, d.download, strict=True)))

    @cached_property
    def computing(self) -> tuple[float, ...]:
        """The time of a score without copies; on a GPU, its device time in a normal score."""
        if not self.device:
            return self.compute
        if self.device.computing:
            return self.device.computing
        moved = zip(self.whole, self.device.upload, self.device.download, strict=True)
        return tuple(whole - up - down for whole, up, down in moved)

    @property
    def outside(self) -> float:
        """The share of `whole` that no network took: noise, sampler, crops, sums; on a GPU copies too."""
        parts = zip(self.whole, zip(*self.stages.values(), strict=True), strict=True)
        shares: list[float] = [1 - sum(stages) / whole for whole, stages in parts]
        return statistics.median(shares)

    @property
    def idle(self) -> float | None:
        """The share of a score's time in which the GPU's stream had no work; gaps inside a graph are not seen."""
        if not self.device:
            return None
        return statistics.median(1 - a / b for a, b in zip(self.device.busy, self.device.wall, strict=True))

    @property
    def without_graph(self) -> float | None:
        """The time of computing without CUDA graphs, as a multiple of the time with them."""
        if not self.device or not self.device.plain:
            return None
        return statistics.median(a / b for a, b in zip(self.device.plain, self.compute, strict=True))

    @property
    def step_ms(self) -> float | None:
        """The median over samples of the mean step, in milliseconds."""
        samples = list(zip(*self.step_seconds, strict=True))
        return 1e3 * statistics.median(map(statistics.fmean, samples)) if samples else None

    def gflops(self, stage: str | None = None) -> float | None:
        """The rate of a stage, or of the whole score, at the median time; None if the work was not counted."""
        if not self.work:
            return None
        if stage is None:
            return sum(work.gflop for work in self.work.values()) / statistics.median(self.compute)
        return self.work[stage].gflop / max(statistics.median(self.stages[stage]), 1e-9)


@dataclass(frozen=True)
class Start:
    """One fresh process: the seconds of each part, in order."""

    interpreter: float
    imports: float
    check: float  # of the engine's files: sizes and hashes
    load: float
    first_score: float
    later_score: float
    peak_mib: float | None  # after the first score
    second_score: float | None = None  # on a GPU, where it captures the graphs


@dataclass(frozen=True)
class PeerCase:
    """One peer on one case: seconds per image from file to score, one sample per image and round."""

    case: str
    seconds: tuple[float, ...]
    drift: float | None  # mean difference of its scores from ours
    allowed: float | None  # what it may be


@dataclass(frozen=True)
class Peer:
    """What became of a peer."""

    name: str
    precision: str
    version: str | None
    problem: str | None  # why it is missing, how it failed or how it disagrees; None: its speed counts
    skipped: bool  # it cannot run here, which is no failure
    ready_seconds: float | None  # from the start of its process: imports, loading, compiling
    peak_mib: float | None
    cases: tuple[PeerCase, ...]


@dataclass(frozen=True)
class Soak:
    """Many images in a row: the seconds of each, and readings of resident memory."""

    seconds: tuple[float, ...]  # per image, a value for every batch
    resident_mib: tuple[float, ...]
    batch: int = 1

    @property
    def images(self) -> int:
        """How many they were."""
        return len(self.seconds) * self.batch

    @property
    def drift(self) -> float:
        """How much longer the later half took, as a share; of at least two values."""
        half = len(self.seconds) // 2
        return statistics.median(self.seconds[half:]) / statistics.median(self.seconds[:half]) - 1


@dataclass(frozen=True)
class Results:
    """Everything one benchmark found."""

    schema: int
    created: str  # UTC, ISO 8601
    options: dict[str, str]
    interrupted: bool
    machine: Machine
    load: Load
    engine: Engine
    ceilings: Ceilings
    cases: tuple[Case, ...]
    starts: tuple[Start, ...]
    peers: tuple[Peer, ...]
    soak: Soak | None
    overhead: float | None  # time that reading the clock takes, as a share of computing
    left_out: tuple[str, ...]  # images that could not be read
    not_measured: dict[str, str]  # figure → why
    gpu: Gpu | None = None

    @property
    def where(self) -> str:
        """What ran the networks."""
        return self.gpu.name if self.gpu else self.machine.cpu

    @property
    def peak_gflops(self) -> float | None:
        """The median rate of the matrix product."""
        return statistics.median(self.ceilings.matmul_gflops) if self.ceilings.matmul_gflops else None

    @property
    def peak_gbs(self) -> float | None:
        """The median rate of the copy."""
        return statistics.median(self.ceilings.copy_gbs) if self.ceilings.copy_gbs else None

    def mfu(self, gflops: float | None) -> float | None:
        """A rate as a share of the matrix product's."""
        return gflops / self.peak_gflops if gflops is not None and self.peak_gflops else None

    def sheet_mfu(self, gflops: float | None) -> float | None:
        """A rate as a share of what the GPU's data sheet promises in fp16, whatever the networks compute in."""
        sheet = self.gpu.sheet_tflops if self.gpu else None
        return gflops / (1e3 * sheet) if gflops is not None and sheet else None

    @property
    def roof(self) -> tuple[float, float] | None:
        """The most GFLOP/s and GB/s: as probed, else as the data sheet promises."""
        gflops = self.peak_gflops or (1e3 * self.gpu.sheet_tflops if self.gpu and self.gpu.sheet_tflops else None)
        gbs = self.peak_gbs or (self.gpu.sheet_gbs if self.gpu else None)
        return (gflops, gbs) if gflops and gbs else None

    @property
    def measured(self) -> tuple[Case, ...]:
        """The cases that have samples of both kinds; an interrupted run may have others."""
        return tuple(case for case in self.cases if case.compute and case.end_to_end)


def write(results: Results, path: Path) -> None:
    """Write the JSON file, whole or not at all, with a digest of the figures on top. Raises OutputError."""
    found = {"summary": _digest(results), **encode(results)}
    write_file(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def read(path: Path) -> Results:
    """Read a JSON file that `write` made. Raises UsageError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise UsageError(f"cannot read {path}: {first_line(exc)}") from exc
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
        raise UsageError(f"{path} is not what iqa-bench --json writes, or was written by another version")
    data.pop("summary", None)  # follows from the rest
    return decode(Results, {"schema": SCHEMA, **data}, path.name, UsageError)


def _device_digest(case: Case) -> dict[str, Any] | None:
    """Return the figures that trtexec shows, and those of graphs and energy; None for a case on the CPU."""
    d = case.device
    if not d:
        return None
    launching, launching_plain = d.launching
    kinds = {
        "h2d": d.upload,
        "compute": case.computing,
        "d2h": d.download,
        "enqueue": launching,
        "enqueue_without_graphs": launching_plain,
        "score_without_graphs": d.plain,
    }
    return {
        "ms": {name: encode(summarise([1e3 * s for s in samples])) for name, samples in kinds.items() if samples},
        "idle_share": case.idle,
        "time_without_graphs": case.without_graph,
        "joules_per_image": statistics.fmean(d.joules) if d.joules else None,
    }


def plural(count: int, noun: str) -> str:
    """Return `1 crop`, `2 crops`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _digest(results: Results) -> dict[str, Any]:
    """Return the main figures, for people who read the file without this program."""
    cases = []
    for case in results.measured:
        end_to_end, compute = case.end_to_end_summary, case.compute_summary
        cases.append(
            {
                "case": case.name,
                "images_per_second": 1 / end_to_end.median,
                "crops_per_second": case.crops / end_to_end.median,
                "end_to_end_seconds": encode(end_to_end),
                "compute_seconds": encode(compute),
                "ms_per_step": case.step_ms,
                "gflops": case.gflops(),
                "mfu": results.mfu(case.gflops()),
                "mfu_of_data_sheet": results.sheet_mfu(case.gflops()),
                "share_outside_networks": case.outside,
                "gpu": _device_digest(case),
                "stages": {
                    name: {
                        "ms": encode(summarise([1e3 * s for s in seconds])),
                        "gflops": case.gflops(name),
                        "mfu": results.mfu(case.gflops(name)),
                    }
                    for name, seconds in case.stages.items()
                },
                "stability": encode(case.stability),
            }
        )
    ceilings = {"matmul_gflops": results.peak_gflops, "copy_gbs": results.peak_gbs}
    return {"ceilings": ceilings, "cases": cases}
