"""The description of the service in OpenAPI 3.1, for programs that make clients of it."""

import types
import typing
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from .. import __version__
from ..runtime.command.records import Record
from ..runtime.results import Mode
from .limits import MAX_LOOKS, MAX_SEEDS, Limits

_JSON = "application/json"
_NAMES = {
    str: "string",
    int: "integer",
    float: "number",
    bool: "boolean",
    type(None): "null",
    tuple: "array",
    dict: "object",
}
_REASONS = {
    "400": "A body that is no form, or no inference request.",
    "401": "The service needs a token.",
    "404": "No such engine or version.",
    "408": "The body did not arrive in time.",
    "413": "Too many bytes or images.",
    "415": "A compressed body.",
    "422": "An option or an image that cannot be used.",
    "429": "This client has too many images in the queue.",
    "503": "The queue is full, time is over, or the service starts or ends. Retry-After says when to try again.",
}


def description(limits: Limits, engines: Sequence[str]) -> dict[str, Any]:
    """Return the whole document of a service that has these engines."""
    record = {"$ref": "#/components/schemas/Record"}
    image = {"schema": {"type": "string", "format": "binary"}}
    files = {"type": "object", "additionalProperties": {"type": "string", "format": "binary"}}
    scored = {
        "description": "One record for an image as body, a list for a form. JSONL has one record on each line.",
        "content": {
            _JSON: {"schema": {"oneOf": [record, {"type": "array", "items": record}]}},
            "application/jsonl": {"schema": {"type": "string"}},
        },
    }
    post = {
        "summary": "Score images",
        "description": f"An image file as body, or up to {limits.images} as files of a form.",
        "parameters": [
            {"name": name, "in": "query", "schema": schema} for name, schema in _options(limits, engines).items()
        ],
        "requestBody": {"required": True, "content": {"image/*": image, "multipart/form-data": {"schema": files}}},
        "responses": {"200": scored, **_errors(*_REASONS)},
    }
    name = {"name": "name", "in": "path", "required": True, "schema": {"enum": list(engines)}}
    elements = {"type": "array", "items": {"type": "string", "contentEncoding": "base64"}}
    tensor = {
        "name": {"const": "image"},
        "datatype": {"const": "BYTES"},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 1}},
        "data": elements,
    }
    image_tensor = {"type": "object", "required": ["name", "datatype", "shape"], "properties": tensor}
    inputs = {"type": "array", "items": image_tensor, "minItems": 1, "maxItems": 1}
    tensors = {"type": "object", "required": ["inputs"], "properties": {"inputs": inputs}}
    inference = {
        "summary": "Score images by the Open Inference Protocol, version 2",
        "parameters": [name],
        "requestBody": {"required": True, "content": {_JSON: {"schema": tensors}}},
        "responses": {"200": _ok("The outputs score and record."), **_errors(*_REASONS)},
    }
    paths = {
        "/score": {"post": post},
        "/v2/models/{name}/infer": {"post": inference},
        "/v2/models/{name}": {"get": _get("What a model takes and gives, what its scores mean", name)},
        "/v2/models/{name}/ready": {"get": _get("Whether a model can score", name)},
        "/v2": {"get": _get("What this is, and its models")},
        "/v2/health/live": {"get": _get("Whether the process answers")},
        "/v2/health/ready": {"get": _get("Whether every engine has given a score")},
        "/metrics": {"get": {"summary": "Counters for Prometheus", "responses": {"200": {"description": "Text."}}}},
    }
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "diffiqa", "version": __version__, "summary": "Image quality scores without a reference."},
        "paths": paths,
        "components": {
            "schemas": {"Record": _record(), "Error": error},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"token": []}],
    }


def _options(limits: Limits, engines: Sequence[str]) -> dict[str, dict[str, Any]]:
    def whole(least: int, most: int) -> dict[str, Any]:
        return {"type": "integer", "minimum": least, "maximum": most}

    return {
        "engine": {"enum": list(engines)},
        "format": {"enum": ["json", "jsonl"]},
        "name": {"type": "string"},
        "crops": whole(1, MAX_LOOKS),
        "seed": whole(0, 2**64 - 1),
        "seeds": whole(1, MAX_SEEDS),
        "mode": {"enum": [mode.value for mode in Mode]},
        "steps": whole(1, 2**31),
        "sampler": {"type": "string"},
        "fast": {"type": "boolean"},
        "pixel_budget": whole(2**16, limits.pixel_budget),
    }


def _ok(what: str) -> dict[str, Any]:
    return {"description": what, "content": {_JSON: {"schema": {"type": "object"}}}}


def _get(summary: str, *parameters: dict[str, Any]) -> dict[str, Any]:
    errors = _errors("401", "404", "503") if parameters else _errors("401", "503")
    return {"summary": summary, "parameters": list(parameters), "responses": {"200": _ok(summary), **errors}}


def _errors(*statuses: str) -> dict[str, Any]:
    schema = {_JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": _REASONS[status], "content": schema} for status in statuses}


def _record() -> dict[str, Any]:
    """Return the schema of a record, from its own fields."""
    properties = {}
    for field in fields(Record):
        kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
        names = [_NAMES.get(kind) or _NAMES.get(typing.get_origin(kind), "string") for kind in kinds]
        properties[field.name] = {"type": names if len(names) > 1 else names[0]}
    return {"type": "object", "properties": properties, "required": ["image", "status", "engine", "settings"]}
