"""Print the variables of a MATLAB 5 file as JSON: `python matfile.py FILE`.

`labelfiles.read_mat` runs this as a process of its own: some damaged files make SciPy's reader crash (1.17.1, a
segmentation fault), and a crash ends the process.
"""

import json
import sys
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt


def flat(value: npt.NDArray[Any]) -> Any:
    """Return numbers as a list, char arrays as text, cells as a list of such values, anything else as None."""
    values = value.ravel(order="F")
    if values.dtype.kind == "O":
        return [flat(cell) for cell in values]
    if values.dtype.kind == "U":
        return "".join(values)
    return values.tolist() if values.dtype.kind in "biuf" else None


def read(path: str) -> dict[str, Any]:
    """Return the variables of a file, without those of other kinds. Raises ValueError if it is damaged."""
    from scipy.io import loadmat

    try:
        with warnings.catch_warnings(action="error"):  # SciPy warns of variables that it cannot read
            variables = loadmat(path)
            values = {name: flat(value) for name, value in variables.items() if isinstance(value, np.ndarray)}
    except Exception as exc:  # a damaged file ends in one of a dozen types
        raise ValueError(f"{type(exc).__name__}: {exc}") from exc
    return {name: value for name, value in values.items() if value is not None}


def main(path: str) -> None:
    """Print one JSON object. What is wrong with the file ends in a line on stderr and exit code 1."""
    try:
        json.dump(read(path), sys.stdout)
    except ValueError as exc:
        sys.exit(str(exc))


if __name__ == "__main__":
    main(sys.argv[1])
