"""`EngineDescription`: what an engine runs, as plain data. Whoever owns the engine makes it; it crosses processes.

Imports no torch: a process that only talks to engines reads it too.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.models.config import ModelConfig
from tokenmill.runtime.memory_planner import MemoryPlan


@dataclass(frozen=True, slots=True)
class EngineDescription:
    """What an engine runs.

    Args:
        model: the architecture's numbers.
        device, dtype, cache_dtype: where and in which types, as text.
        attn_backend: the attention backend's name.
        max_batch_size, max_num_tokens, max_seq_len: limits.
        enable_chunked_prefill: whether a prompt may be longer than a step.
        memory: the plan that the cache was sized by.
        backend: `torch`, or `engine` for a compiled program.
        max_input_len: longest prompt, where an engine or the caller limits it; None: it leaves room for one token.
    """

    model: ModelConfig
    device: str
    dtype: str
    cache_dtype: str
    attn_backend: str
    max_batch_size: int
    max_num_tokens: int
    max_seq_len: int
    enable_chunked_prefill: bool
    memory: MemoryPlan
    backend: str = "torch"
    max_input_len: int | None = None

    @property
    def num_blocks(self) -> int:
        """Cache blocks that requests can use: all but the reserved one."""
        return self.memory.num_blocks - 1

    @property
    def tokens_per_block(self) -> int:
        """Tokens in one cache block."""
        return self.memory.tokens_per_block

    def blocks_for(self, num_tokens: int) -> int:
        """Cache blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.tokens_per_block)
