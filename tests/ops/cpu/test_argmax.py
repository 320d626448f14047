"""The most likely token, against torch."""

from __future__ import annotations

import pytest
import torch

from tests.support.native_ops import run_equally, run_ops
from tokenmill.ops.cpu.argmax import (
    NOT_FINITE,
    advance_arguments,
    argmax,
    argmax_arguments,
    argmax_scratch_bytes,
)


def native_argmax(logits: torch.Tensor) -> list[int]:
    """Tokens by the op, with 1, 2 and 3 threads."""
    rows, columns = logits.shape

    def compute(num_threads: int) -> torch.Tensor:
        tokens = torch.full((rows,), 99, dtype=torch.int32)
        scratch = torch.zeros(argmax_scratch_bytes(rows), dtype=torch.uint8)
        addresses = {"scratch": scratch.data_ptr(), "tokens": tokens.data_ptr()}
        halves = argmax_arguments(logits=logits.data_ptr(), columns=columns, **addresses)
        run_ops([(argmax, half) for half in halves], rows, num_threads)
        return tokens

    return run_equally(compute).tolist()


@pytest.mark.parametrize("columns", [1, 15, 16, 40, 100, 1000, 49152])
def test_the_largest_of_each_row(columns: int) -> None:
    torch.manual_seed(columns)
    logits = torch.randn(5, columns)
    assert native_argmax(logits) == logits.argmax(1).tolist()


def test_every_place_can_be_the_largest() -> None:
    assert native_argmax(torch.eye(150)) == list(range(150))


def test_of_equal_ones_the_first() -> None:
    logits = torch.zeros(3, 300)
    logits[1, [70, 71, 200, 299]] = 4.0
    logits[2, [298, 17]] = 1.0
    assert native_argmax(logits) == [0, 70, 17]


def test_numbers_that_are_not_finite() -> None:
    logits = torch.randn(7, 200)
    for row, column in enumerate((0, 5, 199, 100)):
        logits[row, column] = torch.nan
    logits[4, 150] = torch.inf
    logits[5] = -torch.inf
    logits[6, :199] = -torch.inf
    assert native_argmax(logits) == [NOT_FINITE] * 6 + [199]


def test_the_tokens_are_the_next_input() -> None:
    def compute(num_threads: int) -> torch.Tensor:
        token_ids, positions, kv_lens, tokens = (torch.randint(9, 999, (5,), dtype=torch.int32) for _ in range(4))
        before = positions.clone(), kv_lens.clone()
        arguments = advance_arguments(
            tokens=tokens.data_ptr(),
            token_ids=token_ids.data_ptr(),
            positions=positions.data_ptr(),
            kv_lens=kv_lens.data_ptr(),
        )
        run_ops([(argmax, arguments)], 3, num_threads)
        assert token_ids[:3].tolist() == tokens[:3].tolist()
        assert [(positions - before[0]).tolist(), (kv_lens - before[1]).tolist()] == [[1, 1, 1, 0, 0]] * 2
        return torch.zeros(1)

    run_equally(compute)
