"""How the scores of the two branches become one."""

from typing import Any, Protocol


class BranchWeights(Protocol):
    """What says how much each branch counts: a manifest's `ScoreMeaning`, or a model's configuration."""

    @property
    def vcg_weight(self) -> float:
        """How much the ViT branch counts."""

    @property
    def vda_weight(self) -> float:
        """How much the ResNet branch counts."""


def weighted_sum(weights: BranchWeights, vcg: Any | None, vda: Any | None) -> Any:
    """Return the weighted sum of the branches' scores: numbers, arrays or tensors, whichever they are.

    A branch that the model does not have is None; at least one is there.
    """
    parts = [
        weight * score for weight, score in ((weights.vcg_weight, vcg), (weights.vda_weight, vda)) if score is not None
    ]
    return sum(parts[1:], start=parts[0])
