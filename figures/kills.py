"""Kills iqa-run and iqa-export at 100 random moments each: `python figures/kills.py ENGINE [TIMES]`.

ENGINE is one of the tiny model of the tests. `tests/crash/kills.py` says what is done and what must be left.
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image
from record import write

from diffiqa.tests.crash.kills import as_dict, kill_exports, kill_runs
from diffiqa.tests.tiny import photo


def main() -> None:
    """Kill, and write figures/results/kills.json."""
    engine, times = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100
    with tempfile.TemporaryDirectory() as folder:
        images = [str(Path(folder, f"{seed}.png")) for seed in range(40)]
        for seed, image in enumerate(images):
            Image.fromarray(photo(seed, 32, 32)).save(image)
        runs = kill_runs(engine, images, Path(folder), times)
        exports = kill_exports(engine, Path(folder), times)
    write("kills", {"run": as_dict(runs), "export": as_dict(exports)})


if __name__ == "__main__":
    main()
