"""What the service takes, how it refuses the rest, and the options that a request may give."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..engine.manifest import Manifest
from ..errors import UsageError, one_line
from ..runtime.plan import sampling_of
from ..runtime.results import PIXEL_BUDGET, Options

MAX_SEEDS = 16  # of one image: the restorations of all its seeds are held in memory
MAX_LOOKS = 144  # crops × seeds of one image: all crops are held, 2.4 MB each at full size
MOST_HELD = 8  # bodies of the largest size that may be in memory together
_WHOLE = ("crops", "seed", "seeds", "steps", "pixel_budget")
_BOOLEANS = {"": True, "1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
OPTIONS = (*_WHOLE, "mode", "sampler", "fast")


class Refusal(Exception):  # noqa: N818 — an answer, not an error of ours
    """A request that is answered with a status and a reason; `retry_after` is in seconds."""

    def __init__(self, status: int, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


@dataclass(frozen=True)
class Limits:
    """What bounds memory and time, whatever clients send. Raises UsageError for limits that contradict each other."""

    body_bytes: int = 32 * 2**20  # of one request
    pixels: int | None = 24_000_000  # of one image, looked at before it is decoded
    images: int = 32  # in one request
    queue: int = 64  # images that wait or are being scored
    per_client: int | None = None  # of those, from one token or address
    seconds: float = 60.0  # from a request's first byte to its answer
    drain: float = 30.0  # seconds for what was accepted, once the service is told to end
    pixel_budget: int = PIXEL_BUDGET  # larger images are restored in tiles

    def __post_init__(self) -> None:
        """Refuse limits under which nothing could be scored."""
        for name in ("body_bytes", "pixels", "images", "queue", "per_client", "seconds"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UsageError(f"{name} must be more than 0, not {value}")
        object.__setattr__(self, "images", min(self.images, self.queue))  # others would never fit

    def options(self, given: Mapping[str, Any], manifest: Manifest) -> Options:
        """Return the options that a request names, as texts or JSON. Raises Refusal for what cannot be done here."""
        tiled = {} if manifest.flow.loop.result else {"pixel_budget": self.pixel_budget}  # if it restores images
        try:
            options = Options(**tiled | {name: _value(name, value) for name, value in given.items()})
            sampling_of(manifest, options)
            _at_most("seeds", options.seeds, MAX_SEEDS)
            _at_most("crops × seeds", (options.crops or manifest.crop.count) * options.seeds, MAX_LOOKS)
            if tiled:
                _at_most("pixel_budget", options.pixel_budget, self.pixel_budget)
        except UsageError as exc:
            raise Refusal(422, str(exc)) from exc
        return options


def engine_name(given: str, manifest: Manifest) -> str:
    """Return what requests call an engine: the name given to it, or else its model's. Raises UsageError."""
    name = given or manifest.model_name
    if not re.fullmatch(r"[\w-][\w.-]{0,63}", name, re.ASCII):
        raise UsageError(f"{name!r} cannot name an engine; give it another name of letters and digits: NAME=DIR")
    return name


def _at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise UsageError(f"{name} may be at most {most} in this service, not {value}; iqa-run has no such limit")


def _value(name: str, value: Any) -> Any:
    if name not in OPTIONS:
        raise UsageError(f"there is no option {one_line(name, 40)!r}; there are {', '.join(OPTIONS)}")
    text = str(value).lower() if isinstance(value, str | int) else ""  # of true and false too
    if name in _WHOLE and re.fullmatch(r"[0-9]{1,20}", text):
        return int(text)
    if name == "fast" and isinstance(value, str | bool) and text in _BOOLEANS:
        return _BOOLEANS[text]
    if name in {"mode", "sampler"} and isinstance(value, str):
        return one_line(value, 40)
    kind = "a whole number" if name in _WHOLE else "true or false" if name == "fast" else "a word"
    raise UsageError(f"{name} must be {kind}, not {one_line(repr(value), 40)}")
