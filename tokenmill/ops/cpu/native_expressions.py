"""Expressions of native functions as LLVM code. Called by `native_functions.py`, which writes the statements."""

from __future__ import annotations

import ast
import builtins
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import FunctionType, MappingProxyType
from typing import Any, Final

import numpy as np
from llvmlite import ir

from tokenmill.ops.cpu.native_types import (
    DeviceFunction,
    Operand,
    Operation,
    Type,
    Value,
    arithmetic,
    as_value,
    boolean,
    choose,
    common_type,
    compare,
    convert,
    float32,
    float64,
    int64,
    is_constant,
    literal,
    none,
)


@dataclass(frozen=True, slots=True)
class Variable:
    """A local variable: its type, and where it lies."""

    type: Type
    place: ir.Value


@dataclass(frozen=True, slots=True)
class NativeCode:
    """A translated function.

    Args:
        function: LLVM's.
        results: types of what it returns; a tuple if it returns one.
    """

    function: ir.Function
    results: Type | tuple[Type, ...]


@dataclass(slots=True)
class Frame:
    """A function that is being translated.

    Args:
        function: in Python.
        builder: where its code goes.
        translate: gives the code of a function that it calls, for the types of its arguments.
        variables: by name.
        loops: the blocks where `continue` and `break` of the loops around go, the innermost last.
        results: types of what it returns, once that is known.
    """

    function: FunctionType
    builder: ir.IRBuilder
    translate: Callable[[DeviceFunction, tuple[Type, ...]], NativeCode]
    variables: dict[str, Variable] = field(default_factory=dict)
    loops: list[tuple[ir.Block, ir.Block]] = field(default_factory=list)
    results: Type | tuple[Type, ...] | None = None

    def place(self, kind: Type) -> ir.Value:
        """Stack memory for a value; LLVM makes a register of it."""
        with self.builder.goto_entry_block():
            return self.builder.alloca(kind.form)

    def assign(self, name: str, operand: Operand) -> None:
        """Give a variable a value.

        Raises:
            TypeError: it has a value of another type.
        """
        if name not in self.variables:
            kind = as_value(operand).type
            self.variables[name] = Variable(kind, self.place(kind))
        variable = self.variables[name]
        value = as_value(operand)
        if value.type is not variable.type and (value.type, variable.type) not in _WIDENINGS:
            raise TypeError(f"'{name}' is {variable.type} and cannot become {value.type}")
        self.builder.store(convert(self.builder, value, variable.type), variable.place)

    def read(self, name: str) -> Operand:
        """The value of a variable, or what the name means outside the function.

        Raises:
            TypeError: it means nothing.
        """
        if name in self.variables:
            variable = self.variables[name]
            return Value(variable.type, self.builder.load(variable.place))
        if name in self.function.__code__.co_varnames:
            raise TypeError(f"'{name}' has no value yet")
        found = self._outside(name)
        return int(found) if isinstance(found, np.integer) else found

    def _outside(self, name: str) -> Any:
        names = self.function.__code__.co_freevars
        if name in names:
            return (self.function.__closure__ or ())[names.index(name)].cell_contents
        for known in (self.function.__globals__, vars(builtins)):
            if name in known:
                return known[name]
        raise TypeError(f"'{name}' is not known")


_WIDENINGS: Final = frozenset({(int64, float64), (float32, float64)})


def evaluate(frame: Frame, node: ast.expr) -> Operand:
    """The value of an expression; of a call without result None.

    Raises:
        TypeError: native functions have no such expression.
    """
    if type(node) not in _EXPRESSIONS:
        raise TypeError(f"a native function has no {type(node).__name__}")
    return _EXPRESSIONS[type(node)](frame, node)


def condition(frame: Frame, node: ast.expr) -> bool | ir.Value:
    """Whether an expression is true: LLVM's i1, or a bool if that is known now."""
    operand = evaluate(frame, node)
    return bool(operand) if is_constant(operand) else convert(frame.builder, operand, boolean)


def _constant(frame: Frame, node: ast.Constant) -> Operand:
    return node.value


def _name(frame: Frame, node: ast.Name) -> Operand:
    return frame.read(node.id)


def _attribute(frame: Frame, node: ast.Attribute) -> Operand:
    owner = evaluate(frame, node.value)
    if isinstance(owner, Value):
        raise TypeError("values have no attributes")
    return getattr(owner, node.attr)


def _tuple(frame: Frame, node: ast.Tuple) -> Operand:
    return tuple(evaluate(frame, element) for element in node.elts)


def _binary(frame: Frame, node: ast.BinOp) -> Operand:
    left, right = evaluate(frame, node.left), evaluate(frame, node.right)
    return arithmetic(frame.builder, binary_function(node.op), left, right)


def binary_function(sign: ast.operator) -> Callable[[Any, Any], Any]:
    """The function of an operator.

    Raises:
        TypeError: native functions do not have it.
    """
    if type(sign) not in _BINARY:
        raise TypeError(f"a native function has no {type(sign).__name__}")
    return _BINARY[type(sign)]


def _unary(frame: Frame, node: ast.UnaryOp) -> Operand:
    builder = frame.builder
    if isinstance(node.op, ast.Not):
        value = condition(frame, node.operand)
        return (not value) if isinstance(value, bool) else Value(boolean, builder.not_(value))
    operand = evaluate(frame, node.operand)
    if is_constant(operand):
        return -operand if isinstance(node.op, ast.USub) else ~operand if isinstance(node.op, ast.Invert) else operand
    value = as_value(operand)
    if isinstance(node.op, ast.Invert) and value.type is int64:
        return Value(int64, builder.not_(value.code))
    if isinstance(node.op, ast.USub) and value.type in (float32, float64):
        return Value(value.type, builder.fneg(value.code))
    if isinstance(node.op, ast.USub) and value.type is int64:
        return Value(int64, builder.neg(value.code))
    raise TypeError(f"{value.type} has no {type(node.op).__name__}")


def _comparison(frame: Frame, node: ast.Compare) -> Operand:
    """Also of several in a row; each operand is evaluated."""
    left, found = evaluate(frame, node.left), []
    for sign, right_node in zip(node.ops, node.comparators, strict=True):
        right = evaluate(frame, right_node)
        if isinstance(sign, ast.In):
            found.append(_any_of(frame.builder, [compare(frame.builder, operator.eq, left, one) for one in right]))
        elif type(sign) in _COMPARISONS:
            found.append(compare(frame.builder, _COMPARISONS[type(sign)], left, right))
        else:
            raise TypeError(f"a native function has no {type(sign).__name__}")
        left = right
    result = found[0]
    for following in found[1:]:
        parts = [convert(frame.builder, part, boolean) for part in (result, following)]
        result = Value(boolean, frame.builder.and_(*parts))
    return result


def _any_of(builder: ir.IRBuilder, found: Sequence[Operand]) -> Operand:
    if all(is_constant(one) for one in found):
        return any(found)
    result = boolean.form(0)
    for one in found:
        result = builder.or_(result, convert(builder, one, boolean))
    return Value(boolean, result)


def _boolean(frame: Frame, node: ast.BoolOp) -> Operand:
    """`and` or `or` of conditions; what is not needed is not computed."""
    builder, is_and = frame.builder, isinstance(node.op, ast.And)
    end = builder.append_basic_block("known")
    outcomes: list[tuple[ir.Value, ir.Block]] = []
    for index, part in enumerate(node.values):
        value = condition(frame, part)
        code = boolean.form(int(value)) if isinstance(value, bool) else value
        outcomes.append((code, builder.block))
        if index == len(node.values) - 1:
            builder.branch(end)
            break
        following = builder.append_basic_block("and" if is_and else "or")
        builder.cbranch(code, following if is_and else end, end if is_and else following)
        builder.position_at_end(following)
    builder.position_at_end(end)
    result = builder.phi(boolean.form)
    for code, block in outcomes:
        result.add_incoming(code, block)
    return Value(boolean, result)


def _conditional(frame: Frame, node: ast.IfExp) -> Operand:
    builder, test = frame.builder, condition(frame, node.test)
    if isinstance(test, bool):
        return evaluate(frame, node.body if test else node.orelse)
    blocks = [builder.append_basic_block(name) for name in ("yes", "no", "chosen")]
    builder.cbranch(test, blocks[0], blocks[1])
    values, ends = [], []
    for block, part in zip(blocks, (node.body, node.orelse), strict=False):
        builder.position_at_end(block)
        values.append(as_value(evaluate(frame, part)))
        ends.append(builder.block)
    first, second = values
    kind = first.type if first.type is second.type else common_type(first.type, second.type)
    codes = []
    for value, block in zip(values, ends, strict=True):
        builder.position_at_end(block)
        codes.append(convert(builder, value, kind))
        builder.branch(blocks[2])
    builder.position_at_end(blocks[2])
    result = builder.phi(kind.form)
    for code, block in zip(codes, ends, strict=True):
        result.add_incoming(code, block)
    return Value(kind, result)


def _subscript(frame: Frame, node: ast.Subscript) -> Operand:
    table, index = evaluate(frame, node.value), evaluate(frame, node.slice)
    if not isinstance(table, tuple):
        raise TypeError("only tuples have elements")
    if isinstance(index, int):
        return table[index]
    if not all(isinstance(element, int) for element in table):
        raise TypeError("only an element of a tuple of int constants can be chosen at run time")
    module = frame.builder.module
    content = ir.Constant(ir.ArrayType(int64.form, len(table)), [int(element) for element in table])
    place = ir.GlobalVariable(module, content.type, module.get_unique_name("table"))
    place.linkage, place.global_constant, place.initializer = "internal", True, content
    element = frame.builder.gep(place, [int64.form(0), convert(frame.builder, index, int64)])
    return Value(int64, frame.builder.load(element))


def _call(frame: Frame, node: ast.Call) -> Operand:
    if node.keywords:
        raise TypeError("arguments of native functions have no names")
    callee = evaluate(frame, node.func)
    arguments = tuple(evaluate(frame, argument) for argument in node.args)
    builder = frame.builder
    if isinstance(callee, Operation):
        return _call_operation(builder, callee, arguments)
    if isinstance(callee, DeviceFunction):
        return _call_function(frame, callee, arguments)
    if callee in (min, max):
        return choose(builder, operator.lt if callee is min else operator.gt, arguments)
    if isinstance(callee, Type) and len(arguments) == 1:
        (operand,) = arguments
        return callee(operand) if is_constant(operand) else Value(callee, convert(builder, operand, callee))
    if callee is math.sqrt:
        value = as_value(arguments[0])
        kind = value.type if value.type is float32 else float64
        return Value(kind, _square_root(builder, convert(builder, value, kind), kind))
    raise TypeError(f"a native function cannot call {callee!r}")


def _square_root(builder: ir.IRBuilder, code: ir.Value, kind: Type) -> ir.Value:
    name = f"llvm.sqrt.{'f32' if kind is float32 else 'f64'}"
    function = builder.module.globals.get(name)
    function = function or ir.Function(builder.module, ir.FunctionType(kind.form, [kind.form]), name)
    return builder.call(function, [code])


def _call_operation(builder: ir.IRBuilder, operation: Operation, arguments: Sequence[Operand]) -> Operand:
    parameters = operation.signature.parameters
    if len(arguments) != len(parameters):
        raise TypeError(f"{operation.name} has {len(parameters)} parameters, not {len(arguments)}")
    codes = []
    for kind, argument in zip(parameters, arguments, strict=True):
        if kind is literal and not isinstance(argument, int):
            raise TypeError(f"{operation.name} wants a number that is known when the function is compiled")
        codes.append(argument if kind is literal else convert(builder, argument, kind))
    result = operation.emit(builder, *codes)
    kind = operation.signature.result
    return None if kind is none else Value(kind, result)


def _call_function(frame: Frame, callee: DeviceFunction, arguments: Sequence[Operand]) -> Operand:
    values = [as_value(argument) for argument in arguments]
    code = frame.translate(callee, tuple(value.type for value in values))
    result = frame.builder.call(code.function, [value.code for value in values])
    if isinstance(code.results, tuple):
        return tuple(Value(kind, frame.builder.extract_value(result, index)) for index, kind in enumerate(code.results))
    return None if code.results is none else Value(code.results, result)


_EXPRESSIONS: Final[Mapping[type[ast.expr], Callable[[Frame, Any], Operand]]] = MappingProxyType({
    ast.Constant: _constant,
    ast.Name: _name,
    ast.Attribute: _attribute,
    ast.Tuple: _tuple,
    ast.BinOp: _binary,
    ast.UnaryOp: _unary,
    ast.Compare: _comparison,
    ast.BoolOp: _boolean,
    ast.IfExp: _conditional,
    ast.Subscript: _subscript,
    ast.Call: _call,
})  # fmt: skip

_BINARY: Final[Mapping[type[ast.operator], Callable[[Any, Any], Any]]] = MappingProxyType({
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
})  # fmt: skip

_COMPARISONS: Final[Mapping[type[ast.cmpop], Callable[[Any, Any], Any]]] = MappingProxyType({
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
})  # fmt: skip
