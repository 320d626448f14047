"""Translates native functions, written in a small part of Python, to LLVM code. Called by `jit.py`.

The part: numbers and vectors in local variables that keep their types; assignments, `if`, `while`, `for` over `range`
with a positive step, `break`, `continue`, `return`; arithmetic, comparisons, `and`, `or`, `not`, `a if c else b`, `in`
with a tuple; `min`, `max`, `math.sqrt`; numbers and tuples of numbers from the module or the closure; calls of
operations and of functions that are marked with `@device`, which may return tuples. There are no checks and no
exceptions. What is not in this part is refused with its line.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import FunctionType, MappingProxyType
from typing import Any, Final

from llvmlite import ir

from tokenmill.ops.cpu.native_expressions import (
    Frame,
    NativeCode,
    Variable,
    binary_function,
    condition,
    evaluate,
)
from tokenmill.ops.cpu.native_types import (
    DeviceFunction,
    Operand,
    Signature,
    Type,
    Value,
    arithmetic,
    as_value,
    boolean,
    convert,
    int64,
    none,
)


class NativeSyntaxError(TypeError):
    """A native function contains what cannot be translated; the message begins with file and line."""


def write_module(function: FunctionType, signature: Signature, name: str) -> ir.Module:
    """LLVM code of a native function and all that it calls.

    Args:
        function: in Python.
        signature: of it.
        name: of the C function.

    Raises:
        NativeSyntaxError: a function contains what cannot be translated.
    """
    module = ir.Module(name)
    known: dict[tuple[DeviceFunction, tuple[Type, ...]], NativeCode | None] = {}

    def translate(callee: DeviceFunction, kinds: tuple[Type, ...]) -> NativeCode:
        key = (callee, kinds)
        if key not in known:
            known[key] = None
            inner_name = module.get_unique_name(callee.function.__name__)
            inner = _write_function(module, callee.function, kinds, inner_name, translate)
            inner.function.linkage = "internal"
            known[key] = inner
        code = known[key]
        if code is None:
            raise TypeError(f"{callee.function.__name__} calls itself")
        return code

    code = _write_function(module, function, signature.parameters, name, translate)
    if code.results is not signature.result:
        raise NativeSyntaxError(f"{function.__qualname__} returns {code.results}, not {signature.result}")
    return module


def _write_function(
    module: ir.Module,
    function: FunctionType,
    kinds: Sequence[Type],
    name: str,
    translate: Callable[[DeviceFunction, tuple[Type, ...]], NativeCode],
) -> NativeCode:
    definition = _definition(function)
    code = ir.Function(module, ir.FunctionType(none.form, [kind.form for kind in kinds]), name)
    code.attributes.add("nounwind")
    entry, body = code.append_basic_block("entry"), code.append_basic_block("body")
    frame = Frame(function, ir.IRBuilder(entry), translate)
    names = [parameter.arg for parameter in definition.args.args]
    if len(names) != len(kinds):
        raise NativeSyntaxError(f"{function.__qualname__} has {len(names)} parameters, not {len(kinds)}")
    for parameter, kind, value in zip(names, kinds, code.args, strict=True):
        frame.variables[parameter] = Variable(kind, frame.builder.alloca(kind.form))
        frame.builder.store(value, frame.variables[parameter].place)
    frame.builder.position_at_end(body)
    _write_all(frame, definition.body)
    if not frame.builder.block.is_terminated:
        if frame.results in (None, none):
            frame.builder.ret_void()
        else:
            frame.builder.unreachable()  # every way of the source returns a value
    ir.IRBuilder(entry).branch(body)
    results = none if frame.results is None else frame.results
    _set_result(code, results)
    return NativeCode(code, results)


def _set_result(function: ir.Function, results: Type | tuple[Type, ...]) -> None:
    """The type that a function returns, which is known only when it is written."""
    form = ir.LiteralStructType([kind.form for kind in results]) if isinstance(results, tuple) else results.form
    function.ftype = ir.FunctionType(form, function.ftype.args)
    function.type = function.ftype.as_pointer()
    function.return_value = ir.ReturnValue(function, form)


# ---- source ----------------------------------------------------------------------------------------------------------


def _definition(function: FunctionType) -> ast.FunctionDef:
    code = function.__code__
    try:
        return _definitions(code.co_filename)[code.co_firstlineno]
    except (OSError, KeyError):
        message = f"{code.co_filename}:{code.co_firstlineno}: the source of {code.co_name} is not there"
        raise NativeSyntaxError(message) from None


@cache
def _definitions(path: str) -> Mapping[int, ast.FunctionDef]:
    """The functions of a file by their first line, decorators included."""
    found = {}
    for node in ast.walk(ast.parse(Path(path).read_text())):
        if isinstance(node, ast.FunctionDef):
            found[min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])] = node
    return found


# ---- statements ------------------------------------------------------------------------------------------------------


def _write_all(frame: Frame, nodes: Sequence[ast.stmt]) -> None:
    for node in nodes:
        if frame.builder.block.is_terminated:  # after return, break, continue
            return
        try:
            if type(node) not in _STATEMENTS:
                raise TypeError(f"a native function has no {type(node).__name__}")
            _STATEMENTS[type(node)](frame, node)
        except NativeSyntaxError:
            raise
        except TypeError as error:
            raise NativeSyntaxError(f"{frame.function.__code__.co_filename}:{node.lineno}: {error}") from error


def _expression(frame: Frame, node: ast.Expr) -> None:
    evaluate(frame, node.value)


def _pass(frame: Frame, node: ast.Pass) -> None:
    pass


def _assign(frame: Frame, node: ast.Assign) -> None:
    value = evaluate(frame, node.value)
    for target in node.targets:
        _store(frame, target, value)


def _assign_annotated(frame: Frame, node: ast.AnnAssign) -> None:
    if node.value is not None:
        _store(frame, node.target, evaluate(frame, node.value))


def _store(frame: Frame, target: ast.expr, value: Operand) -> None:
    if isinstance(target, ast.Name):
        frame.assign(target.id, value)
        return
    if not isinstance(target, ast.Tuple) or not isinstance(value, tuple) or len(target.elts) != len(value):
        raise TypeError("values go to variables, or tuples of them")
    for element, part in zip(target.elts, value, strict=True):
        _store(frame, element, part)


def _augment(frame: Frame, node: ast.AugAssign) -> None:
    if not isinstance(node.target, ast.Name):
        raise TypeError("values go to variables")
    before = frame.read(node.target.id)
    value = arithmetic(frame.builder, binary_function(node.op), before, evaluate(frame, node.value))
    frame.assign(node.target.id, value)


def _if(frame: Frame, node: ast.If) -> None:
    test = condition(frame, node.test)
    if isinstance(test, bool):
        _write_all(frame, node.body if test else node.orelse)
        return
    builder = frame.builder
    yes, no, after = (builder.append_basic_block(name) for name in ("then", "else", "endif"))
    builder.cbranch(test, yes, no)
    is_reached = False
    for block, statements in ((yes, node.body), (no, node.orelse)):
        builder.position_at_end(block)
        _write_all(frame, statements)
        if not builder.block.is_terminated:
            builder.branch(after)
            is_reached = True
    builder.position_at_end(after)
    if not is_reached:
        builder.unreachable()


def _while(frame: Frame, node: ast.While) -> None:
    if node.orelse:
        raise TypeError("a native function has no else of a loop")
    builder = frame.builder
    head, body, after = (builder.append_basic_block(name) for name in ("while", "do", "endwhile"))
    builder.branch(head)
    builder.position_at_end(head)
    test = condition(frame, node.test)
    builder.cbranch(boolean.form(int(test)) if isinstance(test, bool) else test, body, after)
    builder.position_at_end(body)
    _write_body(frame, node.body, head, after)


def _for(frame: Frame, node: ast.For) -> None:
    if node.orelse or not isinstance(node.target, ast.Name):
        raise TypeError("a loop gives values to one variable, and has no else")
    start, end, step = _range(frame, node.iter)
    builder = frame.builder
    counter = frame.place(int64)
    builder.store(start, counter)
    head, body, following, after = (builder.append_basic_block(name) for name in ("for", "do", "next", "endfor"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.load(counter)
    builder.cbranch(builder.icmp_signed("<", index, end), body, after)
    builder.position_at_end(body)
    frame.assign(node.target.id, Value(int64, index))
    builder.position_at_end(following)
    builder.store(builder.add(index, step, flags=("nsw",)), counter)
    builder.branch(head)
    builder.position_at_end(body)
    _write_body(frame, node.body, following, after)


def _range(frame: Frame, node: ast.expr) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Start, end and step of a loop."""
    if not isinstance(node, ast.Call) or evaluate(frame, node.func) is not range or not 1 <= len(node.args) <= 3:
        raise TypeError("a loop is over a range")
    operands = [evaluate(frame, argument) for argument in node.args]
    if len(operands) == 1:
        operands.insert(0, 0)
    if len(operands) == 2:
        operands.append(1)
    if isinstance(operands[2], int) and operands[2] < 1:
        raise TypeError("the step of a range is positive")
    start, end, step = (convert(frame.builder, operand, int64) for operand in operands)
    return start, end, step


def _write_body(frame: Frame, nodes: Sequence[ast.stmt], following: ir.Block, after: ir.Block) -> None:
    """Of a loop; goes on at `following`, and the code that comes next at `after`."""
    frame.loops.append((following, after))
    _write_all(frame, nodes)
    frame.loops.pop()
    if not frame.builder.block.is_terminated:
        frame.builder.branch(following)
    frame.builder.position_at_end(after)


def _continue(frame: Frame, node: ast.Continue) -> None:
    frame.builder.branch(frame.loops[-1][0])


def _break(frame: Frame, node: ast.Break) -> None:
    frame.builder.branch(frame.loops[-1][1])


def _return(frame: Frame, node: ast.Return) -> None:
    builder = frame.builder
    if node.value is None:
        _agree(frame, none)
        builder.ret_void()
        return
    operand = evaluate(frame, node.value)
    if not isinstance(operand, tuple):
        value = as_value(operand)
        _agree(frame, value.type)
        builder.ret(value.code)
        return
    values = [as_value(one) for one in operand]
    _agree(frame, tuple(value.type for value in values))
    result = ir.Constant(ir.LiteralStructType([value.type.form for value in values]), ir.Undefined)
    for index, value in enumerate(values):
        result = builder.insert_value(result, value.code, index)
    builder.ret(result)


def _agree(frame: Frame, results: Type | tuple[Type, ...]) -> None:
    if frame.results is None:
        frame.results = results
    if frame.results != results:
        raise TypeError(f"returns {results} here and {frame.results} before")


_STATEMENTS: Final[Mapping[type[ast.stmt], Callable[[Frame, Any], None]]] = MappingProxyType({
    ast.Expr: _expression,
    ast.Pass: _pass,
    ast.Assign: _assign,
    ast.AnnAssign: _assign_annotated,
    ast.AugAssign: _augment,
    ast.If: _if,
    ast.While: _while,
    ast.For: _for,
    ast.Continue: _continue,
    ast.Break: _break,
    ast.Return: _return,
})  # fmt: skip
