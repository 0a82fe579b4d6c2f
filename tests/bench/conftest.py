"""What every benchmark in these tests measures beside the scores, at a size that takes no time."""

from collections.abc import Iterator

import pytest

from diffiqa.bench import ceilings


@pytest.fixture(scope="session", autouse=True)
def _small_ceilings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ceilings, "SIDE", 128)
        for name in ("COPY_BYTES", "DEVICE_COPY_BYTES"):
            patch.setattr(ceilings, name, 2**20)
        yield
