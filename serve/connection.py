"""One connection: uvicorn's HTTP/1.1, with a limit on how long a head may take, and with errors in JSON."""

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_HEAD_SECONDS = 10.0


class Connection(H11Protocol):
    """uvicorn waits for ever for the rest of a request's head, and answers in plain text where HTTP is broken."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start to wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Take in data; between requests, start to wait for the next."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Free what came of a body that nobody read: a refused client may keep its connection."""
        self.cycle.body = bytearray()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Say that this is not HTTP, unless an answer is on its way, and close."""
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            body = json.dumps({"error": msg}).encode() + b"\n"
            headers = [
                ("content-type", "application/json"),
                ("connection", "close"),
                ("content-length", str(len(body))),
            ]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        if self._in_request():
            if self._waiting:
                self._waiting.cancel()
            self._waiting = None
        elif self._waiting is None:
            self._waiting = self.loop.call_later(_HEAD_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._waiting = None
        if not self._in_request():
            self.transport.close()

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete
