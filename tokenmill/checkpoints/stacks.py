"""Checkpoint tensors that hold several tensors one after the other, taken apart. Called by `loading`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from tokenmill.checkpoints.base import LazyTensor
from tokenmill.errors import CheckpointError


def take_apart(stack: LazyTensor, names: Sequence[str]) -> Iterator[LazyTensor]:
    """The tensors `names` in `stack`, whose first two axes [S, D, ...] run over all of their rows.

    The stack is read when the first of them is, and kept until all have been; rows that are encoded as blocks can be
    read as they are.

    Raises:
        CheckpointError: the rows cannot be shared out evenly.
    """
    shape = stack.shape
    if len(shape) != 3 or (shape[0] * shape[1]) % len(names):
        raise CheckpointError(
            f"The tensor '{stack.name}' {list(shape)} does not hold {len(names)} matrices.",
            field="model",
            remedy="Check that the weights and the configuration belong to the same model.",
        )
    part_shape = (shape[0] * shape[1] // len(names), shape[2])
    shared = _Shared(stack, (len(names), *part_shape))
    for index, name in enumerate(names):
        blocks = None if stack.load_blocks is None else partial(shared.blocks, index)
        yield LazyTensor(name, part_shape, stack.dtype, partial(shared.part, index), stack.block_type, blocks)


class _Shared:
    """A tensor that is read once for all of its parts."""

    def __init__(self, stack: LazyTensor, shape: tuple[int, ...]) -> None:
        self._stack = stack
        self._shape = shape
        self._loaded: torch.Tensor | None = None
        self._num_left = 0

    def part(self, index: int) -> torch.Tensor:
        if self._loaded is None:
            self._loaded = self._stack.load().reshape(self._shape)
            self._num_left = self._shape[0]
        part = self._loaded[index]
        self._num_left -= 1
        if not self._num_left:
            self._loaded = None
        return part

    def blocks(self, index: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Encoded rows of a part. They are views of the file, so nothing is kept."""
        assert self._stack.load_blocks is not None
        num_parts, num_rows, _ = self._shape
        rows = self._stack.load_blocks().reshape(num_parts * num_rows, -1)
        return rows[index * num_rows : (index + 1) * num_rows]
