"""What the scheduler decides by: pure functions on ranks, budgets and block counts. Nothing here changes anything.

A new policy is a new branch in these functions, or a new function beside them; the scheduler stays as it is.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Literal, TypeAlias

from tokenmill.config import CapacitySchedulerPolicy
from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.sequence import Sequence

QueuePolicy: TypeAlias = Literal["fcfs", "priority"]
QueueKey: TypeAlias = tuple[float, bool, int, int]


def request_rank(policy: QueuePolicy, inputs: GenerationRequest, arrival: int) -> tuple[float, int]:
    """Order between requests, best first: arrival alone, or priority and then arrival."""
    return (-inputs.priority if policy == "priority" else 0.0, arrival)


def queue_key(sequence: Sequence) -> QueueKey:
    """Order of the waiting queue: by rank, but what was started before goes first among equal priorities."""
    priority, arrival, index = sequence.rank
    return (priority, not sequence.started, arrival, index)


def may_join(policy: CapacitySchedulerPolicy, batch_is_closed: bool, sequence: Sequence) -> bool:
    """Whether a waiting sequence may join those that run now; a static batch takes only siblings of its members."""
    return policy is not CapacitySchedulerPolicy.STATIC_BATCH or not batch_is_closed or sequence.started


def may_preempt(policy: CapacitySchedulerPolicy) -> bool:
    """Whether running sequences may run out of blocks, so that one of them must give up its own."""
    return policy is CapacitySchedulerPolicy.MAX_UTILIZATION


def admission_headroom(
    policy: CapacitySchedulerPolicy, *, num_blocks: int, num_running: int, num_promised: int, num_growth: int
) -> int:
    """Blocks that must stay free after a sequence is admitted.

    Args:
        policy: capacity policy.
        num_blocks: blocks of the cache.
        num_running: sequences that run already.
        num_promised: blocks that those may still ask for, at worst.
        num_growth: blocks that the new one may still ask for after its admission, at worst.
    """
    if may_preempt(policy):
        return max(1, num_blocks // 100) if num_running else 0
    return num_promised + num_growth


def choose_victim(running: list[Sequence], scheduled_slots: Container[int]) -> Sequence:
    """Who gives up its blocks: the worst-ranked running sequence that has no row in the plan yet.

    Args:
        running: best rank first. At least one has no row yet.
        scheduled_slots: slots that have a row in the plan.
    """
    return next(sequence for sequence in reversed(running) if sequence.slot not in scheduled_slots)


def may_chunk(num_tokens: int, max_num_tokens: int, enable_chunked_prefill: bool) -> bool:
    """Whether a prefill of `num_tokens` is split over steps.

    Without chunked prefill only what cannot fit any step is split: an answer that grew beyond it and was preempted.
    """
    return enable_chunked_prefill or num_tokens > max_num_tokens
