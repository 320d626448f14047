"""What native functions compute is what Python computes; what they cannot have is refused with its line."""

from __future__ import annotations

import ctypes
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.ops.cpu.jit import NativeFunction, device
from tokenmill.ops.cpu.native_functions import NativeSyntaxError
from tokenmill.ops.cpu.native_types import Type, boolean, float32, float64, int64, none
from tokenmill.ops.cpu.scalars import load_i64, store_i64
from tokenmill.ops.cpu.simd import broadcast, load, store

TABLE = (3, 1, 4, 1, 5)
SMALL, LARGE = 2, 7
HALF = np.float32(0.5)
NOTHING = "text"

integers = st.integers(-(1 << 40), 1 << 40)


# Written without decorators, so that Python runs them, too.


def signed_division(a: int, b: int) -> int:
    return (a // b) * 1000 + a % b + a // 8 - a % 8 + a // 7 * 3 + a % 7 - a // -3


def bits(a: int, b: int) -> int:
    return ((a << 3) ^ (b >> 2)) + (a & b) - (a | ~b) + -a


def choices(a: int, b: int) -> int:
    larger = a if a > b else b
    inside = 1 if 0 <= a < b else 0
    named = 10 if b in (SMALL, LARGE, 11) else 20
    if not a < b and (a != 5 or b == 3):
        larger += 100
    elif a == b or a > 1000:
        larger -= 100
    else:
        larger *= 2
    return larger + inside + named + min(a, b, 9) - max(a, 2, b)


def loops(a: int, b: int) -> int:
    total, previous = 0, 1
    for i in range(a % 20):
        for j in range(i, b % 30, 3):
            if j == 11:
                continue
            if j > 25:
                break
            total += i * j
        total, previous = previous + total, total
    while total > 10:
        total //= 3
        if total % 5 == 2:
            break
    return total * 100 + previous + TABLE[a % 5] + TABLE[1]


def early(a: int, b: int) -> int:
    for i in range(b % 10):
        if i * i > a % 50:
            return i
    if a < 0:
        return -1
    return early_helper(a) + 1


def early_helper(a: int) -> int:
    if a % 2 == 0:
        return 4
    return 5


def native(function: Callable[..., Any], *parameters: Type, result: Type = int64) -> Callable[..., Any]:
    return NativeFunction(function, result(*parameters)).call


@pytest.fixture(scope="module")
def compiled() -> dict[str, Callable[..., Any]]:
    before = early.__globals__["early_helper"]
    early.__globals__["early_helper"] = device(before)
    try:
        return {f.__name__: native(f, int64, int64) for f in (signed_division, bits, choices, loops, early)}
    finally:
        early.__globals__["early_helper"] = before


@settings(max_examples=300, deadline=None)
@given(a=integers | st.integers(-20, 20), b=integers | st.integers(-20, 20))
def test_integers(compiled: dict[str, Callable[..., Any]], a: int, b: int) -> None:
    for function in (bits, choices, loops, early):
        assert compiled[function.__name__](a, b) == function(a, b), function.__name__
    if b != 0:
        assert compiled["signed_division"](a, b) == signed_division(a, b)


def test_numbers_mix_as_in_numpy() -> None:
    def mixed(address: int, count: int, x: float) -> float:
        single = HALF * float32(count)  # float32
        double = single + x  # float64
        return math.sqrt(double) / 3 + 1 / count - (count * HALF) * -x

    single, count, x = np.float32(0.5) * np.float32(77), 77, 1e-9
    expected = math.sqrt(float(single) + x) / 3 + 1 / count - count * 0.5 * -x
    assert native(mixed, int64, int64, float64, result=float64)(0, count, x) == expected


def test_float32_is_rounded_after_each_operation() -> None:
    def product(a: float, b: float) -> float:
        return a * b + a

    a, b = np.float32(1.1), np.float32(3.3)
    assert native(product, float32, float32, result=float32)(a, b) == float(a * b + a)


def test_comparisons_with_not_a_number() -> None:
    def compared(x: float) -> int:
        return (1 if x == x else 0) + (2 if x != x else 0) + (4 if x < 1.0 else 0) + (8 if not x >= 1.0 else 0)

    call = native(compared, float64)
    assert [call(x) for x in (0.0, 2.0, math.nan)] == [13, 1, 10]


def test_the_rest_of_a_condition_is_not_computed() -> None:
    def guarded(address: int) -> int:
        if address != 0 and load_i64(address) == 5:
            return 1
        return 0 if address == 0 or load_i64(address) != 6 else 2

    number = ctypes.c_int64(5)
    call = native(guarded, int64)
    assert [call(0), call(ctypes.addressof(number))] == [0, 1]
    number.value = 6
    assert call(ctypes.addressof(number)) == 2


@device
def quotient_and_rest(a: int, b: int) -> tuple[int, float]:
    return a // b, a % b / 2


@device
def put(address: int, value: int) -> None:
    if value < 0:
        return
    store_i64(address, value)


def test_functions_return_tuples_or_nothing() -> None:
    def call(a: int, b: int, address: int) -> float:
        whole, half = quotient_and_rest(a, b)
        put(address, whole)
        put(address, -1)
        return half

    number = ctypes.c_int64(0)
    assert native(call, int64, int64, int64, result=float64)(17, 5, ctypes.addressof(number)) == 1.0
    assert number.value == 3


def test_vectors() -> None:
    def double(source: int, target: int) -> None:
        values = load(source)
        if source != target:
            values = broadcast(1)
        store(target, values)

    memory = np.arange(16, dtype=np.float32)
    call = native(double, int64, int64, result=none)
    call(memory.ctypes.data, memory.ctypes.data)
    assert memory.tolist() == list(range(16))
    call(0 + memory.ctypes.data, memory.copy().ctypes.data + 0)
    other = np.zeros(16, np.float32)
    call(memory.ctypes.data, other.ctypes.data)
    assert other.tolist() == [1.0] * 16


def test_conditions_that_are_known_are_not_compiled() -> None:
    def outer(is_known: bool) -> NativeFunction:
        def choose(x: int) -> int:
            if is_known:
                return x
            return NOTHING[x]  # cannot be compiled

        return NativeFunction(choose, int64(int64))

    assert outer(True).call(3) == 3
    with pytest.raises(NativeSyntaxError, match="only tuples have elements"):
        outer(False).llvm_code()


# ---- what is refused -------------------------------------------------------------------------------------------------


def changes_type(a: int) -> int:
    x = a
    if a > 0:
        x = 1.5
    return x


def grows_a_list(a: int) -> int:
    return [a][0]


def calls_anything(a: int) -> int:
    return len(str(a))


def reads_nothing(a: int) -> int:
    return a + missing  # type: ignore[name-defined]  # noqa: F821


def reads_too_early(a: int) -> int:
    b += a  # type: ignore[has-type]  # noqa: F821
    return b


def returns_both(a: int) -> Any:
    if a > 0:
        return 1
    return 1.5


def steps_down(a: int) -> int:
    for i in range(a, 0, -1):
        a += i
    return a


def adds_vectors(a: int) -> int:
    store(a, broadcast(1.0) + broadcast(2.0))  # type: ignore[operator]
    return a


def wants_a_number(a: int) -> int:
    return a + load(a)  # type: ignore[return-value]


def names_an_argument(a: int) -> int:
    return max(a, key=a)  # type: ignore[call-overload]


def raises(a: int) -> int:
    raise ValueError


@device
def calls_itself(a: int) -> int:
    return calls_itself(a)


def recurses(a: int) -> int:
    return calls_itself(a)


def takes_two(a: int, b: int) -> int:
    return a


def gives_too_few(a: int) -> int:
    return load_i64()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (changes_type, "'x' is int64 and cannot become float64"),
        (grows_a_list, "has no List"),
        (calls_anything, "cannot call"),
        (reads_nothing, "'missing' is not known"),
        (reads_too_early, "'b' has no value yet"),
        (returns_both, "returns float64 here and int64 before"),
        (steps_down, "the step of a range is positive"),
        (adds_vectors, "vectors have operations"),
        (wants_a_number, "vectors have operations"),
        (names_an_argument, "have no names"),
        (raises, "has no Raise"),
        (recurses, "calls_itself calls itself"),
        (takes_two, "has 2 parameters, not 1"),
        (gives_too_few, "load_i64 has 1 parameters, not 0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_refused(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(NativeSyntaxError, match=message) as error:
        NativeFunction(function, int64(int64)).llvm_code()
    if function is not takes_two:
        line = inspect.getsourcelines(getattr(function, "function", function))[1]
        assert "test_native_functions.py:" in str(error.value)
        assert function is recurses or int(str(error.value).split(":")[1]) >= line


def test_the_result_is_what_the_signature_says() -> None:
    with pytest.raises(NativeSyntaxError, match="returns float64, not int64"):
        NativeFunction(quotient, int64(int64)).llvm_code()


def quotient(a: int) -> float:
    return a / 2


def test_types_are_named() -> None:
    assert [repr(one) for one in (none, boolean, int64, float32)] == ["none", "boolean", "int64", "float32"]
