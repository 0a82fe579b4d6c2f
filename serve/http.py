"""The routes: bodies in, jobs for the queue, records out."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from .. import __version__
from ..errors import DiffiqaError, one_line
from ..runtime.command.records import Format, Record, RunSettings, document, to_line
from ..runtime.results import Failure, Options, Score
from . import protocol
from .door import ENTRY, GONE, Door, Entry, answer, refused
from .form import read_form
from .limits import Refusal
from .openapi import description
from .work import Job, Service

TYPES = {Format.JSON: "application/json", Format.JSONL: "application/jsonl"}
_OF_THE_ADDRESS = ("engine", "format", "name")  # besides options


def make_app(service: Service, tokens: tuple[bytes, ...] = ()) -> ASGIApp:
    """Return the ASGI application of a service."""
    model = "/v2/models/{name}"
    routes = [
        Route("/score", score, methods=["POST"]),
        Route("/v2", server),
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        *(
            route
            for path in (model, f"{model}/versions/{{version}}")
            for route in (
                Route(path, model_metadata),
                Route(f"{path}/ready", model_ready),
                Route(f"{path}/infer", infer, methods=["POST"]),
            )
        ),
        Route("/openapi.json", openapi),
        Route("/metrics", metrics),
    ]
    handlers: dict[Any, Any] = {
        Refusal: lambda _, exc: refused(exc),
        HTTPException: _no_such_address,
        DiffiqaError: lambda _, exc: answer({"error": str(exc)}, 500),
        ClientDisconnect: lambda *_: Response(status_code=GONE),  # nobody reads it
        Exception: lambda *_: answer({"error": "an error of the service itself; its log says more"}, 500),
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.service = service
    return Door(app, service, tokens)


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

    async def results(self, jobs: Sequence[Job]) -> list[Score | Failure]:
        """Have images scored. Whatever ends the wait, those that are not done are cancelled."""
        self.entry.images = len(jobs)
        self.service.submit(jobs)
        done = asyncio.gather(*(asyncio.wrap_future(job.result) for job in jobs))
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

    def job(self, source: bytes, name: str, options: Options, *, pictures: bool = False) -> Job:
        """Return one image as a job."""
        return Job(self.engine, source, name, options, self.entry.client, pictures)

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


async def score(request: Request) -> Response:
    """Score the image that is the body, or the files of a form."""
    given = of_the_address(request)
    engine, form, name = (given.pop(key, "") for key in _OF_THE_ADDRESS)
    visit = Visit(request, engine)
    options = visit.service.limits.options(given, visit.manifest)
    if form not in {"", *TYPES}:
        raise Refusal(422, f"format must be json or jsonl, not {one_line(form, 40)!r}")
    kind, body = request.headers.get("content-type", ""), await visit.body()
    single = not kind.lower().startswith("multipart/")
    files = [(one_line(name) or "image 0", body)]
    if not single and not (files := read_form(kind, body, visit.service.limits.images)):
        raise Refusal(422, "the form has no files; with curl: -F image=@photo.jpg")
    results = await visit.results([visit.job(data, name, options) for name, data in files])
    settings = RunSettings.of(visit.manifest, options)
    records = [Record.of(result, settings) for result in results]
    if form == Format.JSONL or single:
        data = b"".join(to_line(record, Format.JSONL) for record in records)
    else:
        data = b"".join(document(records, Format.JSON))
    status = 422 if single and records[0].score is None else 200
    return Response(data, status, media_type=TYPES[Format(form or Format.JSON)])


async def infer(request: Request) -> Response:
    """Score the images of an inference request."""
    visit = Visit(request, request.path_params["name"])
    _refuse_version(visit, request)
    limits, body = visit.service.limits, await visit.body()
    asked = protocol.read_request(request.headers.get(protocol.BINARY_HEAD), body, limits.images)
    options = limits.options(asked.options, visit.manifest)
    images = [visit.job(image, f"image {number}", options) for number, image in enumerate(asked.images)]
    settings = RunSettings.of(visit.manifest, options)
    records = [Record.of(result, settings) for result in await visit.results(images)]
    if failed := [record.error for record in records if record.error]:
        raise Refusal(422, "; ".join(failed))
    scores = [record.score for record in records if record.score is not None]
    lines = [to_line(record, Format.JSONL).rstrip() for record in records]
    data, head = protocol.write_response(visit.engine, visit.manifest.engine_id, asked, scores, lines)
    if head is None:
        return Response(data, media_type="application/json")
    return Response(data, headers={protocol.BINARY_HEAD: str(head)}, media_type="application/octet-stream")


async def model_metadata(request: Request) -> Response:
    """Say what a model takes and gives, what its scores mean, and whether its folder has changed meanwhile."""
    visit = Visit(request, request.path_params["name"])
    _refuse_version(visit, request)
    about = protocol.metadata(visit.engine, visit.service.scorers[visit.engine].info)
    about["parameters"]["warning"] = await asyncio.to_thread(visit.service.swapped, visit.engine)
    return answer(about)


async def model_ready(request: Request) -> Response:
    """Say whether a model can score."""
    visit = Visit(request, request.path_params["name"])
    _refuse_version(visit, request)
    return await ready(request)


async def ready(request: Request) -> Response:
    """Say whether all engines have given a score."""
    if service_of(request).ready:
        return answer({"ready": True})
    raise Refusal(503, "not ready: no score yet, or shutting down", retry_after=1)


async def live(_: Request) -> Response:
    """Say that the process answers."""
    return answer({"live": True})


async def server(request: Request) -> Response:
    """Say what this is."""
    about = {"name": "diffiqa", "version": __version__, "extensions": ["binary_tensor_data"]}
    return answer(about | {"models": list(service_of(request).scorers)})


async def openapi(request: Request) -> Response:
    """Describe all this for programs."""
    return answer(description(service_of(request).limits))


async def metrics(request: Request) -> Response:
    """Return the counters for Prometheus."""
    service = service_of(request)
    text = service.metrics.text(service.gauges())
    return Response(text, media_type="text/plain; version=0.0.4")


def _refuse_version(visit: Visit, request: Request) -> None:
    version = request.path_params.get("version", visit.manifest.engine_id)
    if version != visit.manifest.engine_id:
        raise Refusal(404, f"the version of {visit.engine} is {visit.manifest.engine_id}, the id of its engine")


def _too_many_bytes(most: int) -> Refusal:
    return Refusal(413, f"more than {most} bytes in one request; send fewer or smaller images")


def _no_such_address(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)  # noqa: S101 — what Starlette registers this for
    if exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "other methods")
        return answer({"error": f"this address takes {allowed}"}, 405, exc.headers)
    return answer({"error": "there is nothing at this address; see /openapi.json"}, exc.status_code, exc.headers)
