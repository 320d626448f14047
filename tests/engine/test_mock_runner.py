"""The mock runner notices what it is there to notice; otherwise the tests built on it would prove nothing."""

import pytest

from tests.support.mock_runner import MockRunner, Slot, expected_answer, hash_chain
from tokenmill.engine.plan import BatchPlan, BlockCopy, NewBlocks, NewSlot, Row
from tokenmill.engine.request import GenerationRequest
from tokenmill.sampling_params import SamplingParams

SAMPLING = SamplingParams(max_tokens=9)
PROMPT = (1, 2, 3, 4, 5, 6)


def new_slot(slot: int, block_ids: tuple[int, ...], token_ids: tuple[int, ...] = PROMPT) -> NewSlot:
    return NewSlot(slot, token_ids, len(token_ids), block_ids, SAMPLING, 0, 0, ())


def runner() -> MockRunner:
    """After a step in which slot 0 computed the prompt in blocks 1 and 2."""
    mock = MockRunner(num_blocks=9, tokens_per_block=4, num_slots=4)
    mock.run(BatchPlan(0, (Row(0, 0, 6, True),), (new_slot(0, (1, 2)),)))
    return mock


def test_follows_its_own_oracle() -> None:
    mock = runner()
    tokens = [mock.slots[0].token_ids[-1]]
    for step in range(1, 3):
        output = mock.run(BatchPlan(step, (Row(0, 5 + step, 1, True),)))
        tokens.append(output.rows[0].token_id)
    expected = expected_answer(GenerationRequest(0, PROMPT, SAMPLING), 0, max_seq_len=99)
    assert tuple(tokens) == expected.token_ids[:3]


def test_shared_prefix_and_copy_are_accepted() -> None:
    mock = runner()
    plan = BatchPlan(1, (Row(1, 5, 1, True),), (new_slot(1, (1, 3)),), (), (BlockCopy(2, 3),))
    assert mock.run(plan).rows[0].token_id == mock.slots[0].token_ids[-1]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (BatchPlan(1, (Row(1, 5, 1, True),), (new_slot(1, (1, 3)),)), "block 3 holds another text"),
        (BatchPlan(1, (Row(1, 4, 2, True),), (new_slot(1, (2, 3)),)), "block 2 holds another text"),
        (
            BatchPlan(1, (Row(1, 4, 2, True),), (new_slot(1, (1, 3), (9, 2, 3, 4, 5, 6)),)),
            "block 1 holds another text",
        ),
        (BatchPlan(1, (Row(0, 6, 1, True), Row(1, 5, 1, True)), (new_slot(1, (1, 2)),)), "which others use"),
        (BatchPlan(1, (Row(0, 6, 1, True), Row(1, 0, 6, True)), (new_slot(1, (1, 3)),)), "which others use"),
        (BatchPlan(1, (Row(0, 6, 2, True),)), "not known"),
        (BatchPlan(1, (Row(0, 6, 1, False),)), "wrong place to sample"),
        (BatchPlan(1, (Row(1, 0, 3, False), Row(0, 6, 1, True)), (new_slot(1, (3, 4)),)), "do not come first"),
        (BatchPlan(1, (Row(0, 6, 1, True), Row(0, 6, 1, True))), "two rows"),
        (BatchPlan(1, (Row(0, 6, 1, True),), (new_slot(1, (3, 4)),)), "without a row"),
        (BatchPlan(1, (Row(0, 6, 1, True),), (), (NewBlocks(0, 1, (3,)),)), "wrong place"),
        (BatchPlan(1, (Row(0, 6, 1, True),), (), (NewBlocks(0, 2, (0,)),)), "scratch"),
        (BatchPlan(1, (Row(0, 6, 1, True),), (), (NewBlocks(0, 2, (1,)),)), "twice"),
        (BatchPlan(1, (Row(0, 6, 1, True),), (), (), (BlockCopy(2, 3), BlockCopy(3, 4))), "copied from and copied to"),
        (BatchPlan(1, (Row(0, 6, 1, True),), (), (), (BlockCopy(3, 2),)), "block 2 holds another text"),
        (BatchPlan(0, (Row(0, 6, 1, True),)), "out of order"),
        (BatchPlan(1, ()), "empty plan"),
    ],
)
def test_mistakes_are_noticed(plan: BatchPlan, message: str) -> None:
    mock = runner()
    with pytest.raises(AssertionError, match=message):
        mock.run(plan)
    assert len(mock.mistakes) == 1, "kept for the harness, since the engine swallows the exception"


def test_collecting_out_of_order_is_noticed() -> None:
    mock = runner()
    mock.launch(BatchPlan(1, (Row(0, 6, 1, True),)))
    second = mock.launch(BatchPlan(2, (Row(0, 7, 1, True),), (), (NewBlocks(0, 2, (3,)),)))
    with pytest.raises(AssertionError, match="out of order"):
        mock.collect(second)


def test_a_failed_step_spoils_what_it_was_to_write() -> None:
    mock = runner()
    mock.launch_error = lambda plan: RuntimeError("lost") if plan.step == 1 else None
    with pytest.raises(RuntimeError, match="lost"):
        mock.run(BatchPlan(1, (Row(0, 6, 1, True),)))
    mock.slots[1] = Slot(new_slot(1, ()), [], [], [1, 2])
    mock.slots[1].token_ids = [*mock.slots[0].token_ids, 3]
    mock.slots[1].chain = hash_chain(mock.slots[1].token_ids)
    with pytest.raises(AssertionError, match="position 6: block 2 holds another text"):
        mock.run(BatchPlan(2, (Row(1, 7, 1, True),)))
