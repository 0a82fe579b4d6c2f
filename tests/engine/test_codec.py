"""Values of the wrong kind are refused by name: JSON's `true` is no number, though Python counts with it."""

from dataclasses import dataclass
from typing import Any

import pytest

from diffiqa.engine.codec import decode


@dataclass(frozen=True)
class Example:
    """A field of each kind of scalar."""

    whole: int = 1
    real: float = 1.0
    text: str = ""
    flag: bool = False
    either: int | str = 1


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("whole", True, "whole must be a whole number, not True"),
        ("whole", 1.0, "whole must be a whole number, not 1.0"),
        ("real", True, "real must be a finite number, not True"),
        ("real", float("nan"), "real must be a finite number, not nan"),
        ("text", 1, "text must be text, not 1"),
        ("flag", 1, "flag must be true or false, not 1"),
        ("either", True, "either must be a whole number or text, not True"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(field: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=rf"^example\.{says}$"):
        decode(Example, {field: value}, "example", ValueError)


def test_a_whole_number_is_a_real_one_too() -> None:
    assert decode(Example, {"whole": 2, "real": 3, "either": "x"}, "example", ValueError) == Example(2, 3.0, either="x")
