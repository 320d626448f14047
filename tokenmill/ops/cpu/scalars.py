"""Numbers in memory for native functions, beyond the float32 and int32 of `simd.py`."""

from __future__ import annotations

from llvmlite import ir

from tokenmill.ops.cpu.simd import F32, I8, I16, I32, I64, declare, extend_half, float32, int64, none, operation


def emit_prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Start to bring the cache line at an address to the second-level cache."""
    pointer = builder.inttoptr(address, I8.as_pointer())
    function = declare(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer.type, I32, I32, I32])
    builder.call(function, [pointer, I32(0), I32(2), I32(1)])


@operation(int64, int64)
def load_i64(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The int64 at an address."""
    return builder.load(builder.inttoptr(address, I64.as_pointer()), align=8)


@operation(none, int64, int64)
def store_i64(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Write an int64."""
    builder.store(value, builder.inttoptr(address, I64.as_pointer()), align=8)


@operation(none, int64, int64)
def store_i32(builder: ir.IRBuilder, address: ir.Value, value: ir.Value) -> None:
    """Write the low 32 bits."""
    builder.store(builder.trunc(value, I32), builder.inttoptr(address, I32.as_pointer()), align=4)


@operation(int64, int64)
def load_u16(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The unsigned 16-bit number at an address."""
    return builder.zext(builder.load(builder.inttoptr(address, I16.as_pointer()), align=1), I64)


@operation(int64, int64)
def load_u8(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The unsigned 8-bit number at an address."""
    return builder.zext(builder.load(builder.inttoptr(address, I8.as_pointer()), align=1), I64)


@operation(int64, int64)
def load_i8(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The signed 8-bit number at an address."""
    return builder.sext(builder.load(builder.inttoptr(address, I8.as_pointer()), align=1), I64)


@operation(float32, int64)
def load_f16(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """The float16 at an address."""
    return extend_half(builder, builder.load(builder.inttoptr(address, ir.HalfType().as_pointer()), align=1))


@operation(none, int64)
def prefetch(builder: ir.IRBuilder, address: ir.Value) -> None:
    """Start to bring the cache line at an address to the second-level cache."""
    emit_prefetch(builder, address)


@operation(float32, int64)
def bfloat16_value(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """The float32 whose upper 16 bits are the low 16 of `bits`."""
    return builder.bitcast(builder.shl(builder.trunc(bits, I32), I32(16)), F32)
