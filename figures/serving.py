"""What `iqa-serve` costs beside the bare scorer, what ten times more than it can hold does to it, and what a fuzzer.

    python figures/serving.py cost --engine out/engine [--query 'crops=1'] [--seconds 20] [--rounds 3]
    python figures/serving.py flood --engine out/engine [--query 'crops=1'] [--seconds 60]
    python figures/serving.py schema --engine out/engine --schemathesis FILE [--examples 60]

Each writes results/serving-WHAT.json, `cost` serving-cost-MODEL.json. `cost`: bare scoring and service alternate within
a round, each in its own process, on the same picture with as many threads; clients keep their connections. `flood`: ten
clients for each place in the queue. `schema`: the program schemathesis makes requests from the service's own OpenAPI.
"""

import argparse
import asyncio
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image
from record import run_apart, write

from diffiqa.engine.manifest import read_manifest
from diffiqa.runtime.images import synthetic

CLIENTS = (1, 8, 64)
QUEUE = 64
BARE = """
import sys, time, diffiqa
engine, picture, seconds, threads, *options = sys.argv[1:]
options = dict(pair.split("=") for pair in options)
options = diffiqa.Options(**{k: int(v) if v.isdigit() else v for k, v in options.items()})
data = open(picture, "rb").read()
with diffiqa.load(engine, diffiqa.OnnxRuntime(threads=int(threads))) as scorer:
    scorer.score(data, options)
    start, count, busy = time.perf_counter(), 0, time.process_time()
    while time.perf_counter() - start < float(seconds):
        print(scorer.score(data, options).score.hex())
        count += 1
    print((time.process_time() - busy) / count, count / (time.perf_counter() - start))
"""


class Service:
    """A running `iqa-serve`."""

    def __init__(self, engine: Path, threads: int, *more: str) -> None:
        command = [sys.executable, "-m", "diffiqa.cli", "serve", "--engine", str(engine), "--port", "0"]
        command += ["--threads", str(threads), "--queue", str(QUEUE), "--seconds", "600", *more]
        start = time.perf_counter()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr
        lines = iter(self.process.stderr.readline, "")
        self.port = next(int(found[1]) for line in lines if (found := re.search(r"ready at .*:(\d+)", line)))
        self.start_seconds = time.perf_counter() - start

    def resident_mib(self) -> float:
        """Memory of the process now."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        found = re.search(r"VmRSS:\s+(\d+) kB", text)
        assert found
        return int(found[1]) / 1024

    def cpu_seconds(self) -> float:
        """CPU time of the process so far: unlike a clock's, it says little of what else runs here."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def load(self, path: str, body: bytes, clients: int, seconds: float) -> dict[str, Any]:
        """Put a load on it, and say what it cost: CPU time, and the most memory in either half of the time."""
        peaks, over, begun = [0.0, 0.0], threading.Event(), time.monotonic()

        def watch() -> None:
            while not over.wait(0.5):
                half = int(time.monotonic() - begun > seconds / 2)
                peaks[half] = max(peaks[half], self.resident_mib())

        watching = threading.Thread(target=watch)
        watching.start()
        busy = self.cpu_seconds()
        found = load(self.port, path, body, clients, seconds)
        found["cpu_ms_a_score"] = (self.cpu_seconds() - busy) / found["answers"]["200"] * 1000
        over.set()
        watching.join()
        return found | {"most_mib_by_half": peaks}

    def end(self) -> int:
        """Tell it to end, and return its exit code."""
        self.process.terminate()
        return self.process.wait(120)


def load(port: int, path: str, body: bytes, clients: int, seconds: float) -> dict[str, Any]:
    """Have so many clients ask for so long, each again once it is answered; after a 503 a tenth of a second later."""
    request = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    taken: list[float] = []
    answers: Counter[int | str] = Counter()
    scores: set[bytes] = set()
    start = time.perf_counter()

    async def client() -> None:
        streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        while (begun := time.perf_counter()) - start < seconds:
            status: int | str
            try:
                async with asyncio.timeout(600):
                    reader, writer = streams = streams or await asyncio.open_connection("127.0.0.1", port)
                    writer.write(request)
                    head = (await reader.readuntil(b"\r\n\r\n")).lower()
                    data = await reader.readexactly(int(head.partition(b"content-length: ")[2].split()[0]))
                status, lost = int(head[9:12]), b"connection: close" in head
            except (OSError, EOFError) as exc:
                status, lost = type(exc).__name__, True
            answers[status] += 1
            if status == 200:
                taken.append(time.perf_counter() - begun)
                scores.update(re.findall(rb'"score": ([^,]+)', data))
            else:
                await asyncio.sleep(0.1)
            if lost and streams:
                streams[1].close()
                streams = None
        if streams:
            streams[1].close()

    async def every_client() -> None:
        await asyncio.gather(*(client() for _ in range(clients)))

    # One thread, and few calls for each answer: it takes time from the service that it measures.
    asyncio.run(every_client())
    wall = time.perf_counter() - start
    percent = statistics.quantiles(taken, n=100, method="inclusive") if len(taken) > 1 else [0.0] * 99
    return {
        "clients": clients,
        "answers": {str(status): count for status, count in answers.items()},
        "scored_a_second": len(taken) / wall,
        "p50_ms": percent[49] * 1000,
        "p95_ms": percent[94] * 1000,
        "p99_ms": percent[98] * 1000,
        "scores": sorted(float(score).hex() for score in scores),
    }


def picture_of(side: int) -> bytes:
    """Return a picture as a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(synthetic(0, side, side)).save(stream, "PNG")
    return stream.getvalue()


def cost(given: argparse.Namespace) -> dict[str, Any]:
    """Measure what the service costs beside the bare scorer."""
    body, path = picture_of(given.side), f"/score?{given.query}"
    picture = Path("/tmp") / f"serving-{given.side}.png"  # noqa: S108 — for the other process
    picture.write_bytes(body)
    options = [f"{name}={value}" for name, value in parse_qsl(given.query)]
    bare, rounds = [], []
    everything: set[str] = set()
    for _ in range(given.rounds):
        *scores, busy, rate = run_apart(BARE, given.engine, picture, str(given.seconds), str(given.threads), *options)
        bare.append({"scored_a_second": float(rate), "cpu_ms_a_score": float(busy) * 1000})
        everything.update(scores)
        service = Service(given.engine, given.threads, "--quiet")
        found = [service.load(path, body, clients, given.seconds) for clients in CLIENTS]
        for cell in found:
            everything.update(cell.pop("scores"))
        rounds.append({"start_seconds": service.start_seconds, "load": found})
        assert service.end() == 0
    assert len(everything) == 1, "the service and the bare scorer gave different scores"
    beside = {
        f"{what}, {clients} clients": statistics.median(
            sign * (one["load"][place][what] / alone[what] - 1) for one, alone in zip(rounds, bare, strict=True)
        )
        for place, clients in enumerate(CLIENTS)
        for what, sign in (("scored_a_second", -1), ("cpu_ms_a_score", 1))
    }
    return {"how": how(given), "cost_beside_bare": beside, "bare": bare, "rounds": rounds}


def flood(given: argparse.Namespace) -> dict[str, Any]:
    """Have ten clients for each place in the queue ask at once."""
    service = Service(given.engine, given.threads, "--quiet")
    found = service.load(f"/score?{given.query}", picture_of(given.side), 10 * QUEUE, given.seconds)
    assert len(found.pop("scores")) == 1, "one picture got different scores"
    assert service.end() == 0
    return {"how": how(given), "start_seconds": service.start_seconds, "queue": QUEUE, **found}


def schema(given: argparse.Namespace) -> dict[str, Any]:
    """Have schemathesis make requests from the description, and count the service's own log of them."""
    service = Service(given.engine, given.threads)
    log: list[str] = []
    reading = threading.Thread(target=lambda: log.extend(service.process.stderr or ()))
    reading.start()
    address = f"http://127.0.0.1:{service.port}/openapi.json"
    # Where options exclude one another, what fits the schema can be refused.
    rules = ["--exclude-checks", "positive_data_acceptance", "--suppress-health-check", "too_slow"]
    rules += ["--max-examples", str(given.examples), "--request-timeout", "60", "--seed", "22"]
    command = [Path(shutil.which(given.schemathesis) or given.schemathesis).absolute(), "run", address, *rules]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # it keeps things where it runs
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=folder
        )
    seconds = time.perf_counter() - start
    assert service.end() == 0
    reading.join()
    answers = Counter(str(json.loads(line)["status"]) for line in log if line.startswith("{"))
    if done.returncode:
        sys.exit(done.stdout)
    faults = sum(count for status, count in answers.items() if status.startswith("5") and status != "503")
    return {"how": how(given), "seconds": seconds, "answers": answers, "faults": faults, "hangs": answers["499"]}


def how(given: argparse.Namespace) -> dict[str, Any]:
    """Return what a run was asked for."""
    return {"engine": given.engine.name} | {name: getattr(given, name) for name in ("query", "side", "threads")}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["cost", "flood", "schema"])
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--query", default="crops=1")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--schemathesis", default="schemathesis")
    parser.add_argument("--examples", type=int, default=60)
    given = parser.parse_args()
    name = f"serving-cost-{read_manifest(given.engine).model_name}" if given.what == "cost" else f"serving-{given.what}"
    write(name, {"cost": cost, "flood": flood, "schema": schema}[given.what](given))


if __name__ == "__main__":
    main()
