"""All inputs and outputs of a verification in a folder, to judge them again without a run.

verify.json     which engines were compared, the seed, the images, and the figures of the whole run
0001.npz …      one for each image: its pixels, both traces, and the candidate's answers to the reference's inputs
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.atomic import writing
from ..engine.codec import decode, encode
from ..engine.manifest import Manifest
from ..engine.npz import read_arrays
from ..errors import OutputError, UsageError, first_line
from .compare import Subject
from .figures import Findings, RunFigures, image_figures
from .sides import Party
from .trace import Answers, Trace

SCHEMA = 1
INDEX = "verify.json"
_ADVICE = "; make room, or save elsewhere"


@dataclass(frozen=True)
class _Entry:
    name: str
    digest: str  # SHA-256 of the pixels


@dataclass(frozen=True)
class _Index:
    schema: int
    reference: Party
    candidate: Party
    engine: str  # id of the candidate's engine, without its plan
    manifest: Any  # of the candidate: it has the weights of the branches
    quantile: float
    seed: int
    asked: int
    images: tuple[_Entry, ...]
    loop: RunFigures


class Store:
    """Writes a folder, image by image; `read_saved` takes it after `finish`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._images: list[_Entry] = []
        try:
            folder.mkdir(exist_ok=True)
            if any(folder.iterdir()):
                raise OutputError(f"{folder} is not empty; give --save a new folder")
        except OSError as exc:
            raise OutputError(f"cannot write {folder}: {exc.strerror or exc}; choose another --save DIR") from exc

    def add(self, subject: Subject, reference: Trace, candidate: Trace, answers: Answers | None) -> None:
        """Write all that was computed for one image."""
        name = f"{len(self._images) + 1:04d}.npz"
        parts = {"reference": reference, "candidate": candidate, "answers": answers}
        arrays: dict[str, Any] = {"image": subject.plane}
        arrays |= {
            f"{part}.{f.name}": getattr(data, f.name) for part, data in parts.items() if data for f in fields(data)
        }
        with writing(self._folder / name, _ADVICE) as stream:
            np.savez(stream, **arrays)
        self._images.append(_Entry(subject.name, subject.digest))

    def finish(self, findings: Findings, manifest: Manifest) -> None:
        """Write the index. It comes last: a folder without one is unfinished."""
        index = _Index(
            SCHEMA,
            findings.reference,
            findings.candidate,
            manifest.engine_id,
            json.loads(manifest.to_json()),
            findings.quantile,
            findings.seed,
            findings.asked,
            tuple(self._images),
            findings.loop,
        )
        with writing(self._folder / INDEX, _ADVICE) as stream:
            stream.write(json.dumps(encode(index), indent=2, ensure_ascii=False).encode() + b"\n")


def read_saved(folder: Path, quantile: float | None = None) -> tuple[Findings, str]:
    """Measure saved results again; return them with the id of the candidate's engine. Raises UsageError."""
    path = folder / INDEX

    def damaged(message: str) -> UsageError:
        return UsageError(f"{path} is not what iqa-verify --save writes: {message}; save again")

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as exc:
        raise UsageError(f"{folder} holds no (finished) saved results: {INDEX} is missing; save again") from exc
    except OSError as exc:
        raise UsageError(f"cannot read {path}: {exc.strerror or exc}") from exc
    except (ValueError, RecursionError) as exc:
        raise damaged(first_line(exc)) from exc
    index = decode(_Index, data, "verify", damaged)
    if index.schema != SCHEMA:
        raise damaged(f"it has schema version {index.schema}, this diffiqa reads version {SCHEMA}")
    if not index.images:
        raise damaged("it has no images")
    manifest = decode(Manifest, index.manifest, "verify.manifest", damaged)
    if manifest.engine_id != index.engine:
        raise damaged("its manifest is of another engine")
    chosen = index.quantile if quantile is None else quantile
    try:
        images = tuple(
            image_figures(manifest, name, reference, candidate, answers, chosen)
            for name, reference, candidate, answers in _traces(folder, index)
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as exc:
        raise UsageError(f"saved results in {folder} are damaged ({first_line(exc)}); save again") from exc
    score = manifest.score
    findings = Findings(
        index.reference,
        index.candidate,
        manifest.model_name,
        score.trained,
        score.nominal_maximum - score.minimum,
        chosen,
        index.seed,
        images,
        index.asked,
        index.loop,
    )
    return findings, index.engine


def _traces(folder: Path, index: _Index) -> Iterator[tuple[str, Trace, Trace, Answers | None]]:
    for number, entry in enumerate(index.images, 1):
        arrays = read_arrays(folder / f"{number:04d}.npz")
        traces = [
            Trace(**{f.name: arrays[f"{part}.{f.name}"] for f in fields(Trace)}) for part in ("reference", "candidate")
        ]
        answers = None
        if "answers.noise" in arrays:
            answers = Answers(**{f.name: arrays[f"answers.{f.name}"] for f in fields(Answers)})
        yield entry.name, traces[0], traces[1], answers
