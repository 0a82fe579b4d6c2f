"""The order in which records are shown, and the best and worst of them."""

import enum
import math
from collections.abc import Iterable
from typing import Any

from .records import Record, Status


class Sort(enum.StrEnum):
    """What results are sorted by."""

    SCORE = "score"
    NAME = "name"
    VCG = "vcg"
    VDA = "vda"
    SPREAD = "spread"
    TIME = "time"


_FIELDS = {Sort.NAME: "image", Sort.TIME: "seconds"}  # the other fields have the names that are sorted by


def arrange(
    records: Iterable[Record],
    sort: Sort | None = None,
    *,
    descending: bool = False,
    top: int | None = None,
    bottom: int | None = None,
) -> list[Record]:
    """Return records in order: first those with a value, then those without, then errors. Equal ones keep their order.

    `top` and `bottom` keep the records with the highest and the lowest values of what is sorted by; of the score,
    where that is nothing or the name. Without `sort`, the highest come first; with `bottom` alone, the lowest.
    """
    records = list(records)
    if top is not None or bottom is not None:
        by = Sort.SCORE if sort in {None, Sort.NAME} else sort
        rising = [record for record in _sorted(records, by, descending=False) if _value(record, by) is not None]
        falling = _sorted(rising, by, descending=True)
        chosen = {id(record) for record in falling[: top or 0] + rising[: bottom or 0]}
        records = [record for record in records if id(record) in chosen]
        if sort is None:
            return _sorted(records, by, descending=top is not None)
    return records if sort is None else _sorted(records, sort, descending=descending)


def _sorted(records: list[Record], sort: Sort, *, descending: bool) -> list[Record]:
    valued = [record for record in records if _value(record, sort) is not None]
    valued.sort(key=lambda record: _value(record, sort), reverse=descending)
    others = [record for record in records if _value(record, sort) is None]
    return valued + sorted(others, key=lambda record: record.status is Status.ERROR)


def _value(record: Record, sort: Sort) -> Any:
    """Return what a record is sorted by; None where it has none, or failed."""
    value = None if record.status is Status.ERROR else getattr(record, _FIELDS.get(sort, sort))
    return None if isinstance(value, float) and math.isnan(value) else value
