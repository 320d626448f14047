"""Register tiles: small matrix products with all accumulators in registers and every loop over them unrolled.

`tile_loop` writes the LLVM code of C[rows, vectors of 16] += A[rows, k] B[k, vectors of 16]. Attention and the float
linear kernels make their inner loops with it. An element of A or B is one float32, or one pair of bfloat16 values that
lie next to each other along k; or (`mixed_pair`) one of A is two float32, and one of B a pair of bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from llvmlite import ir

from tokenmill.ops.cpu import simd
from tokenmill.ops.cpu.cpu_features import host_features
from tokenmill.ops.cpu.scalars import emit_prefetch
from tokenmill.ops.cpu.simd import F32, F32X16, I32, I64, call, constant, load_vector, splat

ElementKind: TypeAlias = Literal["float32", "bfloat16_pair", "mixed_pair"]


def has_wide_registers() -> bool:
    """Whether a vector of 16 lanes is one register, of which there are 32."""
    return "avx512f" in host_features()


def has_bfloat16_products() -> bool:
    """Whether the processor multiplies pairs of bfloat16 and adds both products in one instruction."""
    return "avx512bf16" in host_features()


class _BFloat16(ir.Type):  # type: ignore[misc]  # llvmlite has no such type, and no types
    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat16)

    def __hash__(self) -> int:
        return hash(_BFloat16)


_PAIRS: Final = ir.VectorType(_BFloat16(), 2 * simd.LANES)


def _halves(builder: ir.IRBuilder, pairs: ir.Value) -> tuple[ir.Value, ir.Value]:
    low = builder.shl(pairs, constant(I32, 16))
    high = builder.and_(pairs, constant(I32, 0xFFFF0000))
    return builder.bitcast(low, F32X16), builder.bitcast(high, F32X16)


def _multiply_add(
    builder: ir.IRBuilder, kind: ElementKind, total: ir.Value, a: Sequence[ir.Value], b: Sequence[ir.Value]
) -> ir.Value:
    """total + a * b, or the sum of both products of each pair."""
    if kind == "bfloat16_pair" and has_bfloat16_products():
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        return call(builder, name, F32X16, total, builder.bitcast(a[0], _PAIRS), builder.bitcast(b[0], _PAIRS))
    for x, y in zip(a, b, strict=True):
        total = call(builder, "llvm.fmuladd.v16f32", F32X16, x, y, total)
    return total


def _load_element(builder: ir.IRBuilder, kind: ElementKind, address: ir.Value) -> tuple[ir.Value, ...]:
    """An element of A in all lanes, as `_multiply_add` wants it."""
    element = I32 if kind == "bfloat16_pair" else F32
    places = [address, builder.add(address, I64(4))] if kind == "mixed_pair" else [address]
    values = [splat(builder, builder.load(builder.inttoptr(place, element.as_pointer()), align=4)) for place in places]
    return _split(builder, kind, values[0]) if kind == "bfloat16_pair" else tuple(values)


def _load_elements(builder: ir.IRBuilder, kind: ElementKind, address: ir.Value) -> tuple[ir.Value, ...]:
    """16 elements of B."""
    if kind == "float32":
        return (load_vector(builder, address, F32, align=4),)
    return _split(builder, kind, load_vector(builder, address, I32, align=4))


def _split(builder: ir.IRBuilder, kind: ElementKind, pairs: ir.Value) -> tuple[ir.Value, ...]:
    if kind == "bfloat16_pair" and has_bfloat16_products():
        return (pairs,)
    return _halves(builder, pairs)


@dataclass(frozen=True, slots=True)
class Matrix:
    """Where the elements of A or B lie.

    Args:
        addresses: int64, of the first element of each row of A, or of each vector of B.
        k_stride: int64, bytes from k to k + 1.
    """

    addresses: Sequence[ir.Value]
    k_stride: ir.Value


Accumulators: TypeAlias = Sequence[Sequence[ir.Value]]
"""Vectors of sums: [rows][vectors]."""


def tile_loop(
    builder: ir.IRBuilder,
    kind: ElementKind,
    a: Matrix,
    b: Matrix,
    count: ir.Value,
    start: Accumulators,
    ahead: Sequence[ir.Value] = (),
) -> Accumulators:
    """Add `count` >= 1 products to the accumulators `start` [rows][vectors]; returns them. Opens new basic blocks.

    Args:
        ahead: addresses of vectors of a later B; what lies there is brought nearer meanwhile.
    """

    def multiply(index: ir.Value, totals: Accumulators) -> Accumulators:
        offset_a, offset_b = builder.mul(index, a.k_stride), builder.mul(index, b.k_stride)
        vectors = [_load_elements(builder, kind, builder.add(address, offset_b)) for address in b.addresses]
        for address in ahead:
            emit_prefetch(builder, builder.add(address, offset_b))
        results = []
        for address, row in zip(a.addresses, totals, strict=True):
            value = _load_element(builder, kind, builder.add(address, offset_a))
            parts = [_multiply_add(builder, kind, total, value, b) for total, b in zip(row, vectors, strict=True)]
            results.append(parts)
        return results

    return emit_loop(builder, count, start, multiply)


def emit_loop(
    builder: ir.IRBuilder,
    count: ir.Value,
    start: Accumulators,
    body: Callable[[ir.Value, Accumulators], Accumulators],
) -> Accumulators:
    """Run `body` for the indices below `count` >= 1; it writes its own code. Opens new basic blocks.

    Args:
        start: the accumulators before the first run.
        body: takes the index and the accumulators, and returns the accumulators after it.

    Returns:
        The accumulators after the last run.
    """
    before = builder.block
    inside, after = builder.append_basic_block("loop"), builder.append_basic_block("loop.end")
    builder.branch(inside)
    builder.position_at_end(inside)
    index = builder.phi(I64)
    index.add_incoming(I64(0), before)
    totals = [[builder.phi(F32X16) for _ in row] for row in start]
    _add_incoming(totals, start, before)
    results = body(index, totals)
    _add_incoming(totals, results, builder.block)
    following = builder.add(index, I64(1))
    index.add_incoming(following, builder.block)
    builder.cbranch(builder.icmp_signed("<", following, count), inside, after)
    builder.position_at_end(after)
    return results


def _add_incoming(totals: Accumulators, values: Accumulators, block: ir.Block) -> None:
    for phis, row in zip(totals, values, strict=True):
        for phi, value in zip(phis, row, strict=True):
            phi.add_incoming(value, block)


def zeros(rows: int, vectors: int) -> list[list[ir.Value]]:
    """Accumulators to start with."""
    return [[constant(F32, 0.0)] * vectors for _ in range(rows)]


def offsets(builder: ir.IRBuilder, address: ir.Value, stride: ir.Value | int, count: int) -> list[ir.Value]:
    """`count` addresses, `stride` bytes apart."""
    step = I64(stride) if isinstance(stride, int) else stride
    return [builder.add(address, builder.mul(step, I64(index))) for index in range(count)]


def emit_cases(builder: ir.IRBuilder, key: ir.Value, cases: Mapping[int, Callable[[], None]]) -> None:
    """Run the case that equals `key` at run time; each one writes its own code. Nothing happens without one."""
    after = builder.append_basic_block("cases.end")
    switch = builder.switch(key, after)
    for value, emit in cases.items():
        block = builder.append_basic_block("case")
        switch.add_case(I64(value), block)
        builder.position_at_end(block)
        emit()
        builder.branch(after)
    builder.position_at_end(after)


CACHE_KINDS: Final[tuple[ElementKind, ...]] = ("float32", "bfloat16_pair")
"""Kinds of a cache by the number that kernels are told: `CACHE_KINDS[is_pairs]`."""
