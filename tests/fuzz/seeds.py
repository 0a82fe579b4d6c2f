"""A few whole inputs for each reader, for the fuzzer to start from."""

import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
Seeds = list[bytes]


def _images() -> Seeds:
    from diffiqa.tests.runtime.test_images_fuzz import samples

    return list(samples().values())


def _manifests() -> Seeds:
    return [path.read_bytes() for path in sorted((ROOT / "tests/engine/manifests").glob("**/*.json"))[:4]]


def _self_tests() -> Seeds:
    picture = {"png": "iVBORw0KGgo=", "answers": {"score": 0.5}}
    test = {"schema": 1, "engine": "0" * 16, "steps": 3, "span": 1.0, "tolerances": {"fp32": 1e-4}}
    return [json.dumps({**test, "pictures": [picture]}).encode()]


def _precision_plans() -> Seeds:
    kept = {"node": "n", "op": "Conv", "why": "it must"}
    stage = {"name": "unet", "onnx_sha256": "0" * 64, "tensors": {"y": "float16"}, "float32": [kept]}
    return [json.dumps({"schema": 1, "precision": "fp16", "stages": [stage]}).encode()]


def _labels() -> Seeds:
    return [b"image,score\na.png,0.5\nb.png,1e3\n", "image,score,std,reference\nä.png,3,0.1,r\n".encode()]


def _weights() -> Seeds:
    """Return safetensors, and both of torch's forms."""
    import safetensors.torch
    import torch

    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2, 2)}
    files = [safetensors.torch.save(tensors)]
    with tempfile.TemporaryDirectory() as folder:
        for zipped in (True, False):
            path = Path(folder, f"{zipped}.pt")
            torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
            files.append(path.read_bytes())
    return files


def _pickles() -> Seeds:
    with zipfile.ZipFile(io.BytesIO(_weights()[1])) as archive:
        return [archive.read("True/data.pkl")]


def _indexes() -> Seeds:
    return [b'{"metadata": {}, "weight_map": {"a.weight": "model-00001-of-00002.safetensors"}}']


def _options() -> Seeds:
    return [b'swin-scale = 0.13\nscore-range = [0, 100]\nbetter = "higher"\ntaps = "5,2"\nmean = 0.5\n']


def _prompts() -> Seeds:
    stream = io.BytesIO()
    np.save(stream, np.ones((16, 4), np.float32))
    return [stream.getvalue()]


def _statistics() -> Seeds:
    sample = {"name": "a.png", "digest": "0" * 16, "seed": 0}
    header = {"schema": 1, "engine": "0" * 16, "samples": [sample], "tensors": {"unet": ["a"]}, "steps": {"unet": 1}}
    stream = io.BytesIO()
    np.savez_compressed(stream, header=np.zeros(2, np.uint8))
    return [json.dumps(header).encode(), stream.getvalue()]


def _records() -> Seeds:
    from diffiqa.runtime.command.records import document
    from diffiqa.tests.runtime.command.test_recordfile import FILE_FORMATS, failed, scored

    jsonl, csv, json_ = (b"".join(document([scored("a.png"), failed("b.png")], form)) for form in FILE_FORMATS)
    return [bytes([number]) + file for number, file in enumerate([jsonl, csv, json_, jsonl, jsonl])]


def _shard_plans() -> Seeds:
    names = {"count": 2, "duplicates": 0, "shard_size": 2, "sha256": "0" * 64, "starts": [0, 31]}
    plan = {"version": 1, "engine": "e", "settings": "s", "max_pixels": None, "form": "jsonl", "backend": "b"}
    return [json.dumps(plan | {"names": names}).encode() + b'\n"a.png"\n["b.tar#b.png", 0, 9]\n']


def _shards() -> Seeds:
    return [_records()[0][1:]]


def _requests() -> Seeds:
    from .site import requests

    return requests()


SEEDS: dict[str, Callable[[], Seeds]] = {
    "image": _images,
    "manifest": _manifests,
    "self-test": _self_tests,
    "plan": _precision_plans,
    "labels": _labels,
    "weights": _weights,
    "pickle": _pickles,
    "index of shards": _indexes,
    "options": _options,
    "prompts": _prompts,
    "statistics": _statistics,
    "records": _records,
    "shard plan": _shard_plans,
    "shard": _shards,
    "request": _requests,
}
