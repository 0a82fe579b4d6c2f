"""The page for people: the report's page, which begins empty, and a stream with the card of one picture."""

import asyncio
import json
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse

from ..engine.manifest import Manifest
from ..runtime.report.markup import Html
from ..runtime.report.page import Collected, Live, Page
from ..runtime.report.writer import single_card
from ..runtime.results import Failure, Score
from .limits import Refusal
from .visit import Visit, of_the_address

_SIDE = 512  # longest side of pictures, pixels
_TOLD_EVERY = 0.2  # seconds
_CLOSING = "Pictures go to the service that this page is from, and nowhere else."


async def page(request: Request) -> Response:
    """Return the page; what stands in its address goes on to the scores of its pictures."""
    given = of_the_address(request)
    visit = Visit(request, given.pop("engine", ""))
    options = visit.service.limits.options(given, visit.manifest)
    info = visit.service.scorers[visit.engine].info
    others = [name for name in visit.service.scorers if name != visit.engine]
    lead = f"Engine {visit.engine}, {info.engine}, by {info.backend}." + "".join(f" Also: /?engine={o}" for o in others)
    live = Live(lead, Html(_asset("page.html")), _asset("page.css"), _asset("page.js"), _CLOSING)
    frame = _page(visit.manifest, options.steps).frame(Collected((), {"": (0.0, 1.0)}, _SIDE), live)
    return HTMLResponse("".join(frame), headers={"x-content-type-options": "nosniff"})


async def card(request: Request) -> Response:
    """Score the picture that is the body; tell how far it is, and at the end its card or why there is none."""
    given = of_the_address(request)
    name = given.pop("name", "")
    visit = Visit(request, given.pop("engine", ""))
    options = visit.service.limits.options(given, visit.manifest)
    job = visit.job(await visit.body(), name, options, pictures=True)
    visit.submit([job])
    scoring = asyncio.ensure_future(visit.results([job]))
    scoring.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left to ask for it

    async def events() -> AsyncIterator[str]:
        try:
            while not scoring.done():
                yield _event({"done": job.done, "steps": job.steps})
                await asyncio.wait({scoring}, timeout=_TOLD_EVERY)
            (result,) = scoring.result()
            yield _event(await asyncio.to_thread(_told, visit.manifest, result, options.steps))
        except Refusal as refusal:
            yield _event({"error": str(refusal)})
        finally:
            scoring.cancel()

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})


def _told(manifest: Manifest, result: Score | Failure, steps: int | None) -> dict[str, Any]:
    if isinstance(result, Failure):
        return {"error": result.error}
    return {"card": single_card(_page(manifest, steps), result, _SIDE)}


def _page(manifest: Manifest, steps: int | None) -> Page:
    return Page(manifest, "Image quality", steps=steps)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
