"""Token embedding and the head that turns hidden states into logits, both split by vocabulary over the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from torch.nn import functional

from tokenmill.layers.context import LayerContext
from tokenmill.layers.weights import Shard, WeightTarget, join_name
from tokenmill.ops.soft_cap import soft_cap
from tokenmill.parallel.group import ParallelGroup
from tokenmill.quantization.base import ConvertsWhileLoading, LinearMethod
from tokenmill.quantization.unquantized import UnquantizedLinear


def _rank_rows(vocab_size: int, group: ParallelGroup) -> tuple[int, int, int]:
    """(rows of every rank, this rank's first token, its number of real tokens); the last rank's tail is padding."""
    num_rows = -(-vocab_size // group.size)
    first = min(group.rank * num_rows, vocab_size)
    return num_rows, first, min(num_rows, vocab_size - first)


class VocabParallelEmbedding(nn.Module):
    """Rows of the embedding matrix by token id; each rank holds an equal range of the vocabulary."""

    def __init__(self, vocab_size: int, hidden_size: int, context: LayerContext) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.group = context.group
        num_rows, self.first_token, self.num_tokens = _rank_rows(vocab_size, context.group)
        weight = torch.empty(num_rows, hidden_size, dtype=context.dtype, device=context.device)
        weight[self.num_tokens :].zero_()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[T] int64 token ids to [T, hidden_size]."""
        if self.group.size == 1:
            return functional.embedding(input_ids, self.weight)
        local_ids = input_ids - self.first_token
        elsewhere = (local_ids < 0) | (local_ids >= self.num_tokens)
        rows = functional.embedding(local_ids.masked_fill(elsewhere, 0), self.weight)
        return self.group.all_reduce(rows.masked_fill(elsewhere[:, None], 0.0))

    def named_weight_targets(self, prefix: str) -> Iterator[tuple[str, WeightTarget]]:
        """The whole matrix, of which this rank takes its rows."""
        shard = Shard(0, self.first_token, self.vocab_size) if self.group.size > 1 else None
        yield join_name(prefix, "weight"), WeightTarget(self.weight.data[: self.num_tokens], shard)


class LMHead(nn.Module):
    """Logits over the vocabulary.

    Args:
        vocab_size, hidden_size: of the model.
        tied_to: the embedding whose matrix is the head's too; None: the head has its own.
        soft_cap: logits become `soft_cap * tanh(logits / soft_cap)`; None: unchanged.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        tied_to: VocabParallelEmbedding | None,
        context: LayerContext,
        soft_cap: float | None = None,
    ) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.group = context.group
        self.soft_cap = soft_cap
        num_rows, self.first_token, self.num_tokens = _rank_rows(vocab_size, context.group)
        self.method: LinearMethod
        self._is_tied = tied_to is not None
        if tied_to is not None:
            shared = UnquantizedLinear(batch_invariant=context.batch_invariant)
            shared.share_weight(tied_to.weight)
            self.method = shared
        else:
            self.method = context.linear_method(context.prefix)
            self.method.create_weights(self, hidden_size, num_rows, context.dtype, context.device)
            for parameter in self.parameters():
                parameter.data[self.num_tokens :].zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden_size] to [n, vocab_size], of the input's type; float32 with a soft cap."""
        logits = self.group.all_gather(self.method.apply(hidden, None))[:, : self.vocab_size]
        if self.soft_cap is not None:
            logits = soft_cap(logits.float(), self.soft_cap)
        return logits

    def finalize_weights(self) -> None:
        """Let the method prepare the filled weight."""
        self.method.process_after_loading(self)

    def named_weight_targets(self, prefix: str) -> Iterator[tuple[str, WeightTarget]]:
        """The head's own matrix; nothing if it is the embedding's."""
        if self._is_tied:
            return
        shard = Shard(0, self.first_token, self.vocab_size) if self.group.size > 1 else None
        for name, parameter in self.named_parameters():
            store = None
            if isinstance(self.method, ConvertsWhileLoading):
                store = partial(self.method.store, self, name, 0)
            yield join_name(prefix, name), WeightTarget(parameter.data[: self.num_tokens], shard, store)
