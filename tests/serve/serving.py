"""A running service for tests: real sockets, and an executor whose time the test decides."""

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from diffiqa.runtime.executor import Branch, Cancelled, Outcome, Show, Task, Verdict
from diffiqa.runtime.plan import Plan, Window
from diffiqa.serve.api import Server
from diffiqa.serve.work import Service


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Running:
    """A service that answers at a port."""

    service: Service
    server: Server
    port: int

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None, timeout: float = 60
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        with contextlib.closing(connection):
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def raw(self, data: bytes, timeout: float = 10) -> bytes:
        """Send bytes that may be no HTTP, and return whatever comes back before the connection ends."""
        with socket.create_connection(("127.0.0.1", self.port), timeout) as connection:
            connection.sendall(data)
            received = b""
            with contextlib.suppress(TimeoutError, ConnectionError):
                while more := connection.recv(65536):
                    received += more
            return received


@contextlib.contextmanager
def running(service: Service, tokens: tuple[bytes, ...] = ()) -> Iterator[Running]:
    """Serve in a thread, warmed up, until the block ends."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = Server(service, tokens)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(service, server, listener.getsockname()[1])
    finally:
        server.should_exit = True
        service.stop()
        thread.join()
        service.close()


def until(true: Callable[[], bool], seconds: float = 30) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@dataclass
class Gate:
    """An executor that waits at a gate, and whose scores are the means of the pixels: an answer tells its image."""

    together: int = 1
    takes_pixels: bool = True
    queue_depth: int = 0
    open: threading.Event = field(default_factory=threading.Event)
    groups: list[list[int]] = field(default_factory=list)  # the means of the images of each run
    cancelled: int = 0

    def run_together(
        self, tasks: Sequence[Task], plan: Plan, cancelled: Callable[[], bool], *, show: Show | None = None, **_: Any
    ) -> list[Outcome]:
        means = [int(image.mean()) for image, _ in tasks]
        self.groups.append(means)
        if show:
            window, crop = plan.windows[0], plan.crops[0]
            show(window, np.full((3, window.height, window.width), -1, np.float32))  # black
            half = Window(crop.top, crop.left, plan.crop_size, plan.crop_size)
            show(half, np.array([[0.25, 0.75]], np.float32))
        while not self.open.wait(0.005):
            if cancelled():
                self.cancelled += 1
                raise Cancelled
        return [_outcome(mean, plan) for mean in means]

    def close(self) -> None:
        pass


def _outcome(mean: int, plan: Plan) -> Outcome:
    one = np.ones((4, 4), np.float32)
    branch = Branch(float(mean), one, one)
    crops = np.zeros((len(plan.crops), 4, 3, plan.crop_size, plan.crop_size), np.float32)
    return Outcome((Verdict(branch, branch),) * len(plan.crops), crops, {}, seconds=0.001)
