"""A PFD-IQA network that computes in milliseconds, with an encoder of either kind."""

from dataclasses import replace

from diffiqa.model.pfd.config import PFD_PAPER, Backbone, Words

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
