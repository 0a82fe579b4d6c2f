"""The weighted sum of the two branches' scores."""

from typing import Any, Protocol


class BranchWeights(Protocol):
    """The weights of the branches: a manifest's `ScoreMeaning`, or a model's configuration."""

    @property
    def vcg_weight(self) -> float:
        """The weight of the ViT branch."""

    @property
    def vda_weight(self) -> float:
        """The weight of the ResNet branch."""


def weighted_sum(weights: BranchWeights, vcg: Any | None, vda: Any | None) -> Any:
    """Return the weighted sum of the branches' scores: numbers, arrays or tensors.

    A branch that the model does not have is None. At least one is not.
    """
    parts = [
        weight * score for weight, score in ((weights.vcg_weight, vcg), (weights.vda_weight, vda)) if score is not None
    ]
    return sum(parts[1:], start=parts[0])
