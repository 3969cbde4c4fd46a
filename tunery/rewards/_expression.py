"""The arithmetic of `calculate_output`: numbers, names, + - * / ^, and a few functions.

A reader of its own rather than Python's: there, `^` is no power, and a name may reach anything.

    sum     = product (("+" | "-") product)*
    product = unary (("*" | "/") unary)*
    unary   = "-" unary | power
    power   = atom ("^" unary)?
    atom    = number | name | function "(" sum ("," sum)* ")" | "(" sum ")"
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Node = Callable[[Mapping[str, float]], float]

MAX_CHARS = 2000
MAX_DEPTH = 50
_TOKEN = re.compile(r"\s*(?:(\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+)|([A-Za-z_]\w*)|(\S))")
_FUNCTIONS: dict[str, tuple[Callable[..., float], int, int | None]] = {
    "min": (min, 1, None),
    "max": (max, 1, None),
    "abs": (abs, 1, 1),
    "floor": (math.floor, 1, 1),
    "ceil": (math.ceil, 1, 1),
    "exp": (math.exp, 1, 1),
    "sqrt": (math.sqrt, 1, 1),
    "log": (math.log, 1, 1),
}
"""Name to function, fewest and most arguments. `log` is the natural one."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed formula.

    Attributes:
        names: variables that it reads.
    """

    names: frozenset[str]
    _node: Node

    def __call__(self, values: Mapping[str, float]) -> float:
        """Its value.

        Raises:
            ArithmeticError: no finite real number: a division by zero, a root of -1, an overflow.
        """
        try:
            value = self._node(values)
        except ValueError as error:  # math.sqrt(-1), math.log(0)
            raise ArithmeticError("no real number") from error
        if isinstance(value, complex) or not math.isfinite(value):
            raise ArithmeticError("no finite number")
        return float(value)


def parse(source: str) -> Expression:
    """Read a formula.

    Raises:
        ValueError: not one; says where.
    """
    if len(source) > MAX_CHARS:
        raise ValueError(f"the formula has {len(source)} characters, at most {MAX_CHARS}")
    parser = _Parser(source)
    node = parser.sum()
    parser.end()
    return Expression(frozenset(parser.names), node)


class _Parser:
    def __init__(self, source: str) -> None:
        self._tokens: list[tuple[int, str | None, str | None, str | None]] = [
            (match.start(match.lastindex or 0) + 1, match.group(1), match.group(2), match.group(3))
            for match in _TOKEN.finditer(source)
        ]
        """Place, and either a number, a name or a symbol."""
        self._at = 0
        self._depth = 0
        self.names: set[str] = set()

    def end(self) -> None:
        if self._at < len(self._tokens):
            raise self._unexpected()

    def _unexpected(self) -> ValueError:
        if self._at >= len(self._tokens):
            return ValueError("the formula ends too early")
        place, *kinds = self._tokens[self._at]
        return ValueError(f"unexpected {next(k for k in kinds if k)!r} at character {place}")

    def _peek(self) -> str | None:
        return self._tokens[self._at][3] if self._at < len(self._tokens) else None

    def _take(self, *symbols: str) -> str | None:
        found = self._peek()
        if found is None or found not in symbols:
            return None
        self._at += 1
        return found

    def _need(self, symbol: str) -> None:
        if self._take(symbol) is None:
            raise self._unexpected()

    def sum(self) -> Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"the formula is nested more than {MAX_DEPTH} deep")
        node = self._product()
        while operator := self._take("+", "-"):
            node = _binary(operator, node, self._product())
        self._depth -= 1
        return node

    def _product(self) -> Node:
        node = self._unary()
        while operator := self._take("*", "/"):
            node = _binary(operator, node, self._unary())
        return node

    def _unary(self) -> Node:
        signs = 0
        while self._take("-"):
            signs += 1
        node = self._power()
        return node if signs % 2 == 0 else lambda values: -node(values)

    def _power(self) -> Node:
        base = self._atom()
        if self._take("^") is None:
            return base
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise ValueError(f"the formula is nested more than {MAX_DEPTH} deep")
        exponent = self._unary()
        self._depth -= 1
        return _binary("^", base, exponent)

    def _atom(self) -> Node:
        if self._take("("):
            node = self.sum()
            self._need(")")
            return node
        if self._at >= len(self._tokens):
            raise self._unexpected()
        _, number, name, _ = self._tokens[self._at]
        if number is not None:
            self._at += 1
            constant = float(number)
            return lambda _: constant
        if name is None:
            raise self._unexpected()
        self._at += 1
        return self._call(name) if self._peek() == "(" else self._name(name)

    def _name(self, name: str) -> Node:
        self.names.add(name)
        return lambda values: values[name]

    def _call(self, name: str) -> Node:
        if name not in _FUNCTIONS:
            raise ValueError(f"there is no function {name!r}; known: {', '.join(_FUNCTIONS)}")
        function, fewest, most = _FUNCTIONS[name]
        self._need("(")
        arguments = [self.sum()]
        while self._take(","):
            arguments.append(self.sum())
        self._need(")")
        if len(arguments) < fewest or (most is not None and len(arguments) > most):
            raise ValueError(f"{name} takes {most} argument, not {len(arguments)}")
        return lambda values: function(*(argument(values) for argument in arguments))


def _binary(operator: str, left: Node, right: Node) -> Node:
    operations: dict[str, Node] = {
        "+": lambda values: left(values) + right(values),
        "-": lambda values: left(values) - right(values),
        "*": lambda values: left(values) * right(values),
        "/": lambda values: left(values) / right(values),
        "^": lambda values: left(values) ** right(values),
    }
    return operations[operator]
