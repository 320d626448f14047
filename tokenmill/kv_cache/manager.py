"""`KvCacheManager`: the block tables of all sequences, and the prefix tree of what may be reused.

The scheduler calls it, with sequence ids, token ids and counts; it answers with block numbers. It keeps three promises:

- a block table's blocks stay as they are until `release`; a block that others can read is never written to again;
- `num_free_blocks` is exact: as many blocks can be given out now, cached but unused ones included;
- blocks named in a copy keep their content until `end_plan`, even if their holder leaves before.

Order of launch makes immediate release sound: a block given back while a launched step still touches it goes to a plan
that is launched later, so its new content is written after.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenmill.kv_cache.block_pool import SCRATCH_BLOCK, BlockPool
from tokenmill.kv_cache.prefix_tree import PrefixNode, PrefixTree
from tokenmill.telemetry.stats import KvCacheStats


@dataclass(frozen=True, slots=True)
class PrefixGrant:
    """What a sequence starts with.

    Args:
        num_cached_tokens: tokens that need not be computed; always less than all.
        block_ids: the block table, long enough for all tokens.
        copy: a block to copy before the step, as (source, destination).
    """

    num_cached_tokens: int
    block_ids: tuple[int, ...]
    copy: tuple[int, int] | None = None


@dataclass(slots=True, eq=False)
class _Table:
    """The blocks of one sequence.

    Attributes:
        block_ids: its block table; each entry counts as a holder of the block.
        priority: how long its cached blocks are kept, compared with others.
        path: nodes of the prefix tree that spell its first full blocks, locked. Their blocks are those of the table,
            but for duplicates that were computed at the same time as another sequence's. While the sequence waits for
            `start_shared`, the node of `shared_tail` is in it as well, if there is one.
        shared_tokens: for a sequence that waits for `start_shared`: tokens it holds of its sibling.
        shared_tail: the sibling's block with the last of them, to be copied; held, but not in the table.
    """

    block_ids: list[int]
    priority: float
    path: list[PrefixNode] = field(default_factory=list)
    shared_tokens: int = 0
    shared_tail: int | None = None


class KvCacheManager:
    """Block tables by sequence id, prefix reuse and eviction. No tensors.

    Args:
        num_blocks: blocks of the cache's tensors, the scratch block 0 included.
        tokens_per_block: tokens in one block.
        enable_block_reuse: keep computed blocks and find them by their tokens.
        enable_partial_reuse: also reuse the first tokens of a block, by copying it.
    """

    def __init__(
        self,
        num_blocks: int,
        tokens_per_block: int,
        *,
        enable_block_reuse: bool = True,
        enable_partial_reuse: bool = True,
    ) -> None:
        self.tokens_per_block = tokens_per_block
        self._reuse = enable_block_reuse
        self._partial_reuse = enable_block_reuse and enable_partial_reuse
        self._pool = BlockPool(num_blocks)
        self._tree = PrefixTree(tokens_per_block)
        self._tables: dict[int, _Table] = {}
        self._pinned_paths: list[list[PrefixNode]] = []
        self._pinned_blocks: list[int] = []
        self.num_releases = 0
        self._num_queried_tokens = 0
        self._num_hit_tokens = 0
        self._num_evicted_blocks = 0

    # Counts

    @property
    def num_blocks(self) -> int:
        """Blocks that sequences can use: all but the scratch block."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be given out now: free ones, and cached ones that no sequence uses."""
        return self._pool.num_free + self._tree.num_unlocked

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.tokens_per_block)

    # The life of a sequence

    def start(
        self,
        sequence_id: int,
        token_ids: Sequence[int],
        *,
        headroom: int = 0,
        max_uncached_tokens: int | None = None,
        lookup: bool = True,
        priority: float = 0.0,
    ) -> PrefixGrant | None:
        """Make a block table for all of `token_ids`, with the longest cached prefix in it.

        Args:
            sequence_id: a sequence without a table.
            token_ids: all tokens known; at least one.
            headroom: blocks that must be free afterwards.
            max_uncached_tokens: most tokens that may be left to compute; None: any number.
            lookup: whether to look for cached tokens; not if every token must be computed.
            priority: how long its blocks are kept once cached, compared with others (higher is longer).

        Returns:
            What the sequence starts with, or None (and nothing changed) when it does not fit.
        """
        assert sequence_id not in self._tables, f"sequence {sequence_id} has a block table already"
        num_reusable = len(token_ids) - 1 if lookup and self._reuse else 0
        path = self._tree.match(token_ids, num_reusable)
        self._tree.lock(path, priority)
        num_new = self.blocks_for(len(token_ids)) - len(path)
        num_spare = self.num_free_blocks - num_new - headroom
        num_cached = len(path) * self.tokens_per_block
        source, num_more = self._match_partial(path, token_ids, num_reusable, num_spare)
        num_uncached = len(token_ids) - num_cached - num_more
        if num_spare < 0 or (max_uncached_tokens is not None and num_uncached > max_uncached_tokens):
            self._tree.unlock(path)
            return None

        if source is not None:
            self._pinned_paths.append([*path, source])
            self._tree.lock(self._pinned_paths[-1], priority)
        table = _Table([node.block for node in path], priority, path)
        for block in table.block_ids:
            self._pool.acquire(block)
        table.block_ids += [self._take_block() for _ in range(num_new)]
        self._tables[sequence_id] = table
        self._num_queried_tokens += len(token_ids) if lookup and self._reuse else 0
        self._num_hit_tokens += num_cached + num_more
        copy = None if source is None else (source.block, table.block_ids[len(path)])
        return PrefixGrant(num_cached + num_more, tuple(table.block_ids), copy)

    def extend(self, sequence_id: int, num_tokens: int) -> tuple[int, ...] | None:
        """Make the block table long enough for `num_tokens` tokens.

        Returns:
            The blocks appended, or None (and nothing changed) when there are not enough.
        """
        table = self._tables[sequence_id]
        num_new = self.blocks_for(num_tokens) - len(table.block_ids)
        if num_new > self.num_free_blocks:
            return None
        blocks = tuple(self._take_block() for _ in range(num_new))
        table.block_ids += blocks
        return blocks

    def cache_computed(self, sequence_id: int, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Put the blocks that are full of computed tokens into the prefix tree, so that others can share them.

        Costs O(blocks that became full since the last call). A block that a waiting sibling is still to copy is left
        out, and the blocks after it with it, until a later call.
        """
        if not self._reuse:
            return
        table = self._tables[sequence_id]
        size = self.tokens_per_block
        while (len(table.path) + 1) * size <= num_computed_tokens:
            index = len(table.path)
            if self._pool.ref_count(table.block_ids[index]) > 1:
                return
            tokens = tuple(token_ids[index * size : (index + 1) * size])
            table.path.append(self._cache_block(table, tokens, table.block_ids[index]))

    def share(self, parent_id: int, child_id: int, num_tokens: int) -> None:
        """Let a sibling hold the first `num_tokens` tokens of a sequence, which are computed, until it starts."""
        assert child_id not in self._tables, f"sequence {child_id} has a block table already"
        parent = self._tables[parent_id]
        num_full = num_tokens // self.tokens_per_block
        path = parent.path[: self.blocks_for(num_tokens)]
        child = _Table(parent.block_ids[:num_full], parent.priority, path, num_tokens)
        self._tree.lock(child.path, child.priority)
        for block in child.block_ids:
            self._pool.acquire(block)
        if num_tokens % self.tokens_per_block:
            child.shared_tail = parent.block_ids[num_full]
            self._pool.acquire(child.shared_tail)
        self._tables[child_id] = child

    def start_shared(self, sequence_id: int, *, headroom: int = 0) -> PrefixGrant | None:
        """Give a sequence that `share` prepared a block of its own for the token after the shared ones.

        Returns:
            What the sequence starts with, or None (and nothing changed) when less than `headroom` blocks were left.
        """
        table = self._tables[sequence_id]
        if self.num_free_blocks - 1 < headroom:
            return None
        copy = None
        if len(table.path) > len(table.block_ids):
            self._pinned_paths.append(list(table.path))
            self._tree.lock(self._pinned_paths[-1], table.priority)
            self._tree.unlock([table.path.pop()])
        table.block_ids.append(self._take_block())
        if table.shared_tail is not None:
            copy = (table.shared_tail, table.block_ids[-1])
            self._pinned_blocks.append(table.shared_tail)
        num_cached, table.shared_tail, table.shared_tokens = table.shared_tokens, None, 0
        return PrefixGrant(num_cached, tuple(table.block_ids), copy)

    def release(
        self,
        sequence_id: int,
        token_ids: Sequence[int] = (),
        num_computed_tokens: int = 0,
        *,
        discard: bool = False,
    ) -> None:
        """Give the sequence's blocks back; what it computed stays cached, its last partial block included.

        Args:
            sequence_id: whose.
            token_ids: its tokens.
            num_computed_tokens: how many of them have their keys and values in the blocks.
            discard: forget what only this sequence used, since its content cannot be trusted.
        """
        table = self._tables.pop(sequence_id)
        if self._reuse and not discard:
            self._cache_tail(table, token_ids, num_computed_tokens)
        self._tree.unlock(table.path)
        if discard:
            for block in self._tree.prune(table.path):
                self._pool.release(block)
        for block in table.block_ids:
            self._pool.release(block)
        if table.shared_tail is not None:
            self._pool.release(table.shared_tail)
        self.num_releases += 1

    def end_plan(self) -> None:
        """The plan under construction is complete: later plans may overwrite the blocks that it copies from."""
        for path in self._pinned_paths:
            self._tree.unlock(path)
        for block in self._pinned_blocks:
            self._pool.release(block)
        self._pinned_paths.clear()
        self._pinned_blocks.clear()

    # What is known about it

    def num_blocks_of(self, sequence_id: int) -> int:
        """Length of the sequence's block table."""
        return len(self._tables[sequence_id].block_ids)

    def sequence_ids(self) -> set[int]:
        """Sequences that have a block table."""
        return set(self._tables)

    def stats(self) -> KvCacheStats:
        """A snapshot."""
        return KvCacheStats(
            num_blocks=self._pool.num_blocks,
            num_free_blocks=self.num_free_blocks,
            num_cached_blocks=self._tree.num_nodes,
            tokens_per_block=self.tokens_per_block,
            num_queried_tokens=self._num_queried_tokens,
            num_hit_tokens=self._num_hit_tokens,
            num_evicted_blocks=self._num_evicted_blocks,
        )

    def check_integrity(self) -> None:
        """Every block is free, or counted once for each table, pin and tree node that holds it; locks match paths.

        Raises:
            AssertionError: something is leaked, lost or counted wrongly; the message names it.
        """
        self._pool.check_integrity()
        self._tree.check_integrity()
        holders: Counter[int] = Counter({SCRATCH_BLOCK: 1})
        locks: Counter[int] = Counter()
        for sequence_id, table in self._tables.items():
            assert len(set(table.block_ids)) == len(table.block_ids), f"sequence {sequence_id} has a block twice"
            holders.update(table.block_ids)
            holders.update([] if table.shared_tail is None else [table.shared_tail])
        holders.update(self._pinned_blocks)
        for path in [table.path for table in self._tables.values()] + self._pinned_paths:
            locks.update(id(node) for node in path)
        for node in self._tree.nodes():
            holders[node.block] += 1
            assert node.num_locks == locks[id(node)], (
                f"block {node.block}: {node.num_locks} locks, but {locks[id(node)]} paths hold it"
            )
            if node.num_locks == 0:
                count = self._pool.ref_count(node.block)
                assert count == 1, f"block {node.block} counts as evictable and has {count} holders"
        for block in range(self._pool.num_blocks + 1):
            count = self._pool.ref_count(block)
            assert count == holders[block], f"block {block} has {holders[block]} holders, counted {count}"
        if not self._tables and not self._pinned_paths and not self._pinned_blocks:
            assert self.num_free_blocks == self.num_blocks, f"idle, but only {self.num_free_blocks} blocks are free"

    # Parts

    def _match_partial(
        self, path: list[PrefixNode], token_ids: Sequence[int], num_reusable: int, num_spare: int
    ) -> tuple[PrefixNode | None, int]:
        """The node to copy for the tokens after `path`, and how many of them it gives."""
        if not self._partial_reuse:
            return None, 0
        start = len(path) * self.tokens_per_block
        tokens = tuple(token_ids[start : min(start + self.tokens_per_block, num_reusable)])
        match = self._tree.match_partial(path[-1] if path else self._tree.root, tokens)
        if match is None or (match[0].num_locks == 0 and num_spare < 1):  # keeping it would take the last room
            return None, 0
        return match

    def _take_block(self) -> int:
        if self._pool.num_free == 0:
            self._pool.release(self._tree.evict())
            self._num_evicted_blocks += 1
        return self._pool.allocate()

    def _cache_block(self, table: _Table, tokens: tuple[int, ...], block: int) -> PrefixNode:
        """The node for the next full block of the table, locked for it.

        When another sequence cached the same tokens first, its node wins and `block` stays a private duplicate. If
        nobody uses that node any more, it takes `block` over and its own block is freed: locking it instead would
        make a free block vanish, and with it the promise of GUARANTEED_NO_EVICT.
        """
        parent = table.path[-1] if table.path else self._tree.root
        node = parent.children.get(tokens)
        if node is None:
            return self._insert(parent, tokens, block, table.priority)
        if node.num_locks == 0:
            self._pool.release(node.block)
            self._pool.acquire(block)
            node.block = block
        self._tree.lock([node], table.priority)
        return node

    def _cache_tail(self, table: _Table, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Cache the last block of a sequence that ends, if it is partial and nobody else holds it."""
        start = len(table.path) * self.tokens_per_block
        tokens = tuple(token_ids[start:num_computed_tokens])
        if not 0 < len(tokens) < self.tokens_per_block:
            return
        block = table.block_ids[len(table.path)]
        parent = table.path[-1] if table.path else self._tree.root
        if self._pool.ref_count(block) == 1 and self._tree.extension_of(parent, tokens) is None:
            self._tree.unlock([self._insert(parent, tokens, block, table.priority)])

    def _insert(self, parent: PrefixNode, tokens: tuple[int, ...], block: int, priority: float) -> PrefixNode:
        shorter = self._tree.superseded_by(parent, tokens)
        if shorter is not None:
            self._tree.remove(shorter)
            self._pool.release(shorter.block)
        self._pool.acquire(block)
        return self._tree.insert(parent, tokens, block, priority)
