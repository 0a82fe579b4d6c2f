"""What runs in these tests leave out."""

import pytest


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing its chart takes longer than a run of a few steps: test_plot draws, and so do the runs of test_ablate."""
    monkeypatch.setattr("diffiqa.training.start.write_plot", lambda _folder: None)
