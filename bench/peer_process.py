"""The process of a peer: it makes the contender, then scores one image at a time."""

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from ..errors import first_line
from .contenders import Ask, Ground, Make, Missing
from .machine import peak_mib


@dataclass(frozen=True)
class Ready:
    """The contender can be asked."""

    version: str


@dataclass(frozen=True)
class Refused:
    """The contender cannot start, or could not answer."""

    reason: str
    missing: bool = False


@dataclass(frozen=True)
class Answer:
    """A score, and how long it took from file to score."""

    score: float
    seconds: float
    peak_mib: float | None


def serve(pipe: "Connection[Ready | Refused | Answer, Ask]", make: Make, ground: Ground, log: Path) -> None:
    """Make the contender and answer until the other end closes. Output of libraries goes into `log`."""
    # The parent handles Ctrl-C: it writes its results, then closes the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        score, version = make(ground)
        pipe.send(Ready(version))
        while True:
            ask = pipe.recv()
            start = time.perf_counter()
            pipe.send(Answer(score(ask), time.perf_counter() - start, peak_mib()))
    except Exception as exc:  # a peer may fail in any way: the others go on
        missing = isinstance(exc, Missing)
        reason = first_line(exc) if missing else f"{type(exc).__name__}: {first_line(exc)}"
        with contextlib.suppress(OSError):  # the other end was closed: that is how a process ends that is asked no more
            pipe.send(Refused(reason, missing))
