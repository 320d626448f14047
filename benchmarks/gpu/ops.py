"""Times every op of `tokenmill.ops` at the shapes of Llama 3.1 8B, beside torch's way and the device's limit.

    python -m benchmarks.gpu.ops [--rows 1 16 256] [--out benchmarks/results/gpu_ops.json]

Prints a table and writes the file. All kernels are compiled first, beside each other, and algorithms of libraries are
chosen as an engine does. The last lines time all of a model's layers but their attention, as a decode step runs them:
one CUDA graph, in which kernels may begin while the one before them ends.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.gpu.timing import (
    BF16_FLOPS,
    FP8_FLOPS,
    READ_BANDWIDTH,
    Row,
    event_time,
    graph_time,
    host_time,
    num_sets,
    write_results,
)
from tokenmill.ops.activation import FP8_IMPLEMENTATIONS, silu_and_mul, silu_and_mul_triton
from tokenmill.ops.fp8 import Fp8Weight, per_token_quantize_fp8, scaled_linear, weight_only_linear
from tokenmill.ops.kv_cache import copy_blocks, copy_blocks_torch
from tokenmill.ops.library_product import measure_products
from tokenmill.ops.linear import StreamedWeight, linear, new_arrivals
from tokenmill.ops.rms_norm import add_rms_norm, add_rms_norm_fp8, add_rms_norm_torch, rms_norm, rms_norm_torch
from tokenmill.ops.rope import apply_rope, apply_rope_torch
from tokenmill.ops.row_product import OneRow, PendingNorm, row_product
from tokenmill.runtime.warm_up import run_together

HIDDEN, INTERMEDIATE, HEAD_DIM = 4096, 14336, 128
NUM_HEADS, NUM_KV_HEADS, NUM_LAYERS = 32, 8, 32
LINEARS = {
    "qkv": (6144, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
    "lm_head": (128256, HIDDEN),
}
OF_LAYERS = [name for name in LINEARS if name != "lm_head"]
LAYER_ROWS = (1, 16, 64, 128, 256, 512)
BF16 = torch.bfloat16
Calls = Sequence[Callable[[], object]]
silu_and_mul_fp8 = FP8_IMPLEMENTATIONS["silu"]["triton"]


def normal(*shape: int) -> torch.Tensor:
    """Random numbers on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=BF16)


@dataclass(frozen=True)
class Timed:
    """What a row of the table is taken from.

    Args:
        work: name of the row.
        calls: of the op, over inputs that rotate.
        peer: of another way; None: there is none.
        limit, goal: seconds.
    """

    work: str
    calls: Calls
    peer: Calls | None
    limit: float
    goal: float | None = None

    @property
    def first_runs(self) -> Calls:
        """One call of each way, in which kernels are compiled."""
        return [calls[0] for calls in (self.calls, self.peer) if calls]

    def row(self) -> Row:
        """The row, in microseconds."""
        peer = None if self.peer is None else graph_time(self.peer) * 1e6
        goal = None if self.goal is None else self.goal * 1e6
        return Row(self.work, "time", graph_time(self.calls) * 1e6, "us", goal, peer, self.limit * 1e6)


def row_ops(num_rows: int) -> Iterator[Timed]:
    """Norms, rotary embedding, activation and quantization."""
    wide = 2 * num_rows  # bytes of one column of bf16
    weight = normal(HIDDEN)
    sets = num_sets(wide * HIDDEN * 2)
    xs = [(normal(num_rows, HIDDEN), normal(num_rows, HIDDEN)) for _ in range(sets)]
    yield Timed(
        f"rms_norm rows {num_rows}",
        [lambda x=x: rms_norm(x, weight, 1e-5) for x, _ in xs],
        [lambda x=x: rms_norm_torch(x, weight, 1e-5) for x, _ in xs],
        2 * wide * HIDDEN / READ_BANDWIDTH,
    )
    yield Timed(
        f"add_rms_norm rows {num_rows}",
        [lambda x=x, r=r: add_rms_norm(x, r, weight, 1e-5) for x, r in xs],
        [lambda x=x, r=r: add_rms_norm_torch(x, r, weight, 1e-5) for x, r in xs],
        4 * wide * HIDDEN / READ_BANDWIDTH,
    )
    yield Timed(
        f"add_rms_norm_fp8 rows {num_rows}",
        [lambda x=x, r=r: add_rms_norm_fp8(x, r, weight, 1e-5) for x, r in xs],
        [lambda x=x, r=r: per_token_quantize_fp8(add_rms_norm(x, r, weight, 1e-5)[0]) for x, r in xs],
        3.5 * wide * HIDDEN / READ_BANDWIDTH,
    )
    yield Timed(
        f"per_token_quantize_fp8 rows {num_rows}",
        [lambda x=x: per_token_quantize_fp8(x) for x, _ in xs],
        None,
        1.5 * wide * HIDDEN / READ_BANDWIDTH,
    )
    yield from _activations(num_rows, wide)
    yield from _ropes(num_rows, wide)


def _activations(num_rows: int, wide: int) -> Iterator[Timed]:
    gate_ups = [normal(num_rows, 2 * INTERMEDIATE) for _ in range(num_sets(wide * INTERMEDIATE * 2))]
    yield Timed(
        f"silu_and_mul rows {num_rows}",
        [lambda x=x: silu_and_mul_triton(x) for x in gate_ups],
        [lambda x=x: silu_and_mul(x) for x in gate_ups],
        3 * wide * INTERMEDIATE / READ_BANDWIDTH,
    )
    yield Timed(
        f"silu_and_mul_fp8 rows {num_rows}",
        [lambda x=x: silu_and_mul_fp8(x) for x in gate_ups],
        [lambda x=x: per_token_quantize_fp8(silu_and_mul_triton(x)) for x in gate_ups],
        2.5 * wide * INTERMEDIATE / READ_BANDWIDTH,
    )


def _ropes(num_rows: int, wide: int) -> Iterator[Timed]:
    heads, rotated = NUM_HEADS + 2 * NUM_KV_HEADS, NUM_HEADS + NUM_KV_HEADS
    qkvs = [normal(num_rows, heads, HEAD_DIM) for _ in range(num_sets(wide * heads * HEAD_DIM))]
    cos = torch.ones(num_rows, 1, HEAD_DIM, device="cuda")
    sin = torch.zeros(num_rows, 1, HEAD_DIM, device="cuda")
    limit = (2 * wide * rotated * HEAD_DIM + num_rows * HEAD_DIM * 4) / READ_BANDWIDTH
    yield Timed(
        f"apply_rope rows {num_rows}",
        [lambda x=x: apply_rope(x[:, :rotated], cos, sin) for x in qkvs],
        [lambda x=x: apply_rope_torch(x[:, :rotated], cos, sin) for x in qkvs],
        limit,
    )


def linears(name: str, all_rows: Sequence[int]) -> Iterator[Timed]:
    """One linear layer in bf16 and, but for the head, in float8."""
    out_features, in_features = LINEARS[name]
    size = out_features * in_features
    weights = [normal(out_features, in_features) for _ in range(num_sets(2 * size))]
    streamed = [StreamedWeight(weight, new_arrivals(weight)) for weight in weights]
    for num_rows in all_rows:
        x = normal(num_rows, in_features)
        moved = 2 * (size + num_rows * (in_features + out_features))
        limit = max(moved / READ_BANDWIDTH, 2 * num_rows * size / BF16_FLOPS)
        yield Timed(
            f"linear bf16 {name} rows {num_rows}",
            [lambda w=w, x=x: linear(x, w) for w in streamed],
            [lambda w=w, x=x: functional.linear(x, w) for w in weights],
            limit,
            limit / 0.9 if num_rows == 1 else None,
        )
    if name == "lm_head":
        return
    quantized = [Fp8Weight.of(per_token_quantize_fp8(normal(out_features, in_features))) for _ in range(num_sets(size))]
    for num_rows in all_rows:
        yield from _fp8_linear(name, num_rows, quantized)


def _fp8_linear(name: str, num_rows: int, weights: list[Fp8Weight]) -> Iterator[Timed]:
    out_features, in_features = LINEARS[name]
    size = out_features * in_features
    x = normal(num_rows, in_features)
    rows = per_token_quantize_fp8(x)
    moved = size + num_rows * (in_features + 2 * out_features)
    limit = max(moved / READ_BANDWIDTH, 2 * num_rows * size / FP8_FLOPS)

    def library(weight: Fp8Weight, fast: bool) -> torch.Tensor:
        scales = rows.scales[:, None], weight.scales[None, :]
        return torch._scaled_mm(rows.values, weight.values.t(), *scales, out_dtype=BF16, use_fast_accum=fast)

    fast = [lambda w=w: library(w, True) for w in weights]
    if num_rows == 1:
        calls = [lambda w=w: weight_only_linear(x, w) for w in weights]
        yield Timed(f"linear fp8 weight-only {name} rows 1", calls, fast, limit, limit / 0.85)
        return
    calls = [lambda w=w: scaled_linear(rows, w, None, BF16) for w in weights]
    yield Timed(f"linear fp8 {name} rows {num_rows}", calls, fast, limit)
    if num_rows >= 256:
        exact = [lambda w=w: library(w, False) for w in weights]
        yield Timed(f"linear fp8 {name} rows {num_rows}, library with exact sums", exact, fast, limit)


def other() -> Iterator[Row]:
    """Copies of cache blocks, and host time of eager launches."""
    caches = [(normal(256, 32, NUM_KV_HEADS, HEAD_DIM), normal(256, 32, NUM_KV_HEADS, HEAD_DIM)) for _ in range(32)]
    source, destination = torch.arange(8, device="cuda"), torch.arange(100, 108, device="cuda")
    moved = 2 * 8 * sum(tensor[0].nbytes for cache in caches for tensor in cache)
    for function in (copy_blocks, copy_blocks_torch):
        function(caches, source, destination)
    times = [
        min(event_time(lambda f=f: f(caches, source, destination)) for _ in range(5)) * 1e6
        for f in (copy_blocks, copy_blocks_torch)
    ]
    yield Row("copy_blocks 8 blocks 32 layers", "time", times[0], "us", None, times[1], moved / READ_BANDWIDTH * 1e6)
    x, weight = normal(1, HIDDEN), normal(HIDDEN, HIDDEN)
    streamed, norm = StreamedWeight(weight, new_arrivals(weight)), normal(HIDDEN)
    for work, call, peer in (
        ("rms_norm", lambda: rms_norm(x, norm, 1e-5), lambda: rms_norm_torch(x, norm, 1e-5)),
        ("linear bf16 rows 1", lambda: linear(x, streamed), lambda: functional.linear(x, weight)),
    ):
        yield Row(f"{work}, eager", "host time", host_time(call) * 1e6, "us", None, host_time(peer) * 1e6, None)


def decoder_step(num_rows: int, fp8: bool, num_layers: int) -> Callable[[], object]:
    """All layers but their attention."""
    layers = []
    for _ in range(num_layers):
        weights = {name: normal(*LINEARS[name]) * 0.02 for name in OF_LAYERS}
        layers.append({
            name: Fp8Weight.of(per_token_quantize_fp8(weight)) if fp8 else StreamedWeight(weight, new_arrivals(weight))
            for name, weight in weights.items()
        })  # fmt: skip
    x, weight = normal(num_rows, HIDDEN), normal(HIDDEN)
    cos = torch.ones(num_rows, 1, HEAD_DIM, device="cuda")
    step = _row_step if num_rows == 1 else _fp8_step if fp8 else _step
    return lambda: step(x, layers, weight, cos, torch.zeros_like(cos))


def decoder_layers(num_rows: int, fp8: bool) -> Row:
    """All layers but their attention, as one graph; the time of one layer."""
    size = sum(out_features * in_features for out_features, in_features in (LINEARS[name] for name in OF_LAYERS))
    flops = 2 * num_rows * size / (FP8_FLOPS if fp8 else BF16_FLOPS)
    limit = max((1 if fp8 else 2) * size / READ_BANDWIDTH, flops)
    seconds = graph_time([decoder_step(num_rows, fp8, NUM_LAYERS)], launches=1) / NUM_LAYERS
    work = f"decoder layer without attention {'fp8' if fp8 else 'bf16'} rows {num_rows}"
    return Row(work, "time", seconds * 1e6, "us", None, None, limit * 1e6)


def _row_step(
    x: torch.Tensor, layers: Sequence[dict[str, Any]], norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """One row: norms and activation inside the products; its attention turns queries and keys."""

    def product(x: OneRow, weight: Fp8Weight | StreamedWeight, activation: str = "") -> torch.Tensor:
        if isinstance(weight, Fp8Weight):
            return row_product(x, weight.values, weight.scales, None, activation)
        return row_product(x, weight.data, None, None, activation)

    residual = x
    for layer in layers:
        row = PendingNorm.of(x, residual, norm, 1e-5)
        qkv = product(row, layer["qkv"])
        x = product(qkv[:, :HIDDEN], layer["o"])
        row = PendingNorm.of(x, row.stream, norm, 1e-5)
        x = product(product(row, layer["gate_up"], "silu"), layer["down"])
        residual = row.stream
    return x


def _step(
    x: torch.Tensor,
    layers: Sequence[dict[str, StreamedWeight]],
    norm: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    residual = x
    for layer in layers:
        hidden, residual = add_rms_norm(x, residual, norm, 1e-5)
        qkv = linear(hidden, layer["qkv"])
        rotated = apply_rope(qkv.view(x.shape[0], -1, HEAD_DIM)[:, : NUM_HEADS + NUM_KV_HEADS], cos, sin)
        x = linear(rotated.flatten(1)[:, :HIDDEN], layer["o"])
        hidden, residual = add_rms_norm(x, residual, norm, 1e-5)
        x = linear(silu_and_mul_triton(linear(hidden, layer["gate_up"])), layer["down"])
    return x


def _fp8_step(
    x: torch.Tensor, layers: Sequence[dict[str, Fp8Weight]], norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    residual = x
    for layer in layers:
        rows, residual = add_rms_norm_fp8(x, residual, norm, 1e-5)
        qkv = scaled_linear(rows, layer["qkv"], None, BF16)
        rotated = apply_rope(qkv.view(x.shape[0], -1, HEAD_DIM)[:, : NUM_HEADS + NUM_KV_HEADS], cos, sin)
        x = scaled_linear(per_token_quantize_fp8(rotated.flatten(1)[:, :HIDDEN]), layer["o"], None, BF16)
        rows, residual = add_rms_norm_fp8(x, residual, norm, 1e-5)
        rows = silu_and_mul_fp8(scaled_linear(rows, layer["gate_up"], None, BF16))
        x = scaled_linear(rows, layer["down"], None, BF16)
    return x


def show(row: Row) -> None:
    """One line of the table."""
    peer = "" if row.peer is None else f"  peer {row.peer:9.1f}"
    limit = "" if row.limit is None else f"  limit {row.limit:8.1f}  reached {row.limit / row.value:5.1%}"
    goal = "" if row.goal is None else ("  goal met" if row.value <= row.goal else "  goal MISSED")
    print(f"{row.work:52} {row.value:9.1f} {row.unit}{peer}{limit}{goal}", flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64, 128, 256, 512, 2048])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_ops.json"))
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    works = [work for num_rows in options.rows for work in row_ops(num_rows)]
    works += [work for name in LINEARS for work in linears(name, options.rows)]
    layers = [decoder_step(num_rows, fp8, 1) for fp8 in (False, True) for num_rows in LAYER_ROWS]
    run_together([*(call for work in works for call in work.first_runs), *layers], device)
    measure_products(device)  # as an engine does when it starts
    rows: list[Row] = []

    def collect(row: Row) -> None:
        rows.append(row)
        show(row)

    for work in works:
        collect(work.row())
    for row in other():
        collect(row)
    works.clear()
    layers.clear()
    for fp8 in (False, True):
        for num_rows in LAYER_ROWS:
            torch.cuda.empty_cache()
            collect(decoder_layers(num_rows, fp8))
    write_results("ops", rows, options.out)


if __name__ == "__main__":
    main()
