"""Runs single ops of `tokenmill/ops/cpu/` on torch tensors, with 1, 2 and 3 threads whose results must be equal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

from tokenmill.ops.cpu.jit import NativeFunction
from tokenmill.ops.cpu.threads import OpList, ThreadPool

NUM_THREADS = (1, 2, 3)


@cache
def pool(num_threads: int) -> ThreadPool:
    """Threads that live as long as the tests; they sleep between ops."""
    return ThreadPool(num_threads, num_spins=200)


def matrix(tensor: torch.Tensor, first_column: int = 0) -> tuple[int, int]:
    """Address and row stride in bytes of a tensor [rows, columns] from a column on."""
    assert tensor.dim() == 2 and tensor.stride(1) == 1
    size = tensor.element_size()
    return tensor.data_ptr() + first_column * size, tensor.stride(0) * size


def run_ops(ops: Sequence[tuple[NativeFunction, Sequence[int]]], num_tokens: int, num_threads: int = 1) -> None:
    """Run ops one after the other."""
    rows = OpList(len(ops))
    for kernel, arguments in ops:
        rows.append(kernel, *arguments, num_tokens=num_tokens)
    pool(num_threads).run(rows)


def run_equally(compute: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The result of `compute(num_threads)`, after checking that it is the same to the bit for any number of threads."""
    results = [compute(num_threads) for num_threads in NUM_THREADS]
    first = results[0].contiguous().view(torch.uint8)
    for num_threads, result in zip(NUM_THREADS, results, strict=True):
        assert torch.equal(first, result.contiguous().view(torch.uint8)), f"{num_threads} threads give other bits"
    return results[0]


def nans(*shape: int) -> torch.Tensor:
    """Memory that must be written before it is read."""
    return torch.full(shape, torch.nan)
