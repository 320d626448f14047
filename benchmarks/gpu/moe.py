"""Times of the experts' kernels at the shape of Qwen3-30B-A3B on one GPU, beside the device's limit.

    python -m benchmarks.gpu.moe [--tokens 1 16 256 8192] [--weights features plain] [--tune]

Every call has a routing of its own, so that few tokens find no expert's weights in the cache. `--tune` tries other
blocks of the kernels for many tokens; their compilation is spread over processes first.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
import triton

from benchmarks.gpu.timing import BF16_FLOPS, FP8_FLOPS, READ_BANDWIDTH, Row, graph_time, write_results
from tokenmill.ops.fp8 import QuantizedRows, per_token_quantize_fp8
from tokenmill.ops.moe import ExpertMatrix, ExpertWeights, Routing, route, run_experts
from tokenmill.ops.moe_plan import MAX_PAIR_TOKENS, GroupedPlan, PairPlan, grouped_plan
from tokenmill.ops.triton.moe_layer import programs_stay
from tokenmill.ops.triton.moe_many import many_down, many_gate_up
from tokenmill.ops.triton.moe_pairs import run_pairs
from tokenmill.ops.triton.moe_routing import combine
from tokenmill.ops.triton.moe_sorting import MAX_TOGETHER, RowBlocks, sort_many_pairs, sort_pairs
from tokenmill.ops.triton.moe_tiles import grouped_down, grouped_gate_up

HIDDEN, SIZE, NUM_EXPERTS, TOP_K = 2048, 768, 128, 8
BF16 = torch.bfloat16
UNFIT = (triton.OutOfResources, RuntimeError)
Calls = list[Callable[[], object]]


def random_weights(kind: str) -> ExpertWeights:
    """One layer's experts."""

    def matrix(out_features: int, in_features: int) -> ExpertMatrix:
        values = torch.randn(NUM_EXPERTS, out_features, in_features, device="cuda", dtype=BF16) * in_features**-0.5
        if kind == "plain":
            return ExpertMatrix(values)
        rows = per_token_quantize_fp8(values.flatten(0, 1))
        return ExpertMatrix(rows.values.view(values.shape), rows.scales.view(NUM_EXPERTS, out_features))

    return ExpertWeights(matrix(2 * SIZE, HIDDEN), matrix(HIDDEN, SIZE))


def routings(num_tokens: int, count: int) -> list[Routing]:
    """Tokens whose experts are uniformly random."""
    return [
        route(torch.randn(num_tokens, NUM_EXPERTS, device="cuda", dtype=BF16), TOP_K, normalize=True)
        for _ in range(count)
    ]


def limit_of(num_tokens: int, chosen: Sequence[Routing], bytes_per_weight: int, share: float = 1.0) -> float:
    """Seconds: reading the experts that are used once, or the arithmetic; `share` of the three projections."""
    num_used = sum(len(routing.experts.unique()) for routing in chosen) / len(chosen)
    matrix = 3 * HIDDEN * SIZE * share
    flops = FP8_FLOPS if bytes_per_weight == 1 else BF16_FLOPS
    return max(num_used * matrix * bytes_per_weight / READ_BANDWIDTH, 2 * num_tokens * TOP_K * matrix / flops)


def measure(num_tokens: int, weights: ExpertWeights, kind: str) -> Iterator[Row]:
    """All that follows the router's product, and its parts."""
    bytes_per_weight = weights.down.values.element_size()
    x = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=BF16)
    chosen = routings(num_tokens, 8 if num_tokens < 512 else 1)
    logits = torch.randn(num_tokens, NUM_EXPERTS, device="cuda", dtype=BF16)
    work = f"experts {kind} {num_tokens} tokens"
    limit = limit_of(num_tokens, chosen, bytes_per_weight)
    yield row(work, [lambda r=r: run_experts(x, r, weights) for r in chosen], limit)
    yield row(f"{work}: route", [lambda: route(logits, TOP_K, normalize=True)], None)
    if num_tokens <= MAX_PAIR_TOKENS:
        return
    plan = grouped_plan(num_tokens * TOP_K, NUM_EXPERTS)
    stays = programs_stay(x, weights, plan, num_tokens * TOP_K)
    sort = sort_many_pairs if stays or num_tokens * TOP_K > MAX_TOGETHER else sort_pairs
    tiles = [sort(r.experts, 0, NUM_EXPERTS, plan.block_rows) for r in chosen]
    yield row(f"{work}: sort", [lambda: sort(chosen[0].experts, 0, NUM_EXPERTS, plan.block_rows)], None)
    rows, scales = operand(x, bytes_per_weight)
    by_token = weights.scales_inner_by_token(num_tokens * TOP_K)

    def first(r: Routing, t: RowBlocks) -> torch.Tensor | QuantizedRows:
        if stays:
            return many_gate_up(QuantizedRows(rows, scales), r, weights, t, BF16)
        return grouped_gate_up(rows, scales, r, weights, t, plan, unquantized=BF16 if by_token else None)

    both = list(zip(chosen, tiles, strict=True))
    limits = [limit_of(num_tokens, chosen, bytes_per_weight, share) for share in (2 / 3, 1 / 3)]
    yield row(f"{work}: gate and up", [partial(first, *pair) for pair in both], limits[0])
    inner = first(*both[0])
    if by_token:
        assert isinstance(inner, torch.Tensor)
        between = inner
        yield row(f"{work}: quantize", [lambda: per_token_quantize_fp8(between)], None)
        inner = per_token_quantize_fp8(between)

    def second(r: Routing, t: RowBlocks) -> torch.Tensor:
        if stays:
            return many_down(inner, r, weights, t, BF16)
        return grouped_down(inner, r, weights, t, plan, BF16)

    yield row(f"{work}: down", [partial(second, *pair) for pair in both], limits[1])
    of_pairs = second(*both[0])
    yield row(f"{work}: combine", [lambda: combine(of_pairs, chosen[0].experts, 0, NUM_EXPERTS)], None)


def operand(x: torch.Tensor, bytes_per_weight: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x as the first product takes it."""
    return per_token_quantize_fp8(x) if bytes_per_weight == 1 else (x, None)


def row(work: str, calls: Calls, limit: float | None) -> Row:
    """Microseconds of one call; the limit is given in seconds."""
    return Row(work, "time", graph_time(calls) * 1e6, "us", limit=None if limit is None else limit * 1e6)


# ---- other blocks ------------------------------------------------------------------------------------------------


def candidates(num_tokens: int) -> list[GroupedPlan]:
    """Blocks that are worth a try for so many tokens."""
    stages = ((3, 128), (4, 128), (6, 128), (3, 256))
    if num_tokens >= 2048:
        tiles: Sequence[tuple[int, int, int]] = ((128, 8, 128), (64, 4, 128), (64, 8, 128), (128, 4, 128))
        stages = ((3, 128), (4, 128), (3, 64))
    else:
        rows = (16, 32) if num_tokens <= 256 else (32, 64)
        tiles = tuple(itertools.product(rows, (4, 8), (64, 128)))
    return [
        GroupedPlan(block_rows, warps, num_stages, num_bytes, out, warps, num_stages)
        for block_rows, warps, out in tiles
        for num_stages, num_bytes in stages
    ]


def tune(num_tokens: int, weights: ExpertWeights) -> None:
    """Print the best blocks for both products."""
    x = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=BF16)
    chosen = routings(num_tokens, 4 if num_tokens < 512 else 1)
    tried: dict[str, list[tuple[float, GroupedPlan]]] = {"gate and up": [], "down": []}
    for plan in candidates(num_tokens):
        for name, calls in tuned_calls(x, weights, chosen, plan).items():
            try:
                tried[name].append((graph_time(calls, launches=8, replays=3), plan))
            except UNFIT as error:
                print("   ", name, tuple(plan), type(error).__name__)
    for name, share in (("gate and up", 2 / 3), ("down", 1 / 3)):
        limit = limit_of(num_tokens, chosen, weights.down.values.element_size(), share)
        print(f"{num_tokens} tokens, {name}: limit {limit * 1e6:.1f} us")
        for seconds, plan in sorted(tried[name])[:5]:
            print(f"    {seconds * 1e6:8.1f} us {tuple(plan)}")


def tuned_calls(
    x: torch.Tensor, weights: ExpertWeights, chosen: Sequence[Routing], plan: GroupedPlan
) -> dict[str, Calls]:
    """Both products with a plan; the first only once for all values that it does not depend on."""
    rows, scales = operand(x, weights.down.values.element_size())
    inner = empty_inner(x.shape[0], weights)
    calls: dict[str, Calls] = {"gate and up": [], "down": []}
    for routing in chosen:
        tiles = sort_pairs(routing.experts, 0, NUM_EXPERTS, plan.block_rows)
        calls["gate and up"].append(partial(grouped_gate_up, rows, scales, routing, weights, tiles, plan))
        calls["down"].append(partial(grouped_down, inner, routing, weights, tiles, plan, BF16))
    if plan.down_out != 128:
        del calls["gate and up"]
    if plan.gate_up_bytes != 128:
        del calls["down"]
    return calls


def empty_inner(num_tokens: int, weights: ExpertWeights) -> torch.Tensor | QuantizedRows:
    """What the second product takes."""
    inner = torch.randn(num_tokens * TOP_K, SIZE, device="cuda", dtype=BF16)
    if weights.down.scales is None:
        return inner
    rows = per_token_quantize_fp8(inner)
    if weights.scales_inner_by_token(num_tokens * TOP_K):
        return rows
    return QuantizedRows(rows.values, rows.scales[:, None].expand(-1, SIZE // 128).contiguous())


def tune_pairs(weights: ExpertWeights) -> None:
    """Print the best blocks for one token."""
    x, chosen = torch.randn(1, HIDDEN, device="cuda", dtype=BF16), routings(1, 16)
    tried = []
    for gate_up, down in pair_candidates():
        calls: Calls = [partial(run_pairs, x, r, weights, gate_up, down) for r in chosen]
        tried.append((graph_time(calls), gate_up, down))
    for seconds, gate_up, down in sorted(tried)[:8]:
        print(f"    {seconds * 1e6:8.1f} us {tuple(gate_up)} {tuple(down)}")


def pair_candidates() -> list[tuple[PairPlan, PairPlan]]:
    """Plans of the first and of the second product."""
    first = [
        PairPlan(*plan) for plan in ((1, 2048, 1), (1, 2048, 2), (2, 2048, 4), (2, 1024, 2), (4, 512, 2), (4, 1024, 4))
    ]
    second = [
        PairPlan(*plan) for plan in ((4, 256, 1), (8, 256, 2), (16, 256, 4), (8, 256, 4), (4, 256, 2), (2, 256, 1))
    ]
    best_first, best_second = first[2], second[1]
    return [(plan, best_second) for plan in first] + [(best_first, plan) for plan in second]


def compile_some(part: int, num_parts: int, all_tokens: Sequence[int]) -> None:
    """Compile every `num_parts`-th candidate into triton's cache; nothing is timed."""
    weights = random_weights("features")
    plans = [plan for num_tokens in all_tokens for plan in candidates(num_tokens)]
    x, routing = torch.randn(8, HIDDEN, device="cuda", dtype=BF16), routings(8, 1)[0]
    for plan in plans[part::num_parts]:
        for calls in tuned_calls(x, weights, [routing], plan).values():
            with suppress(*UNFIT):
                calls[0]()
    for gate_up, down in itertools.islice(pair_candidates(), part, None, num_parts):
        run_pairs(torch.randn(1, HIDDEN, device="cuda", dtype=BF16), routings(1, 1)[0], weights, gate_up, down)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 64, 128, 256, 512, 2048, 8192])
    parser.add_argument("--weights", nargs="+", choices=["plain", "features"], default=["features", "plain"])
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_moe.json"))
    options = parser.parse_args()
    if options.tune:
        many = [num_tokens for num_tokens in options.tokens if num_tokens > MAX_PAIR_TOKENS]
        with ProcessPoolExecutor(12, mp_context=get_context("spawn")) as pool:
            list(pool.map(compile_some, range(12), [12] * 12, [many] * 12))
        weights = random_weights("features")
        if 1 in options.tokens:
            tune_pairs(weights)
        for num_tokens in many:
            tune(num_tokens, weights)
        return
    rows: list[Row] = []
    for kind in options.weights:
        weights = random_weights(kind)
        for num_tokens in options.tokens:
            for found in measure(num_tokens, weights, kind):
                reached = (
                    "" if found.limit is None else f"limit {found.limit:8.1f}  reached {found.limit / found.value:5.1%}"
                )
                print(f"{found.work:44} {found.value:9.1f} us  {reached}", flush=True)
                rows.append(found)
    write_results("moe", rows, options.out)


if __name__ == "__main__":
    main()
