"""Block tables, reuse, duplicates, copies, sharing between siblings, and the integrity check."""

from collections.abc import Callable

import pytest

from tokenmill.kv_cache.manager import KvCacheManager, PrefixGrant

SIZE = 4
PROMPT = list(range(100, 110))  # two full blocks and half of one


def manager(num_blocks: int = 20, **options: bool) -> KvCacheManager:
    return KvCacheManager(num_blocks + 1, SIZE, **options)


def start(kv: KvCacheManager, sequence_id: int, tokens: list[int], **options: object) -> PrefixGrant:
    grant = kv.start(sequence_id, tokens, **options)
    assert grant is not None
    kv.check_integrity()
    return grant


def finish(kv: KvCacheManager, sequence_id: int, tokens: list[int], num_computed: int | None = None) -> None:
    num_computed = len(tokens) if num_computed is None else num_computed
    kv.cache_computed(sequence_id, tokens, num_computed)
    kv.release(sequence_id, tokens, num_computed)
    kv.check_integrity()


def compute(kv: KvCacheManager, sequence_id: int, tokens: list[int]) -> PrefixGrant:
    """Run a sequence from start to end."""
    grant = start(kv, sequence_id, tokens)
    kv.end_plan()
    finish(kv, sequence_id, tokens)
    return grant


def test_first_sequence_finds_nothing_and_gets_blocks_for_all_tokens() -> None:
    kv = manager()
    grant = start(kv, 0, PROMPT)
    assert grant.num_cached_tokens == 0 and len(set(grant.block_ids)) == 3 and grant.copy is None
    assert 0 not in grant.block_ids
    assert kv.num_free_blocks == 17
    assert kv.num_blocks_of(0) == 3


def test_finished_prefix_is_reused_with_its_partial_tail_copied() -> None:
    kv = manager()
    first = compute(kv, 0, PROMPT)
    assert kv.num_free_blocks == 20 and kv.stats().num_cached_blocks == 3
    second = start(kv, 1, [*PROMPT, 7])
    assert second.num_cached_tokens == 10
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.copy == (first.block_ids[2], second.block_ids[2])
    assert second.block_ids[2] not in first.block_ids


def test_last_token_is_always_computed() -> None:
    kv = manager()
    compute(kv, 0, PROMPT[:8])
    assert start(kv, 1, PROMPT[:8]).num_cached_tokens == 7, "4 shared, 3 copied"
    kv = manager(enable_partial_reuse=False)
    compute(kv, 0, PROMPT[:8])
    assert start(kv, 1, PROMPT[:8]).num_cached_tokens == 4
    assert start(kv, 2, PROMPT[:1]).num_cached_tokens == 0


def test_partial_match_inside_a_full_block() -> None:
    kv = manager()
    first = compute(kv, 0, PROMPT)
    other = [*PROMPT[:6], 1, 2, 3]
    grant = start(kv, 1, other)
    assert grant.num_cached_tokens == 6 and grant.copy == (first.block_ids[1], grant.block_ids[1])


def test_reuse_off_keeps_nothing() -> None:
    kv = manager(enable_block_reuse=False)
    compute(kv, 0, PROMPT)
    assert kv.stats().num_cached_blocks == 0
    assert start(kv, 1, PROMPT).num_cached_tokens == 0
    assert kv.stats().num_queried_tokens == 0


def test_lookup_off_computes_all_and_still_caches() -> None:
    kv = manager()
    compute(kv, 0, PROMPT)
    grant = start(kv, 1, PROMPT, lookup=False)
    assert grant.num_cached_tokens == 0 and grant.copy is None
    finish(kv, 1, PROMPT)
    assert kv.stats().num_cached_blocks == 3


def test_computed_blocks_are_shared_before_the_sequence_ends() -> None:
    kv = manager()
    first = start(kv, 0, PROMPT)
    kv.cache_computed(0, PROMPT, 5)
    assert start(kv, 1, PROMPT).block_ids[0] == first.block_ids[0]
    assert kv.num_free_blocks == 20 - 3 - 2
    finish(kv, 0, PROMPT)
    finish(kv, 1, PROMPT)
    assert kv.num_free_blocks == 20


def test_duplicate_of_a_node_in_use_stays_private() -> None:
    kv = manager()
    first, second = start(kv, 0, PROMPT), start(kv, 1, PROMPT)
    kv.cache_computed(0, PROMPT, 8)
    kv.cache_computed(1, PROMPT, 8)
    kv.check_integrity()
    assert start(kv, 2, PROMPT).block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[0] not in first.block_ids
    finish(kv, 0, PROMPT)
    num_free = kv.num_free_blocks
    finish(kv, 1, PROMPT)
    assert kv.num_free_blocks == num_free + 3, "its duplicates are freed with it"


def test_duplicate_of_an_unused_node_takes_its_place() -> None:
    kv = manager()
    first, second = start(kv, 0, PROMPT), start(kv, 1, PROMPT)
    finish(kv, 0, PROMPT)
    num_free = kv.num_free_blocks
    kv.cache_computed(1, PROMPT, 8)
    kv.check_integrity()
    assert kv.num_free_blocks == num_free, "a block that counted as free would vanish if both were kept"
    assert start(kv, 2, PROMPT).block_ids[:2] == second.block_ids[:2] != first.block_ids[:2]


def test_longer_tail_supersedes_a_shorter_one_and_not_the_other_way() -> None:
    kv = manager()
    compute(kv, 0, PROMPT[:9])
    compute(kv, 1, PROMPT[:10])
    assert kv.stats().num_cached_blocks == 3
    compute(kv, 2, PROMPT[:9])
    assert kv.stats().num_cached_blocks == 3
    assert start(kv, 3, [*PROMPT, 1, 2]).num_cached_tokens == 10
    kv.end_plan()
    finish(kv, 3, [*PROMPT, 1, 2])
    assert kv.stats().num_cached_blocks == 3, "the full block took the place of the partial one"


def test_does_not_fit_changes_nothing() -> None:
    kv = manager(4)
    start(kv, 0, PROMPT)
    assert kv.start(1, [1, 2, 3, 4, 5]) is None
    assert kv.start(1, [1, 2, 3, 4], headroom=1) is None
    assert kv.num_free_blocks == 1 and kv.sequence_ids() == {0}
    kv.check_integrity()
    assert kv.start(1, [1, 2, 3, 4]) is not None
    assert kv.extend(1, 5) is None
    assert kv.num_blocks_of(1) == 1


def test_uncached_part_may_be_limited() -> None:
    kv = manager()
    assert kv.start(0, PROMPT, max_uncached_tokens=9) is None
    compute(kv, 0, PROMPT[:8])
    assert kv.start(1, PROMPT, max_uncached_tokens=1) is None
    assert start(kv, 1, PROMPT, max_uncached_tokens=2).num_cached_tokens == 8
    assert kv.stats().num_hit_tokens == 8, "lookups that came to nothing are not counted"


def test_extend_appends_what_is_missing() -> None:
    kv = manager()
    grant = start(kv, 0, PROMPT)
    assert kv.extend(0, 12) == ()
    added = kv.extend(0, 17)
    assert added is not None and len(added) == 2 and not set(added) & set(grant.block_ids)
    assert kv.num_blocks_of(0) == 5


def test_full_cache_evicts_what_nobody_uses() -> None:
    kv = manager(4)
    compute(kv, 0, PROMPT)
    assert kv.num_free_blocks == 4
    grant = start(kv, 1, [1] * 8)
    assert len(set(grant.block_ids)) == 2
    assert kv.stats().num_evicted_blocks == 1 and kv.stats().num_cached_blocks == 2
    assert start(kv, 2, PROMPT[:6]).num_cached_tokens == 4, "the prefix lasts longest"


def test_copy_source_is_kept_until_the_plan_is_complete() -> None:
    kv = manager(5)
    source = compute(kv, 0, PROMPT[:6]).block_ids[1]
    grant = start(kv, 1, [*PROMPT[:6], 1])
    assert grant.copy == (source, grant.block_ids[1])
    assert kv.num_free_blocks == 2, "one of the three others is the source"
    blocks = start(kv, 2, [5] * 8).block_ids
    assert source not in blocks
    assert kv.extend(2, 9) is None
    kv.end_plan()
    assert kv.extend(2, 9) == (source,)
    kv.check_integrity()


def test_copy_source_outlives_its_sequence_within_a_plan() -> None:
    kv = manager(6)
    source = compute(kv, 0, PROMPT[:6]).block_ids[1]
    start(kv, 1, [*PROMPT[:6], 1])
    kv.release(1)
    kv.check_integrity()
    assert source not in start(kv, 2, [5] * 16).block_ids
    kv.end_plan()
    kv.check_integrity()


def test_partial_reuse_gives_way_when_the_source_takes_the_last_block() -> None:
    kv = manager(3)
    compute(kv, 0, PROMPT[:6])
    grant = start(kv, 1, [*PROMPT[:6], 1, 2, 3, 4])
    assert grant.num_cached_tokens == 4 and grant.copy is None


def test_sibling_shares_full_blocks_and_copies_the_partial_one() -> None:
    kv = manager()
    first = start(kv, 0, PROMPT)
    kv.cache_computed(0, PROMPT, 10)
    kv.share(0, 1, 9)
    kv.check_integrity()
    grant = kv.start_shared(1)
    assert grant is not None and grant.num_cached_tokens == 9
    assert grant.block_ids[:2] == first.block_ids[:2]
    assert grant.copy == (first.block_ids[2], grant.block_ids[2])
    kv.check_integrity()
    kv.end_plan()
    finish(kv, 0, PROMPT)
    finish(kv, 1, PROMPT)
    assert kv.num_free_blocks == 20


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("num_prompt_tokens", [1, 4, 5, 8, 9])
@pytest.mark.parametrize("leaves_first", [True, False])
def test_siblings_hold_the_prompt_after_the_first_left(reuse: bool, num_prompt_tokens: int, leaves_first: bool) -> None:
    kv = manager(enable_block_reuse=reuse)
    prompt = PROMPT[:num_prompt_tokens]
    answer = [*prompt, 1, 2, 3, 4]
    first = start(kv, 0, prompt)
    kv.cache_computed(0, prompt, num_prompt_tokens)
    for sibling in (1, 2, 3):
        kv.share(0, sibling, num_prompt_tokens - 1)
        kv.check_integrity()
    kv.release(3)
    assert kv.extend(0, len(answer)) is not None
    if leaves_first:
        finish(kv, 0, answer)
    needed = set(first.block_ids[: -(-(num_prompt_tokens - 1) // SIZE)])
    for sibling in (1, 2):
        grant = kv.start_shared(sibling)
        kv.check_integrity()
        assert grant is not None and grant.num_cached_tokens == num_prompt_tokens - 1
        own = grant.block_ids[-1]
        assert own not in needed
        assert set(grant.block_ids[:-1]) | ({grant.copy[0]} if grant.copy else set()) == needed
        assert (grant.copy is not None) == ((num_prompt_tokens - 1) % SIZE != 0)
        kv.end_plan()
        kv.check_integrity()
    if not leaves_first:
        finish(kv, 0, answer)
    for sibling in (1, 2):
        finish(kv, sibling, prompt)
    assert kv.num_free_blocks == 20


def test_sibling_waits_when_there_is_no_block() -> None:
    kv = manager(3)
    start(kv, 0, PROMPT)
    kv.share(0, 1, 9)
    assert kv.start_shared(1) is None
    kv.check_integrity()
    finish(kv, 0, PROMPT)
    assert kv.num_free_blocks == 0, "the sibling holds the prompt"
    kv.release(1)
    assert kv.num_free_blocks == 3
    kv.check_integrity()


def test_discard_forgets_what_only_this_sequence_used() -> None:
    kv = manager()
    compute(kv, 0, PROMPT[:4])
    start(kv, 1, PROMPT)
    kv.cache_computed(1, PROMPT, 8)
    start(kv, 2, PROMPT[:5])
    kv.release(1, PROMPT, 8, discard=True)
    kv.check_integrity()
    assert kv.stats().num_cached_blocks == 1, "the block that another sequence uses stays"
    kv.release(2, PROMPT, 4, discard=True)
    kv.check_integrity()
    assert kv.stats().num_cached_blocks == 0


def test_hit_statistics() -> None:
    kv = manager()
    compute(kv, 0, PROMPT)
    compute(kv, 1, PROMPT)
    stats = kv.stats()
    assert (stats.num_queried_tokens, stats.num_hit_tokens) == (20, 9)
    assert stats.hit_rate == pytest.approx(0.45)
    assert stats.usage == 0.0 and stats.tokens_per_block == SIZE and stats.num_blocks == 20


def test_misuse_is_refused() -> None:
    kv = manager()
    start(kv, 0, PROMPT)
    with pytest.raises(AssertionError, match="sequence 0 has a block table"):
        kv.start(0, PROMPT)
    start(kv, 1, PROMPT)
    with pytest.raises(AssertionError, match="sequence 1 has a block table"):
        kv.share(0, 1, 4)
    with pytest.raises(KeyError):
        kv.release(7)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda kv: kv._tables.pop(0), "paths hold it"),
        (lambda kv: kv._tables[0].block_ids.append(kv._tables[0].block_ids[0]), "block twice"),
        (lambda kv: kv._tables[0].block_ids.pop(), "holders, counted 1"),
        (lambda kv: kv._pool.acquire(kv._tables[0].block_ids[2]), "has 1 holders, counted 2"),
        (lambda kv: kv._tables[0].path.pop(), "paths hold it"),
        (lambda kv: kv._pool.allocate(), "has 0 holders, counted 1"),
    ],
)
def test_integrity_check_finds_damage(damage: Callable[[KvCacheManager], object], message: str) -> None:
    kv = manager()
    start(kv, 0, PROMPT)
    kv.cache_computed(0, PROMPT, 8)
    kv.check_integrity()
    damage(kv)
    with pytest.raises(AssertionError, match=message):
        kv.check_integrity()
