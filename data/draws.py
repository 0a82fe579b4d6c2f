"""Random numbers that depend on a seed and on what they are for, never on what was drawn before."""

import enum

import numpy as np


@enum.unique
class Purpose(enum.IntEnum):
    """What numbers are drawn for. They are part of every result: none is ever reused for something else."""

    DATA = 1
    DROPOUT = 2
    EPOCH = 3  # the order of elements in it
    VALIDATION = 4
    WINDOW = 20  # of a photograph
    KINDS = 21  # of distortion, in which order
    DISTORTION = 22  # what is random in it
    LEVEL = 23


def generator(seed: int, purpose: Purpose, step: int, index: int = 0) -> np.random.Generator:
    """Return the generator of all that is random for one purpose at one place of one step."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, step, index)))
