"""Costs are counted in operations, not in seconds: nothing per token grows with the length of a sequence."""

import sys
from collections.abc import Callable

import pytest

from tests.support.engine_harness import MAX_UTILIZATION, Harness
from tokenmill.engine.plan import BatchPlan, RowOutput, StepOutput
from tokenmill.kv_cache.manager import KvCacheManager
from tokenmill.kv_cache.prefix_tree import PrefixTree


def count_calls(work: Callable[[], object]) -> int:
    """Calls of Python functions and of built-ins that `work` makes."""
    num_calls = 0

    def profiler(frame: object, event: str, argument: object) -> None:
        nonlocal num_calls
        num_calls += event in ("call", "c_call")

    sys.setprofile(profiler)
    try:
        work()
    finally:
        sys.setprofile(None)
    return num_calls


class CountingToken(int):
    """A token that counts how often it is looked at."""

    num_looks = 0

    def __eq__(self, other: object) -> bool:
        CountingToken.num_looks += 1
        return int.__eq__(self, other)

    def __lt__(self, other: int) -> bool:
        CountingToken.num_looks += 1
        return int.__lt__(self, other)

    def __hash__(self) -> int:
        CountingToken.num_looks += 1
        return int.__hash__(self)


def count_looks(work: Callable[[], object]) -> int:
    before = CountingToken.num_looks
    work()
    return CountingToken.num_looks - before


def answer(plan: BatchPlan) -> StepOutput:
    return StepOutput(tuple(RowOutput(token_id=7 if row.sample else None) for row in plan.rows))


def decode_calls(prompt_length: int, num_sequences: int, num_steps: int) -> tuple[int, int]:
    """Calls for `num_steps` decode steps of sequences with prompts of a length; and tokens given."""
    harness = Harness(
        num_blocks=20000, tokens_per_block=16, max_batch_size=256, max_num_tokens=10**6, max_seq_len=10**6
    )
    for first in range(num_sequences):
        harness.add([first] * prompt_length, max_tokens=1000)
    scheduler = harness.scheduler
    plan = scheduler.schedule()
    scheduler.commit(plan, answer(plan))
    num_calls = num_tokens = 0
    for _ in range(num_steps):
        plans: list[BatchPlan] = []
        num_calls += count_calls(lambda plans=plans: plans.append(scheduler.schedule()))
        plan, output = plans[0], answer(plans[0])
        num_calls += count_calls(lambda plan=plan, output=output: scheduler.commit(plan, output))
        num_tokens += len(plan.rows)
    return num_calls, num_tokens


def test_decoding_costs_the_same_at_any_length() -> None:
    short, _ = decode_calls(16, 8, 32)
    long, _ = decode_calls(16 * 1000, 8, 32)
    assert long <= short * 1.02


def test_decoding_costs_a_few_calls_a_token() -> None:
    num_calls, num_tokens = decode_calls(16, 256, 32)
    assert num_tokens == 256 * 32
    assert num_calls / num_tokens < 25


def test_decoding_does_not_look_at_earlier_tokens() -> None:
    kv = KvCacheManager(2000, 16)
    tokens = [CountingToken(i) for i in range(16000)]
    assert kv.start(0, tokens) is not None
    kv.cache_computed(0, tokens, 16000)

    def decode() -> None:
        for _ in range(160):
            tokens.append(CountingToken(1))
            kv.extend(0, len(tokens))
            kv.cache_computed(0, tokens, len(tokens))

    assert count_looks(decode) <= 160 * 12, "each token is hashed and compared a few times when its block is full"


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_long_prompt_is_looked_at_once(is_cached: bool) -> None:
    kv = KvCacheManager(8000, 32)
    tokens = [CountingToken(i % 977) for i in range(100_000)]
    if is_cached:
        kv.start(0, tokens)
        kv.cache_computed(0, tokens, len(tokens))
        kv.release(0, tokens, len(tokens))
    looks = count_looks(lambda: kv.start(1, list(tokens)))
    assert looks <= (3 * 100_000 if is_cached else 200)


def test_a_long_cached_prompt_costs_a_few_calls_a_block() -> None:
    kv = KvCacheManager(8000, 32)
    tokens = [i % 977 for i in range(100_000)]
    kv.start(0, tokens)
    kv.cache_computed(0, tokens, len(tokens))
    kv.release(0, tokens, len(tokens))
    assert count_calls(lambda: kv.start(1, tokens)) < 10 * 100_000 / 32
    assert count_calls(lambda: kv.cache_computed(1, tokens, len(tokens))) < 20


def test_partial_match_among_many_siblings_looks_at_few() -> None:
    tree = PrefixTree(32)
    num_siblings = 4096
    for i in range(num_siblings):
        tokens = tuple(CountingToken(t) for t in (*[5] * 16, i, *[6] * 15))
        tree.insert(tree.root, tokens, i + 1, 0.0)
    query = tuple(CountingToken(t) for t in (*[5] * 16, 1234, *[6] * 10, *[7] * 5))
    found = []
    looks = count_looks(lambda: found.append(tree.match_partial(tree.root, query)))
    assert found[0] is not None and found[0][1] == 27 and found[0][0].block == 1235
    assert looks <= 3 * 32 * 13, "O(tokens * log(siblings))"


def test_eviction_cost_grows_slowly_with_the_cache() -> None:
    def calls_to_evict(num_blocks: int) -> float:
        kv = KvCacheManager(num_blocks + 1, 1)
        for i in range(num_blocks):
            kv.start(i, [i])
            kv.cache_computed(i, [i], 1)
            kv.release(i, [i], 1)
        assert kv.stats().num_cached_blocks == num_blocks
        kv.start(-1, [10**6])
        return count_calls(lambda: kv.extend(-1, 100)) / 99

    assert calls_to_evict(4000) <= 1.5 * calls_to_evict(200)


def test_a_blocked_head_is_not_matched_again_before_something_is_released() -> None:
    harness = Harness(num_blocks=40, max_seq_len=200, capacity_policy=MAX_UTILIZATION, max_num_tokens=200)
    harness.add(range(100), max_tokens=40)
    harness.step()
    harness.add([1] * 60, max_tokens=5)
    harness.step()
    calls: list[int] = []
    start = harness.kv.start
    harness.kv.start = lambda *args, **options: calls.append(1) or start(*args, **options)  # type: ignore[method-assign]
    for _ in range(20):
        harness.step()
    assert not calls and harness.core.stats().num_waiting == 1
    harness.run()
    assert calls
    harness.check_finished()
