"""A service for the fuzzer: real routes, bodies and readers of images; scores are made up, and there are no sockets."""

import asyncio
import dataclasses
import io
import json
import re
from typing import Any

import numpy as np
from PIL import Image

from diffiqa.engine.manifest import CropPolicy
from diffiqa.runtime.scorer import Scorer
from diffiqa.serve.http import make_app
from diffiqa.serve.limits import Limits
from diffiqa.serve.work import Service

from ..runtime.fake_results import fake_manifest
from ..serve.serving import Gate

_PATHS = (b"/score", b"/v2/models/gate/infer")
_NOT_IN_HEADERS = re.compile(rb"[\x00-\x1f\x7f]+")  # HTTP has none of these


class Site:
    """Answers one request after the other."""

    def __init__(self) -> None:
        gate = Gate()
        gate.open.set()
        manifest = dataclasses.replace(fake_manifest(), crop=CropPolicy(8, 1))
        scorer = Scorer(manifest, gate, backend="gate", max_pixels=10_000)
        self._service = Service({"gate": scorer}, Limits(body_bytes=10**6, images=4, seconds=20))
        self._app = make_app(self._service)
        self._loop = asyncio.new_event_loop()

    def answer(self, data: bytes) -> None:
        """Send three lines and a body: the path's number and the query, the content type, where JSON ends."""
        query, kind, head, body = (*data.split(b"\n", 3), b"", b"", b"")[:4]
        headers = {b"content-length": str(len(body)).encode(), b"content-type": kind}
        headers |= {b"inference-header-content-length": head} if head else {}
        scope = {
            "type": "http",
            "method": "POST",
            "path": _PATHS[query[:1] == b"1"].decode(),
            "query_string": _NOT_IN_HEADERS.sub(b"", query[1:]).replace(b" ", b""),
            "headers": [(name, _NOT_IN_HEADERS.sub(b"", value).strip()) for name, value in headers.items()],
        }
        sent: list[dict[str, Any]] = []
        self._loop.run_until_complete(self._ask(scope, body, sent))
        (start,) = (one for one in sent if one["type"] == "http.response.start")
        answered = b"".join(one.get("body", b"") for one in sent)
        kind = dict(start["headers"])[b"content-type"]
        if kind == b"application/json":
            json.loads(answered)
        assert start["status"] in {200, 400, 413, 422}, (start, answered)
        assert start["status"] == 200 or json.loads(answered)["error"]
        left = self._service.gauges()
        assert left["queue_images"] == left["body_bytes"] == 0

    async def _ask(self, scope: dict[str, Any], body: bytes, sent: list[dict[str, Any]]) -> None:
        chunks = [body[: len(body) // 2], body[len(body) // 2 :]]

        async def receive() -> dict[str, Any]:
            if not chunks:
                await asyncio.Event().wait()  # the client stays
            return {"type": "http.request", "body": chunks.pop(0), "more_body": bool(chunks)}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive, send)


def requests() -> list[bytes]:
    """Return whole requests to start from."""
    stream = io.BytesIO()
    Image.fromarray(np.arange(300, dtype=np.uint16).astype(np.uint8).reshape(10, 10, 3)).save(stream, "PNG")
    png = stream.getvalue()
    part = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + png + b"\r\n"
    tensor: dict[str, Any] = {"name": "image", "datatype": "BYTES", "shape": [1]}
    wanted = {"parameters": {"crops": 1}, "outputs": [{"name": "score", "parameters": {"binary_data": True}}]}
    element = len(png).to_bytes(4, "little") + png
    binary = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(element)}}], **wanted}).encode()
    text = json.dumps({"id": "x", "inputs": [tensor | {"data": ["iVBORw0KGgo="]}]}).encode()
    return [
        b"0?name=a&crops=1&seed=2&mode=crop\nimage/png\n\n" + png,
        b"0format=jsonl\nmultipart/form-data; boundary=b\n\n" + part * 2 + b"--b--\r\n",
        b"1\napplication/octet-stream\n%d\n" % len(binary) + binary + element,
        b"1\napplication/json\n\n" + text,
    ]
