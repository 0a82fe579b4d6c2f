"""The Open Inference Protocol, version 2, as KServe and Triton speak it, with its binary extension.

An image is one element of the input `image`, of type BYTES: after the JSON head with four bytes of length before it, or
as base64 within the JSON.
"""

import base64
import binascii
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import one_line
from ..runtime.scorer import Info
from .limits import Refusal

BINARY_HEAD = "inference-header-content-length"
_MOST_COMMAS = 10_000  # in JSON, which takes thirty times its size in memory if it is full of them
OUTPUTS = {"score": "FP64", "record": "BYTES"}


@dataclass(frozen=True)
class Inference:
    """A request: its images, its options, and which outputs it wants, each as binary or not."""

    id: str | None
    images: tuple[bytes, ...]
    options: Mapping[str, Any]
    outputs: Mapping[str, bool]


def read_request(head_bytes: str | None, body: bytes, most: int) -> Inference:
    """Take a request apart; `head_bytes` is the header that says where JSON ends. Raises Refusal, 400 or 413."""
    length = len(body)
    if head_bytes is not None:
        if not (head_bytes.isascii() and head_bytes.isdigit() and len(head_bytes) < 10 and int(head_bytes) <= length):
            raise Refusal(400, f"{BINARY_HEAD} must say where the JSON ends, within the body of {length} bytes")
        length = int(head_bytes)
    if body.count(b",", 0, length) > _MOST_COMMAS:
        raise Refusal(400, "the JSON has too many parts; an image is one element, as base64 or after the JSON")
    try:
        head = json.loads(body[:length])
    except (ValueError, RecursionError) as exc:
        raise Refusal(400, f"the request is not JSON ({one_line(str(exc), 80)})") from exc
    head = _typed(head, dict, "the request")
    (tensor,) = _exactly_one(_typed(head.get("inputs"), list, "inputs"))
    tensor = _typed(tensor, dict, "inputs[0]")
    if (tensor.get("name"), tensor.get("datatype")) != ("image", "BYTES"):
        raise Refusal(400, "the input must be named image and be of type BYTES, each element an image file")
    count = _count(_typed(tensor.get("shape"), list, "shape"))
    if count > most:
        raise Refusal(413, f"{count} images in one request; send at most {most} at a time")
    parameters = _typed(tensor.get("parameters", {}), dict, "parameters")
    if "binary_data_size" in parameters:
        if "data" in tensor or parameters["binary_data_size"] != len(body) - length:
            raise Refusal(
                400, f"binary_data_size must be the {len(body) - length} bytes after the JSON, without `data`"
            )
        images = _elements(body[length:], count)
    elif length < len(body):
        raise Refusal(400, f"{len(body) - length} bytes after the JSON belong to no input; give it a binary_data_size")
    else:
        images = _from_base64(_typed(tensor.get("data"), list, "data"))
    if len(images) != count:
        raise Refusal(400, f"the shape says {count} images, and there are {len(images)}")
    options = dict(_typed(head.get("parameters", {}), dict, "parameters"))
    binary = options.pop("binary_data_output", False) is True
    name = head.get("id")
    return Inference(name if isinstance(name, str) else None, images, options, _wanted(head.get("outputs"), binary))


def write_response(
    model: str, version: str, request: Inference, scores: Sequence[float], records: Sequence[bytes]
) -> tuple[bytes, int | None]:
    """Return the body, and where its JSON ends if binary outputs follow."""
    tensors: list[dict[str, Any]] = []
    tail = b""
    for name, binary in request.outputs.items():
        tensor: dict[str, Any] = {"name": name, "datatype": OUTPUTS[name], "shape": [len(scores)]}
        if binary:
            packed = [struct.pack("<d", score) for score in scores]
            if name == "record":
                packed = [struct.pack("<I", len(record)) + record for record in records]
            data = b"".join(packed)
            tensor["parameters"] = {"binary_data_size": len(data)}
            tail += data
        else:
            tensor["data"] = list(scores) if name == "score" else [record.decode() for record in records]
        tensors.append(tensor)
    answer = {"model_name": model, "model_version": version, "outputs": tensors}
    head = json.dumps(answer | ({} if request.id is None else {"id": request.id}), allow_nan=False).encode()
    return head + tail, len(head) if tail else None


def metadata(name: str, info: Info) -> dict[str, Any]:
    """Return what a model takes and gives, and what its scores mean."""
    meaning = info.score
    shape = [-1]
    outputs = [{"name": output, "datatype": kind, "shape": shape} for output, kind in OUTPUTS.items()]
    about = {
        "meaning": meaning.meaning,
        "higher_is_better": meaning.higher_is_better,
        "minimum": meaning.minimum,
        "nominal_maximum": meaning.nominal_maximum,
        "trained": meaning.trained,
        "reference": meaning.reference.name if meaning.reference else None,
        "model": info.model,
        "backend": info.backend,
        "steps": info.steps,
        "crops": info.crop_count,
        "drift": info.drift,
    }
    inputs = [{"name": "image", "datatype": "BYTES", "shape": shape}]
    versions = {"name": name, "versions": [info.engine], "platform": "diffiqa"}
    return versions | {"inputs": inputs, "outputs": outputs, "parameters": about}


def _typed(value: Any, kind: type, name: str) -> Any:
    if isinstance(value, kind):
        return value
    raise Refusal(
        400, f"{name} must be {'an object' if kind is dict else 'a list'}, as the Open Inference Protocol says"
    )


def _exactly_one(inputs: list[Any]) -> list[Any]:
    if len(inputs) != 1:
        raise Refusal(400, f"there is one input, image; the request has {len(inputs)}")
    return inputs


def _count(shape: list[Any]) -> int:
    if not shape or not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**31 for n in shape[:4]):
        raise Refusal(400, "shape must be whole numbers from 1 on, as [2] for two images")
    if len(shape) > 4:
        raise Refusal(400, "shape must have one number, as [2] for two images")
    return math.prod(shape)


def _elements(data: bytes, count: int) -> tuple[bytes, ...]:
    """Take BYTES elements apart: each has its length before it, 32 bits, the lowest first."""
    found: list[bytes] = []
    at = 0
    while at < len(data) and len(found) <= count:
        end = at + 4 + int.from_bytes(data[at : at + 4], "little")
        if end > len(data) or at + 4 > len(data):
            raise Refusal(400, f"element {len(found)} of image is longer than the bytes that follow its length")
        found.append(data[at + 4 : end])
        at = end
    return tuple(found)


def _from_base64(data: list[Any]) -> tuple[bytes, ...]:
    try:
        return tuple(base64.b64decode(element, validate=True) for element in data)
    except (TypeError, ValueError, binascii.Error) as exc:
        raise Refusal(400, "without binary data, every element of image must be an image file as base64") from exc


def _wanted(outputs: Any, binary: bool) -> dict[str, bool]:
    if outputs is None:
        return dict.fromkeys(OUTPUTS, binary)
    wanted = {}
    for output in _typed(outputs, list, "outputs"):
        name = _typed(output, dict, "outputs").get("name")
        if not isinstance(name, str) or name not in OUTPUTS:
            raise Refusal(400, f"there is no output {one_line(repr(name), 40)}; there are {', '.join(OUTPUTS)}")
        wanted[name] = _typed(output.get("parameters", {}), dict, "parameters").get("binary_data", binary) is True
    return wanted
