"""Status, queue, slot and blocks change together."""

from collections.abc import Callable

import pytest

from tokenmill.engine.placement import Placement
from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.sequence import Request, Sequence, SequenceStatus, make_request
from tokenmill.kv_cache.manager import KvCacheManager
from tokenmill.sampling_params import SamplingParams


def placement() -> Placement:
    return Placement(KvCacheManager(20, 4), 2)


def request(arrival: int = 0, n: int = 1) -> Request:
    inputs = GenerationRequest(arrival, tuple(range(9)), SamplingParams(n=n, temperature=1.0))
    return make_request(inputs, (0.0, arrival), 60, 10 * arrival)


def run(place: Placement, sequence: Sequence) -> None:
    grant = place.kv.start(sequence.id, sequence.token_ids)
    assert grant is not None
    place.run(sequence, grant)


def test_from_the_queue_to_a_slot_and_out() -> None:
    place, (late,), (early,) = placement(), request(1).sequences, request(0).sequences
    for sequence in (late, early):
        place.enqueue(sequence)
    assert list(place.waiting) == [early, late]
    run(place, late)
    run(place, early)
    assert (late.slot, early.slot) == (0, 1) and place.running == [early, late] and not place.free_slots
    assert early.status is SequenceStatus.RUNNING and early.num_block_tokens == 12
    place.check_integrity()
    place.leave(late)
    assert late.status is SequenceStatus.FINISHED and late.slot == -1 and place.free_slots == [0]
    assert place.kv.sequence_ids() == {early.id}
    place.check_integrity()


def test_preempted_sequence_keeps_its_tokens_and_loses_the_rest() -> None:
    place, (sequence,) = placement(), request().sequences
    place.enqueue(sequence)
    run(place, sequence)
    sequence.num_scheduled_tokens = sequence.num_computed_tokens = 9
    sequence.length = 10
    place.preempt(sequence, 5)
    assert sequence.status is SequenceStatus.WAITING and place.waiting.head is sequence
    assert sequence.num_scheduled_tokens == sequence.num_computed_tokens == sequence.num_block_tokens == 0
    assert sequence.length == 10 and sequence.num_preemptions == 1 and sequence.last_lost_step == 4
    assert place.free_slots and place.kv.num_free_blocks == place.kv.num_blocks
    place.check_integrity()


def test_siblings_hold_the_prompt_once_it_is_computed() -> None:
    place, parent = placement(), request(n=3)
    first, *siblings = parent.sequences
    place.enqueue(first)
    run(place, first)
    first.num_scheduled_tokens = first.num_computed_tokens = 9
    place.enqueue_siblings(parent)
    assert list(place.waiting) == siblings and not parent.siblings_are_pending
    assert set(place.prompt_holders) == {1, 2} == place.kv.sequence_ids() - {0}
    place.check_integrity()
    assert place.drop_held_prompt() and set(place.prompt_holders) == {1}, "the last one lets go"
    place.leave(siblings[0])
    assert not place.drop_held_prompt()
    assert list(place.waiting) == [siblings[1]]
    place.check_integrity()


def test_siblings_hold_nothing_if_the_prompt_was_not_computed() -> None:
    place, parent = placement(), request(n=3)
    place.enqueue(parent.sequences[0])
    run(place, parent.sequences[0])
    place.leave(parent.sequences[2])
    place.enqueue_siblings(parent)
    assert list(place.waiting) == [parent.sequences[1]] and not place.prompt_holders
    place.check_integrity()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda place, sequence: place.free_slots.append(0), "slots"),
        (lambda place, sequence: setattr(sequence, "status", SequenceStatus.WAITING), "runs as"),
        (lambda place, sequence: place.kv.release(sequence.id), "block tables"),
        (lambda place, sequence: place.kv.start(99, [1]), "block tables"),
        (lambda place, sequence: place.kv.extend(sequence.id, 13), "room for 16 tokens"),
        (lambda place, sequence: setattr(sequence, "num_computed_tokens", 1), "counts"),
        (lambda place, sequence: setattr(sequence, "length", 8), "lengths"),
    ],
)
def test_integrity_check_finds_damage(damage: Callable[[Placement, Sequence], object], message: str) -> None:
    place, (sequence,) = placement(), request().sequences
    place.enqueue(sequence)
    run(place, sequence)
    place.check_integrity()
    damage(place, sequence)
    with pytest.raises(AssertionError, match=message):
        place.check_integrity()
