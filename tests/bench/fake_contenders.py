"""Contenders that need no network: one that works, and one for every way to fail. Peers' processes import this."""

import os
import sys
import time

from diffiqa.bench.contenders import Ask, Ground, Missing, Score


def good(_ground: Ground) -> tuple[Score, str]:
    return truth, "fake 1.0"


def truth(ask: Ask) -> float:
    return 0.5 + 0.01 * ask.seed


def rounds_a_little(_ground: Ground) -> tuple[Score, str]:
    return lambda ask: truth(ask) + 1e-3, "fake 1.0"


def differs(_ground: Ground) -> tuple[Score, str]:
    return lambda ask: truth(ask) + 0.1, "fake 1.0"


def sways(_ground: Ground) -> tuple[Score, str]:
    """Differ from image to image by as much upwards as downwards."""
    return lambda ask: truth(ask) + (0.1 if ask.image.name == "a.png" else -0.1), "fake 1.0"


def no_number(_ground: Ground) -> tuple[Score, str]:
    return lambda _ask: float("nan"), "fake 1.0"


def missing(_ground: Ground) -> tuple[Score, str]:
    raise Missing("fake is not installed")


def refuses(_ground: Ground) -> tuple[Score, str]:
    raise ValueError("no such device\nand more")


def dies(_ground: Ground) -> tuple[Score, str]:
    def score(_ask: Ask) -> float:
        sys.stderr.write("terminate called\n")
        sys.stderr.flush()
        os._exit(7)

    return score, "fake 1.0"


def hangs(_ground: Ground) -> tuple[Score, str]:
    def score(_ask: Ask) -> float:
        time.sleep(600)
        return 0.0

    return score, "fake 1.0"
