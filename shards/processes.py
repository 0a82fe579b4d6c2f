"""Workers as processes of this machine: one for each GPU, or each with its share of the CPUs."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..errors import DiffiqaError
from .driver import Answer, Died, Ready
from .worker import Work, Worker

_TELL_EVERY = 16  # images
_spawn = multiprocessing.get_context("spawn")  # a fork would copy whatever threads and GPU this process has


def gpus() -> list[str]:
    """Return the NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in given.split(",") if name and name != "-1"]
    folder = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number, _ in enumerate(folder.iterdir())] if folder.is_dir() else []


class Processes:
    """A crew on this machine."""

    def __init__(self, work: Work, slots: int) -> None:
        self.slots, self._work = slots, work
        self._workers: dict[int, tuple[Any, Connection]] = {}

    def start(self, slot: int) -> None:
        """Start a process."""
        ours, its = _spawn.Pipe()
        arguments = self._work, its, *_share(slot, self.slots)
        process = _spawn.Process(target=_serve, args=arguments, name=f"diffiqa-worker-{slot}", daemon=True)
        process.start()
        its.close()
        self._workers[slot] = process, ours

    def ask(self, slot: int, method: str, *arguments: Any) -> None:
        """Send a call. If the process is gone, its answer will be Died."""
        with contextlib.suppress(OSError):
            self._workers[slot][1].send((method, arguments))

    def answers(self, seconds: float) -> Iterable[tuple[int, Answer]]:
        """Return what has come through the pipes."""
        slots = {id(connection): slot for slot, (_, connection) in self._workers.items()}
        ready = wait([connection for _, connection in self._workers.values()], seconds)
        return [(slot, self._answer(slot)) for slot in (slots[id(connection)] for connection in ready)]

    def stop(self) -> None:
        """Kill the processes: what they have not committed is to be done again anyway."""
        for slot in list(self._workers):
            self._end(slot)

    def _answer(self, slot: int) -> Answer:
        try:
            answer: Answer = self._workers[slot][1].recv()
        except (EOFError, OSError):
            self._end(slot)
            return Died()
        return answer

    def _end(self, slot: int) -> None:
        process, connection = self._workers.pop(slot)
        process.kill()
        process.join()
        process.close()
        connection.close()


def _share(slot: int, slots: int) -> tuple[Mapping[str, str], set[int]]:
    """Return a worker's part of the machine: its environment, and its CPUs (none: all)."""
    if slots == 1:
        return {}, set()
    found = gpus()
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    mine = cpus[slot * len(cpus) // slots : (slot + 1) * len(cpus) // slots]
    return {"CUDA_VISIBLE_DEVICES": found[slot % len(found)]} if found else {}, set(mine)


def _serve(work: Work, connection: Connection, environment: Mapping[str, str], cpus: set[int]) -> None:
    """Answer calls until the driver is gone. An error that is none of ours ends the process: it counts as a death."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the driver, which ends us
    threading.Thread(target=_end_with_driver, daemon=True).start()
    os.environ.update(environment)
    if cpus:
        os.sched_setaffinity(0, cpus)

    def tell(done: int) -> None:
        if done % _TELL_EVERY == 0:
            connection.send(done)

    with contextlib.suppress(EOFError, BrokenPipeError):
        try:
            worker = Worker(work, tell)
            connection.send(Ready(worker.backend))
        except DiffiqaError as exc:
            connection.send(exc)
            return
        while True:
            method, arguments = connection.recv()
            try:
                answer = getattr(worker, method)(*arguments)
            except DiffiqaError as exc:
                answer = exc
            connection.send(answer)


def _end_with_driver() -> None:
    if driver := multiprocessing.parent_process():
        wait([driver.sentinel])
        os._exit(1)
