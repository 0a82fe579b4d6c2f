"""Folders that are functions too: `diffiqa.bench(...)`, although `diffiqa.bench` is a folder of modules.

Python stores a folder under its name in the package as soon as one of its modules is imported. A function of that name
in `__init__.py` would be gone then. So the folder's own module can be called.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


def make_callable(room: str) -> None:
    """Let `diffiqa.ROOM(...)` call the function of that name in `ROOM/api.py`, which is imported at the first call."""

    class Room(ModuleType):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            return self.__wrapped__(*arguments, **options)

        @property
        def __wrapped__(self) -> Any:  # `help` and `inspect.signature` follow it
            name = self.__name__
            return getattr(importlib.import_module(f"{name}.api"), name.rpartition(".")[2])

    sys.modules[room].__class__ = Room
