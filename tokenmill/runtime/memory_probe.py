"""`largest_step` and `peak_bytes`: what a step of a model really takes on a GPU, found by running it before the cache
exists. Called by `executor.runner_factory`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tokenmill.attention.base import LayerCache
from tokenmill.engine.plan import Row
from tokenmill.layers.forward_batch import ForwardBatch
from tokenmill.runtime.model_runner import StepModel
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_inputs import inputs_of_rows
from tokenmill.sampling.exact import MAX_ELEMENTS

SAMPLING_BYTES = 32
"""Of temporary tensors for each logit that is sampled from at the same time."""
GRAPHS_ROOM = 256 << 20
"""For the results of all graphs, and the drivers' part of each."""


def largest_step(
    model: StepModel, caches: tuple[LayerCache, ...], state: SlotState, max_num_tokens: int, max_batch_size: int
) -> Callable[[], None]:
    """A step of `max_num_tokens` prompt tokens and the logits of `max_batch_size` rows.

    The block tables of `state` must still be empty: all tokens read and write scratch block 0, the only one needed.
    """
    return _step(model, caches, state, _rows(max_num_tokens, state.max_seq_len), max_batch_size)


def largest_decode_step(
    model: StepModel, caches: tuple[LayerCache, ...], state: SlotState, max_batch_size: int
) -> Callable[[], None]:
    """A step of one token of each of `max_batch_size` rows; as `largest_step`."""
    rows = [Row(slot=0, start=0, num_tokens=1, sample=False)] * max_batch_size
    return _step(model, caches, state, rows, max_batch_size)


def sampling_bytes(num_logits: int) -> int:
    """Most memory that the sampler takes for so many logits, which lie in 16 bits and in float32 then."""
    return 6 * num_logits + SAMPLING_BYTES * min(num_logits, MAX_ELEMENTS)


def _step(
    model: StepModel, caches: tuple[LayerCache, ...], state: SlotState, rows: list[Row], num_logits: int
) -> Callable[[], None]:
    def run() -> None:
        inputs = inputs_of_rows(rows, state)
        hidden = model(ForwardBatch(inputs.input_ids, inputs.positions, inputs.attention, caches))
        logits = model.compute_logits(hidden[torch.zeros(num_logits, dtype=torch.int64, device=state.device)])
        logits.max(dim=-1)

    return run


@torch.inference_mode()
def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Most memory that `step` has at a time, above what is taken now. Its kernels should have run before.

    It is what torch asks the device for, gaps between tensors of different sizes included: a graph's memory has the
    same ones (1.1 GB where tensors are 0.56 GB, for a mixture's logits of 1,024 rows).
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - allocated
    from_device = torch.cuda.max_memory_reserved(device) - reserved
    torch.cuda.empty_cache()
    return max(peak, from_device)


def _rows(num_tokens: int, max_seq_len: int) -> list[Row]:
    """As many rows of the longest length as the tokens fill."""
    lens = [max_seq_len] * (num_tokens // max_seq_len)
    rest = num_tokens % max_seq_len
    return [Row(slot=0, start=0, num_tokens=length, sample=False) for length in [*lens, *([rest] if rest else [])]]
