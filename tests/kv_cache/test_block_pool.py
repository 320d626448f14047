"""Reference counts and the free list."""

from collections.abc import Callable

import pytest

from tokenmill.kv_cache.block_pool import BlockPool


def test_gives_out_every_block_but_the_scratch_block_once() -> None:
    pool = BlockPool(5)
    assert pool.num_blocks == pool.num_free == 4
    assert sorted(pool.allocate() for _ in range(4)) == [1, 2, 3, 4]
    assert pool.num_free == 0
    pool.check_integrity()


def test_block_is_free_when_the_last_holder_leaves() -> None:
    pool = BlockPool(3)
    block = pool.allocate()
    pool.acquire(block)
    pool.release(block)
    assert pool.ref_count(block) == 1 and pool.num_free == 1
    pool.release(block)
    assert pool.ref_count(block) == 0 and pool.num_free == 2
    assert pool.allocate() == block
    pool.check_integrity()


def test_misuse_is_refused() -> None:
    pool = BlockPool(3)
    with pytest.raises(AssertionError, match="block 1 is free"):
        pool.acquire(1)
    with pytest.raises(AssertionError, match="block 1 is released more often"):
        pool.release(1)
    with pytest.raises(AssertionError, match="scratch"):
        pool.release(0)
    with pytest.raises(AssertionError, match="scratch"):
        pool.acquire(0)
    with pytest.raises(AssertionError, match="got 1 blocks"):
        BlockPool(1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda pool: pool._free.append(1), "twice"),
        (lambda pool: pool._free.append(0), "scratch"),
        (lambda pool: pool._free.pop(), "0 holders"),
        (lambda pool: pool._ref_counts.__setitem__(2, -1), "-1 holders"),
    ],
)
def test_integrity_check_finds_damage(damage: Callable[[BlockPool], object], message: str) -> None:
    pool = BlockPool(4)
    damage(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check_integrity()
