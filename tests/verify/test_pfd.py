"""PFD-IQA verified: every step beside PyTorch, a fault in one stage, results saved and judged again."""

from collections.abc import Callable
from pathlib import Path

import PIL.Image
import pytest
import torch

from diffiqa.errors import UsageError
from diffiqa.model.bundle import save_bundle
from diffiqa.model.pfd.checkpoint import PfdBundle
from diffiqa.model.pfd.network import PfdIQA
from diffiqa.runtime.results import Options
from diffiqa.verify import api
from diffiqa.verify.scores import compare_scores

from ..model.pfd.small import SMALL, random_small
from ..tiny import photo


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    names = [str(tmp_path / f"{seed}.png") for seed in (1, 2)]
    for seed, name in enumerate(names):
        PIL.Image.fromarray(photo(seed, 80, 90)).save(name)
    return names


def checkpoint(path: Path, change: Callable[[PfdIQA], object] = lambda model: None) -> Path:
    model = random_small().model
    with torch.no_grad():
        change(model)
    save_bundle(model, path, kind=PfdBundle)
    return path


def test_an_engine_agrees_with_its_checkpoint_step_by_step(pfd_engine: Path, images: list[str], tmp_path: Path) -> None:
    against, saved = checkpoint(tmp_path / "small.safetensors"), tmp_path / "saved"
    found = api.verify(
        pfd_engine, images, against=against, any_weights=True, options=Options(seeds=2, crops=2), save=saved
    )
    assert found.within, [check for check in found.checks if not check.within]
    for image in found.findings.images:
        steps = len(SMALL.schedule.timesteps)
        assert len(image.forced) == len(image.state) == len(image.noise) == steps
        assert max(step.max for step in image.forced) < 1e-4
        assert image.scores["score"][0] == pytest.approx(image.scores["score"][1], abs=1e-4)
    assert found.findings.loop.spread
    assert (found.findings.loop.batch or {})["denoiser"] < 1e-5
    again = api.verify_saved(saved, engine=pfd_engine)
    assert [check.value for check in again.checks] == [check.value for check in found.checks]


@pytest.mark.parametrize(
    ("change", "beyond"),
    [
        (lambda model: model.denoiser.out.weight.mul_(1.02), "unet-max"),
        (lambda model: model.denoiser.time.weight[300].add_(0.3), "unet-max"),
        (lambda model: model.decoder.head.weight.mul_(1.05), "score"),
    ],
)
def test_a_fault_in_a_stage_is_found(
    pfd_engine: Path, images: list[str], tmp_path: Path, change: Callable[[PfdIQA], object], beyond: str
) -> None:
    against = checkpoint(tmp_path / "small.safetensors", change)
    found = api.verify(pfd_engine, images, against=against, any_weights=True, options=Options(seeds=1, crops=1))
    wrong = {check.name for check in found.checks if not check.within}
    assert beyond in wrong


def test_scores_of_another_program_are_not_compared(pfd_engine: Path, images: list[str], tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text("name,score\n1.png,0.5\n2.png,0.4\n")
    with pytest.raises(UsageError, match="no other program"):
        compare_scores(pfd_engine, images, tmp_path / "scores.csv")
