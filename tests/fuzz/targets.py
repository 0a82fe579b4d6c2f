"""What is fuzzed: readers of untrusted files. `python -m diffiqa.tests.fuzz.targets NAME SECONDS FOLDER` fuzzes one.

An input is bytes. A reader may return, or raise an error of ours; anything else is a find, and so is an input that
takes more than a few seconds. FOLDER gets one file for each kind of find. A find is fixed, and gets a test beside the
reader's others.
"""

import contextlib
import hashlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from diffiqa.errors import DiffiqaError

ROOT = Path(__file__).parent.parent.parent
SLOW = 5.0  # seconds that no input may take
Reader = Callable[[bytes, Path], object]  # bytes, and a file to put them into where the reader wants one


def _image(data: bytes, _file: Path) -> None:
    from diffiqa.runtime.images import read_image

    read_image(data, min_side=1, max_pixels=1_000_000)


def _manifest(data: bytes, file: Path) -> None:
    from diffiqa.engine.manifest import MANIFEST, read_manifest

    file.with_name(MANIFEST).write_bytes(data)
    read_manifest(file.parent)


def _self_test(data: bytes, _file: Path) -> None:
    from diffiqa.runtime.selftest import parse_self_test

    parse_self_test(data, Path("self-test.json"))


def _plan(data: bytes, file: Path) -> None:
    from diffiqa.export.precision import read_plan

    file.write_bytes(data)
    read_plan(file)


def _labels(data: bytes, file: Path) -> None:
    from diffiqa.data.datasets import load_csv

    file.write_bytes(data)
    load_csv(file, need_files=False)


def _weights(data: bytes, file: Path) -> None:
    from diffiqa.model.weightfile import read

    file.write_bytes(data)
    read(file)


def _records(data: bytes, file: Path) -> None:
    from diffiqa.runtime.command.recordfile import read_records
    from diffiqa.runtime.command.records import Format

    file.write_bytes(data[1:])
    read_records(file, (Format.JSONL, Format.CSV, Format.JSON)[data[0] % 3 if data else 0])


TARGETS: dict[str, Reader] = {
    "image": _image,
    "manifest": _manifest,
    "self-test": _self_test,
    "plan": _plan,
    "labels": _labels,
    "weights": _weights,
    "records": _records,
}


def seeds(name: str) -> list[bytes]:
    """Return a few whole inputs to start from."""
    if name == "image":
        from diffiqa.tests.runtime.test_images_fuzz import samples

        return list(samples().values())
    if name == "manifest":
        return [path.read_bytes() for path in sorted((ROOT / "tests/engine/manifests").glob("**/*.json"))[:4]]
    if name == "self-test":
        picture = {"png": "iVBORw0KGgo=", "answers": {"score": 0.5}}
        test = {"schema": 1, "engine": "0" * 16, "steps": 3, "span": 1.0, "tolerances": {"fp32": 1e-4}}
        return [json.dumps({**test, "pictures": [picture]}).encode()]
    if name == "plan":
        stage = {"name": "unet", "onnx_sha256": "0" * 64, "float32": [], "tensors": {"y": "float16"}}
        return [json.dumps({"schema": 1, "engine": "0" * 16, "precision": "fp16", "stages": [stage]}).encode()]
    if name == "labels":
        return [b"name,score\na.png,0.5\nb.png,1e3\n", "name,mos,std\nä.png,3,0.1\n".encode()]
    if name == "weights":
        return _weight_files()
    from diffiqa.runtime.command.records import document
    from diffiqa.tests.runtime.command.test_recordfile import FILE_FORMATS, failed, scored

    records = [scored("a.png"), failed("b.png")]
    return [bytes([i]) + b"".join(document(records, form)) for i, form in enumerate(FILE_FORMATS)]


def _weight_files() -> list[bytes]:
    import safetensors.torch
    import torch

    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2, 2)}
    with tempfile.TemporaryDirectory() as folder:
        for zipped in (True, False):
            torch.save(tensors, Path(folder, f"{zipped}.pt"), _use_new_zipfile_serialization=zipped)
        made = [path.read_bytes() for path in Path(folder).iterdir()]
    return [safetensors.torch.save(tensors), *made]


def tried(read: Reader, data: bytes, file: Path, finds: Path) -> None:
    """Give a reader an input; write down what should not be."""
    start = time.monotonic()
    kind = text = ""
    try:
        read(data, file)
    except DiffiqaError as exc:
        kind = "" if str(exc).strip() else "silent"
    except Exception as exc:
        place = traceback.extract_tb(exc.__traceback__)[-1]
        kind, text = f"{type(exc).__name__} {place.filename}:{place.lineno}", traceback.format_exc()
    if not kind and time.monotonic() - start > SLOW:
        kind = "slow"
    found = finds / f"{'slow' if kind == 'slow' else 'traceback'}-{hashlib.sha256(kind.encode()).hexdigest()[:12]}"
    if kind and not found.with_suffix(".txt").exists():
        found.with_suffix(".txt").write_text(f"{kind}\n{text}", encoding="utf-8")
        found.with_suffix(".bin").write_bytes(data)


def main() -> None:
    """Fuzz one target."""
    import atheris

    name, seconds, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    finds, corpus = folder / "finds", folder / "corpus"
    for needed in (finds, corpus):
        needed.mkdir(parents=True, exist_ok=True)
    read = TARGETS[name]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as work:  # noqa: S108
        file = Path(work) / "input"
        with atheris.instrument_imports(include=["diffiqa"]), contextlib.suppress(DiffiqaError):
            read(b"", file)  # imports what it needs
        for number, seed in enumerate(seeds(name)):
            (corpus / str(number)).write_bytes(seed)
        options = [f"-max_total_time={seconds}", "-print_final_stats=1", "-timeout=60", "-rss_limit_mb=4096"]
        options += ["-max_len=20000", f"-artifact_prefix={finds}/", "-verbosity=1"]
        atheris.Setup([sys.argv[0], str(corpus), *options], lambda data: tried(read, data, file, finds))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
