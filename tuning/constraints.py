"""Expressions over a trial's values: constraints, conditions, lengths, computed settings and metrics of a search space.

Python's syntax for arithmetic, comparison and logic, and nothing else: the text is parsed, never run. A name is a
parameter, a dotted configuration key or a derived quantity; whoever evaluates says what it is worth.
"""

from __future__ import annotations

import ast
import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from infra.errors import InputError

Lookup = Callable[[str], Any]
"""What a name is worth; raises `NotDrawn` for a parameter that does not apply to the trial."""

_MOST_CHARACTERS = 1_000
_LARGEST_POWER = 512.0
_BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.In: lambda one, many: one in many,
    ast.NotIn: lambda one, many: one not in many,
}
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "abs": abs,
    "ceil": math.ceil,
    "floor": math.floor,
    "len": len,
    "log2": math.log2,
    "log10": math.log10,
    "max": max,
    "min": min,
    "round": round,
    "sqrt": math.sqrt,
    "sum": sum,
}
_ALLOWED = f"+ - * / // % **, comparisons, and/or/not/in/if-else, lists, [index], {', '.join(FUNCTIONS)}"


class NotDrawn(LookupError):  # noqa: N818 - an answer, not an error
    """A parameter that does not apply to this trial."""


@dataclass(frozen=True)
class Expression:
    """A parsed expression.

    Raises:
        InputError: it is not one (when made), or it cannot be worked out (when evaluated).
    """

    text: str
    where: str
    """What it is part of, for messages."""

    def __post_init__(self) -> None:
        _ = self.names

    @cached_property
    def _tree(self) -> ast.expr:
        if len(self.text) > _MOST_CHARACTERS:
            raise InputError(
                f"{self.where} must have at most {_MOST_CHARACTERS} characters: {len(self.text)}\n"
                "hint: write several constraints"
            )
        try:
            return ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise InputError(
                f"{self.where} is not an expression: {self.text}\nhint: for example tokens <= 512"
            ) from error

    @cached_property
    def names(self) -> frozenset[str]:
        """The names it asks for, dotted ones whole."""
        found: set[str] = set()
        self._collect(self._tree, found)
        return frozenset(found)

    def _collect(self, node: ast.expr, found: set[str]) -> None:
        if (name := _dotted(node)) is not None:
            found.add(name)
            return
        for child in self._children(node):
            self._collect(child, found)

    def _children(self, node: ast.expr) -> Iterable[ast.expr]:
        """The parts of an allowed piece of syntax."""
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return ()
            case ast.BoolOp(values=values):
                return values
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                return (left, right)
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return (operand,)
            case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in _COMPARISONS for op in ops):
                return (left, *rest)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return (test, body, orelse)
            case ast.List(elts=items) | ast.Tuple(elts=items) if not any(isinstance(i, ast.Starred) for i in items):
                return items
            case ast.Subscript(value=value, slice=index) if not isinstance(index, ast.Slice):
                return (value, index)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in FUNCTIONS:
                if not any(isinstance(argument, ast.Starred) for argument in arguments):
                    return arguments
            case ast.Call(func=ast.Name(id=name)):
                close = difflib.get_close_matches(name, FUNCTIONS, n=1)
                hint = f"did you mean {close[0]}?" if close else f"allowed are {_ALLOWED}"
                raise InputError(f"{self.where}: no such function: {name} in {self.text}\nhint: {hint}")
            case _:
                pass
        raise InputError(
            f"{self.where}: {ast.unparse(node)} is not allowed in {self.text}\nhint: allowed are {_ALLOWED}"
        )

    def evaluate(self, lookup: Lookup) -> Any:
        """What it is worth.

        Raises:
            NotDrawn: it needs a parameter that does not apply.
            InputError: types that do not fit, a division by zero, a number out of range.
        """
        try:
            return self._value(self._tree, lookup)
        except (TypeError, ValueError, ArithmeticError, IndexError) as error:
            if isinstance(error, InputError):
                raise
            known = ", ".join(f"{name}={_shown(lookup, name)}" for name in sorted(self.names))
            raise InputError(
                f"{self.where} cannot be worked out: {self.text} with {known or 'no names'} ({error})\n"
                "hint: check the kinds of its values; lists take len, sum, min, max or [index]"
            ) from error

    def _value(self, node: ast.expr, lookup: Lookup) -> Any:
        if (name := _dotted(node)) is not None:
            value = lookup(name)
            return list(value) if isinstance(value, tuple) else value
        match node:
            case ast.Constant(value=value):
                return value
            case ast.BoolOp(op=ast.And(), values=values):
                return all(self._value(value, lookup) for value in values)
            case ast.BoolOp(values=values):
                return any(self._value(value, lookup) for value in values)
            case ast.BinOp(left=left, op=op, right=right):
                return _computed(op, self._value(left, lookup), self._value(right, lookup))
            case ast.UnaryOp(op=unary, operand=operand):
                return _UNARY[type(unary)](self._value(operand, lookup))
            case ast.Compare(left=left, ops=ops, comparators=rest):
                return self._compared(left, ops, rest, lookup)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self._value(body if self._value(test, lookup) else orelse, lookup)
            case ast.List(elts=items) | ast.Tuple(elts=items):
                return [self._value(item, lookup) for item in items]
            case ast.Subscript(value=inner, slice=index):
                return self._value(inner, lookup)[self._value(index, lookup)]
            case ast.Call(func=ast.Name(id=function), args=arguments):
                return FUNCTIONS[function](*(self._value(argument, lookup) for argument in arguments))
        raise AssertionError(f"not caught when the expression was read: {ast.dump(node)}")

    def _compared(self, left: ast.expr, ops: list[ast.cmpop], rest: list[ast.expr], lookup: Lookup) -> bool:
        value = self._value(left, lookup)
        for op, node in zip(ops, rest, strict=True):
            other = self._value(node, lookup)
            if not _COMPARISONS[type(op)](value, other):
                return False
            value = other
        return True


def _dotted(node: ast.expr) -> str | None:
    """`a.b.c` as one name; None for anything else."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=value, attr=attribute):
            below = _dotted(value)
            return None if below is None else f"{below}.{attribute}"
    return None


def _computed(op: ast.operator, left: Any, right: Any) -> Any:
    """One operation on numbers (or `+` on lists); a power in floats, so that no text can ask for an endless number."""
    if isinstance(op, ast.Add) and isinstance(left, list) and isinstance(right, list):
        return left + right
    if not isinstance(left, int | float) or not isinstance(right, int | float):
        raise TypeError(f"{type(op).__name__} of {left!r} and {right!r}")
    if isinstance(op, ast.Pow):
        if abs(right) > _LARGEST_POWER:
            raise ValueError(f"a power above {_LARGEST_POWER:g}")
        if isinstance(left, int) and isinstance(right, int) and 0 <= right * left.bit_length() <= _LARGEST_POWER:
            return left**right
        found = float(left) ** float(right)
        if isinstance(found, complex):
            raise ValueError("a root of a negative number")
        return found
    return _BINARY[type(op)](left, right)


def _shown(lookup: Lookup, name: str) -> str:
    try:
        return repr(lookup(name))
    except NotDrawn:
        return "nothing"
