"""`measure_activations`: what the largest step really takes on a GPU, found by running one before the cache exists."""

from __future__ import annotations

import torch

from tokenmill.engine.plan import Row
from tokenmill.kv_cache.tensors import allocate_caches
from tokenmill.layers.forward_batch import ForwardBatch
from tokenmill.models.base import CausalLM
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_inputs import inputs_of_rows


@torch.inference_mode()
def measure_activations(
    model: CausalLM, state: SlotState, max_num_tokens: int, max_batch_size: int, cache_dtype: torch.dtype
) -> int:
    """Peak bytes of a step of `max_num_tokens` prompt tokens and the logits of `max_batch_size` rows.

    The block tables of `state` must still be empty: all tokens read and write scratch block 0, the only one there is.
    """
    config, device = model.config, state.device
    caches = allocate_caches(
        config.num_layers, 1, state.tokens_per_block, config.num_key_value_heads, config.head_dim, cache_dtype, device
    )
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    inputs = inputs_of_rows(_rows(max_num_tokens, state.max_seq_len), state)
    hidden = model(ForwardBatch(inputs.input_ids, inputs.positions, inputs.attention, caches))
    logits = model.compute_logits(hidden[torch.zeros(max_batch_size, dtype=torch.int64, device=device)])
    logits.max(dim=-1)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del inputs, hidden, logits, caches
    torch.cuda.empty_cache()
    return peak


def _rows(num_tokens: int, max_seq_len: int) -> list[Row]:
    """As many rows of the longest length as the tokens fill."""
    lens = [max_seq_len] * (num_tokens // max_seq_len)
    rest = num_tokens % max_seq_len
    return [Row(slot=0, start=0, num_tokens=length, sample=False) for length in [*lens, *([rest] if rest else [])]]
