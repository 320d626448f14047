"""Ways to schedule the same requests, none of which may change a greedy token, and the requests."""

from __future__ import annotations

from typing import Any, Final

from tokenmill import KvCacheConfig, SamplingParams, SchedulerConfig
from tokenmill.config import CapacitySchedulerPolicy

GREEDY: Final = SamplingParams(max_tokens=40, ignore_eos=True)
NO_REUSE: Final = KvCacheConfig(max_tokens=8192, tokens_per_block=16, enable_block_reuse=False)

WAYS: Final[dict[str, dict[str, Any]]] = {
    "chunked": {"max_num_tokens": 24},
    "one at a time": {"max_batch_size": 1},
    "prefix cache": {"kv_cache_config": KvCacheConfig(max_tokens=8192, tokens_per_block=16)},
    "preempted": {
        "kv_cache_config": KvCacheConfig(max_tokens=480, tokens_per_block=16),
        "scheduler_config": SchedulerConfig(capacity_scheduler_policy=CapacitySchedulerPolicy.MAX_UTILIZATION),
    },
}
"""Arguments of `LLM`; `NO_REUSE` where a way has no cache of its own."""


def prompts_of(*lengths: int) -> list[list[int]]:
    """Token ids, one prompt for each length."""
    return [[(7 * index + 13 * length) % 300 for index in range(length)] for length in lengths]
