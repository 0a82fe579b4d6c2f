"""Workers as Ray actors; and `diffiqa.ray.Scorer`, for pipelines of your own in Ray Data.

Ray places workers and tells which are gone. It carries numbers of shards and what a shard came to, never pixels.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, DiffiqaError, ImageError, UsageError, first_line
from ..runtime.backends import Backend
from ..runtime.images import Source
from ..runtime.results import Options, Score
from ..runtime.scorer import load
from .driver import Answer, Died, Ready
from .plan import Entry
from .sources import read
from .worker import Work, Worker, score_each

Array = npt.NDArray[Any]


class Scorer:
    """A column of images becomes columns of scores.

        dataset.map_batches(diffiqa.ray.Scorer, fn_constructor_args=("engine/",), compute=…, num_gpus=1)

    The column has names, bytes or arrays (height, width, channels). The batch that is returned has `score`, `vcg` and
    `vda` too, NaN where there is none, the `digest` of the pixels, and an `error`, empty where there is none.
    """

    def __init__(
        self,
        engine: str | Path,
        backend: Backend | Sequence[Backend] | None = None,
        *,
        column: str = "image",
        options: Options | None = None,
    ) -> None:
        self._column, self._options = column, options or Options()
        self._scorer = load(engine, backend)

    def __call__(self, batch: dict[str, Array]) -> dict[str, Array]:
        """Score a batch of rows."""
        results = score_each(self._scorer, map(_source, batch[self._column]), self._options)
        scores = [result if isinstance(result, Score) else None for result in results]
        numbers = {
            name: np.array([getattr(score, name, None) for score in scores], np.float64)  # None becomes NaN
            for name in ("score", "vcg", "vda")
        }
        texts = {
            "digest": np.array([score.digest if score else "" for score in scores], object),
            "error": np.array([getattr(result, "error", "") for result in results], object),
        }
        return {**batch, **numbers, **texts}


def _source(value: Any) -> Source | ImageError:
    try:
        return read(Entry(value)) if isinstance(value, str) else value
    except ImageError as exc:
        return exc


class Actors:
    """A crew on a Ray cluster."""

    def __init__(self, work: Work, workers: int | None, address: str) -> None:
        self._work, self._ray = work, _import_ray()
        self._ours = not self._ray.is_initialized()
        # What goes through the store of a cluster made here is small; Ray would set aside 30 % of the memory.
        local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
        if self._ours:
            where = local if address == "local" else {"address": address}
            with _explained(f"cannot reach Ray at {address}"):
                self._ray.init(**where, log_to_driver=True, logging_level="ERROR")
        there = self._ray.cluster_resources()
        found = int(there.get("GPU", 0))
        self.slots = workers or found or 1
        # Without a GPU a worker takes its share of the CPUs, so that Ray gives each node as many as it can run.
        cpus = max(1, int(there.get("CPU", 1)) // self.slots)
        needs = {"num_gpus": min(1.0, found / self.slots), "num_cpus": 1} if found else {"num_cpus": cpus}
        # What an actor had not committed when it died is the driver's to give out again.
        self._kind = self._ray.remote(_Actor).options(max_restarts=0, max_task_retries=0, **needs)
        self._actors: dict[int, Any] = {}
        self._slots: dict[Any, int] = {}  # of what was asked and is not answered

    def start(self, slot: int) -> None:
        """Have Ray make an actor, which it does once there is room."""
        self._actors[slot] = self._kind.remote(self._work, str(Path.cwd()))
        self._slots[self._actors[slot].open.remote()] = slot

    def ask(self, slot: int, method: str, *arguments: Any) -> None:
        """Call an actor."""
        self._slots[self._actors[slot].call.remote(method, arguments)] = slot

    def answers(self, seconds: float) -> Iterable[tuple[int, Answer]]:
        """Return what has been answered."""
        with _explained("the Ray cluster is gone; give the command again once it is back"):
            ready, _ = self._ray.wait(list(self._slots), timeout=seconds)
            return [(slot, self._answer(slot, ref)) for ref in ready for slot in [self._slots.pop(ref)]]

    def stop(self) -> None:
        """Kill the actors."""
        with contextlib.suppress(Exception):  # the cluster may be gone
            for actor in self._actors.values():
                self._ray.kill(actor)
        if self._ours:
            self._ray.shutdown()

    def _answer(self, slot: int, ref: Any) -> Answer:
        exceptions = self._ray.exceptions
        try:
            answer: Answer = self._ray.get(ref)
        except (exceptions.RayActorError, exceptions.RayTaskError, exceptions.ObjectLostError):
            with contextlib.suppress(Exception):
                self._ray.kill(self._actors[slot])
            return Died()
        return answer


class _Actor:
    """A worker. Its constructor does nothing that can fail, since that would fail the whole job."""

    def __init__(self, work: Work, folder: str) -> None:
        self._work, self._folder = work, folder

    def open(self) -> Ready | DiffiqaError:
        """Load the engine."""
        with contextlib.suppress(OSError):  # names of files are relative to the driver's folder, if it is here too
            os.chdir(self._folder)
        try:
            self._worker = Worker(self._work)
        except DiffiqaError as exc:
            return exc
        return Ready(self._worker.backend)

    def call(self, method: str, arguments: tuple[Any, ...]) -> Answer:
        """Call a method of the worker."""
        try:
            answer: Answer = getattr(self._worker, method)(*arguments)
        except DiffiqaError as exc:
            return exc
        return answer


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as exc:
        raise UsageError(f"--ray needs a package: pip install 'diffiqa[ray]' ({first_line(exc)})") from exc
    return ray


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except DiffiqaError:
        raise
    except Exception as exc:
        raise BackendError(f"{what} ({first_line(exc)})") from exc
