"""Inputs of decode steps: one launch against the definition, in triton's interpreter and on a GPU."""

from __future__ import annotations

import pytest
import torch

from tokenmill.ops.decode_inputs import DecodeInputs, choose, decode_inputs_torch

pytest.importorskip("triton")
from tokenmill.ops.decode_inputs import decode_inputs_triton

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.spec("C1")
@pytest.mark.parametrize(("num_rows", "num_blocks"), [(1, 1), (1, 8), (5, 3), (9, 8)])
@pytest.mark.parametrize("tokens_per_block", [4, 32])
def test_one_launch_finds_what_the_definition_does(
    num_rows: int, num_blocks: int, tokens_per_block: int, device: str
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    num_slots, longest = 12, num_blocks * tokens_per_block
    token_ids = torch.randint(50_000, (num_slots + 1, longest + 1), generator=generator)
    tables = torch.randint(1, 900, (num_slots + 1, 8), generator=generator, dtype=torch.int32)
    tables[num_slots] = 0
    slots = torch.randperm(num_slots, generator=generator)[:num_rows]
    starts = torch.randint(longest, (num_rows,), generator=generator)
    slots[-1], starts[-1] = (num_slots, -1) if num_rows > 1 else (3, longest - 1)
    given = torch.stack((slots, starts)), token_ids, tables
    expected = decode_inputs_torch(*given, tokens_per_block, num_blocks)
    actual = decode_inputs_triton(*(tensor.to(device) for tensor in given), tokens_per_block, num_blocks)
    for name in DecodeInputs._fields:
        found, wanted = getattr(actual, name), getattr(expected, name)
        assert found.dtype == wanted.dtype, name
        assert found.tolist() == wanted.tolist(), name


def test_who_finds_them_on_a_cpu() -> None:
    assert choose(torch.device("cpu")) == "torch"
