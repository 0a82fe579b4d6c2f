"""Shards: what they cost, how they grow, and what is left of them after kills.

    python figures/shards.py growth
    python figures/shards.py kills --engine engine/ --photos photos/

`growth` (results/shards-growth.json) plans and scores made-up names with a stub that takes no time, in two processes;
the largest count is only planned. `kills` (results/shards-kills.json) kills workers and driver at random, and compares
the files with those of a run that nobody disturbed.
"""

import argparse
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from record import write

from diffiqa.shards.api import carry_out, read_scores
from diffiqa.shards.plan import Entry, cut
from diffiqa.shards.processes import Processes
from diffiqa.tests.shards.kills import kill_at_random, results
from diffiqa.tests.shards.stub import Inline, work_in

COUNTS = (50_000, 250_000, 1_000_000)
PLANNED_ONLY = (1_000_000, 10_000_000)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("growth").set_defaults(measure=growth)
    one = commands.add_parser("one")  # in a process of its own, whose memory is then known
    one.add_argument("kind", choices=["plan", "run"])
    one.add_argument("count", type=int)
    one.set_defaults(measure=measure_one)
    command = commands.add_parser("kills")
    command.add_argument("--engine", type=Path, required=True)
    command.add_argument("--photos", type=Path, required=True)
    command.set_defaults(measure=kills)
    given = parser.parse_args()
    given.measure(given)


def growth(_: argparse.Namespace) -> None:
    """Run and plan more and more names, each count in a process of its own."""

    def apart(kind: str, count: int) -> dict[str, Any]:
        command = [sys.executable, __file__, "one", kind, str(count)]
        words = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
        return {"names": count, **{key: float(value) for key, _, value in (word.partition("=") for word in words)}}

    runs = [apart("run", count) for count in COUNTS]
    plans = [apart("plan", count) for count in PLANNED_ONLY]
    write("shards-growth", {"shard_size": 1000, "workers": 2, "runs": runs, "plans": plans})


def measure_one(given: argparse.Namespace) -> None:
    """Print seconds, of a clock and of CPUs, and memory of one count."""
    found: dict[str, float] = {}

    def timed(what: str, call: Callable[[], Any]) -> None:
        start = time.perf_counter(), _cpu()
        call()
        found[f"{what}_seconds"], found[f"{what}_cpu_seconds"] = time.perf_counter() - start[0], _cpu() - start[1]

    with tempfile.TemporaryDirectory() as name:
        folder, out = Path(name), Path(name) / "out"
        work = work_in(out)
        if given.kind == "plan":
            timed("plan", lambda: cut(_names(given.count), 1000, folder))
        else:
            timed("run", lambda: carry_out(work, _names(given.count), Processes(work, 2), shard_size=1000))
            (out / "manifest.json").unlink()
            timed("plan_and_merge", lambda: carry_out(work, _names(given.count), Inline(work), shard_size=1000))
            timed("read_50000", lambda: sum(1 for _ in itertools.islice(read_scores(out), 50_000)))
            found["worker_peak_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        found["driver_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(*(f"{key}={value:.3f}" for key, value in found.items()))


def _cpu() -> float:
    """Return the seconds that this process and its children computed."""
    parts = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in parts)


def _names(count: int) -> Iterator[Entry]:
    return (Entry(f"/data/photographs/{number // 1000:06}/{number:09}.jpg") for number in range(count))


def kills(given: argparse.Namespace) -> None:
    """Compare runs that were killed with runs that were not: of the stub, and of an engine."""
    found = {}
    for name, count, seconds, number, longest, more in [
        ("stub", 2000, 0.01, 50, 12.0, []),
        ("engine", 0, 0, 10, 12.0, [given.engine, given.photos]),
    ]:
        with tempfile.TemporaryDirectory() as folder:
            whole, killed = Path(folder, "whole"), Path(folder, "killed")
            rest = [str(count), str(seconds), *map(str, more)]
            kill_at_random([whole, *rest], 0, 1, seed=0)
            start = time.perf_counter()
            hit = kill_at_random([killed, *rest], number, longest, seed=7)
            images = sum(1 for _ in read_scores(killed))
            same = results(whole) == results(killed)
            found[name] = {"images": images, **hit, "seconds": time.perf_counter() - start, "same_files": same}
    write("shards-kills", found)


if __name__ == "__main__":
    main()
