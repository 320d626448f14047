"""`BlockPool`: which cache blocks are free, and how many holders each of the others has.

Owned by `KvCacheManager`; nobody else touches it. A holder is a sequence's block table or the prefix tree. A block with
no holder is free. Block 0 is the scratch block: padding is written there, and it is never given out.
"""

from __future__ import annotations

SCRATCH_BLOCK = 0


class BlockPool:
    """Reference counts and a free list over `num_blocks` blocks; every operation is O(1).

    Args:
        num_blocks: blocks of the cache, the scratch block included; at least 2.
    """

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks >= 2, f"a cache needs the scratch block and at least one more, got {num_blocks} blocks"
        self._ref_counts = [0] * num_blocks
        self._ref_counts[SCRATCH_BLOCK] = 1
        self._free = list(range(num_blocks - 1, SCRATCH_BLOCK, -1))

    @property
    def num_blocks(self) -> int:
        """Blocks that can be given out: all but the scratch block."""
        return len(self._ref_counts) - 1

    @property
    def num_free(self) -> int:
        """Blocks without a holder."""
        return len(self._free)

    def ref_count(self, block: int) -> int:
        """Number of holders of the block."""
        return self._ref_counts[block]

    def allocate(self) -> int:
        """Give out a free block, with one holder. The caller has checked `num_free`."""
        block = self._free.pop()
        self._ref_counts[block] = 1
        return block

    def acquire(self, block: int) -> None:
        """Add a holder to a block that has one already."""
        assert self._ref_counts[block] > 0, f"block {block} is free and cannot be shared"
        assert block != SCRATCH_BLOCK, "the scratch block belongs to nobody"
        self._ref_counts[block] += 1

    def release(self, block: int) -> None:
        """Take a holder away; the block is free when the last one is gone."""
        assert self._ref_counts[block] > 0, f"block {block} is released more often than it was acquired"
        assert block != SCRATCH_BLOCK, "the scratch block belongs to nobody"
        self._ref_counts[block] -= 1
        if self._ref_counts[block] == 0:
            self._free.append(block)

    def check_integrity(self) -> None:
        """The free list holds exactly the blocks without a holder, each once.

        Raises:
            AssertionError: it does not.
        """
        free = set(self._free)
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert SCRATCH_BLOCK not in free, "the scratch block is in the free list"
        for block, count in enumerate(self._ref_counts):
            assert count >= 0, f"block {block} has {count} holders"
            assert (count == 0) == (block in free), f"block {block} has {count} holders, in free list: {block in free}"
