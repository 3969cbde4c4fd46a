"""The formula of multi graders: arithmetic, and nothing else."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunery.rewards._expression import parse

VALUES = {"a": 2.0, "b": 3.0, "long_name": 0.5}


@pytest.mark.parametrize(
    ("source", "value"),
    [
        ("a + b * 2", 8.0),
        ("(a + b) * 2", 10.0),
        ("a - b - 1", -2.0),
        ("8 / a / 2", 2.0),
        ("2 ^ 3 ^ 2", 512.0),
        ("-a ^ 2", -4.0),
        ("2 ^ -1", 0.5),
        ("--a", 2.0),
        ("1e1 + .5 + 2.", 12.5),
        ("min(a, b, 1)", 1.0),
        ("max(a, abs(-4))", 4.0),
        ("floor(2.7) + ceil(2.1)", 5.0),
        ("sqrt(9) * exp(0) + log(1)", 3.0),
        ("long_name", 0.5),
    ],
)
def test_it_reckons_as_written(source: str, value: float) -> None:
    assert parse(source)(VALUES) == value


def test_it_says_which_names_it_reads() -> None:
    assert parse("min(a, 2) + b").names == {"a", "b"}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "ends too early"),
        ("a +", "ends too early"),
        ("a b", "unexpected 'b' at character 3"),
        ("a.real", "unexpected '.' at character 2"),
        ("a ** 2", "unexpected '\\*' at character 4"),
        ("open(a)", "no function 'open'"),
        ("abs(a, b)", "abs takes 1 argument, not 2"),
        ("(a", "ends too early"),
        ("a ; b", "unexpected ';'"),
        ("(" * 100 + "a" + ")" * 100, "nested more than"),
        ("2" + "^2" * 100, "nested more than"),
        ("a+" * 2000 + "a", "4001 characters"),
    ],
)
def test_what_is_no_formula_is_refused(source: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse(source)


@pytest.mark.parametrize("source", ["1 / 0", "sqrt(-1)", "log(0)", "(-8) ^ 0.5", "9 ^ 9 ^ 9"])
def test_no_finite_number_is_an_arithmetic_error(source: str) -> None:
    with pytest.raises(ArithmeticError):
        parse(source)({})


@given(
    st.recursive(
        st.integers(1, 9).map(str),
        lambda inner: st.tuples(inner, st.sampled_from(["+", "-", "*"]), inner).map(
            lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
        ),
        max_leaves=12,
    )
)
def test_it_agrees_with_python_where_both_can_read(source: str) -> None:
    assert math.isclose(parse(source)({}), eval(source))
