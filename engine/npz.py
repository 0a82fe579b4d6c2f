"""Files of NumPy's arrays, read so that nothing in them is executed."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import first_line


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a `.npz` file by name; that of a `.npy` file has none. Raises OSError, ValueError."""
    try:
        with path.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            return {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except OSError:
        raise
    except Exception as exc:  # of a damaged file NumPy passes on what tokenize, zlib, zipfile and the allocator raise
        raise ValueError(first_line(exc)) from exc
