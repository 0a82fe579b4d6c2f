"""The full-size networks, exported for real: `pytest -m slow`, two minutes and 5 GB of memory each."""

from pathlib import Path

import pytest

from diffiqa.engine.manifest import StageName, open_engine
from diffiqa.export.engine import export_engine
from diffiqa.model.checkpoint import load

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("preset", ["paper", "authors"])
def test_full_size_stages_agree_with_pytorch_and_have_the_published_size(preset: str, tmp_path: Path) -> None:
    manifest, _ = export_engine(load(None, preset=preset, seed=0), tmp_path / "engine")
    assert open_engine(tmp_path / "engine").manifest == manifest
    for stage in manifest.stages:
        for check in stage.checks:
            if check.output in {"noise", "score"}:
                assert check.max_abs_error <= 1e-4
    unet, vit = manifest.stage(StageName.UNET), manifest.stage(StageName.VIT)
    assert unet is not None
    assert vit is not None
    assert unet.macs / 1e9 == pytest.approx(143.6, abs=0.1)
    assert unet.parameters / 1e6 == pytest.approx(97.8, abs=0.1)
    assert vit.macs / 1e9 == pytest.approx(65.1, abs=0.1)
