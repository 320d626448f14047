"""Time of every CPU kernel but the integer linears, for the shapes of SmolLM2-135M. Writes `results/cpu_ops.json`.

    python benchmarks/cpu/ops.py
    python benchmarks/cpu/ops.py --threads 1 --steps decode --repeats 5

A step is one stream (`decode`) or 16 (`batch`) with 200 cached tokens each, or a prompt of 1,024 tokens (`prefill`). An
op runs as often as in the model, with each layer's own weights and cache. The limit is what its bytes from memory, or
its products, take at the rates that the same run measures.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from llvmlite import ir

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.result_file import RESULTS, Row, print_rows, write_result
from tokenmill.ops.cpu.activation import activation_op
from tokenmill.ops.cpu.attention import AttentionOp, attention, attention_combine, partial_bytes, scratch_bytes
from tokenmill.ops.cpu.cache_layout import CacheLocation, cache_shapes
from tokenmill.ops.cpu.elementwise import elementwise, elementwise_arguments
from tokenmill.ops.cpu.embedding import embedding, embedding_arguments
from tokenmill.ops.cpu.intrinsics import argument
from tokenmill.ops.cpu.jit import NativeFunction, kernel
from tokenmill.ops.cpu.layout import FIRST_ARGUMENT, int8_group32_bytes
from tokenmill.ops.cpu.limits import PAGE, read_memory
from tokenmill.ops.cpu.linear_float import SCRATCH_BYTES, LinearFloatOp, linear_float
from tokenmill.ops.cpu.memory import huge_page_memory
from tokenmill.ops.cpu.norm import rms_norm, rms_norm_arguments
from tokenmill.ops.cpu.quantize import quantize, quantize_arguments
from tokenmill.ops.cpu.rope import RopeOp, rope_write_cache, rotation, rotation_arguments
from tokenmill.ops.cpu.simd import I64, int64, none, operation, store_vector
from tokenmill.ops.cpu.threads import OpList, ThreadPool
from tokenmill.ops.cpu.tiles import Matrix, offsets, tile_loop, zeros

LAYERS, HIDDEN, MIDDLE, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 30, 576, 1536, 9, 3, 64, 49152
QKV = (HEADS + 2 * KV_HEADS) * HEAD_DIM
TOKENS_PER_BLOCK = 32
STEPS = {"decode": (1, 1, 200), "batch": (16, 1, 200), "prefill": (1, 1024, 1024)}
"""Rows, tokens of a row, and cached tokens of a row with these."""

Op = tuple[NativeFunction, Sequence[int]]
PEAK_TURNS = 20_000
PEAK_FLOPS = 8 * 2 * 16 * 2 * 16


@dataclass(frozen=True)
class Case:
    """An op as often as a step has it; bytes from memory and float32 products (2 for a multiplication and addition)."""

    name: str
    ops: list[Op]
    num_bytes: float
    num_flops: float = 0.0
    num_tokens: int | None = None


@operation(none, int64, int64, int64)
def multiply_floats(builder: ir.IRBuilder, source: ir.Value, turns: ir.Value, result: ir.Value) -> None:
    """8 x 2 vectors of sums over 16 elements that stay in the fastest cache, again and again."""
    a = Matrix(offsets(builder, source, 64, 8), I64(0))
    b = Matrix(offsets(builder, source, 64, 2), I64(0))
    totals = tile_loop(builder, "float32", a, b, builder.mul(turns, I64(16)), zeros(8, 2))
    for place, row in zip(offsets(builder, result, 128, 8), totals, strict=True):
        for address, total in zip(offsets(builder, place, 64, 2), row, strict=True):
            store_vector(builder, address, total)


@kernel
def float_peak(thread: int, num_threads: int, row: int) -> None:
    """Nothing but products of float32."""
    result = argument(row, FIRST_ARGUMENT + 1) + thread * PAGE
    multiply_floats(argument(row, FIRST_ARGUMENT), PEAK_TURNS, result)


def matrix(tensor: torch.Tensor, column: int = 0) -> tuple[int, int]:
    """Address and row stride."""
    return tensor.data_ptr() + column * tensor.element_size(), tensor.stride(0) * tensor.element_size()


def random_cache(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Keys or values of a layer, in huge pages."""
    memory = torch.from_numpy(huge_page_memory(math.prod(shape) * dtype.itemsize))
    return memory.view(dtype).view(shape).copy_(torch.rand(shape))


class Step:
    """Buffers, caches and rows of a step, and its cases."""

    def __init__(self, name: str, num_threads: int, cache_dtype: torch.dtype) -> None:
        self.num_rows, self.query_len, self.kv_len = STEPS[name]
        self.num_tokens = self.num_rows * self.query_len
        self.cache_dtype = cache_dtype
        blocks_per_row = -(-self.kv_len // TOKENS_PER_BLOCK)
        shapes = cache_shapes(self.num_rows * blocks_per_row, TOKENS_PER_BLOCK, KV_HEADS, HEAD_DIM, cache_dtype)
        self.caches = [tuple(random_cache(shape, cache_dtype) for shape in shapes) for _ in range(LAYERS)]
        self.starts = torch.arange(self.num_rows + 1, dtype=torch.int32) * self.query_len
        self.kv_lens = torch.full((self.num_rows,), self.kv_len, dtype=torch.int32)
        self.tables = torch.randperm(self.num_rows * blocks_per_row).int().view(self.num_rows, -1)
        places = [self.starts.data_ptr(), self.kv_lens.data_ptr(), self.tables.data_ptr(), 4 * blocks_per_row]
        self.step = torch.tensor([self.num_rows, *places])
        tokens = self.num_tokens
        self.x, self.y, self.qkv = torch.randn(tokens, HIDDEN), torch.randn(tokens, HIDDEN), torch.randn(tokens, QKV)
        self.gate_up, self.middle = torch.randn(tokens, 2 * MIDDLE), torch.randn(tokens, MIDDLE)
        self.angles = torch.rand(tokens, HEAD_DIM)
        self.integers = torch.zeros(tokens, dtype=torch.int32)
        self.quantized = torch.zeros(int8_group32_bytes(tokens, MIDDLE), dtype=torch.uint8)
        self.logits = torch.randn(self.num_rows, VOCABULARY)
        self.scratch = huge_page_memory(num_threads * max(SCRATCH_BYTES, scratch_bytes(HEADS, KV_HEADS, HEAD_DIM)))
        blocks = self.num_rows * blocks_per_row
        self.partials = huge_page_memory(partial_bytes(HEADS, HEAD_DIM, TOKENS_PER_BLOCK, blocks, self.num_rows))
        self.weights = huge_page_memory(LAYERS * 4 * 2 * MIDDLE * HIDDEN)
        self.weights[:] = 1  # small numbers; pages that were never written would all be one

    def cases(self) -> Iterator[Case]:
        """All ops."""
        yield from self.maps()
        yield from self.positions()
        yield self.attention()
        for is_bfloat16 in (False, True):
            yield from self.linears(is_bfloat16)

    def maps(self) -> Iterator[Case]:
        """Norms, activations, look-ups."""
        x, y, weight, out = matrix(self.x), matrix(self.y), self.angles.data_ptr(), (self.quantized.data_ptr(), 0)
        norm = rms_norm_arguments(
            x=x, residual=y, total=y, output=out, weight=weight, columns=HIDDEN, eps=1e-5, quantized=True
        )
        yield Case("add_rms_norm to int8", [(rms_norm, norm)] * 2 * LAYERS, 0)
        norm = rms_norm_arguments(x=x, output=y, weight=weight, columns=HIDDEN, eps=1e-5)
        yield Case("rms_norm", [(rms_norm, norm)] * LAYERS, 0)
        arguments = quantize_arguments(a=x, output=out[0], columns=HIDDEN)
        yield Case("quantize", [(quantize, arguments)] * LAYERS, 0)
        for quantized, output in ((False, matrix(self.middle)), (True, out)):
            gated = activation_op(
                "silu",
                x=matrix(self.gate_up),
                up=matrix(self.gate_up, MIDDLE),
                output=output,
                columns=MIDDLE,
                quantized=quantized,
            )
            yield Case(f"gated silu to {'int8' if quantized else 'float32'}", [gated] * LAYERS, 0)
        table = embedding_arguments(
            token_ids=self.integers.data_ptr(),
            table=self.weights.ctypes.data,
            table_format="q8_0",
            num_rows=VOCABULARY,
            columns=HIDDEN,
            output=x,
            packed=True,
        )
        yield Case("embedding of packed q8_0", [(embedding, table)], 0)
        logits = matrix(self.logits)
        capped = elementwise_arguments("soft_cap", a=logits, output=logits, columns=VOCABULARY, factor=30.0)
        yield Case("soft_cap of logits", [(elementwise, capped)], 0, num_tokens=self.num_rows)

    def positions(self) -> Iterator[Case]:
        """Rotary embedding and cache writes."""
        arguments = rotation_arguments(
            positions=self.integers.data_ptr(),
            frequencies=self.x.data_ptr(),
            output=matrix(self.angles),
            head_dim=HEAD_DIM,
            factor=1.0,
        )
        yield Case("rotation", [(rotation, arguments)], 0)
        ops = [
            RopeOp(
                head_dim=HEAD_DIM,
                num_heads=HEADS,
                num_kv_heads=KV_HEADS,
                query=matrix(self.qkv),
                output=matrix(self.qkv),
                key=matrix(self.qkv, HEADS * HEAD_DIM),
                value=matrix(self.qkv, (HEADS + KV_HEADS) * HEAD_DIM),
                rotation=matrix(self.angles),
                cache=self.location(layer),
            )
            for layer in range(LAYERS)
        ]
        written = LAYERS * self.num_tokens * 2 * KV_HEADS * HEAD_DIM * self.cache_dtype.itemsize
        yield Case("rope_write_cache", [(rope_write_cache, op.arguments()) for op in ops], written)

    def location(self, layer: int) -> CacheLocation:
        """Of a layer's cache."""
        keys, values = self.caches[layer]
        is_bfloat16 = self.cache_dtype == torch.bfloat16
        step = self.step.data_ptr()
        stride = keys.stride(0) * keys.itemsize
        return CacheLocation(keys.data_ptr(), values.data_ptr(), stride, is_bfloat16, TOKENS_PER_BLOCK, step)

    def attention(self) -> Case:
        """Attention of all layers."""
        ops: list[Op] = []
        for layer in range(LAYERS):
            op = AttentionOp(
                query=matrix(self.qkv),
                output=matrix(self.x),
                cache=self.location(layer),
                num_heads=HEADS,
                num_kv_heads=KV_HEADS,
                head_dim=HEAD_DIM,
                scale=0.125,
                scratch=self.scratch.ctypes.data,
                partials=self.partials.ctypes.data,
            )
            ops += [(attention, op.arguments()), (attention_combine, op.arguments())]
        read = LAYERS * self.num_rows * self.kv_len * 2 * KV_HEADS * HEAD_DIM * self.cache_dtype.itemsize
        seen = self.kv_len - (self.query_len - 1) / 2  # keys that a query sees, on average
        return Case("attention", ops, read, LAYERS * self.num_tokens * seen * HEADS * HEAD_DIM * 4)

    def linears(self, is_bfloat16: bool) -> Iterator[Case]:
        """Linears of one layer as often as there are layers."""
        name = "bfloat16" if is_bfloat16 else "float32"
        shapes = [
            ("qkv", self.x, QKV, self.qkv, None),
            ("gate, up, silu", self.x, 2 * MIDDLE, self.middle, "silu"),
            ("down", self.middle, HIDDEN, self.y, None),
        ]
        for role, x, num_rows, output, activation in shapes:
            num_columns = x.shape[1]
            size = num_rows * num_columns * (2 if is_bfloat16 else 4)
            ops: list[Op] = []
            for layer in range(LAYERS):
                op = LinearFloatOp(
                    x=matrix(x),
                    weight=self.weights.ctypes.data + layer * size,
                    is_bfloat16=is_bfloat16,
                    num_rows=num_rows,
                    num_columns=num_columns,
                    output=matrix(output),
                    scratch=self.scratch.ctypes.data,
                    activation=activation,
                )
                ops.append((linear_float, op.arguments()))
            flops = 2 * LAYERS * self.num_tokens * num_rows * num_columns
            yield Case(f"linear {name}: {role}", ops, LAYERS * size, flops)


def op_list(ops: Sequence[Op], num_tokens: int) -> OpList:
    """Rows for the threads."""
    rows = OpList(len(ops))
    for native, arguments in ops:
        rows.append(native, *arguments, num_tokens=num_tokens)
    return rows


def seconds(pool: ThreadPool, ops: OpList) -> float:
    """Time of one run."""
    begin = time.perf_counter()
    pool.run(ops)
    return time.perf_counter() - begin


def measure(pool: ThreadPool, name: str, cache_dtype: torch.dtype, repeats: int) -> Iterator[Row]:
    """All ops of a step."""
    step = Step(name, pool.num_threads, cache_dtype)
    results = huge_page_memory(PAGE * pool.num_threads)
    memory, size = step.weights.ctypes.data, len(step.weights) // PAGE * PAGE
    read = op_list([(read_memory, (memory, size, results.ctypes.data))], 1)
    peak = op_list([(float_peak, (step.qkv.data_ptr(), results.ctypes.data))], 1)
    cases = [(case, op_list(case.ops, case.num_tokens or step.num_tokens)) for case in step.cases()]
    spent: dict[str, list[float]] = {case.name: [] for case, _ in cases}
    bandwidths, peaks = [], []
    for _ in range(repeats + 1):
        bandwidths.append(size / seconds(pool, read))
        peaks.append(PEAK_TURNS * PEAK_FLOPS * pool.num_threads / seconds(pool, peak))
        for case, ops in cases:
            spent[case.name].append(seconds(pool, ops))
    bandwidth, flops = statistics.median(bandwidths[1:]), statistics.median(peaks[1:])
    yield Row(name, "memory bandwidth", bandwidth / 1e9, "GB/s")
    yield Row(name, "float32 peak", flops / 1e9, "GFLOPS")
    cache = str(cache_dtype).removeprefix("torch.")
    for case, _ in cases:
        taken = statistics.median(spent[case.name][1:])
        what = f"{name}, {case.name}" + (f", {cache} cache" if case.name == "attention" else "")
        limit = max(case.num_bytes / bandwidth, case.num_flops / flops) * 1e3
        yield Row(what, "time in all layers", taken * 1e3, "ms", limit=limit or None)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", default=",".join(STEPS), help=f"of {', '.join(STEPS)}, with commas")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cache", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_ops.json")
    options = parser.parse_args()
    pool = ThreadPool(options.threads)
    dtype = getattr(torch, options.cache)
    rows = [row for name in options.steps.split(",") for row in measure(pool, name, dtype, options.repeats)]
    pool.close()
    print_rows(rows)
    write_result(options.output, "cpu_ops", rows)


if __name__ == "__main__":
    main()
