from __future__ import annotations

import pytest
import torch

from tokenmill.errors import InvalidParameterError
from tokenmill.parallel.group import ParallelGroup


def test_a_group_of_one_returns_its_argument() -> None:
    group = ParallelGroup()
    tensor = torch.randn(2, 3)
    assert group.all_reduce(tensor) is tensor
    assert group.all_gather(tensor) is tensor


@pytest.mark.parametrize(("total", "size", "share"), [(12, 1, 12), (12, 4, 3), (2, 2, 1)])
def test_equal_shares(total: int, size: int, share: int) -> None:
    assert ParallelGroup(rank=size - 1, size=size).shard_size(total, "heads") == share


def test_an_uneven_share_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="9 attention heads cannot be divided over 2") as error:
        ParallelGroup(rank=0, size=2).shard_size(9, "attention heads")
    assert error.value.field == "tensor_parallel_size"


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 1)])
def test_a_rank_outside_the_group(rank: int, size: int) -> None:
    with pytest.raises(AssertionError):
        ParallelGroup(rank=rank, size=size)
