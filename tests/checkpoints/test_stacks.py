from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tokenmill.checkpoints.base import LazyTensor
from tokenmill.checkpoints.stacks import take_apart
from tokenmill.errors import CheckpointError


def stack(shape: tuple[int, ...], reads: list[str]) -> LazyTensor:
    def load() -> torch.Tensor:
        reads.append("read")
        return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)

    return LazyTensor("experts.gate_up_proj", shape, torch.float32, load)


def test_two_matrices_for_each_entry() -> None:
    reads: list[str] = []
    names = ["0.gate", "0.up", "1.gate", "1.up"]
    parts = list(take_apart(stack((2, 6, 5), reads), names))
    assert [part.name for part in parts] == names
    assert [part.shape for part in parts] == [(3, 5)] * 4
    whole = torch.arange(60.0).view(2, 6, 5)
    assert not reads
    loaded = [part.load() for part in parts]
    assert torch.equal(torch.stack(loaded).view(2, 6, 5), whole)
    assert reads == ["read"]
    assert torch.equal(parts[1].load(), whole[0, 3:])
    assert reads == ["read", "read"]  # what all parts were taken from is not kept


def test_encoded_rows_stay_as_they_are() -> None:
    rows = np.arange(12 * 18, dtype=np.uint8).reshape(2, -1)  # as a file holds it: the first axis, and all bytes of it
    whole = replace(stack((2, 6, 32), []), block_type="Q4_0", load_blocks=lambda: rows)
    parts = list(take_apart(whole, ["0.gate", "0.up", "1.gate", "1.up"]))
    assert {part.block_type for part in parts} == {"Q4_0"}
    blocks = [part.load_blocks() for part in parts if part.load_blocks is not None]
    assert [block.shape for block in blocks] == [(3, 18)] * 4
    assert np.array_equal(np.concatenate(blocks), rows.reshape(12, 18))


@pytest.mark.parametrize("shape", [(2, 5, 3), (6,), (2, 3)])
def test_a_stack_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj"):
        list(take_apart(stack(shape, []), ["a", "b", "c", "d"]))
