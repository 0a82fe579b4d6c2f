"""Steps for `gpu-check` that go wrong, each in its own way; `python -m …faulty_steps DIR [LIMIT]` runs them."""

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from diffiqa.figures.gpu import check
from diffiqa.figures.gpu.check import Notes, Place, Step

NAMES = ("wrong", "fails", "crashes", "hangs", "is_fine")


def wrong(_place: Place, notes: Notes) -> None:
    notes.add(found=1)
    notes.attempt("one figure less", lambda: 1 // 0)
    notes.check("bits of a graph", [1, 2] == [1, 3], "they differ")


def fails(_place: Place, notes: Notes) -> None:
    notes.add(found=1)
    raise RuntimeError("on purpose")


def crashes(_place: Place, notes: Notes) -> None:
    notes.add(found=1)
    ctypes.string_at(8)


def hangs(_place: Place, notes: Notes) -> None:
    notes.add(found=1)
    child = subprocess.Popen(["sleep", "1000"])
    Path(os.environ["CHILD"]).write_text(str(child.pid))
    child.wait()


def is_fine(_place: Place, notes: Notes) -> None:
    notes.check("it ran", ok=True)


if __name__ == "__main__":
    out, limit = Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 100.0
    check.variables = lambda place: os.environ | {"CHILD": str(out / "child")}  # no compiler, no caches
    steps = [Step(name, 0 if name == "hangs" else 5, "", module="diffiqa.tests.figures.faulty_steps") for name in NAMES]
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(check.run_all(steps, Place("cuda", False, out, Path(folder), None), out, limit))
