"""Every error that diffiqa raises on purpose. A command ends with the `exit_code` of its error.

DiffiqaError
├── ConfigError       a model configuration that cannot be built
├── CheckpointError   a weights file that cannot be read, or does not fit its configuration
├── EngineError       an engine directory that is missing, damaged, foreign or already there
├── ExportError       a stage that could not be exported, or disagrees with PyTorch
├── BackendError      a library that is missing, or refuses a stage
├── ImageError        one image that cannot be scored
├── OutputError       a result that cannot be written
├── UsageError        options that contradict each other
├── DatasetError      a data set, a split or a table of scores that cannot be used
└── TrainingError     (training/loop.py) a training run that cannot go on
"""

import enum
from typing import TypeVar

E = TypeVar("E", bound=enum.StrEnum)


class DiffiqaError(Exception):
    """Base of all errors meant for the user: the message says what, where, and what to do."""

    exit_code = 2


class ConfigError(DiffiqaError):
    """A model configuration that cannot be built."""


class CheckpointError(DiffiqaError):
    """A weights file that cannot be read, or does not fit its configuration."""


class EngineError(DiffiqaError):
    """An engine directory that is missing, damaged, foreign or already there."""


class ExportError(DiffiqaError):
    """A stage that could not be exported, or disagrees with PyTorch."""


class BackendError(DiffiqaError):
    """A library that is missing, or refuses a stage."""


class ImageError(DiffiqaError):
    """One image that cannot be scored."""

    exit_code = 1


class OutputError(DiffiqaError):
    """A result that cannot be written."""


class UsageError(DiffiqaError):
    """Options that contradict each other."""


class DatasetError(DiffiqaError):
    """A data set, a split or a table of scores that cannot be used."""


def member(kind: type[E], word: str) -> E:
    """Return the member of an enumeration of texts that a word names. Raises UsageError with those there are."""
    try:
        return kind(word)
    except ValueError:
        raise UsageError(f"{word!r} is none of {', '.join(kind)}") from None


def first_line(exc: BaseException) -> str:
    """Return the first line of another library's exception, to quote in ours; its type if it has no message."""
    return (str(exc).splitlines() or [type(exc).__name__])[0]


def one_line(text: str, longest: int = 200) -> str:
    """Return a text of other people as ours can quote it: short, on one line that can be printed."""
    line = " ".join(text.split())[:longest]
    return line if line.isprintable() else ascii(line)
