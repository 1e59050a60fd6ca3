"""Evaluates arithmetic that anybody may have written, in little time and little memory.

simpleeval walks the expression; what it may meet there is chosen here. Its own bounds are for
programs that may stall for seconds: a power of a few million digits holds the interpreter's
lock, and with it every thread of the process.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, cast

from simpleeval import SimpleEval

MOST_CHARACTERS: Final = 1000  # of an expression
MOST_BITS: Final = 14_000  # of an integer, at any step; some 4,200 digits, which str() still takes
_MOST_FACTORIAL: Final = 1000
_MOST_PLACES: Final = 400  # to round to; a float has no more
_EXACT: Final = 1e15  # up to here a float is as exact as the integer

Number = int | float


class ArithmeticRefusedError(ValueError):
    """This is no arithmetic, or more of it than is calculated here; the message says which."""


def evaluate(expression: str) -> Number:
    """The value of an expression such as `sqrt(2) / 3`, in milliseconds at most.

    Raises ArithmeticRefusedError, and what Python raises for an expression that is none or that
    has no value (SyntaxError, ZeroDivisionError, ...); all of them are kinds of Exception.
    """
    if len(expression) > MOST_CHARACTERS:
        msg = f"an expression may have {MOST_CHARACTERS} characters"
        raise ArithmeticRefusedError(msg)
    tree = ast.parse(expression.strip().replace("^", "**"), mode="eval")
    evaluator: Any = SimpleEval(
        operators=dict(_OPERATORS),
        functions=dict(_FUNCTIONS),
        names={"pi": math.pi, "e": math.e},
    )
    nodes: dict[type[ast.AST], Any] = evaluator.nodes
    evaluator.nodes = {kind: nodes[kind] for kind in _KINDS} | {ast.Constant: _constant}
    value = _checked(evaluator.eval(expression, previously_parsed=tree.body))
    if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT:
        return int(value)
    return value


def _checked(value: object) -> Number:
    """The value, if it is a number of a size that is calculated with here."""
    if not isinstance(value, (int, float)):
        msg = "only numbers are calculated with"
        raise ArithmeticRefusedError(msg)
    if _bits(value) > MOST_BITS:
        raise _too_large()
    return value


def _too_large() -> ArithmeticRefusedError:
    return ArithmeticRefusedError("the number is too large")


def _bits(value: Number) -> int:
    """The size of an integer; a float's is always the same."""
    return value.bit_length() if isinstance(value, int) else 0


def _constant(node: ast.Constant) -> Number:
    return _checked(node.value)


def _bounded(function: Callable[..., object]) -> Callable[..., Number]:
    """The same on numbers only, for what takes little time on those that are checked."""

    @functools.wraps(function)
    def on_numbers(*values: object) -> Number:
        return _checked(function(*map(_checked, values)))

    return on_numbers


# --- what could take long is refused before it is begun


def _power(base: Number, exponent: Number) -> object:
    # The least bits that a power of integers has; the most is twice that, and soon calculated.
    if isinstance(exponent, int) and max(_bits(base) - 1, 0) * exponent > MOST_BITS:
        raise _too_large()
    return cast("object", base**exponent)


def _product(left: Number, right: Number) -> Number:
    if _bits(left) + _bits(right) > MOST_BITS + 1:
        raise _too_large()
    return left * right


def _shifted(value: int, places: int) -> int:
    if _bits(value) + places > MOST_BITS:
        raise _too_large()
    return value << places


def _factorial(number: int) -> int:
    if number > _MOST_FACTORIAL:
        msg = f"factorials up to {_MOST_FACTORIAL} are enough"
        raise ArithmeticRefusedError(msg)
    return math.factorial(number)


def _rounded(number: Number, places: int | None = None) -> Number:
    if places is not None and abs(places) > _MOST_PLACES:
        msg = f"a number is rounded to {_MOST_PLACES} places at most"
        raise ArithmeticRefusedError(msg)
    return round(number, places)


# Everything else that Python's grammar knows (strings, lists, attributes, f-strings, ...) is not
# arithmetic, and simpleeval says so of whatever it has no handler for.
_KINDS: Final = (ast.UnaryOp, ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Call, ast.Name)

_PYTHONS: Final[Any] = operator  # whose types say too little of some

_RAW_OPERATORS: Final[Mapping[type[ast.AST], Any]] = MappingProxyType(
    {
        ast.Add: _PYTHONS.add,
        ast.Sub: _PYTHONS.sub,
        ast.Mult: _product,
        ast.Div: _PYTHONS.truediv,
        ast.FloorDiv: _PYTHONS.floordiv,
        ast.Mod: _PYTHONS.mod,
        ast.Pow: _power,
        ast.LShift: _shifted,
        ast.RShift: _PYTHONS.rshift,
        ast.UAdd: _PYTHONS.pos,
        ast.USub: _PYTHONS.neg,
        ast.Not: _PYTHONS.not_,
        ast.Eq: _PYTHONS.eq,
        ast.NotEq: _PYTHONS.ne,
        ast.Lt: _PYTHONS.lt,
        ast.LtE: _PYTHONS.le,
        ast.Gt: _PYTHONS.gt,
        ast.GtE: _PYTHONS.ge,
    },
)
_RAW_FUNCTIONS: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "abs": abs,
        "max": max,
        "min": min,
        "round": _rounded,
        "sqrt": math.sqrt,
        "log": math.log,
        "log10": math.log10,
        "exp": math.exp,
        "sin": math.sin,
        "cos": math.cos,
        "tan": math.tan,
        "floor": math.floor,
        "ceil": math.ceil,
        "factorial": _factorial,
    },
)
_OPERATORS: Final = MappingProxyType({k: _bounded(work) for k, work in _RAW_OPERATORS.items()})
_FUNCTIONS: Final = MappingProxyType({k: _bounded(work) for k, work in _RAW_FUNCTIONS.items()})
