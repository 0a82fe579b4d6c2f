"""Hundreds of mutated engine directories: each scores as before or is refused in words, and nothing else happens."""

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffiqa.engine.manifest import MANIFEST
from diffiqa.errors import DiffiqaError
from diffiqa.runtime.backends import OnnxRuntime
from diffiqa.runtime.results import Options
from diffiqa.runtime.scorer import load

from ..tiny import photo

WRONG: list[Any] = [
    None, True, -1, 0, 1, 7, 33, 2**31, 2**63, 10**400, 1e308, 0.5, "", "x", "../../x", "/dev/zero", "\x00", "é" * 3000,
    [], [[]], {}, {"a": 1}, [1] * 5000, "unet", "dis", ["dis", "y0"], "B", 10**9,
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a JSON tree."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found += places(item, (*path, key))
    return found


def mutate(data: Any, generator: random.Random) -> Any:
    """Return a copy with one to three values replaced, removed, repeated or renamed."""
    data = copy.deepcopy(data)
    for _ in range(generator.randint(1, 3)):
        *parents, last = generator.choice(places(data))
        at = data
        for key in parents:
            at = at[key]
        action = generator.choice(["replace", "replace", "replace", "remove", "repeat", "rename"])
        if action == "remove":
            del at[last]
        elif action == "repeat" and isinstance(at, list):
            at.append(copy.deepcopy(at[last]))
        elif action == "rename" and isinstance(at, dict):
            at[generator.choice(["x", "", "schema", last + "_"])] = at.pop(last)
        else:
            at[last] = generator.choice(WRONG)
    return data


@pytest.mark.parametrize("seed", range(4))
def test_mutated_manifests_score_or_are_refused(tiny_engine: Path, tmp_path: Path, seed: int) -> None:
    engine = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    original = json.loads((engine / MANIFEST).read_text())
    generator = random.Random(seed)  # noqa: S311 — mutations, not secrets
    picture = photo(1, 40, 40)
    refusals = []
    for _ in range(40):
        (engine / MANIFEST).write_text(json.dumps(mutate(original, generator)))
        try:
            with load(engine, OnnxRuntime(threads=1)) as scorer:
                scorer.score(picture, Options(crops=1))
        except DiffiqaError as exc:
            refusals.append(str(exc))
    assert all("\n" not in text and len(text) < 1000 for text in refusals), refusals
    assert len(refusals) > 20  # most mutations hurt; provenance and notes may say anything


def test_mutated_bytes_of_a_manifest_are_refused_or_harmless(tiny_engine: Path, tmp_path: Path) -> None:
    engine = Path(shutil.copytree(tiny_engine, tmp_path / "engine"))
    original = (engine / MANIFEST).read_bytes()
    generator = random.Random(0)  # noqa: S311
    refusals = []
    for _ in range(60):
        data = bytearray(original)
        start = generator.randrange(len(data))
        data[start : start + generator.randint(0, 4)] = generator.randbytes(generator.randint(0, 4))
        (engine / MANIFEST).write_bytes(data)
        try:
            load(engine, OnnxRuntime(threads=1)).close()
        except DiffiqaError as exc:
            refusals.append(str(exc))
    assert all("\n" not in text for text in refusals)
