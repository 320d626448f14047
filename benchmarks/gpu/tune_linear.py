"""Search for the plans of `tokenmill.ops.linear_plan`: times every sensible plan of every linear layer of Llama 3.1 8B.

    python -m benchmarks.gpu.tune_linear [--formats bf16 w8a16 w8a8] [--rows 1 16 64] [--shapes qkv o] [--out FILE]

Prints the best plans of each case beside the vendor's library; all times go to FILE. Kernels are compiled by a pool of
processes first, because one search needs some hundreds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.timing import graph_time, num_sets
from tokenmill.ops.linear_plan import MIN_BLOCK_ROWS, StreamPlan, num_splits_for
from tokenmill.ops.triton.fp8 import per_token_quantize_fp8
from tokenmill.ops.triton.linear import small_batch
from tokenmill.ops.triton.matvec import matvec

SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
    "lm_head": (128256, 4096),
}
"""(output, input features) of Llama 3.1 8B's linear layers."""
SHARED_MEMORY = 227 * 1024


class Case(NamedTuple):
    """One product to tune: `format` is bf16, w8a16 (float8 weights, one row only) or w8a8 (float8 rows too)."""

    format: str
    num_rows: int
    shape: str

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight."""
        return 2 if self.format == "bf16" else 1

    @property
    def bytes_read(self) -> int:
        """Bytes of the whole weight."""
        out_features, in_features = SHAPES[self.shape]
        return out_features * in_features * self.weight_bytes


def plans(case: Case) -> Iterator[StreamPlan]:
    """Plans worth trying."""
    out_features, in_features = SHAPES[case.shape]
    if case.num_rows == 1 and case.format != "w8a8":
        yield from _matvec_plans(case, in_features)
    if case.format == "w8a16":
        return
    padded = max(MIN_BLOCK_ROWS, 1 << (case.num_rows - 1).bit_length())
    for block_out, block_in, num_stages in itertools.product((64, 128), (64, 128, 256), (3, 4, 6)):
        for block_rows in (64, 128, 256) if padded > 64 else (padded,):
            stage = block_in * (block_out + block_rows) * case.weight_bytes
            if block_rows > padded or not 24 * 1024 <= num_stages * stage <= SHARED_MEMORY:
                continue
            blocks = -(-out_features // block_out) * -(-case.num_rows // block_rows)
            num_splits = num_splits_for(blocks, in_features // block_in)
            for splits in sorted({1, num_splits, 2 * num_splits}):
                for num_warps in (4, 8) if block_out * block_rows > 4096 else (4,):
                    yield StreamPlan("small_batch", block_out, block_in, num_warps, num_stages, splits, block_rows)


def _matvec_plans(case: Case, in_features: int) -> Iterator[StreamPlan]:
    whole = 1 << (in_features - 1).bit_length()
    for block_in in sorted({512, 1024, 2048, 4096, whole // 2, whole}):
        for block_out in (1, 2, 4, 8, 16):
            for num_warps in (1, 2, 4, 8, 16):
                per_thread = block_in * block_out // (32 * num_warps)
                if block_in < 256 * num_warps or not 16 <= per_thread <= 128:
                    continue
                yield StreamPlan("matvec", block_out, block_in, num_warps)
    for block_out, num_warps in itertools.product((2, 4, 8), (4, 8, 16)):
        for programs in (2, 3, 4, 5, 6):
            if 16 <= block_out * whole // (32 * num_warps) <= 128 and programs * num_warps <= 64:
                yield StreamPlan("matvec", block_out, whole, num_warps, programs_per_multiprocessor=programs)


class Operands(NamedTuple):
    """One set of random tensors."""

    x: torch.Tensor
    x_scale: torch.Tensor | None
    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    arrivals: torch.Tensor


def operands(case: Case, out_features: int, in_features: int) -> Operands:
    """Fresh tensors of the case's format."""
    x = torch.randn(case.num_rows, in_features, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(out_features, in_features, device="cuda", dtype=torch.bfloat16)
    x_scale = weight_scale = None
    if case.format != "bf16":
        weight, weight_scale = per_token_quantize_fp8(weight)
    if case.format == "w8a8":
        x, x_scale = per_token_quantize_fp8(x)
    return Operands(x, x_scale, weight, weight_scale, torch.zeros(8 * out_features, device="cuda", dtype=torch.int32))


def run(given: Operands, plan: StreamPlan) -> torch.Tensor:
    """The product, as planned."""
    if plan.kernel == "matvec":
        return matvec(given.x, given.weight, given.weight_scale, None, plan)
    x, x_scale, weight, weight_scale, arrivals = given
    return small_batch(x, x_scale, weight, weight_scale, None, arrivals, plan, torch.bfloat16)


def run_library(given: Operands) -> torch.Tensor:
    """The product by the vendor's library; float8 weights with float8 rows."""
    if given.weight_scale is None:
        return functional.linear(given.x, given.weight)
    x, x_scale = (given.x, given.x_scale) if given.x_scale is not None else per_token_quantize_fp8(given.x)
    scales = x_scale[:, None], given.weight_scale[None, :]
    return torch._scaled_mm(x, given.weight.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def _compile(work: list[tuple[Case, StreamPlan]]) -> int:
    """Run each plan once on a narrow weight: the kernel lands in triton's cache on disk."""
    failures = 0
    for case, plan in work:
        try:
            run(operands(case, 256, SHAPES[case.shape][1]), plan)
        except OutOfResources as error:  # a plan that does not fit the device is no candidate
            failures += 1
            print("fails", case, plan, str(error)[:100])
    torch.cuda.synchronize()
    return failures


def compile_all(cases: list[Case]) -> None:
    """Compile every kernel that the search needs, each once."""
    kernels = {}
    for case in cases:
        for plan in plans(case):
            is_even = SHAPES[case.shape][1] % plan.block_in == 0
            split = min(plan.num_splits, 2)
            plan = plan._replace(num_splits=split)
            kernels[case.format, is_even, plan] = (case, plan)
    work = list(kernels.values())
    num_workers = max(1, (os.cpu_count() or 2) - 1)
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        failures = sum(pool.map(_compile, [work[index::num_workers] for index in range(num_workers)]))
    print(f"{len(work)} kernels compiled, {failures} failed", flush=True)


def tune(case: Case) -> dict[str, object]:
    """Times of all plans of one case, best first, and of the library."""
    sets = [operands(case, *SHAPES[case.shape]) for _ in range(num_sets(case.bytes_read))]
    library = graph_time([partial(run_library, given) for given in sets])
    timed = []
    for plan in plans(case):
        try:
            timed.append((graph_time([partial(run, given, plan) for given in sets]), plan))
        except OutOfResources as error:
            print("fails", case, plan, str(error)[:100])
    timed.sort(key=lambda pair: pair[0])
    return {
        "case": case._asdict(),
        "library_us": library * 1e6,
        "plans": [{"us": seconds * 1e6, **plan._asdict()} for seconds, plan in timed],
    }


def report(results: list[dict[str, object]]) -> None:
    """A short table: the library and the three best plans of each case."""
    for result in results:
        case = Case(**result["case"])  # type: ignore[arg-type]
        library = result["library_us"]
        print(f"{case.format:6} rows {case.num_rows:3} {case.shape:8} library {library:7.1f} us", end="")
        print(f" {case.bytes_read / library / 1e6:5.2f} TB/s |", end="")
        for plan in result["plans"][:3]:  # type: ignore[index]
            sizes = (
                f"{plan['kernel'][0]}{plan['block_out']}x{plan['block_in']}w{plan['num_warps']}s{plan['num_stages']}"
            )
            speed = case.bytes_read / plan["us"] / 1e6
            print(f" {plan['us']:6.1f} us {speed:4.2f} {sizes}/{plan['num_splits']}", end=";")
        print(flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--formats", nargs="+", default=["bf16", "w8a16", "w8a8"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 32, 64])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cases = [Case(f, rows, shape) for f in options.formats for rows in options.rows for shape in options.shapes]
    cases = [case for case in cases if case.format != "w8a16" or case.num_rows == 1]
    compile_all(cases)
    results = []
    for case in cases:
        results.append(tune(case))
        report(results[-1:])
        torch.cuda.empty_cache()
        if options.out:
            options.out.write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
