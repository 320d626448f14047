"""`ProgramExecutor`: what runs a program's steps for a runner or a session; `TorchExecutor` does it by torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from tokenmill.attention.base import AttentionMetadata, LayerCache
from tokenmill.layers.forward_batch import ForwardBatch
from tokenmill.ops.kv_cache import copy_blocks
from tokenmill.runtime.step_arrays import StepArrays
from tokenmill.runtime.torch_program import TorchProgram

Logits: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


class ProgramExecutor(Protocol):
    """Runs the step that `arrays` describes. One thread uses it."""

    arrays: StepArrays

    def run(self) -> Logits:
        """Compute the step, write its keys and values to the cache; logits [R, V], good until the next call."""
        ...

    def logits_at(self, row_index: Sequence[int]) -> Logits:
        """Logits [n, V] of other tokens of the step that ran last, by index; good until the next call."""
        ...

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copy cache blocks in all layers; no block is both a source and a destination."""
        ...


class TorchExecutor:
    """A `TorchProgram` on the CPU behind the protocol.

    Args:
        program: what to run.
        caches: keys and values of each layer.
        arrays: where the steps are written.
    """

    def __init__(self, program: TorchProgram, caches: tuple[LayerCache, ...], arrays: StepArrays) -> None:
        self.arrays = arrays
        self._program = program
        self._caches = caches
        self._hidden: torch.Tensor | None = None

    def run(self) -> Logits:
        """See `ProgramExecutor.run`."""
        self._hidden = self._program(forward_batch(self.arrays, self._caches))
        return self.logits_at(self.arrays.row_index[: self.arrays.num_rows].tolist())

    def logits_at(self, row_index: Sequence[int]) -> Logits:
        """See `ProgramExecutor.logits_at`."""
        assert self._hidden is not None, "no step has run"
        logits: Logits = self._program.compute_logits(self._hidden[list(row_index)]).numpy()
        return logits

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """See `ProgramExecutor.copy_blocks`."""
        with torch.inference_mode():
            copy_blocks(self._caches, torch.tensor(sources), torch.tensor(destinations))


def forward_batch(
    arrays: StepArrays, caches: tuple[LayerCache, ...], device: torch.device | None = None
) -> ForwardBatch:
    """The step as torch code takes it: copies on `device` (default: the CPU)."""

    def tensor(values: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    num_tokens, num_sequences = arrays.num_tokens, arrays.num_sequences
    query_start = arrays.query_start[: num_sequences + 1]
    kv_lens = arrays.kv_lens[:num_sequences]
    num_blocks = -(-int(kv_lens.max()) // arrays.tokens_per_block)
    attention = AttentionMetadata(
        query_start=tensor(query_start, torch.int32),
        kv_lens=tensor(kv_lens, torch.int32),
        block_tables=tensor(arrays.block_tables[:num_sequences, :num_blocks], torch.int32),
        slot_mapping=tensor(arrays.slot_mapping[:num_tokens]),
        num_decode_rows=arrays.num_decode,
        query_lens=tuple(np.diff(query_start).tolist()),
        kv_lens_host=tuple(kv_lens.tolist()),
    )
    token_ids, positions = tensor(arrays.token_ids[:num_tokens]), tensor(arrays.positions[:num_tokens])
    return ForwardBatch(token_ids, positions, attention, caches)
