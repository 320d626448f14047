"""The products of a program as `Tunable`s: every shape of packed weight, for every profile.

Measured as a step runs them: threads walk a list of the same product over as many weights as the program has, and each
run takes other weights, so that one token streams its weights from memory and not from a cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Final

import numpy as np

from tokenmill.builder.packing import PACKED_GATED, ROWS
from tokenmill.builder.tuning import Tunable
from tokenmill.ops.cpu.compile_processes import compile_all
from tokenmill.ops.cpu.jit import NativeFunction
from tokenmill.ops.cpu.layout import GROUP_SIZE, int8_group32_bytes
from tokenmill.ops.cpu.linear_int8 import (
    SCRATCH_BYTES,
    Activations,
    LinearVariant,
    LinearWeight,
    Matrix,
    linear_arguments,
    linear_kernel,
    linear_variants,
)
from tokenmill.ops.cpu.memory import huge_page_memory
from tokenmill.ops.cpu.packing import encoding_of, packed_bytes
from tokenmill.ops.cpu.threads import STEP_FUNCTIONS, OpList, ThreadPool
from tokenmill.ops.platform import num_usable_cores
from tokenmill.program.program import Program
from tokenmill.program.timing_cache import linear_key
from tokenmill.program.weight_file import Bytes

REGION_BYTES: Final = 128 << 20
"""Weights that runs of one shape take turns on: more than the caches of some cores hold."""

MAX_RUNS: Final = 64
"""Runs with weights of their own, at most: tiny weights stay in a cache in real steps, too."""

MAX_OPERATIONS: Final = 2e9
"""Multiplications and additions of one measured run; with many tokens fewer copies are enough."""


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A packed weight, without its values."""

    format: str
    num_rows: int
    num_columns: int
    gated: bool
    is_head: bool
    """Whether it is only read for the rows whose logits are wanted, not for all tokens."""

    @property
    def num_bytes(self) -> int:
        """Of the packed weight."""
        return packed_bytes(self.format, self.num_rows, self.num_columns, gated=self.gated)

    def num_copies(self, count: int, num_tokens: int) -> int:
        """How many of `count` weights one run reads."""
        operations = 2.0 * num_tokens * self.num_rows * self.num_columns
        return max(1, min(count, REGION_BYTES // self.num_bytes, int(MAX_OPERATIONS / operations)))


def linear_shapes(program: Program) -> dict[LinearShape, int]:
    """Every shape of packed weight, and how many weights have it."""
    weights = {weight.name: weight for weight in program.weights}
    rows = {buffer.name: buffer.rows for buffer in (*program.buffers, *program.inputs, program.output)}
    counts = Counter[tuple[str, int, int, bool]]()
    with_tokens: set[tuple[str, int, int, bool]] = set()
    for operation in program.operations:
        if operation.kind == "linear" and weights[operation.weights["weight"]].layout != ROWS:
            weight = weights[operation.weights["weight"]]
            shape = (weight.format, weight.shape[0], weight.shape[1], weight.layout == PACKED_GATED)
            counts[shape] += 1
            if rows[operation.inputs["x"].buffer] == "tokens":
                with_tokens.add(shape)
    return {LinearShape(*shape, is_head=shape not in with_tokens): count for shape, count in counts.items()}


@contextmanager
def linear_tunables(
    program: Program, profiles: Sequence[int], max_num_rows: int, num_threads: int
) -> Iterator[list[Tunable]]:
    """The tunables of a program; threads and memory last as long as the block.

    Args:
        program: with packed weights.
        profiles: numbers of tokens.
        max_num_rows: most rows whose logits are wanted.
        num_threads: that compute.
    """
    shapes = linear_shapes(program)
    if not shapes or not profiles:
        yield []
        return
    compile_all([*STEP_FUNCTIONS, *_kernels(shapes, profiles)], num_usable_cores())
    bench = _Bench(shapes, max(profiles), num_threads)
    try:
        yield [
            bench.tunable(shape, count, num_tokens)
            for shape, count in shapes.items()
            for num_tokens in profiles
            if not shape.is_head or num_tokens <= max_num_rows
        ]
    finally:
        bench.pool.close()


def _kernels(shapes: Iterable[LinearShape], profiles: Sequence[int]) -> Iterator[NativeFunction]:
    """All that may be measured."""
    for weight_format in sorted({shape.format for shape in shapes}):
        for one_token in sorted({num_tokens == 1 for num_tokens in profiles}):
            for variant in linear_variants(one_token=one_token):
                yield linear_kernel(weight_format, one_token=one_token, variant=variant)


class _Bench:
    """Memory and threads that all measurements share."""

    def __init__(self, shapes: Mapping[LinearShape, int], max_tokens: int, num_threads: int) -> None:
        self.pool = ThreadPool(num_threads)
        columns = max(shape.num_columns for shape in shapes)
        self._x = huge_page_memory(int8_group32_bytes(max_tokens, columns))
        self._x[:] = 0x3C  # as int8 60, as float32 0.0115: ordinary numbers, whatever is read
        self._y = huge_page_memory(max(4 * shape.num_rows * (1 if shape.is_head else max_tokens) for shape in shapes))
        self._scratch = huge_page_memory(SCRATCH_BYTES * num_threads)
        self._weights = huge_page_memory(
            max(
                max(shape.num_bytes, min(REGION_BYTES, MAX_RUNS * count * shape.num_bytes))
                for shape, count in shapes.items()
            )
        )
        self._filled_for = ""

    def tunable(self, shape: LinearShape, count: int, num_tokens: int) -> Tunable:
        """One shape for one number of tokens."""
        variants = {variant.name: variant for variant in linear_variants(one_token=num_tokens == 1)}
        copies = shape.num_copies(count, num_tokens)

        num_runs = max(1, min(MAX_RUNS, len(self._weights) // (copies * shape.num_bytes)))

        def prepare(name: str) -> Callable[[], None]:
            self._fill(shape.format)
            # Each variant starts elsewhere, or it would find in the cache what the one before it has read.
            start = list(variants).index(name) * num_runs // len(variants)
            order = [(start + index) % num_runs for index in range(num_runs)]
            lists = cycle(
                [self._ops(shape, range(one * copies, (one + 1) * copies), num_tokens, variants[name]) for one in order]
            )
            return lambda: self.pool.run(next(lists))

        key = linear_key(shape.format, shape.num_rows, shape.num_columns, shape.gated, num_tokens)
        return Tunable(key, tuple(variants), prepare)

    def _ops(self, shape: LinearShape, copies: range, num_tokens: int, variant: LinearVariant) -> OpList:
        """Products with the weights of these numbers."""
        # The head's logits are as wide as the vocabulary: they are written over one row.
        stride = 0 if shape.is_head else 4 * shape.num_rows
        y: Matrix | Activations = Matrix(self._y.ctypes.data, stride)
        if shape.gated:
            y = Activations(self._y.ctypes.data, -(-shape.num_rows // 2 // GROUP_SIZE))
        x = Activations(self._x.ctypes.data, -(-shape.num_columns // GROUP_SIZE))
        kernel = linear_kernel(shape.format, one_token=num_tokens == 1, variant=variant)
        ops = OpList(len(copies))
        for index in copies:
            address = self._weights.ctypes.data + index * shape.num_bytes
            weight = LinearWeight(address, shape.format, shape.num_rows, shape.num_columns, shape.gated)
            arguments = linear_arguments(
                weight, x, y, self._scratch.ctypes.data, activation="silu" if shape.gated else None
            )
            ops.append(kernel, *arguments, num_tokens=num_tokens)
        return ops

    def _fill(self, weight_format: str) -> None:
        """Random values under scales that are ordinary numbers."""
        if self._filled_for == weight_format:
            return
        encoding = encoding_of(weight_format)
        size = len(self._weights) // encoding.group_bytes * encoding.group_bytes
        records: Bytes = self._weights[:size].reshape(-1, encoding.group_bytes)
        records[:] = np.random.default_rng(0).integers(0, 256, records.shape[1], np.uint8)
        if encoding.scale_bytes:
            kind = np.float16 if encoding.scale_bytes == 2 else np.float32
            records[:, : encoding.values_offset].view(kind)[:] = 0.01
        self._filled_for = weight_format
