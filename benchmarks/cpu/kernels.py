"""Rates of the CPU's linear kernels beside what the machine allows at that moment. Writes `results/cpu_kernels.json`.

    python benchmarks/cpu/kernels.py
    python benchmarks/cpu/kernels.py --threads 1 --tokens 1,16 --repeats 5

Shapes are those of SmolLM2-135M: 30 layers in Q4_1, each with its own weights so that no cache holds them all, and the
head in Q8_0. For each number of tokens a repeat runs a read of as many bytes, pure dot products, and every kernel, one
after the other; a rate is the median over the repeats of its share of the limit measured in the same repeat.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.result_file import RESULTS, Row, print_rows, write_result
from tokenmill.ops.cpu.layout import int8_group32_bytes
from tokenmill.ops.cpu.limits import OPERATIONS_PER_TURN, PAGE, product_kernel, read_memory
from tokenmill.ops.cpu.linear_int8 import (
    SCRATCH_BYTES,
    Activations,
    LinearWeight,
    Matrix,
    linear_arguments,
    linear_kernel,
)
from tokenmill.ops.cpu.memory import huge_page_memory
from tokenmill.ops.cpu.packing import encoding_of, packed_bytes
from tokenmill.ops.cpu.threads import OpList, ThreadPool

NUM_LAYERS = 30
PRODUCT_TURNS = 500_000


@dataclass(frozen=True)
class Shape:
    """A linear of the model."""

    name: str
    format: str
    num_rows: int
    num_columns: int
    gated: bool = False
    count: int = NUM_LAYERS

    @property
    def num_bytes(self) -> int:
        """Of one packed weight."""
        return packed_bytes(self.format, self.num_rows, self.num_columns, gated=self.gated)

    def operations(self, num_tokens: int) -> int:
        """Multiplications and additions of all weights of this shape."""
        return 2 * num_tokens * self.num_rows * self.num_columns * self.count


SHAPES = (
    Shape("qkv", "q4_1", 960, 576),
    Shape("attention output", "q4_1", 576, 576),
    Shape("gate, up, silu, quantize", "q4_1", 3072, 576, gated=True),
    Shape("down", "q4_1", 576, 1536),
    Shape("head", "q8_0", 49152, 576, count=1),
)


class Model:
    """Weights of all shapes in one memory, in the order in which a step reads them; and activations."""

    def __init__(self, num_threads: int, max_tokens: int) -> None:
        layers = [shape for shape in SHAPES if shape.count > 1]
        order = [*layers * NUM_LAYERS, *(shape for shape in SHAPES if shape.count == 1)]
        self.num_bytes = sum(shape.num_bytes for shape in order)
        self.memory = huge_page_memory(self.num_bytes + PAGE)
        self.addresses: dict[str, list[int]] = {shape.name: [] for shape in SHAPES}
        generator = np.random.default_rng(0)
        first = 0
        for shape in order:
            self._fill(generator, shape, self.memory[first : first + shape.num_bytes])
            self.addresses[shape.name].append(self.memory[first:].ctypes.data)
            first += shape.num_bytes
        self.scratch = huge_page_memory(SCRATCH_BYTES * num_threads)
        self.results = huge_page_memory(PAGE * num_threads)
        self.x = huge_page_memory(int8_group32_bytes(max_tokens, 1536))
        self.x[:] = 1
        self.quantized = huge_page_memory(int8_group32_bytes(max_tokens, 1536))
        self.y = huge_page_memory(4 * max_tokens * 49152)

    @staticmethod
    def _fill(generator: np.random.Generator, shape: Shape, place: np.ndarray) -> None:
        """Random values with scales that are ordinary numbers."""
        encoding = encoding_of(shape.format)
        records = place.reshape(-1, encoding.group_bytes)
        records[:] = generator.integers(0, 256, records.shape[1], dtype=np.uint8)
        records[:, : encoding.values_offset].view(np.float16)[:] = 0.01

    def ops(self, shape: Shape, num_tokens: int) -> OpList:
        """All linears of one shape."""
        ops = OpList(shape.count)
        groups = -(-shape.num_columns // 32)
        y: Matrix | Activations = Matrix(self.y.ctypes.data, 4 * shape.num_rows)
        if shape.gated:
            y = Activations(self.quantized.ctypes.data, shape.num_rows // 64)
        for address in self.addresses[shape.name]:
            arguments = linear_arguments(
                LinearWeight(address, shape.format, shape.num_rows, shape.num_columns, shape.gated),
                Activations(self.x.ctypes.data, groups),
                y,
                self.scratch.ctypes.data,
                activation="silu" if shape.gated else None,
            )
            ops.append(linear_kernel(shape.format, one_token=num_tokens == 1), *arguments, num_tokens=num_tokens)
        return ops

    def limits(self) -> tuple[OpList, OpList]:
        """A read of all weights, and pure dot products."""
        read, multiply = OpList(1), OpList(1)
        address, result = self.memory.ctypes.data, self.results.ctypes.data
        read.append(read_memory, address, self.num_bytes // PAGE * PAGE, result)
        multiply.append(product_kernel(), address, 0, result, PRODUCT_TURNS)
        return read, multiply


def seconds(pool: ThreadPool, ops: OpList) -> float:
    """Time of one run."""
    begin = time.perf_counter()
    pool.run(ops)
    return time.perf_counter() - begin


def measure(pool: ThreadPool, model: Model, num_tokens: int, repeats: int) -> list[Row]:
    """Rates of all shapes for one number of tokens."""
    shapes = [shape for shape in SHAPES if shape.count > 1 or num_tokens <= 16]
    lists = {shape.name: model.ops(shape, num_tokens) for shape in shapes}
    read, multiply = model.limits()
    times: dict[str, list[float]] = {name: [] for name in lists}
    bandwidths, peaks = [], []
    for _ in range(repeats + 1):
        bandwidths.append(model.num_bytes / seconds(pool, read) / 1e9)
        peaks.append(PRODUCT_TURNS * OPERATIONS_PER_TURN * pool.num_threads / seconds(pool, multiply) / 1e9)
        for name, ops in lists.items():
            times[name].append(seconds(pool, ops))
    rows = []
    for shape in shapes:
        spent = times[shape.name][1:]  # the first run warms up
        traffic = shape.num_bytes * shape.count / 1e9
        work = shape.operations(num_tokens) / 1e9
        limits = [max(traffic / bandwidth, work / peak) for bandwidth, peak in zip(bandwidths, peaks, strict=True)][1:]
        shares = [limit / second for limit, second in zip(limits, spent, strict=True)]
        what = f"{num_tokens} tokens, {shape.name}"
        rows.append(Row(what, "time of all layers", statistics.median(spent) * 1e3, "ms"))
        rows.append(Row(what, "bytes of weights", traffic / statistics.median(spent), "GB/s"))
        rows.append(Row(what, "operations", work / statistics.median(spent), "GOPS"))
        rows.append(Row(what, "share of the limit", statistics.median(shares), ""))
    rows.append(Row(f"{num_tokens} tokens", "memory bandwidth", statistics.median(bandwidths[1:]), "GB/s"))
    rows.append(Row(f"{num_tokens} tokens", "int8 peak", statistics.median(peaks[1:]), "GOPS"))
    total = sum(statistics.median(times[shape.name][1:]) for shape in shapes)
    rows.append(Row(f"{num_tokens} tokens", "tokens by linears alone", num_tokens / total, "tokens/s"))
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", default="1,4,16,256,1024", help="numbers of tokens, with commas")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS / "cpu_kernels.json")
    options = parser.parse_args()
    counts = [int(count) for count in options.tokens.split(",")]
    model = Model(options.threads, max(counts))
    pool = ThreadPool(options.threads)
    rows = [row for count in counts for row in measure(pool, model, count, options.repeats)]
    pool.close()
    print_rows(rows)
    write_result(options.output, "cpu_kernels", rows)


if __name__ == "__main__":
    main()
