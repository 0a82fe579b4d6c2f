"""Contenders that need no network: one that works, and one for every way to fail. Peers' processes import this."""

import os
import sys
import time
from pathlib import Path

from diffiqa.bench.contenders import Ground, Missing, Score
from diffiqa.runtime.results import Options


def good(_ground: Ground) -> tuple[Score, str]:
    return truth, "fake 1.0"


def truth(_image: Path, options: Options) -> float:
    return 0.5 + 0.01 * options.seed


def rounds_a_little(_ground: Ground) -> tuple[Score, str]:
    return lambda image, options: truth(image, options) + 1e-3, "fake 1.0"


def differs(_ground: Ground) -> tuple[Score, str]:
    return lambda image, options: truth(image, options) + 0.1, "fake 1.0"


def sways(_ground: Ground) -> tuple[Score, str]:
    """Differ from image to image by as much upwards as downwards."""
    return lambda image, options: truth(image, options) + (0.1 if image.name == "a.png" else -0.1), "fake 1.0"


def no_number(_ground: Ground) -> tuple[Score, str]:
    return lambda _image, _options: float("nan"), "fake 1.0"


def missing(_ground: Ground) -> tuple[Score, str]:
    raise Missing("fake is not installed")


def refuses(_ground: Ground) -> tuple[Score, str]:
    raise ValueError("no such device\nand more")


def dies(_ground: Ground) -> tuple[Score, str]:
    def score(_image: Path, _options: Options) -> float:
        sys.stderr.write("terminate called\n")
        sys.stderr.flush()
        os._exit(7)

    return score, "fake 1.0"


def hangs(_ground: Ground) -> tuple[Score, str]:
    def score(_image: Path, _options: Options) -> float:
        time.sleep(600)
        return 0.0

    return score, "fake 1.0"
