"""The routes: bodies in, jobs for the queue, records out."""

import asyncio
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
from . import protocol
from .door import FAULT, GONE, Door, answer, refused
from .form import read_form
from .limits import Refusal
from .openapi import description
from .page import card, page
from .visit import Visit, of_the_address, service_of
from .work import Service

TYPES = {Format.JSON: "application/json", Format.JSONL: "application/jsonl"}
_OF_THE_ADDRESS = ("engine", "format", "name")  # besides options


def make_app(service: Service, tokens: tuple[bytes, ...] = ()) -> ASGIApp:
    """Return the ASGI application of a service."""
    model = "/v2/models/{name}"
    routes = [
        Route("/", page),
        Route("/page/card", card, methods=["POST"]),
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
        Exception: lambda *_: answer({"error": FAULT}, 500),
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.state.service = service
    return Door(app, service, tokens)


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
    files = [(name, body)]
    if not single and not (files := read_form(kind, body, visit.service.limits.images)):
        raise Refusal(422, "the form has no files; with curl: -F image=@photo.jpg")
    jobs = [visit.job(data, name, options) for name, data in files]
    del body, files  # the queue frees each as it is decoded
    visit.submit(jobs)
    results = await visit.results(jobs)
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
    visit.submit(images)
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
    service = service_of(request)
    return answer(description(service.limits, list(service.scorers)))


async def metrics(request: Request) -> Response:
    """Return the counters for Prometheus."""
    service = service_of(request)
    text = service.metrics.text(service.gauges())
    return Response(text, media_type="text/plain; version=0.0.4")


def _refuse_version(visit: Visit, request: Request) -> None:
    version = request.path_params.get("version", visit.manifest.engine_id)
    if version != visit.manifest.engine_id:
        raise Refusal(404, f"the version of {visit.engine} is {visit.manifest.engine_id}, the id of its engine")


def _no_such_address(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException)  # noqa: S101 — what Starlette registers this for
    if exc.status_code == 405:
        allowed = (exc.headers or {}).get("Allow", "other methods")
        return answer({"error": f"this address takes {allowed}"}, 405, exc.headers)
    return answer({"error": "there is nothing at this address; see /openapi.json"}, exc.status_code, exc.headers)
