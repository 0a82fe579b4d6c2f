"""`serve`: everything `iqa-serve` does, as one function.

>>> import diffiqa
>>> diffiqa.serve("engine/", port=8000)                    # until SIGTERM or Ctrl-C
>>> diffiqa.serve({"mini": "engine/", "half": "engine-fp16/"}, backend=diffiqa.OnnxRuntime(threads=2))
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import uvicorn

from ..engine.manifest import open_engine
from ..errors import UsageError
from ..runtime.backends import Backend
from ..runtime.scorer import Scorer
from ..runtime.selftest import load_tested
from .connection import Connection
from .door import read_tokens
from .http import make_app
from .limits import Limits, engine_name
from .work import Service

_LOOK_EVERY = 10.0  # seconds between looks at the engines' folders
_EXTRA_DRAIN = 5.0  # for answers to be sent
log = logging.getLogger("diffiqa.serve")


def serve(
    engine: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
    *,
    backend: Backend | Sequence[Backend] | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    workers: int = 1,
    limits: Limits | None = None,
    token_file: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then those that were accepted, and return.

    `engine` is an engine directory, or several by name; the first is the default. `workers` images are scored at
    a time. Raises UsageError where it cannot listen, EngineError and BackendError where it cannot score.
    """
    limits = limits or Limits()
    tokens = read_tokens(Path(token_file)) if token_file else ()
    with contextlib.closing(_bound(host, port)) as listener, contextlib.ExitStack() as stack:
        engines = engine if isinstance(engine, Mapping) else {"": engine}
        scorers: dict[str, Scorer] = {}
        directories: dict[str, Path] = {}
        for given, path in engines.items():
            directory = open_engine(Path(path))
            name = engine_name(given, directory.manifest)
            if name in scorers:
                raise UsageError(f"{name!r} names two engines; give them other names, as one=DIR two=DIR")
            scorers[name] = stack.enter_context(load_tested(directory, backend, max_pixels=limits.pixels, say=say))
            directories[name] = Path(path)
            reason = f" ({why})" if (why := scorers[name].info.reason) else ""
            say(f"engine {name}: {scorers[name].info.engine}, {scorers[name].info.backend}{reason}")
        service = Service(scorers, limits, workers=workers, directories=directories)
        _run(stack.enter_context(contextlib.closing(service)), tokens, listener, say)


class Server(uvicorn.Server):
    """uvicorn's server of a service: told to end, it answers what it has accepted, for as long as `drain` allows."""

    def __init__(self, service: Service, tokens: tuple[bytes, ...] = ()) -> None:
        config = uvicorn.Config(
            make_app(service, tokens),
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(service.limits.drain + _EXTRA_DRAIN),
        )
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen no more, wait for answers, and refuse what is left in the end."""
        self._service.ready = False
        stop = asyncio.get_running_loop().call_later(self._service.limits.drain, self._service.stop)
        await super().shutdown(sockets)
        stop.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT as the wish to end. uvicorn would raise them again afterwards: ours end well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket that has the address, and does not listen yet. Raises UsageError if another has it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With the protocol asyncio knows TCP, and sends an answer's end without waiting 40 ms for the client.
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except BaseException:
            listener.close()
            raise
    except (OSError, OverflowError, UnicodeError) as exc:
        why = getattr(exc, "strerror", None) or exc
        raise UsageError(f"cannot listen at {host}, port {port}: {why}; choose another --port or --host") from exc
    return listener


def _run(service: Service, tokens: tuple[bytes, ...], listener: socket.socket, say: Callable[[str], None]) -> None:
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    server = Server(service, tokens)

    async def main() -> None:
        starting = asyncio.create_task(_start(server, service, lambda: say(f"ready at {address}")))
        try:
            await server.serve([listener])
        finally:
            service.stop()
            starting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await starting

    asyncio.run(main())


async def _start(server: uvicorn.Server, service: Service, ready: Callable[[], None]) -> None:
    """Warm up while the server answers that it is alive; then look whether engines are swapped in their folders."""
    try:
        await asyncio.to_thread(service.warm_up)
    except BaseException:
        server.should_exit = True
        raise
    if service.ready:
        ready()
    said: set[str] = set()
    while True:
        await asyncio.sleep(_LOOK_EVERY)
        for name in service.scorers:
            if (problem := await asyncio.to_thread(service.swapped, name)) and problem not in said:
                said.add(problem)
                log.warning("engine %s: %s", name, problem)
