"""Libraries of the extra `train`, which a machine that only scores images does not have."""

import importlib
from typing import Any

from ..errors import BackendError


def load_extra(module: str) -> Any:
    """Import a module of scipy or matplotlib. Raises BackendError, with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        library = module.partition(".")[0]
        raise BackendError(
            f"{library} cannot be loaded ({exc}); install it with: pip install 'diffiqa[train]'"
        ) from exc
