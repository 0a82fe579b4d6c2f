"""One request on its way through: its engine, its body within the limits, and the wait for its scores."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request

from ..errors import one_line
from ..runtime.executor import Show
from ..runtime.results import Failure, Options, Score
from .door import ENTRY, Entry
from .limits import Refusal
from .work import Job, Service


class Visit:
    """One request on its way through: its engine, its body, its images."""

    def __init__(self, request: Request, engine: str | None = None) -> None:
        self.request, self.service = request, service_of(request)
        self.deadline = time.monotonic() + self.service.limits.seconds
        self.entry: Entry = request.scope[ENTRY]
        self.engine = self.entry.engine = engine or next(iter(self.service.scorers))
        if self.engine not in self.service.scorers:
            known = ", ".join(self.service.scorers)
            raise Refusal(404, f"there is no engine {one_line(self.engine, 40)!r}; there are {known}")
        self.manifest = self.service.scorers[self.engine].manifest

    async def body(self) -> bytes:
        """Read the body, within the limits of bytes and seconds. What it holds is given back by the door."""
        limits, headers = self.service.limits, self.request.headers
        self.service.refuse_if_busy()  # before it is sent
        declared = headers.get("content-length", "0")
        if len(declared) > 18 or int(declared) > limits.body_bytes:
            raise _too_many_bytes(limits.body_bytes)
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise Refusal(415, "send the body as it is, without Content-Encoding; image files are compressed already")
        chunks = []
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                async for chunk in self.request.stream():
                    self.service.hold(len(chunk))
                    self.entry.body_bytes += len(chunk)
                    if self.entry.body_bytes > limits.body_bytes:
                        raise _too_many_bytes(limits.body_bytes)
                    chunks.append(chunk)
        except TimeoutError:
            raise Refusal(408, f"the body was not all here after {limits.seconds:g} s; send it faster") from None
        return b"".join(chunks)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Put images into the queue."""
        self.entry.images = len(jobs)
        self.service.submit(jobs)

    async def results(self, jobs: Sequence[Job]) -> list[Score | Failure]:
        """Wait for the scores of images in the queue. Whatever ends the wait, those that are not done are cancelled."""
        done = asyncio.ensure_future(_all(jobs))
        gone = asyncio.ensure_future(self._gone())
        try:
            left = self.deadline - time.monotonic()
            either: set[asyncio.Future[Any]] = {done, gone}
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if done.done():
                return done.result()
            if gone.done():
                raise ClientDisconnect
            seconds = self.service.limits.seconds
            why = f"no score after {seconds:g} s; send fewer or smaller images, or ask for fewer crops, seeds or steps"
            raise Refusal(503, why, retry_after=5)
        except asyncio.CancelledError:
            raise Refusal(503, "the service is shutting down; try again in a while", retry_after=5) from None
        finally:
            gone.cancel()
            done.cancel()
            for job in jobs:
                job.result.cancel()

    def job(self, source: bytes, name: str, options: Options, show: Show | None = None) -> Job:
        """Return one image as a job."""
        return Job(self.engine, source, one_line(name) or "image 0", options, self.entry.client, show)

    async def _gone(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass


def service_of(request: Request) -> Service:
    """Return what the application serves."""
    found: Service = request.app.state.service
    return found


def of_the_address(request: Request) -> dict[str, str]:
    """Return what stands behind the `?`. Raises Refusal for a name that stands there twice."""
    pairs = request.query_params.multi_items()
    if twice := {name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1}:
        raise Refusal(422, f"{one_line(twice.pop(), 40)!r} is given twice")
    return dict(pairs)


async def _all(jobs: Sequence[Job]) -> list[Score | Failure]:
    return [await asyncio.wrap_future(job.result) for job in jobs]


def _too_many_bytes(most: int) -> Refusal:
    return Refusal(413, f"more than {most} bytes in one request; send fewer or smaller images")
