"""What stands around every request: tokens, the access log, counters, and the bytes of its body given back."""

import base64
import binascii
import hmac
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import UsageError
from .limits import Refusal
from .work import Service

ENTRY = "diffiqa"  # in a request's scope
_OPEN = {"/v2/health/live", "/v2/health/ready"}  # without a token
FAULT = "an error of the service itself; its log says more"
GONE = 499  # in the log: the client went before its answer
access = logging.getLogger("diffiqa.access")


@dataclass
class Entry:
    """What the log says of a request, besides its address and status."""

    client: str
    body_bytes: int = 0
    images: int = 0
    engine: str = ""


def answer(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return JSON, in ASCII: texts of clients may hold what UTF-8 cannot."""
    text = json.dumps(data, allow_nan=False) + "\n"
    return Response(text, status, dict(headers or {}), media_type="application/json")


def refused(refusal: Refusal) -> Response:
    """Return the answer to a request that is refused."""
    headers = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
    if refusal.status == 408:
        headers["connection"] = "close"  # the rest of the body may come in an hour
    if refusal.status == 401:
        headers["www-authenticate"] = 'Basic realm="diffiqa: any name, and a token as password", charset="UTF-8"'
    return answer({"error": str(refusal)}, refusal.status, headers)


def read_tokens(path: Path) -> tuple[bytes, ...]:
    """Return the tokens of a file, one on each line; lines that start with # say what a token is for."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as exc:
        raise UsageError(f"cannot read the tokens in {path}: {exc}") from exc
    tokens = [line for line in lines if line and not line.startswith("#")]
    if not tokens or any(len(token) < 16 or not token.isascii() or " " in token for token in tokens):
        raise UsageError(
            f"{path} must have a token on each line, of 16 ASCII characters or more without spaces; make one with: "
            f"python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return tuple(token.encode() for token in tokens)


class Door:
    """The outermost application."""

    def __init__(self, app: ASGIApp, service: Service, tokens: tuple[bytes, ...] = ()) -> None:
        self._app, self._service, self._tokens = app, service, tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, and note it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), GONE
        address = str((scope.get("client") or ("",))[0])
        scope[ENTRY] = entry = Entry(address)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                entry.client = self._admit(scope) or address
            except Refusal as refusal:
                await refused(refusal)(scope, receive, watched)
            else:
                await self._app(scope, receive, watched)
        finally:
            self._service.hold(-entry.body_bytes)
            seconds = time.monotonic() - start
            route = getattr(scope.get("route"), "path", "none")
            self._service.metrics.count("requests", route=route, status=str(status))
            self._service.metrics.observe("request_seconds", seconds, route=route)
            about = {"client": address, "method": scope["method"], "path": scope["path"][:200], "status": status}
            about |= {"ms": round(seconds * 1000, 1), "bytes": entry.body_bytes, "images": entry.images}
            access.info(json.dumps({"time": round(time.time(), 3), **about, "engine": entry.engine}))

    def _admit(self, scope: Scope) -> str:
        """Return who the token stands for, nobody without tokens. Raises Refusal without the right one."""
        headers = Headers(scope=scope)
        if scope["method"] == "POST" and _is_of_another_site(headers):
            raise Refusal(403, "another site's page asked for this; programs and this service's own page may")
        if not self._tokens or scope["path"] in _OPEN:
            return ""
        given = _token(headers.get("authorization", ""))
        # All are compared, each in constant time: how long it takes says nothing of any.
        fits = [hmac.compare_digest(given, token) for token in self._tokens]
        if not any(fits):
            raise Refusal(401, "this service needs a token: send the header `Authorization: Bearer TOKEN`")
        return f"token {fits.index(True)}"


def _is_of_another_site(headers: Headers) -> bool:
    """Return whether a browser says so. Without TLS it sends the origin alone, but to its own machine."""
    if site := headers.get("sec-fetch-site"):
        return site == "cross-site"
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()


def _token(authorization: str) -> bytes:
    """Return the token of a header: as bearer, or as the password of a browser's own dialogue."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() != "basic":
        return value.strip().encode() if scheme.lower() == "bearer" else b""
    try:
        return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    except (ValueError, binascii.Error):
        return b""
