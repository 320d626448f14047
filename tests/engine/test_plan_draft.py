"""A plan under construction."""

import pytest

from tokenmill.engine.plan import BlockCopy, NewBlocks, NewSlot, Row
from tokenmill.engine.plan_draft import PlanDraft
from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.sequence import Sequence, make_request
from tokenmill.kv_cache.manager import PrefixGrant
from tokenmill.sampling_params import SamplingParams


def sequence(slot: int, num_tokens: int, num_scheduled: int = 0, **sampling: object) -> Sequence:
    inputs = GenerationRequest(
        slot, tuple(range(num_tokens)), SamplingParams(**sampling), 5, (1,), (2, 3), bad_words=((4, 4),)
    )
    new = make_request(inputs, (0.0, slot), 100, slot).sequences[0]
    new.slot = slot
    new.num_scheduled_tokens = num_scheduled
    return new


def test_rows_of_one_token_come_first_and_budget_shrinks() -> None:
    draft = PlanDraft(3, 20)
    long, decoding, chunk = sequence(0, 9), sequence(1, 6, 5), sequence(2, 9, 2)
    draft.add_row(long, 9)
    draft.add_row(decoding, 1)
    draft.add_row(chunk, 4)
    assert draft.num_tokens_left == 6 and draft.scheduled_slots() == {0, 1, 2}
    plan = draft.build()
    assert plan.step == 3 and plan.num_tokens == 14
    assert plan.rows == (Row(1, 5, 1, True), Row(0, 0, 9, True), Row(2, 2, 4, False))
    assert draft.sequences == [decoding, long, chunk]
    assert [s.length for s in (long, decoding, chunk)] == [10, 7, 9], "a sampled token is part of the length"
    assert [s.num_scheduled_tokens for s in (long, decoding, chunk)] == [9, 6, 6]


def test_slot_blocks_and_copies() -> None:
    draft = PlanDraft(0, 20)
    new, old = sequence(0, 3), sequence(1, 8, 7)
    draft.add_slot(new, PrefixGrant(2, (5, 6), (9, 6)))
    draft.add_blocks(old, 2, (7,))
    plan = draft.build()
    expected = NewSlot(0, (0, 1, 2), 3, (5, 6), new.request.inputs.sampling, 5, 0, (1, 2, 3), ((4, 4),))
    assert plan.new_slots == (expected,)
    assert plan.new_blocks == (NewBlocks(1, 2, (7,)),)
    assert plan.block_copies == (BlockCopy(9, 6),)


@pytest.mark.parametrize(
    ("start", "num_tokens", "delivered", "expected"),
    [(0, 4, 0, True), (8, 1, 8, True), (9, 1, 9, False), (0, 4, 4, False), (0, 6, 4, True), (8, 5, 8, True)],
)
def test_rows_that_give_prompt_logprobs(start: int, num_tokens: int, delivered: int, expected: bool) -> None:
    draft = PlanDraft(0, 99)
    asking = sequence(0, 10, start, prompt_logprobs=2)
    asking.token_ids += [0] * 3
    asking.length += 3
    asking.num_prompt_logprobs = delivered
    draft.add_row(asking, num_tokens)
    assert draft.build().rows[0].prompt_logprobs is expected
    draft.add_row(sequence(1, 10), 4)
    assert not draft.build().rows[-1].prompt_logprobs, "only if asked for"
