"""`SchedulerSettings`: the limits and policies of one engine, checked and fixed at its start."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.config import CapacitySchedulerPolicy
from tokenmill.engine.policies import QueuePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """Limits and policies.

    Args:
        max_batch_size: most sequences that run at the same time; the number of slots.
        max_num_tokens: most tokens in one step. No more sequences than this run at the same time, so that a step always
            has room for a token of each.
        max_seq_len: longest prompt plus answer.
        max_input_len: longest prompt; None: `max_seq_len` less one.
        enable_chunked_prefill: split prompts over steps.
        capacity_policy: when a waiting sequence is admitted.
        queue_policy: order of the waiting queue.
        max_repeats: how often a step of decoding sequences alone may be repeated before the host looks at its tokens.
    """

    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    max_input_len: int | None = None
    enable_chunked_prefill: bool = True
    capacity_policy: CapacitySchedulerPolicy = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
    queue_policy: QueuePolicy = "fcfs"
    max_repeats: int = 1
