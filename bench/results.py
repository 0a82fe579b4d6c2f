"""What a benchmark found: raw samples as plain data, the figures that follow from them, and its JSON file."""

import json
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import OutputError, UsageError, first_line
from ..runtime.atomic import replacing
from ..runtime.codec import decode, encode
from .stats import Stability, Summary, judge, summarise

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
    """What else the machine did while our pipeline was measured; None where the system does not say."""

    load_before: float | None
    load_after: float | None
    others: float | None  # CPU time that was not ours, hypervisor's included, as a share of all there was
    throttled: int | None  # events of thermal limits and of the cgroup's quota


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
    """Rates of single products and copies: GFLOP/s in float32, GB/s read and written."""

    matmul_gflops: tuple[float, ...]
    copy_gbs: tuple[float, ...]


@dataclass(frozen=True)
class Work:
    """What one image costs in a stage."""

    calls: int
    gflop: float  # of all calls, counted from the graph
    intensity: float  # FLOP per byte if weights, inputs and outputs cross the memory bus once a call: at most this


@dataclass(frozen=True)
class Case:
    """One combination of image size, crops, steps and workers, and its samples: seconds per image."""

    height: int
    width: int
    crops: int
    steps: int
    workers: int
    mode: str  # of restoration, as carried out
    images: tuple[str, ...]
    end_to_end: tuple[float, ...]  # files in, scores out: one sample per round
    compute: tuple[float, ...]  # pixels in, score out: one per image and round
    stages: dict[str, tuple[float, ...]]  # the part of each compute sample that a stage took
    step_seconds: tuple[tuple[float, ...], ...]  # by step in the order run: a U-Net call, one per compute sample
    work: dict[str, Work]  # by stage; empty where it could not be counted
    uncounted: str | None  # why

    @property
    def name(self) -> str:
        """The case in words."""
        text = f"{self.width}×{self.height}, {plural(self.crops, 'crop')}, {plural(self.steps, 'step')}"
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
        return judge(self.compute)

    @property
    def outside(self) -> float:
        """The share of compute time that no network took: noise, sampler, crops, sums."""
        parts = zip(self.compute, zip(*self.stages.values(), strict=True), strict=True)
        shares: list[float] = [1 - sum(stages) / whole for whole, stages in parts]
        return statistics.median(shares)

    @property
    def step_ms(self) -> float | None:
        """The median over samples of the mean step, in milliseconds."""
        samples = list(zip(*self.step_seconds, strict=True))
        return 1e3 * statistics.median(map(statistics.fmean, samples)) if samples else None

    def gflops(self, stage: str | None = None) -> float | None:
        """The rate of a stage, or of the whole score, at the median time; None where work was not counted."""
        if not self.work:
            return None
        if stage is None:
            return sum(work.gflop for work in self.work.values()) / statistics.median(self.compute)
        return self.work[stage].gflop / max(statistics.median(self.stages[stage]), 1e-9)


@dataclass(frozen=True)
class Start:
    """One fresh process, in seconds: each part after the one before."""

    interpreter: float
    imports: float
    check: float  # of the engine's files: sizes and hashes
    load: float
    first_score: float
    later_score: float
    peak_mib: float | None  # after the first score


@dataclass(frozen=True)
class PeerCase:
    """One peer on one case: seconds per image, files in and scores out; one sample per image and round."""

    case: str
    seconds: tuple[float, ...]
    drift: float | None  # largest difference of its scores from ours
    allowed: float | None  # what it may be


@dataclass(frozen=True)
class Peer:
    """What became of a peer."""

    name: str
    precision: str
    version: str | None
    problem: str | None  # why it is missing, how it failed, or how it disagrees; None if its speed counts
    skipped: bool  # not here, which is no failure
    ready_seconds: float | None  # from the start of its process: imports, loading, compiling
    peak_mib: float | None
    cases: tuple[PeerCase, ...]


@dataclass(frozen=True)
class Soak:
    """Many images in a row: seconds each, and resident memory now and then."""

    seconds: tuple[float, ...]
    resident_mib: tuple[float, ...]


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
    overhead: float | None  # of the benchmark's own clocks, as a share of compute time
    left_out: tuple[str, ...]  # images that could not be read
    not_measured: dict[str, str]  # figure → why

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

    @property
    def measured(self) -> tuple[Case, ...]:
        """The cases that have samples of both kinds: an interrupted run may have others."""
        return tuple(case for case in self.cases if case.compute and case.end_to_end)


def write(results: Results, path: Path) -> None:
    """Write the JSON file, whole or not at all, with a digest of the figures on top. Raises OutputError."""
    text = json.dumps({"summary": _digest(results), **encode(results)}, indent=1, ensure_ascii=False) + "\n"
    try:
        with replacing(path) as stream:
            stream.write(text.encode())
    except OSError as exc:
        raise OutputError(f"cannot write {path}: {exc.strerror or exc}") from exc


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


def plural(count: int, noun: str) -> str:
    """Return `1 crop`, `2 crops`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _digest(results: Results) -> dict[str, Any]:
    """Return the figures people look for, for those who read the file without this program."""
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
                "share_outside_networks": case.outside,
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
