"""Counters of the service, in the text format of Prometheus."""

import collections
import threading
from collections.abc import Mapping

Labels = tuple[tuple[str, str], ...]
_PREFIX = "diffiqa_"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128)
# Every metric: its type, its buckets, what it is.
_COUNTERS = {
    "requests": "Requests that were answered, by route and status.",
    "failed_images": "Images that got an error instead of a score.",
}
_HISTOGRAMS: dict[str, tuple[tuple[float, ...], str]] = {
    "request_seconds": (_SECONDS, "From a request's head to the end of its answer."),
    "scoring_seconds": (_SECONDS, "Of an image in its engine, without decoding and waiting."),
    "batch_images": (_IMAGES, "Images that were scored together."),
}
_GAUGES = {
    "queue_images": "Images that wait or are being scored.",
    "body_bytes": "Bytes of bodies in memory.",
    "ready": "1 once every engine has given a score.",
}


class Metrics:
    """Counts from any thread; `text` is what a scraper gets."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, Labels], float] = collections.defaultdict(float)

    def count(self, name: str, **labels: str) -> None:
        """Add one to a counter."""
        with self._lock:
            self._counts[f"{name}_total", tuple(labels.items())] += 1

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        ends, _ = _HISTOGRAMS[name]
        at = tuple(labels.items())
        with self._lock:
            for end in (*ends, float("inf")):
                self._counts[f"{name}_bucket", (*at, ("le", f"{end:g}".replace("inf", "+Inf")))] += value <= end
            self._counts[f"{name}_sum", at] += value
            self._counts[f"{name}_count", at] += 1

    def text(self, gauges: Mapping[str, float]) -> str:
        """Return all metrics."""
        with self._lock:
            counts = dict(self._counts)
        lines = []
        kinds = [(f"{name}_total", "counter", about) for name, about in _COUNTERS.items()]
        kinds += [(name, "histogram", about) for name, (_, about) in _HISTOGRAMS.items()]
        for name, kind, about in kinds:
            lines += [f"# HELP {_PREFIX}{name} {about}", f"# TYPE {_PREFIX}{name} {kind}"]
            own = (name, *(f"{name}_{part}" for part in ("bucket", "sum", "count")))
            lines += [_line(key, labels, value) for (key, labels), value in counts.items() if key in own]
        for name, about in _GAUGES.items():
            lines += [f"# HELP {_PREFIX}{name} {about}", f"# TYPE {_PREFIX}{name} gauge", _line(name, (), gauges[name])]
        return "\n".join(lines) + "\n"


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{key}="{text}"' for key, text in labels)
    return f"{_PREFIX}{name}{{{inside}}} {value + 0:.17g}" if inside else f"{_PREFIX}{name} {value + 0:.17g}"
