"""Types and values of native functions: what `native_functions.py` computes with while it translates Python to LLVM.

A value is a `Value` (a type and an LLVM value), or a Python constant: int, float, bool, `numpy.float32`, or a tuple of
values. Numbers mix as in NumPy: int64 with a float gives float64, float32 with float64 gives float64; a Python float is
a float64. Vectors are computed with by operations only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType, MappingProxyType
from typing import Any, Final, TypeAlias

import numpy as np
from llvmlite import ir

LANES: Final = 16


@dataclass(frozen=True, slots=True)
class Signature:
    """Types of a native function's result and parameters."""

    result: Type
    parameters: tuple[Type, ...]


@dataclass(frozen=True, eq=False)
class Operation:
    """What native functions call to have LLVM code written in place.

    Args:
        name: for messages.
        signature: its parameters are converted to these types.
        emit: writes the code: `(builder, *values) -> LLVM value`, or None without a result.
    """

    name: str
    signature: Signature
    emit: Callable[..., ir.Value | None]


@dataclass(frozen=True, eq=False)
class DeviceFunction:
    """A Python function that native functions call; translated for the types that it is called with."""

    function: FunctionType


class Type:
    """A type of values. `int64(int64, float32)` is the signature of a function that returns an int64.

    Args:
        name: for messages, and in the names of functions.
        form: LLVM's type.
    """

    def __init__(self, name: str, form: ir.Type) -> None:
        self.name = name
        self.form = form

    def __call__(self, *parameters: Type) -> Signature:
        """A signature; in a native function `float32(x)` converts a number."""
        return Signature(self, parameters)

    def __repr__(self) -> str:
        return self.name


class NumberType(Type):
    """A type of single numbers; called with a Python number it makes a constant of the type."""

    def __call__(self, *parameters: Any) -> Any:
        if len(parameters) == 1 and isinstance(parameters[0], int | float):
            makers: dict[str, Callable[[Any], Any]] = {"int64": int, "float32": np.float32, "float64": float}
            return makers[self.name](parameters[0])
        return Signature(self, parameters)


none: Final = Type("none", ir.VoidType())
boolean: Final = Type("boolean", ir.IntType(1))
int64: Final = NumberType("int64", ir.IntType(64))
float32: Final = NumberType("float32", ir.FloatType())
float64: Final = NumberType("float64", ir.DoubleType())
float32x16: Final = Type("float32x16", ir.VectorType(ir.FloatType(), LANES))
int32x16: Final = Type("int32x16", ir.VectorType(ir.IntType(32), LANES))

literal: Final = Type("literal", ir.VoidType())
"""Of an operation's parameter that is known when the function is compiled: `emit` gets the Python int."""

NUMBERS: Final = (boolean, int64, float32, float64)
"""Types of single numbers; of two, the later one is the type of their sum, but of int64 and float32."""


@dataclass(frozen=True, slots=True)
class Value:
    """A value that is computed at run time."""

    type: Type
    code: ir.Value


Operand: TypeAlias = Any
"""`Value`, a Python constant, or a tuple of operands."""


def is_constant(operand: Operand) -> bool:
    """Whether it is a number that is known when the function is compiled."""
    return isinstance(operand, int | float | np.float32)


def as_value(operand: Operand) -> Value:
    """A constant as a value.

    Raises:
        TypeError: it is no number.
    """
    if isinstance(operand, Value):
        return operand
    for kinds, kind in ((bool, boolean), (int, int64), (np.float32, float32), (float, float64)):
        if isinstance(operand, kinds):
            return Value(kind, ir.Constant(kind.form, float(operand) if kind in (float32, float64) else int(operand)))
    raise TypeError(f"{operand!r} is no number")


def convert(builder: ir.IRBuilder, operand: Operand, target: Type) -> ir.Value:
    """The operand as LLVM value of a type.

    Raises:
        TypeError: there is no such conversion.
    """
    value = as_value(operand)
    if value.type is target:
        return value.code
    if value.type not in NUMBERS or target not in NUMBERS:
        raise TypeError(f"{value.type} is no {target}")
    if target is boolean:
        return as_value(compare(builder, operator.ne, value, 0)).code
    if value.type is boolean:
        value = Value(int64, builder.zext(value.code, int64.form))
    if target is int64:
        return value.code if value.type is int64 else builder.fptosi(value.code, int64.form)
    if value.type is int64:
        return builder.sitofp(value.code, target.form)
    if value.type is float32:
        return value.code if target is float32 else builder.fpext(value.code, target.form)
    return builder.fptrunc(value.code, target.form)


def common_type(a: Type, b: Type) -> Type:
    """The type of a sum.

    Raises:
        TypeError: one is no number.
    """
    if a not in NUMBERS or b not in NUMBERS:
        raise TypeError(f"{a} and {b} are not both numbers: vectors have operations")
    if a is b and a is not boolean:
        return a
    larger = max(a, b, int64, key=NUMBERS.index)
    return float64 if {a, b} & {boolean, int64} and larger is float32 else larger


def arithmetic(builder: ir.IRBuilder, function: Callable[[Any, Any], Any], a: Operand, b: Operand) -> Operand:
    """A binary operator of Python, named by its function in the module `operator`.

    Raises:
        TypeError: the operands do not have it.
    """
    if is_constant(a) and is_constant(b) and isinstance(a, np.float32) == isinstance(b, np.float32):
        return function(a, b)
    left, right = as_value(a), as_value(b)
    kind = common_type(left.type, right.type)
    if function is operator.truediv and kind is int64:
        kind = float64
    writers = _INTEGER if kind is int64 else _FLOAT
    if function not in writers:
        raise TypeError(f"{kind} has no {function.__name__}")
    if function in (operator.floordiv, operator.mod):
        return Value(kind, _divide(builder, function, convert(builder, left, kind), b))
    return Value(kind, writers[function](builder, convert(builder, left, kind), convert(builder, right, kind)))


def _divide(builder: ir.IRBuilder, function: Callable[[Any, Any], Any], a: ir.Value, divisor: Operand) -> ir.Value:
    """Quotient or rest as Python has them: the quotient rounded down. By zero it is undefined."""
    is_quotient = function is operator.floordiv
    if isinstance(divisor, int) and divisor > 0 and divisor & (divisor - 1) == 0:
        if is_quotient:
            return builder.ashr(a, int64.form(divisor.bit_length() - 1))
        return builder.and_(a, int64.form(divisor - 1))
    b = convert(builder, divisor, int64)
    zero = int64.form(0)
    rest = builder.srem(a, b)
    has_other_sign = builder.icmp_signed("<", builder.xor(rest, b), zero)
    is_off = builder.and_(builder.icmp_signed("!=", rest, zero), has_other_sign)
    if is_quotient:
        quotient = builder.sdiv(a, b)
        return builder.select(is_off, builder.sub(quotient, int64.form(1)), quotient)
    return builder.select(is_off, builder.add(rest, b), rest)


_INTEGER: Final[Mapping[Callable[[Any, Any], Any], Callable[..., ir.Value]]] = MappingProxyType({
    operator.add: ir.IRBuilder.add,
    operator.sub: ir.IRBuilder.sub,
    operator.mul: ir.IRBuilder.mul,
    operator.floordiv: ir.IRBuilder.sdiv,
    operator.mod: ir.IRBuilder.srem,
    operator.lshift: ir.IRBuilder.shl,
    operator.rshift: ir.IRBuilder.ashr,
    operator.and_: ir.IRBuilder.and_,
    operator.or_: ir.IRBuilder.or_,
    operator.xor: ir.IRBuilder.xor,
})  # fmt: skip

_FLOAT: Final[Mapping[Callable[[Any, Any], Any], Callable[..., ir.Value]]] = MappingProxyType({
    operator.add: ir.IRBuilder.fadd,
    operator.sub: ir.IRBuilder.fsub,
    operator.mul: ir.IRBuilder.fmul,
    operator.truediv: ir.IRBuilder.fdiv,
})  # fmt: skip

_SIGNS: Final[Mapping[Callable[[Any, Any], Any], str]] = MappingProxyType({
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
})  # fmt: skip


def compare(builder: ir.IRBuilder, function: Callable[[Any, Any], Any], a: Operand, b: Operand) -> Operand:
    """A comparison of Python, named by its function in the module `operator`.

    Raises:
        TypeError: an operand is no number.
    """
    if is_constant(a) and is_constant(b):
        return bool(function(a, b))
    left, right = as_value(a), as_value(b)
    kind = common_type(left.type, right.type)
    left_code, right_code = convert(builder, left, kind), convert(builder, right, kind)
    if kind is int64:
        return Value(boolean, builder.icmp_signed(_SIGNS[function], left_code, right_code))
    write = builder.fcmp_unordered if function is operator.ne else builder.fcmp_ordered
    return Value(boolean, write(_SIGNS[function], left_code, right_code))


def choose(builder: ir.IRBuilder, function: Callable[[Any, Any], Any], operands: tuple[Operand, ...]) -> Operand:
    """`max` (function: `gt`) or `min` (`lt`) of numbers: of equal ones the first."""
    best = operands[0]
    for operand in operands[1:]:
        if is_constant(best) and is_constant(operand):
            best = operand if function(operand, best) else best
            continue
        kind = common_type(as_value(best).type, as_value(operand).type)
        other, present = (Value(kind, convert(builder, one, kind)) for one in (operand, best))
        is_better = as_value(compare(builder, function, other, present)).code
        best = Value(kind, builder.select(is_better, other.code, present.code))
    return best
