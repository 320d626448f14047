"""`SlotLists`: lists of any length by slot (biases, banned tokens, bad words) on the device, in one flat pool.

A pool takes the memory of what the lists hold; a padded [slots, longest] tensor would let one request with a long list
multiply it by the number of slots. Written by `slot_params` when a slot changes hands, read by `sampler` each step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from tokenmill.ops.upload import upload

Columns = tuple[npt.NDArray[np.generic], ...]


class SlotLists:
    """A list of entries for each slot; an entry has one value in each of a few columns.

    Args:
        max_slots: S.
        dtypes: the columns' types.
        device: where the lists are read.
    """

    def __init__(self, max_slots: int, dtypes: Sequence[npt.DTypeLike], device: torch.device) -> None:
        self._dtypes = tuple(np.dtype(dtype) for dtype in dtypes)
        self._device = device
        self._lists: dict[int, Columns] = {}
        self._bounds = torch.zeros(2, max_slots, dtype=torch.int64, device=device)  # start, length
        self._pools: tuple[torch.Tensor, ...] = ()
        self._changed = True
        self.upload_changes()

    def set(self, slot: int, columns: Columns) -> None:
        """Give `slot` its list (columns of equal length, perhaps 0), instead of what it had before."""
        if len(columns[0]):
            self._lists[slot] = tuple(column.astype(dtype) for column, dtype in zip(columns, self._dtypes, strict=True))
            self._changed = True
        else:
            self._changed |= self._lists.pop(slot, None) is not None

    def length(self, slot: int) -> int:
        """Number of entries of `slot`, on the host."""
        return len(self._lists[slot][0]) if slot in self._lists else 0

    def upload_changes(self) -> None:
        """Bring the device up to date after one or more `set`; does nothing if no list changed."""
        if not self._changed:
            return
        bounds = np.zeros((2, self._bounds.shape[1]), dtype=np.int64)
        end = 0
        for slot, columns in self._lists.items():
            bounds[:, slot] = end, len(columns[0])
            end += len(columns[0])
        # One zero more at the end: it is what unused entries read.
        pools = [
            np.concatenate([*(columns[index] for columns in self._lists.values()), np.zeros(1, dtype)])
            for index, dtype in enumerate(self._dtypes)
        ]
        self._bounds = upload(bounds, self._device)
        self._pools = tuple(upload(pool, self._device) for pool in pools)
        self._changed = False

    def gather(
        self,
        slots: torch.Tensor,  # [R] int64
        width: int,
    ) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:  # one [R, width] a column, [R, width] bool
        """The slots' lists, side by side, and which entries are real; the others hold zeros.

        `width` is the longest list of these slots, which the host knows from `length`.
        """
        start, length = self._bounds[:, slots].unsqueeze(2)  # [R, 1] each
        offset = torch.arange(width, device=slots.device)
        used = offset < length  # [R, width]
        index = torch.where(used, start + offset, self._pools[0].shape[0] - 1)
        return tuple(pool[index] for pool in self._pools), used
