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


def test_a_value_of_another_kind_is_refused_by_name() -> None:
    cases: list[tuple[str, Any, str]] = [
        ("whole", True, "whole must be a whole number, not True"),
        ("whole", 1.0, "whole must be a whole number, not 1.0"),
        ("real", True, "real must be a finite number, not True"),
        ("real", float("nan"), "real must be a finite number, not nan"),
        ("text", 1, "text must be text, not 1"),
        ("flag", 1, "flag must be true or false, not 1"),
        ("either", True, "either must be a whole number or text, not True"),
    ]
    for field, value, says in cases:
        with pytest.raises(ValueError, match=rf"^example\.{says}$"):
            decode(Example, {field: value}, "example", ValueError)


def test_a_whole_number_is_a_real_one_too() -> None:
    assert decode(Example, {"whole": 2, "real": 3, "either": "x"}, "example", ValueError) == Example(2, 3.0, either="x")


@dataclass(frozen=True)
class Lists:
    """A list of any length, one of three, and a text that may be missing."""

    some: tuple[int, ...] = ()
    three: tuple[int, str, float] = (1, "", 1.0)
    perhaps: str | None = None


def test_lists_and_what_may_be_missing_are_read_as_they_are() -> None:
    data = {"some": [1, 2, 3, 4], "three": [1, "a", 2], "perhaps": "text"}
    assert decode(Lists, data, "lists", ValueError) == Lists((1, 2, 3, 4), (1, "a", 2.0), "text")
    assert decode(Lists, {"perhaps": None}, "lists", ValueError).perhaps is None


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("some", [1, "2"], r"some\[1\] must be a whole number, not '2'"),
        ("three", [1, "a"], r"three must be 3 items, not \[1, 'a'\]"),
        ("three", [1, 2, 3.0], r"three\[1\] must be text, not 2"),
        ("perhaps", 5, "perhaps must be text, not 5"),
    ],
)
def test_a_list_or_text_that_does_not_fit_is_refused_by_place(field: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError, match=rf"^lists\.{says}$"):
        decode(Lists, {field: value}, "lists", ValueError)
