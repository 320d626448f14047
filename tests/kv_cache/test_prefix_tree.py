"""Prefix lookup, supersession and eviction order, against a brute-force reference where there is one."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenmill.kv_cache.prefix_tree import PrefixNode, PrefixTree

SIZE = 3


class Prefixes:
    """A tree with helpers that insert whole texts; blocks are numbered from 1."""

    def __init__(self, tokens_per_block: int = SIZE) -> None:
        self.tree = PrefixTree(tokens_per_block)
        self.num_blocks = 0

    def insert(self, text: list[int], priority: float = 0.0, *, keep_locked: bool = False) -> list[PrefixNode]:
        size = self.tree.tokens_per_block
        path: list[PrefixNode] = []
        node = self.tree.root
        for start in range(0, len(text), size):
            tokens = tuple(text[start : start + size])
            child = node.children.get(tokens)
            if child is None:
                self.num_blocks += 1
                child = self.tree.insert(node, tokens, self.num_blocks, priority)
            else:
                self.tree.lock([child], priority)
            path.append(child)
            node = child
        if not keep_locked:
            self.tree.unlock(path)
        self.tree.check_integrity()
        return path

    def evict_all(self) -> list[int]:
        order = []
        while self.tree.num_unlocked:
            order.append(self.tree.evict())
            self.tree.check_integrity()
        return order


def test_match_follows_full_blocks_as_far_as_they_go() -> None:
    prefixes = Prefixes()
    path = prefixes.insert([1, 2, 3, 4, 5, 6, 7, 8])
    tree = prefixes.tree
    assert tree.match([1, 2, 3, 4, 5, 6, 7, 8, 9], 9) == path[:2], "the partial block is not a full match"
    assert tree.match([1, 2, 3, 4, 5, 6], 5) == path[:1], "only whole blocks within the limit"
    assert tree.match([1, 2, 3, 0, 5, 6], 6) == path[:1]
    assert tree.match([0, 2, 3], 3) == []
    assert tree.match([], 0) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=30), st.data())
def test_partial_match_is_the_longest_of_all_siblings(texts: list[list[int]], data: st.DataObject) -> None:
    tree = PrefixTree(6)
    for block, tokens in enumerate({tuple(text) for text in texts}, start=1):
        tree.insert(tree.root, tokens, block, 0.0)
    query = tuple(data.draw(st.lists(st.integers(0, 2), max_size=6)))

    def num_common(key: tuple[int, ...]) -> int:
        return next((i for i, (a, b) in enumerate(zip(key, query, strict=False)) if a != b), min(len(key), len(query)))

    longest = max(num_common(key) for key in tree.root.children)
    match = tree.match_partial(tree.root, query)
    if longest == 0:
        assert match is None
    else:
        assert match is not None and match[1] == longest == num_common(match[0].tokens)
    extension = tree.extension_of(tree.root, query)
    if any(key[: len(query)] == query for key in tree.root.children):
        assert extension is not None and extension.tokens[: len(query)] == query
    else:
        assert extension is None


def test_superseded_leaf_is_an_unlocked_first_part() -> None:
    prefixes = Prefixes()
    tree = prefixes.tree
    leaf = prefixes.insert([1, 2])[0]
    prefixes.insert([0, 9, 9])
    assert tree.superseded_by(tree.root, (1, 2, 3)) is leaf
    assert tree.superseded_by(tree.root, (1, 3, 3)) is None
    assert tree.superseded_by(tree.root, (0, 0, 0)) is None
    tree.lock([leaf], 0.0)
    assert tree.superseded_by(tree.root, (1, 2, 3)) is None, "somebody copies from it"


def test_eviction_is_leaf_first_and_least_recently_used() -> None:
    prefixes = Prefixes()
    old = prefixes.insert([1, 1, 1, 2, 2, 2])
    new = prefixes.insert([3, 3, 3])
    fork = prefixes.insert([1, 1, 1, 4, 4, 4])
    order = prefixes.evict_all()
    assert order == [old[1].block, new[0].block, fork[1].block, old[0].block]


def test_use_makes_a_node_recent() -> None:
    prefixes = Prefixes()
    first = prefixes.insert([1, 1, 1])
    second = prefixes.insert([2, 2, 2])
    prefixes.tree.lock(first, 0.0)
    prefixes.tree.unlock(first)
    assert prefixes.evict_all() == [second[0].block, first[0].block]


def test_low_priority_is_evicted_before_old() -> None:
    prefixes = Prefixes()
    high = prefixes.insert([1, 1, 1], priority=2.0)
    low = prefixes.insert([2, 2, 2], priority=1.0)
    raised = prefixes.insert([3, 3, 3], priority=1.0)
    prefixes.tree.lock(raised, 3.0)
    prefixes.tree.unlock(raised)
    assert prefixes.evict_all() == [low[0].block, high[0].block, raised[0].block]


def test_locked_path_stays() -> None:
    prefixes = Prefixes()
    locked = prefixes.insert([1, 1, 1, 2, 2, 2], keep_locked=True)
    leaf = prefixes.insert([1, 1, 1, 2, 2, 2, 3, 3, 3])[2]
    assert prefixes.tree.num_unlocked == 1
    assert prefixes.evict_all() == [leaf.block]
    prefixes.tree.unlock(locked)
    assert prefixes.evict_all() == [locked[1].block, locked[0].block]
    assert prefixes.tree.num_nodes == 0


def test_eviction_order_equals_a_plain_search() -> None:
    rng = random.Random(0)
    prefixes = Prefixes(1)
    tree = prefixes.tree
    for _ in range(400):
        if rng.random() < 0.7:
            prefixes.insert([rng.randrange(3) for _ in range(rng.randrange(1, 5))], priority=rng.choice([0.0, 1.0]))
        elif tree.num_unlocked:
            leaves = [node for node in tree.nodes() if not node.children]
            best = min((node.priority, node.last_used) for node in leaves)
            blocks = {node.block for node in leaves if (node.priority, node.last_used) == best}
            assert tree.evict() in blocks


def test_list_of_evictable_leaves_stays_small() -> None:
    prefixes = Prefixes()
    path = prefixes.insert([1, 2, 3])
    for _ in range(1000):
        prefixes.tree.lock(path, 0.0)
        prefixes.tree.unlock(path)
    assert len(prefixes.tree._evictable) <= 2 * 1 + 64 + 1
    assert prefixes.evict_all() == [path[0].block]


def test_only_unlocked_leaves_can_be_removed() -> None:
    prefixes = Prefixes()
    path = prefixes.insert([1, 1, 1, 2, 2, 2])
    with pytest.raises(AssertionError, match="only an unlocked leaf"):
        prefixes.tree.remove(path[0])
    with pytest.raises(AssertionError, match="equal node"):
        prefixes.tree.insert(prefixes.tree.root, (1, 1, 1), 9, 0.0)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tree, path: path[0].child_keys.clear(), "not in order"),
        (lambda tree, path: setattr(path[1], "parent", tree.root), "wrong place"),
        (lambda tree, path: setattr(path[1], "num_locks", 1), "has 1 locks"),
        (lambda tree, path: tree._evictable.clear(), "not listed"),
        (lambda tree, path: setattr(tree, "num_nodes", 7), "counted 7"),
        (lambda tree, path: setattr(tree, "num_unlocked", 0), "counted 0"),
    ],
)
def test_integrity_check_finds_damage(damage: Callable[[PrefixTree, list[PrefixNode]], object], message: str) -> None:
    prefixes = Prefixes()
    path = prefixes.insert([1, 1, 1, 2, 2, 2])
    damage(prefixes.tree, path)
    with pytest.raises(AssertionError, match=message):
        prefixes.tree.check_integrity()
