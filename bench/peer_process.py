"""The process of a peer: it makes the contender, then scores one image at a time."""

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
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the parent handles Ctrl-C: it writes its results, then closes the pipe
    with log.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        score, version = make(ground)
    except Missing as exc:
        pipe.send(Refused(first_line(exc), missing=True))
        return
    except Exception as exc:  # a peer may fail in any way: the others go on
        pipe.send(Refused(f"{type(exc).__name__}: {first_line(exc)}"))
        return
    pipe.send(Ready(version))
    while True:
        try:
            ask = pipe.recv()
        except (EOFError, OSError):
            return
        start = time.perf_counter()
        try:
            value = score(ask)
        except Exception as exc:
            pipe.send(Refused(f"{type(exc).__name__}: {first_line(exc)}"))
            return
        pipe.send(Answer(value, time.perf_counter() - start, peak_mib()))
