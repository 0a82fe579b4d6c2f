"""Shards: what they cost, how they grow, and what is left of them after kills.

    python figures/shards.py growth
    python figures/shards.py driver
    python figures/shards.py requests
    python figures/shards.py kills [--engine engine/]
    python figures/shards.py overhead --engine engine/ [--ray]

`growth` (results/shards-growth.json) scores made-up names with a stub that takes no time, in two processes, and plans
and merges many more of them. `driver` (results/shards-driver.json) gives out the shards of even more names to a
thousand workers that answer at once. `requests` (results/shards-requests.json) counts what is asked of a bucket; it
needs s3fs and moto[server]. `kills` (results/shards-kills-….json) kills workers and driver at random, and compares the
files with those of a run that nobody disturbed. `overhead` (results/shards-overhead-MODEL.json) runs `iqa-run` in turn
without shards, with them and one worker, and with that worker on Ray; every other round in the opposite order.
"""

import argparse
import collections
import contextlib
import hashlib
import itertools
import json
import logging
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image
from record import write

from diffiqa.engine.codec import encode
from diffiqa.engine.manifest import read_manifest
from diffiqa.shards.api import MANIFEST, carry_out, manifest_of, read_scores, status
from diffiqa.shards.driver import Answer, Driver, Ready
from diffiqa.shards.part import Form, Shard, Side, file_of, side_of
from diffiqa.shards.plan import NAMES, VERSION, Entry, Names, Plan, cut, write_plan
from diffiqa.shards.processes import Processes
from diffiqa.shards.sources import entries
from diffiqa.shards.store import Folder, file_system, open_store
from diffiqa.tests.shards.kills import kill_at_random, results
from diffiqa.tests.shards.stub import SETTINGS, Inline, work_in

SCORED = 20_000


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("growth")
    command.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    command.set_defaults(measure=growth)
    command = commands.add_parser("driver")
    command.add_argument("--counts", type=int, nargs="+", default=[10**6, 10**7, 10**8])
    command.set_defaults(measure=drive)
    commands.add_parser("requests").set_defaults(measure=requests)
    command = commands.add_parser("step")
    command.add_argument("step")
    command.add_argument("count", type=int)
    command.add_argument("folder", type=Path)
    command.set_defaults(measure=measure_step)
    command = commands.add_parser("kills")
    command.add_argument("--engine", type=Path, help="default: a stub")
    command.set_defaults(measure=kills)
    command = commands.add_parser("overhead")
    command.add_argument("--engine", type=Path, required=True)
    command.add_argument("--images", type=int, default=150)
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--ray", action="store_true", help="on Ray too, on a cluster that is started before")
    command.set_defaults(measure=overhead)
    given = parser.parse_args()
    given.measure(given)


def growth(given: argparse.Namespace) -> None:
    """Score some names; plan, merge and read more and more."""
    found = []
    for count in given.counts:
        found.append(_measured(count, "run", "plan", "merge", "read"))
        write("shards-growth", {"shard_size": 1000, "workers": 2, "scored": SCORED, "growth": found})


def drive(given: argparse.Namespace) -> None:
    """Give out the shards of more and more names."""
    found = [_measured(count, "drive") for count in given.counts]
    write("shards-driver", {"shard_size": 1000, "workers": Instant.slots, "growth": found})


def _measured(count: int, *steps: str) -> dict[str, float]:
    """Take each step in a process of its own, whose memory is then known."""
    row = {"names": float(count)}
    with tempfile.TemporaryDirectory() as folder:
        for step in steps:
            command = [sys.executable, __file__, "step", step, str(count), folder]
            words = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
            row |= {f"{step}_{key}": float(value) for key, _, value in (word.partition("=") for word in words)}
    return row


def measure_step(given: argparse.Namespace) -> None:
    """Do one step and print its seconds, of a clock and of CPUs, and its memory."""
    sample, out = given.folder / "sample", given.folder / "out"
    start = time.perf_counter()
    if given.step == "run":
        work = work_in(sample)
        carry_out(work, _names(SCORED), Processes(work, 2), shard_size=1000)
    elif given.step == "plan":
        _plan_with_shards(out, given.count, (sample / "part-000000.jsonl").read_bytes())
    elif given.step == "drive":
        _give_out(out, given.count)
    elif given.step == "merge":  # with planning, as the names are compared
        work = work_in(out)
        assert carry_out(work, _names(given.count), Inline(work), shard_size=1000).records == given.count
    else:
        assert sum(1 for _ in itertools.islice(read_scores(out), 10_000)) == 10_000
    seconds = time.perf_counter() - start
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(part.ru_utime + part.ru_stime for part in (own, children))
    print(f"seconds={seconds:.2f} cpu_seconds={cpu:.2f} mb={own.ru_maxrss / 1024:.1f}")
    if given.step == "run":
        print(f"worker_mb={children.ru_maxrss / 1024:.1f}")


def _plan_with_shards(out: Path, count: int, data: bytes) -> None:
    """Plan so many names, and put copies of one shard in place of all: whoever merges looks at bytes, not at names."""
    out.mkdir()
    store = Folder(out)
    with store.scratch() as scratch:
        names, file = cut(_names(count), 1000, scratch)
        store.take(NAMES, file)
    plan = Plan(VERSION, SETTINGS.engine, str(SETTINGS), None, Form.JSONL, "stub 1", names)
    write_plan(store, plan)
    digest = hashlib.sha256(data).hexdigest()
    for index in range(names.shards):
        shard = Shard(file_of(index, 0, Form.JSONL), digest, names.in_shard(index), 0)
        (out / shard.file).write_bytes(data)
        side = Side(shard, plan.digest, "host", "stub 1", 1.0, 0.0)
        (out / side_of(shard.file)).write_text(json.dumps(encode(side)))


class Instant:
    """A crew of many workers. Each answers at once, and its answer comes alone, which costs the driver most."""

    slots = 1000

    def __init__(self) -> None:
        self._answers: collections.deque[tuple[int, Answer]] = collections.deque()

    def start(self, slot: int) -> None:
        """Have a worker in a slot."""
        self._answers.append((slot, Ready("stub 1")))

    def ask(self, slot: int, method: str, *arguments: Any) -> None:
        """Do a shard."""
        assert method == "shard"
        index, attempt, _ = arguments
        self._answers.append((slot, Shard(file_of(index, attempt, Form.JSONL), f"{index:064x}", 1000, 0)))

    def answers(self, _seconds: float) -> list[tuple[int, Answer]]:
        """Return the next answer."""
        return [self._answers.popleft()]

    def stop(self) -> None:
        """There is nothing to end."""


def _give_out(out: Path, count: int) -> None:
    """Write the plan of so many names, of which there are none, have all shards done, and write the manifest."""
    out.mkdir()
    store, shards = Folder(out), count // 1000
    names = Names(count, 0, 1000, "", tuple(range(0, 60_000 * (shards + 1), 60_000)))
    plan = Plan(VERSION, SETTINGS.engine, str(SETTINGS), None, Form.JSONL, "stub 1", names)
    write_plan(store, plan)
    driver = Driver(store, Instant(), watch=lambda _: None)
    driver.start()
    driver.run(plan, {}, {}, retry_failed=False)
    store.write(MANIFEST, json.dumps(encode(manifest_of(plan, driver.shards))).encode())
    assert status(out).done == count


def requests(_: argparse.Namespace) -> None:
    """Count what a run asks of a bucket, for few images and for many, in few shards and in many."""
    from moto.server import ThreadedMotoServer

    seen: collections.Counter[str] = collections.Counter()
    handler = logging.Handler()
    handler.emit = lambda record: seen.update(re.findall(r"([A-Z]+) /", record.getMessage()))  # type: ignore[method-assign]
    logging.getLogger("werkzeug").addHandler(handler)
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*server.get_host_and_port())
    os.environ |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    bucket, _ = file_system("s3://bucket")
    bucket.mkdir("bucket")
    found = []
    for images, shard_size in ((20, 20), (40, 40), (40, 4)):
        for number in range(images):
            bucket.pipe_file(f"bucket/{images}/{number}.png", b"image")
        seen.clear()
        work = work_in(open_store(f"s3://bucket/out-{images}-{shard_size}"))
        carry_out(work, entries([f"s3://bucket/{images}/"]), Inline(work), shard_size=shard_size)
        found.append({"images": images, "shards": images // shard_size, **dict(sorted(seen.items()))})
    server.stop()
    write("shards-requests", {"runs": found})


def _names(count: int) -> Iterator[Entry]:
    return (Entry(f"/data/photographs/{number // 1000:06}/{number:09}.jpg") for number in range(count))


def kills(given: argparse.Namespace) -> None:
    """Compare a run that was killed with one that was not: of an engine, or of the stub."""
    name, seconds = ("engine", 3.0) if given.engine else ("stub", 9.0)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed, photos = Path(folder, "whole"), Path(folder, "killed"), Path(folder, "photos")
        if given.engine:
            _draw(photos, 2000)
        rest = ["--engine", str(given.engine), str(photos)] if given.engine else ["2000", "0.01"]
        kill_at_random([whole, *rest], 0, 1, seed=0)
        start = time.perf_counter()
        hit = kill_at_random([killed, *rest], 50, seconds, seed=7)
        images = sum(1 for _ in read_scores(killed))
        found = {"images": images, **hit, "seconds": time.perf_counter() - start}
        write(f"shards-kills-{name}", {**found, "same_files": results(whole) == results(killed)})


def overhead(given: argparse.Namespace) -> None:
    """Run in turn without shards, with them, and on Ray: few images, which tell what a start costs, and many."""
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        counts, place = (1, given.images), Path(folder)
        for count in counts:
            _draw(place / str(count), count)
        ways = {"plain": ["-o"], "shards": ["--shards"]}
        if given.ray:
            import ray

            about = ray.init(include_dashboard=False, num_cpus=2, object_store_memory=100 * 2**20)
            stack.callback(ray.shutdown)
            ways["ray"] = ["--ray", about.address_info["gcs_address"], "--shards"]
        command = ["-m", "diffiqa.cli", "run", "--engine", given.engine, "-q", "--threads", "1"]
        command = [sys.executable, *command, "--backend", "onnxruntime", "--no-self-test"]
        for number in range(given.rounds):
            # Whoever comes second may find a warmer machine.
            order = list(ways.items())[:: -1 if number % 2 else 1]
            for (way, more), count in itertools.product(order, counts):
                start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run(
                    [*command, place / str(count), *more, place / f"{number}-{way}-{count}.jsonl"], check=True
                )
                seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                row = found.setdefault(way, {})
                row.setdefault(f"seconds_{count}", []).append(seconds)
                row.setdefault(f"cpu_seconds_{count}", []).append(cpu)
    # On Ray most of the work is done by processes that are not ours: their CPU time is not known here.
    ratios = {
        f"{way}_beside_plain_{clock}": {
            "whole_run": _ratios(found[way][f"{clock}_{counts[1]}"], found["plain"][f"{clock}_{counts[1]}"]),
            "without_start": _ratios(*(_slope(found[one], clock, counts) for one in (way, "plain"))),
        }
        for way, clock in itertools.product(list(ways)[1:], ("seconds", "cpu_seconds"))
        if (way, clock) != ("ray", "cpu_seconds")
    }
    name = f"shards-overhead-{read_manifest(given.engine).model_name}"
    write(name, {"images": given.images, "rounds": given.rounds, "ratios_by_round": ratios, "samples": found})


def _ratios(ours: list[float], plain: list[float]) -> list[float]:
    return [one / other for one, other in zip(ours, plain, strict=True)]


def _slope(row: dict[str, list[float]], clock: str, counts: tuple[int, int]) -> list[float]:
    """Return the time of all images but the few, by round."""
    few, many = (row[f"{clock}_{count}"] for count in counts)
    return [more - less for more, less in zip(many, few, strict=True)]


def _draw(folder: Path, count: int) -> None:
    """Write so many pictures."""
    from diffiqa.tests.tiny import photo  # it imports torch, which would count as memory of a step

    folder.mkdir()
    for number in range(count):
        Image.fromarray(photo(number, 240, 320)).save(folder / f"{number}.png")


if __name__ == "__main__":
    main()
