"""What runs in these tests leave out."""

import pytest


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing its chart takes longer than a run of a few steps: test_plot draws, and a run of each other kind."""
    for module in ("start", "pfd"):
        monkeypatch.setattr(f"diffiqa.training.{module}.write_plot", lambda _folder: None)
