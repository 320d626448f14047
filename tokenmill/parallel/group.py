"""`ParallelGroup`: the ranks that share a layer, and the two collectives that layers need.

Linear and embedding layers take their group explicitly. A group of one rank holds no process group and its collectives
return their argument, so a model is written once and costs nothing extra on one device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from tokenmill.errors import InvalidParameterError


@dataclass(frozen=True, slots=True)
class ParallelGroup:
    """Ranks that hold shards of the same layers.

    Args:
        rank: this process's place in the group, 0 <= rank < size.
        size: number of ranks.
        process_group: what carries the data (NCCL or Gloo); None for the default group of `torch.distributed`.
    """

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"rank {self.rank} is not in a group of {self.size}"

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks; may reuse the storage of `tensor`."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the ranks' tensors (equal shapes) along the last dimension, in rank order."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.process_group)
        return torch.cat(parts, dim=-1)

    def shard_size(self, total: int, what: str) -> int:
        """This rank's equal share of `total`.

        Raises:
            InvalidParameterError: `total` of `what` cannot be divided evenly (`field` is `tensor_parallel_size`).
        """
        if total % self.size:
            raise InvalidParameterError(
                f"{total} {what} cannot be divided over {self.size} devices.",
                field="tensor_parallel_size",
                remedy=f"Choose a divisor of {total}.",
            )
        return total // self.size
