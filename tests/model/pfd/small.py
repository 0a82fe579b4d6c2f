"""A PFD-IQA network that computes in milliseconds, with an encoder of either kind."""

from dataclasses import replace

from diffiqa.engine.manifest import Source
from diffiqa.model.pfd.checkpoint import LoadedPfd
from diffiqa.model.pfd.config import PFD_PAPER, Backbone, PfdConfig, Words
from diffiqa.model.pfd.network import build

from ..comparing import randomised

SMALL = replace(
    PFD_PAPER,
    name="small",
    width=16,
    crop=64,
    blocks=2,
    heads=2,
    mlp_ratio=2,
    words=Words(("blur", "noise", "color"), ("bad", "good")),
    prompt_width=10,
    temperature=4.0,
    panels=3,
    adapter_reduction=4,
    groups=2,
)
LITE0 = replace(SMALL, encoder=Backbone.LITE0)
LITE2 = replace(SMALL, encoder=Backbone.LITE2)


def random_small(config: PfdConfig = SMALL, seed: int = 0) -> LoadedPfd:
    """A float32 model of random weights that say something, as if it were trained."""
    model = randomised(build(config, 0), seed).float()
    return LoadedPfd(model, (Source("bundle", "small.safetensors", 1, "0" * 64, "diffiqa bundle"),), ())
