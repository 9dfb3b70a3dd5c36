"""Expressions of a search space: what they are worth, and that nothing but arithmetic can be asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import InputError
from tuning.constraints import FUNCTIONS, Expression, NotDrawn

KNOWN: Mapping[str, Any] = {"tokens": 80, "sizes": [256, 1024], "kind": "fsq", "vq.model.width": 32, "share": 0.25}


def lookup(name: str) -> Any:
    if name not in KNOWN:
        raise NotDrawn(name)
    return KNOWN[name]


def evaluate(text: str) -> Any:
    return Expression(text, "constraint 1").evaluate(lookup)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("tokens <= 512", True),
        ("64 <= tokens < 80", False),
        ("sum(sizes) == 1280 and len(sizes) == 2", True),
        ("sizes[0] < sizes[-1]", True),
        ('kind != "fsq" or min(sizes) >= 8', True),
        ('kind in ["ema", "simvq"]', False),
        ("not (share > 0.5)", True),
        ("log2(max(sizes)) * 64", 640.0),
        ("vq.model.width * 2 if share < 1 else 0", 64),
        ("10 ** (-20 / 10)", 0.01),
        ("7 // 2 + 7 % 2 - -1", 5),
        ("[1, 2] + sizes", [1, 2, 256, 1024]),
    ],
)
def test_an_expression_is_worth_what_python_says(text: str, value: object) -> None:
    assert evaluate(text) == value


@given(st.integers(-50, 50), st.integers(-50, 50), st.integers(1, 9))
def test_arithmetic_agrees_with_python_for_any_numbers(a: int, b: int, c: int) -> None:
    found = Expression("(a - b) * c + a // c - b % c <= a / c + abs(b) ** 2", "x").evaluate(
        {"a": a, "b": b, "c": c}.get
    )
    assert found == ((a - b) * c + a // c - b % c <= a / c + abs(b) ** 2)


def test_names_are_whole_and_without_functions() -> None:
    expression = Expression("min(sizes) * vq.model.width < tokens + sizes[1]", "constraint 1")
    assert expression.names == {"sizes", "vq.model.width", "tokens"}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "(lambda: 1)()",
        "sizes.__class__",
        "[x for x in sizes]",
        "open('/etc/passwd')",
        "f'{tokens}'",
        "max(*sizes)",
        "max(sizes, key=len)",
        "sizes[0:1]",
        "(tokens := 3)",
        "{1: 2}",
        "tokens @ tokens",
        "~tokens",
        "1j < 2",
        "b'x' == kind",
    ],
)
def test_nothing_but_arithmetic_is_read(text: str) -> None:
    with pytest.raises((InputError, NotDrawn)) as caught:
        evaluate(text)
    if isinstance(caught.value, InputError):
        assert "hint:" in str(caught.value)
    else:  # an attribute of a name is a dotted name, which nobody knows
        assert text == "sizes.__class__"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tokens <", r"constraint 1 is not an expression: tokens <\nhint: for example tokens <= 512"),
        ("mni(sizes) > 1", r"constraint 1: no such function: mni in .*\nhint: did you mean min\?"),
        ("[x for x in sizes]", r"constraint 1: \[x for x in sizes\] is not allowed in .*\nhint: allowed are"),
        ("tokens / 0 > 1", r"cannot be worked out: tokens / 0 > 1 with tokens=80 \(division by zero\)\nhint:"),
        ("kind * 3", r"cannot be worked out: .*kind='fsq'.*\nhint: check the kinds"),
        ("sizes[5] > 1", r"cannot be worked out: .*index out of range\)\nhint:"),
        ("9 ** 9 ** 9", r"cannot be worked out: .*a power above 512\)\nhint:"),
        ("(-8) ** 0.5", r"a root of a negative number\)\nhint:"),
        ("log2(0)", r"cannot be worked out: log2\(0\) with no names"),
        ("1 +" * 500 + "1", r"must have at most 1000 characters: 1501\nhint:"),
    ],
)
def test_what_is_wrong_is_said_in_two_lines(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        evaluate(text)
    assert len(str(caught.value).splitlines()) == 2


def test_a_big_power_stays_a_number_of_bounded_size() -> None:
    assert evaluate("2 ** 100") == 2**100
    assert evaluate("2.0 ** 100") == 2.0**100
    with pytest.raises(InputError, match="cannot be worked out"):
        evaluate("10.0 ** 400")


def test_what_decides_first_is_all_that_is_asked_for() -> None:
    assert evaluate("tokens == 80 or missing > 3") is True
    assert evaluate("tokens != 80 and missing > 3") is False
    with pytest.raises(NotDrawn, match="missing"):
        evaluate("missing > 3")


def test_every_function_does_something_on_a_number_or_a_list() -> None:
    assert len(FUNCTIONS) == 11
    for name in FUNCTIONS:
        of = "sizes" if name in ("len", "max", "min", "sum") else "4"
        assert math.isfinite(evaluate(f"{name}({of})"))
