"""The page for people: the report's page, which begins empty, and a stream with the card of one picture."""

import asyncio
import base64
import collections
import io
import json
import logging
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

import PIL.Image
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse

from ..engine.manifest import Manifest
from ..engine.pixels import to_pixels
from ..runtime.executor import FloatArray
from ..runtime.images import Image
from ..runtime.plan import Window
from ..runtime.report.heatmap import to_heatmap
from ..runtime.report.markup import Html
from ..runtime.report.page import Collected, Live, Page
from ..runtime.report.writer import single_card
from ..runtime.results import Failure, Score
from .door import FAULT
from .limits import Refusal
from .visit import Visit, of_the_address

_SIDE = 512  # longest side of pictures, pixels
_STATE_SIDE = 256  # of a restoration under way, at most
_TOLD_EVERY = 0.2  # seconds
_CLOSING = "Pictures go to the service that this page is from, and nowhere else."
log = logging.getLogger(__name__)


class Sights:
    """What a running score shows, between two looks at it: small, whatever the image's size."""

    def __init__(self) -> None:
        self._state: tuple[Window, FloatArray] | None = None
        self._maps: collections.deque[tuple[Window, FloatArray]] = collections.deque()

    def __call__(self, place: Window, values: FloatArray) -> None:
        """Note a state or a map. The thread that scores calls this: it only copies."""
        if values.ndim == 2:
            self._maps.append((place, values))
        else:
            every = -(-max(values.shape) // _STATE_SIDE)
            self._state = place, values[:, ::every, ::every].copy()

    def taken(self, image: Image | None) -> dict[str, Any]:
        """Return what is new, each with its place (top, left, height, width) in shares of the image's size."""
        latest, self._state = self._state, None
        if not image or not (latest or self._maps):
            return {}
        height, width = image.size

        def at(place: Window) -> list[float]:
            return [place.top / height, place.left / width, place.height / height, place.width / width]

        told: dict[str, Any] = {"size": image.size, "maps": []}
        while self._maps:
            place, values = self._maps.popleft()
            found = to_heatmap(values)
            index = base64.b64encode(found.index.tobytes()).decode()
            about = {"low": found.low, "high": found.high, "columns": values.shape[1], "index": index}
            told["maps"].append({"at": at(place), **about})
        if latest:
            place, state = latest
            stream = io.BytesIO()
            PIL.Image.fromarray(to_pixels(state)).save(stream, "JPEG")
            told["state"] = {"at": at(place), "jpeg": base64.b64encode(stream.getvalue()).decode()}
        return told


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
    sights = Sights()
    job = visit.job(await visit.body(), name, options, sights)
    visit.submit([job])
    scoring = asyncio.ensure_future(visit.results([job]))
    scoring.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left to ask for it

    async def events() -> AsyncIterator[str]:
        try:
            while not scoring.done():
                yield _event({"done": job.done, "steps": job.steps, **sights.taken(job.image)})
                await asyncio.wait({scoring}, timeout=_TOLD_EVERY)
            (result,) = scoring.result()
            yield _event(await asyncio.to_thread(_told, visit.manifest, result, options.steps))
        except Refusal as refusal:
            yield _event({"error": str(refusal)})
        except Exception:
            log.exception("cannot give a card")
            yield _event({"error": FAULT})
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
