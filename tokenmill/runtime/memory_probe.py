"""`measure_activations`: what the largest step really takes on a GPU, found by running one before the cache exists."""

from __future__ import annotations

import torch

from tokenmill.engine.plan import Row
from tokenmill.kv_cache.tensors import allocate_caches
from tokenmill.layers.forward_batch import ForwardBatch
from tokenmill.models.base import CausalLM
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_inputs import inputs_of_rows
from tokenmill.sampling.exact import MAX_ELEMENTS

SAMPLING_BYTES = 32
"""Of temporary tensors for each logit that is sampled from at the same time."""
GRAPHS_ROOM = 64 << 20
"""For the results of all graphs, and the drivers' part of each."""


@torch.inference_mode()
def measure_activations(
    model: CausalLM, state: SlotState, max_num_tokens: int, max_batch_size: int, cache_dtype: torch.dtype
) -> int:
    """Peak bytes of a step of `max_num_tokens` prompt tokens and the logits of `max_batch_size` rows, or of sampling.

    The block tables of `state` must still be empty: all tokens read and write scratch block 0, the only one there is.
    """
    rows = _rows(max_num_tokens, state.max_seq_len)
    step = _peak_of_step(model, state, rows, max_batch_size, cache_dtype)
    num_logits = max_batch_size * model.config.vocab_size
    return max(step, 6 * num_logits + SAMPLING_BYTES * min(num_logits, MAX_ELEMENTS))


def measure_graphs(model: CausalLM, state: SlotState, max_batch_size: int, cache_dtype: torch.dtype) -> int:
    """Peak bytes of a decode step of `max_batch_size` rows, with some room for what each graph keeps."""
    rows = [Row(slot=0, start=0, num_tokens=1, sample=False)] * max_batch_size
    return GRAPHS_ROOM + _peak_of_step(model, state, rows, max_batch_size, cache_dtype)


def _peak_of_step(model: CausalLM, state: SlotState, rows: list[Row], num_logits: int, cache_dtype: torch.dtype) -> int:
    config, device = model.config, state.device
    caches = allocate_caches(
        config.num_layers, 1, state.tokens_per_block, config.num_key_value_heads, config.head_dim, cache_dtype, device
    )
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    inputs = inputs_of_rows(rows, state)
    hidden = model(ForwardBatch(inputs.input_ids, inputs.positions, inputs.attention, caches))
    logits = model.compute_logits(hidden[torch.zeros(num_logits, dtype=torch.int64, device=device)])
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
