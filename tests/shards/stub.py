"""A scorer that takes no time, and a crew in this process: for tests of everything around scores."""

import contextlib
import functools
import hashlib
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from diffiqa.errors import DiffiqaError
from diffiqa.runtime.command.records import RunSettings
from diffiqa.runtime.results import Failure, Mode, Options, Score
from diffiqa.runtime.scorer import Scorer
from diffiqa.shards.driver import Answer, Died, Ready
from diffiqa.shards.plan import Entry
from diffiqa.shards.store import Folder, Store
from diffiqa.shards.worker import Work, Worker

SETTINGS = RunSettings("stub-engine", 9, 0, 1, Mode.WHOLE, 2**19)


class Killed(BaseException):
    """What a kill -9 of an inline worker looks like."""


class Stub:
    """Scores names. One with `bad` in it fails while there is a file `broken`; one with `lethal` kills the process."""

    def __init__(self, broken: Path | None = None, seconds: float = 0.0, inline: bool = False) -> None:
        self._broken, self._seconds, self._inline = broken, seconds, inline
        self.info = SimpleNamespace(backend="stub 1")
        self.scored: list[str] = []

    def stream(self, images: Iterable[str | bytes], _options: Options) -> Iterator[Score | Failure]:
        for image in images:
            name = image if isinstance(image, str) else hashlib.sha256(image).hexdigest()
            self.scored.append(name)
            if "lethal" in name:
                if self._inline:
                    raise Killed
                os.kill(os.getpid(), signal.SIGKILL)
            if self._seconds:
                time.sleep(self._seconds)
            if "bad" in name and self._broken and self._broken.exists():
                yield Failure(name, f"{name}: broken")
                continue
            digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
            score = int(digest[:12], 16) / 16**12
            yield Score(
                name, score, score, None, None, 8, 8, Mode.WHOLE, (0,), (), (), digest, "stub-engine", "stub 1", 0.5
            )


def open_stub(
    broken: Path | None = None, seconds: float = 0.0, *, inline: bool = False
) -> contextlib.nullcontext[Scorer]:
    return contextlib.nullcontext(cast("Scorer", Stub(broken, seconds, inline)))


def work_in(out: Path | Store, **options: Any) -> Work:
    store = Folder(out) if isinstance(out, Path) else out
    return Work(store, functools.partial(open_stub, **options), Options(), SETTINGS)


def names(count: int, **special: int) -> list[Entry]:
    """Return so many names; `special` gives the places of names with such a word in them."""
    words = {place: word for word, place in special.items()}
    return [Entry(f"{number:05}-{words.get(number, 'good')}.png") for number in range(count)]


class Inline:
    """A crew of one worker in this process. `kill` says before which calls it dies."""

    slots = 1

    def __init__(self, work: Work, kill: Iterable[int] = ()) -> None:
        self._work, self._kill, self._calls = work, set(kill), 0
        self._worker: Worker | None = None
        self._answers: list[tuple[int, Answer]] = []
        self.asked: list[tuple[Any, ...]] = []

    def start(self, slot: int) -> None:
        self._worker = Worker(self._work)
        self._answers.append((slot, Ready(self._worker.backend)))

    def ask(self, slot: int, method: str, *arguments: Any) -> None:
        self.asked.append((method, *arguments[:2]))
        self._calls += 1
        answer: Answer
        try:
            answer = Died() if self._calls in self._kill else getattr(self._worker, method)(*arguments)
        except Killed:
            answer = Died()
        except DiffiqaError as exc:
            answer = exc
        self._answers.append((slot, answer))

    def answers(self, _seconds: float) -> list[tuple[int, Answer]]:
        answers, self._answers = self._answers, []
        return answers

    def stop(self) -> None:
        self._worker = None
