"""The weighted sum: each weight goes with its own branch, and a branch that is not there counts nothing."""

from types import SimpleNamespace

import pytest

from diffiqa.engine.score import weighted_sum

WEIGHTS = SimpleNamespace(vcg_weight=0.5, vda_weight=1.5)


@pytest.mark.parametrize(
    ("vcg", "vda", "total"), [(2.0, 4.0, 7.0), (2.0, None, 1.0), (None, 4.0, 6.0)], ids=["both", "VCG", "VDA"]
)
def test_each_branch_counts_with_its_weight(vcg: float | None, vda: float | None, total: float) -> None:
    assert weighted_sum(WEIGHTS, vcg, vda) == total
