"""What every benchmark in these tests measures beside the scores, at a size that takes no time."""

from collections.abc import Iterator

import pytest

from diffiqa.bench import ceilings

REAL_SIZES = {name: getattr(ceilings, name) for name in ("SIDE", "COPY_BYTES", "DEVICE_COPY_BYTES")}
SMALL = {"SIDE": 128, "COPY_BYTES": 2**20, "DEVICE_COPY_BYTES": 2**20}


@pytest.fixture(scope="session", autouse=True)
def _small_ceilings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, size in SMALL.items():
            patch.setattr(ceilings, name, size)
        yield
