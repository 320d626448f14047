"""`PrefixTree`: cached blocks found by the tokens that lead to them.

A node is one block together with its tokens; the path from the root to it spells all tokens from position 0 on, since
keys and values depend on everything before them. Only a leaf may hold less than a full block. Owned by
`KvCacheManager`; the tree knows blocks as numbers and decides nothing but which one to give up next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush


class PrefixNode:
    """One cached block.

    Attributes:
        tokens: the tokens whose keys and values the block holds.
        block: its number; -1 for the root.
        parent: None for the root, and for a node that left the tree.
        children: by their tokens.
        child_keys: the keys of `children` in lexicographic order: the children that share most tokens with a given
            text are neighbours of the place where it would be inserted.
        num_locks: holders (sequences, copies under way) whose path contains the node. A holder locks its whole path
            from the root, so a node has at least as many locks as any child.
        priority: highest priority of the requests that used it; lower ones are evicted first.
        last_used: the tree's clock when the last holder let go.
    """

    __slots__ = ("block", "child_keys", "children", "last_used", "num_locks", "parent", "priority", "tokens")

    def __init__(self, tokens: tuple[int, ...], block: int, parent: PrefixNode | None, priority: float) -> None:
        self.tokens = tokens
        self.block = block
        self.parent = parent
        self.children: dict[tuple[int, ...], PrefixNode] = {}
        self.child_keys: list[tuple[int, ...]] = []
        self.num_locks = 0
        self.priority = priority
        self.last_used = 0


class PrefixTree:
    """Prefix lookup, insertion, and eviction of unlocked leaves by (priority, least recently used).

    Args:
        tokens_per_block: tokens in a full block.
    """

    def __init__(self, tokens_per_block: int) -> None:
        self.tokens_per_block = tokens_per_block
        self.root = PrefixNode((), -1, None, 0.0)
        self.num_nodes = 0
        self.num_unlocked = 0
        self._clock = 0
        self._num_pushes = 0
        # Unlocked leaves as (priority, last_used, number of the push, node). Entries are not removed when a node is
        # locked, extended or dropped; `_is_current` tells the stale ones.
        self._evictable: list[tuple[float, int, int, PrefixNode]] = []

    def match(self, token_ids: Sequence[int], num_tokens: int) -> list[PrefixNode]:
        """Nodes of the longest cached prefix of full blocks within the first `num_tokens` tokens, from the root on."""
        path: list[PrefixNode] = []
        node = self.root
        for end in range(self.tokens_per_block, num_tokens + 1, self.tokens_per_block):
            child = node.children.get(tuple(token_ids[end - self.tokens_per_block : end]))
            if child is None:
                break
            path.append(child)
            node = child
        return path

    def match_partial(self, parent: PrefixNode, tokens: tuple[int, ...]) -> tuple[PrefixNode, int] | None:
        """The child of `parent` that starts with most of `tokens`, and how many; None if all differ in the first.

        O(tokens * log(children)): in lexicographic order it is a neighbour of `tokens`.
        """
        index = bisect_left(parent.child_keys, tokens)
        best: tuple[PrefixNode, int] | None = None
        for key in parent.child_keys[max(index - 1, 0) : index + 1]:
            num_common = _num_common(key, tokens)
            if num_common > (best[1] if best else 0):
                best = parent.children[key], num_common
        return best

    def extension_of(self, parent: PrefixNode, tokens: tuple[int, ...]) -> PrefixNode | None:
        """A child of `parent` whose tokens are `tokens` or start with them."""
        index = bisect_left(parent.child_keys, tokens)
        if index < len(parent.child_keys) and parent.child_keys[index][: len(tokens)] == tokens:
            return parent.children[parent.child_keys[index]]
        return None

    def superseded_by(self, parent: PrefixNode, tokens: tuple[int, ...]) -> PrefixNode | None:
        """The unlocked child of `parent` that holds only a first part of `tokens`.

        There is at most one that matters: it would have been superseded itself by anything between it and `tokens`.
        """
        index = bisect_left(parent.child_keys, tokens) - 1
        if index < 0:
            return None
        key = parent.child_keys[index]
        node = parent.children[key]
        return node if node.num_locks == 0 and tokens[: len(key)] == key else None

    def insert(self, parent: PrefixNode, tokens: tuple[int, ...], block: int, priority: float) -> PrefixNode:
        """Add a child that `parent` does not have yet. The caller holds one lock on the new node."""
        assert tokens not in parent.children, "an equal node exists"
        assert 0 < len(tokens) <= self.tokens_per_block and len(parent.tokens) in (0, self.tokens_per_block)
        node = PrefixNode(tokens, block, parent, priority)
        node.num_locks = 1
        parent.children[tokens] = node
        parent.child_keys.insert(bisect_left(parent.child_keys, tokens), tokens)
        self.num_nodes += 1
        return node

    def lock(self, path: Sequence[PrefixNode], priority: float) -> None:
        """Keep the nodes of `path` (which starts below the root) from being evicted."""
        for node in path:
            if node.num_locks == 0:
                self.num_unlocked -= 1
            node.num_locks += 1
            if node.priority < priority:
                node.priority = priority

    def unlock(self, path: Sequence[PrefixNode]) -> None:
        """Take back one `lock` of `path`, or the lock that `insert` gave."""
        self._clock += 1
        for node in reversed(path):
            node.num_locks -= 1
            if node.num_locks == 0:
                self.num_unlocked += 1
                node.last_used = self._clock
                if not node.children:
                    self._push(node)

    def evict(self) -> int:
        """Drop the unlocked leaf of lowest priority that was not used for the longest time; returns its block.

        The caller has checked `num_unlocked`: any unlocked node can be evicted, since all nodes below it are unlocked.
        """
        while True:
            entry = heappop(self._evictable)
            if self._is_current(entry):
                node = entry[3]
                self.remove(node)
                return node.block

    def remove(self, node: PrefixNode) -> None:
        """Take an unlocked leaf out of the tree."""
        parent = node.parent
        assert parent is not None and node.num_locks == 0 and not node.children, "only an unlocked leaf can go"
        del parent.children[node.tokens]
        del parent.child_keys[bisect_left(parent.child_keys, node.tokens)]
        node.parent = None
        self.num_nodes -= 1
        self.num_unlocked -= 1
        if parent is not self.root and parent.num_locks == 0 and not parent.children:
            self._push(parent)

    def prune(self, path: list[PrefixNode]) -> list[int]:
        """Remove the end of `path` as far as it is unlocked and without children; the removed nodes' blocks."""
        blocks: list[int] = []
        for node in reversed(path):
            if node.num_locks or node.children:
                break
            self.remove(node)
            blocks.append(node.block)
        return blocks

    def nodes(self) -> Iterator[PrefixNode]:
        """All nodes but the root, parents first."""
        pending = list(self.root.children.values())
        while pending:
            node = pending.pop()
            yield node
            pending.extend(node.children.values())

    def check_integrity(self) -> None:
        """Links, keys, locks, counters and the eviction order fit together.

        Raises:
            AssertionError: they do not.
        """
        num_nodes = num_unlocked = 0
        current = {id(entry[3]) for entry in self._evictable if self._is_current(entry)}
        for node in [self.root, *self.nodes()]:
            assert node.child_keys == sorted(node.children), f"block {node.block}: its child keys are not in order"
            for tokens, child in node.children.items():
                assert child.parent is node and child.tokens == tokens, f"block {child.block} hangs at a wrong place"
                assert 0 < len(tokens) <= self.tokens_per_block, f"block {child.block} holds {len(tokens)} tokens"
                assert node is self.root or child.num_locks <= node.num_locks, (
                    f"block {child.block} has {child.num_locks} locks, its parent {node.block} only {node.num_locks}"
                )
            if node is self.root:
                continue
            num_nodes += 1
            num_unlocked += node.num_locks == 0
            full = len(node.tokens) == self.tokens_per_block
            assert full or not node.children, f"block {node.block} is partial and has children"
            evictable = node.num_locks == 0 and not node.children
            assert evictable == (id(node) in current), f"block {node.block}: can be evicted {evictable}, but not listed"
        assert num_nodes == self.num_nodes, f"{num_nodes} nodes, counted {self.num_nodes}"
        assert num_unlocked == self.num_unlocked, f"{num_unlocked} unlocked nodes, counted {self.num_unlocked}"

    def _push(self, node: PrefixNode) -> None:
        self._num_pushes += 1
        heappush(self._evictable, (node.priority, node.last_used, self._num_pushes, node))
        if len(self._evictable) > 2 * self.num_nodes + 64:
            self._drop_stale_entries()

    def _drop_stale_entries(self) -> None:
        current = {id(entry[3]): entry for entry in self._evictable if self._is_current(entry)}
        self._evictable = list(current.values())
        heapify(self._evictable)

    @staticmethod
    def _is_current(entry: tuple[float, int, int, PrefixNode]) -> bool:
        _, last_used, _, node = entry
        return node.parent is not None and node.num_locks == 0 and not node.children and node.last_used == last_used


def _num_common(left: tuple[int, ...], right: tuple[int, ...]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count
