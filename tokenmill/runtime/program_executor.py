"""`ProgramExecutor`: what runs a program's steps for a runner or a session; `TorchExecutor` does it by torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from tokenmill.attention.base import AttentionMetadata, LayerCache
from tokenmill.engine.plan import Interruption
from tokenmill.layers.forward_batch import ForwardBatch
from tokenmill.ops.kv_cache import copy_blocks
from tokenmill.runtime.step_arrays import NO_TOKEN, Integers, StepArrays
from tokenmill.runtime.torch_program import TorchProgram

Values: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]
"""Rows of floats on the host."""


ProgressCallback: TypeAlias = Callable[[str, int, int], None]
"""Called with what is done, how much of it, and how much there is."""


class ProgramExecutor(Protocol):
    """Runs the step that `arrays` describes. One thread uses it."""

    arrays: StepArrays

    def run(self) -> Values:
        """Compute the step, write its keys and values to the cache; logits [R, V], good until the next call."""
        ...

    def run_steps(self, max_steps: int, seconds: float, interruption: Interruption) -> Integers:
        """Compute the step, and those that follow when the most likely tokens are the input, one position further on.

        Logits are not told. A token is the first of equal ones, -1 in rows whose largest logit is not a finite number;
        a further step with such a row is left out, as if it had not been done. `arrays` are those of some step then.

        Args:
            max_steps: up to `MAX_STEPS`; more than 1 only where the step has one token of each sequence, and all their
                logits are wanted.
            seconds: no step begins that is likely to end later.
            interruption: no further step begins while it is set; neither after one of a sequence's `end_ids`.

        Returns:
            The tokens [R, steps], good until the next call.
        """
        ...

    def logits_at(self, row_index: Sequence[int]) -> Values:
        """Logits [n, V] of other tokens of the step that ran last, by index; good until the next call."""
        ...

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """Copy cache blocks in all layers; no block is both a source and a destination."""
        ...

    def kept(self) -> Mapping[str, Values]:
        """Values of the buffers that are kept after a step, of the step that ran last: [T or R, columns], copies."""
        ...

    def run_timed(self, *, with_logits: bool = True) -> Mapping[str, float]:
        """As `run`, or one of `run_steps`; the seconds that each operation took, by its name."""
        ...


class TorchExecutor:
    """A `TorchProgram` behind the protocol.

    Args:
        program: what to run.
        caches: keys and values of each layer.
        arrays: where the steps are written.
        device: of program and caches.
    """

    def __init__(
        self, program: TorchProgram, caches: tuple[LayerCache, ...], arrays: StepArrays, device: torch.device
    ) -> None:
        self.arrays = arrays
        self._program = program
        self._caches = caches
        self._device = device
        self._hidden: torch.Tensor | None = None

    def run(self) -> Values:
        """See `ProgramExecutor.run`."""
        self._hidden = self._program(self._batch())
        return self.logits_at(self.arrays.row_index[: self.arrays.num_rows].tolist())

    def run_steps(self, max_steps: int, seconds: float, interruption: Interruption) -> Integers:
        """See `ProgramExecutor.run_steps`."""
        begin, found = time.perf_counter(), [self._next_tokens()]
        while len(found) < max_steps and found[-1].min() >= 0 and not interruption.is_set:
            spent = time.perf_counter() - begin
            if spent + spent / len(found) > seconds or self._has_ended(found[-1]):
                break
            self.arrays.advance(found[-1])
            tokens = self._next_tokens()
            if tokens.min() < 0:
                break
            found.append(tokens)
        return np.stack(found, axis=1)

    def _next_tokens(self) -> Integers:
        logits = self.run()
        tokens = logits.argmax(1)  # of the first NaN, if there is one
        largest = np.take_along_axis(logits, tokens[:, None], 1)[:, 0]
        return np.where(np.isfinite(largest), tokens, NO_TOKEN).astype(np.int32)

    def _has_ended(self, tokens: Integers) -> bool:
        return bool((self.arrays.end_ids[: len(tokens)] == tokens[:, None]).any())

    def logits_at(self, row_index: Sequence[int]) -> Values:
        """See `ProgramExecutor.logits_at`."""
        assert self._hidden is not None, "no step has run"
        index = torch.tensor(row_index, dtype=torch.int64, device=self._device)
        return _to_host(self._program.compute_logits(self._hidden[index]))

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """See `ProgramExecutor.copy_blocks`."""
        with torch.inference_mode():
            pairs = torch.tensor([sources, destinations], dtype=torch.int64, device=self._device)
            copy_blocks(self._caches, pairs[0], pairs[1])

    def kept(self) -> Mapping[str, Values]:
        """See `ProgramExecutor.kept`; runs the step again."""
        values = self._program.run(self._batch(), self._row_index())
        return {name: _to_host(values[name].float()) for name in self._program.keep}

    def run_timed(self, *, with_logits: bool = True) -> Mapping[str, float]:
        """See `ProgramExecutor.run_timed`."""
        times: dict[str, float] = {}
        self._program.run(self._batch(), self._row_index(), times)
        return times

    def _batch(self) -> ForwardBatch:
        return forward_batch(self.arrays, self._caches, self._device)

    def _row_index(self) -> torch.Tensor:
        return torch.tensor(self.arrays.row_index[: self.arrays.num_rows], dtype=torch.int64, device=self._device)


def _to_host(tensor: torch.Tensor) -> Values:
    values: Values = tensor.cpu().numpy()
    return values


def forward_batch(arrays: StepArrays, caches: tuple[LayerCache, ...], device: torch.device) -> ForwardBatch:
    """The step as torch code takes it: copies on `device`."""

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
        slot_mapping=tensor(arrays.slot_mapping()),
        num_decode_rows=arrays.num_decode,
        query_lens=tuple(np.diff(query_start).tolist()),
        kv_lens_host=tuple(kv_lens.tolist()),
    )
    token_ids, positions = tensor(arrays.token_ids[:num_tokens]), tensor(arrays.positions[:num_tokens])
    return ForwardBatch(token_ids, positions, attention, caches)
