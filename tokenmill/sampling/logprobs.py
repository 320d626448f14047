"""Log-probabilities of chosen and prompt tokens, from the model's raw logits, before any step of sampling.

The first half runs on the device and returns tensors; `to_token_logprobs` turns them into dicts on the host.
Called by `sampler` for generated tokens and by the runner for prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tokenmill.outputs import Logprob, TokenLogprobs
from tokenmill.sampling.exact import MAX_ELEMENTS, rows_per_slice


@dataclass(frozen=True, slots=True)
class LogprobTensors:
    """Log-probabilities of T tokens, each with its N most likely alternatives.

    Args:
        token_ids: [T] int64, the tokens asked about.
        logprobs: [T] float32, theirs.
        ranks: [T] int64, 1 + the number of more likely tokens.
        top_token_ids: [T, N] int64, the most likely tokens, the likeliest first.
        top_logprobs: [T, N] float32, theirs.
    """

    token_ids: torch.Tensor
    logprobs: torch.Tensor
    ranks: torch.Tensor
    top_token_ids: torch.Tensor
    top_logprobs: torch.Tensor

    def cpu(self) -> LogprobTensors:
        """The same in host memory, with one copy."""
        return unpack(pack(self).cpu(), self.top_token_ids.shape[1])


def token_logprobs(
    logits: torch.Tensor,  # [T, V] of any float type
    token_ids: torch.Tensor,  # [T] int64
    num_top: int,
) -> LogprobTensors:
    """Log-softmax of `logits` at `token_ids` and at the `num_top` (at most V) largest."""
    num_rows = rows_per_slice(logits)
    starts = range(0, max(1, logits.shape[0]), num_rows)
    slices = [
        _slice_logprobs(logits[start : start + num_rows], token_ids[start : start + num_rows], num_top)
        for start in starts
    ]
    return _concatenate(slices)


def prompt_logprobs(
    hidden_states: torch.Tensor,  # [T, H]
    compute_logits: Callable[[torch.Tensor], torch.Tensor],
    token_ids: torch.Tensor,  # [T] int64
    num_top: int,
    *,
    vocab_size: int,
) -> LogprobTensors:
    """`token_logprobs` for the positions of a prompt, a slice of rows at a time: [T, V] never exists as a whole.

    Args:
        hidden_states: the model's last hidden states at T positions.
        compute_logits: hidden states [t, H] to logits [t, V].
        token_ids: the token that follows each of these positions.
        num_top: most likely tokens to return for each.
        vocab_size: V.
    """
    num_rows = max(1, MAX_ELEMENTS // vocab_size)  # many: each slice reads the output layer's weights
    starts = range(0, max(1, token_ids.shape[0]), num_rows)
    slices = [
        token_logprobs(
            compute_logits(hidden_states[start : start + num_rows]), token_ids[start : start + num_rows], num_top
        )
        for start in starts
    ]
    return _concatenate(slices)


def _slice_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> LogprobTensors:
    logits = logits.float()
    row_max = logits.amax(dim=-1, keepdim=True)
    # Summed in float64: the result does not depend on the order of summation, hence not on the batch.
    log_sum = (logits - row_max).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64).log_() + row_max
    chosen = logits.gather(1, token_ids.unsqueeze(1))
    top_logits, top_ids = torch.topk(logits, min(num_top, logits.shape[1]), dim=-1)
    return LogprobTensors(
        token_ids=token_ids,
        logprobs=(chosen - log_sum).squeeze(1).to(torch.float32),
        ranks=(logits > chosen).sum(dim=-1) + 1,
        top_token_ids=top_ids,
        top_logprobs=(top_logits - log_sum).to(torch.float32),
    )


def _concatenate(slices: Sequence[LogprobTensors]) -> LogprobTensors:
    if len(slices) == 1:
        return slices[0]
    return LogprobTensors(
        token_ids=torch.cat([part.token_ids for part in slices]),
        logprobs=torch.cat([part.logprobs for part in slices]),
        ranks=torch.cat([part.ranks for part in slices]),
        top_token_ids=torch.cat([part.top_token_ids for part in slices]),
        top_logprobs=torch.cat([part.top_logprobs for part in slices]),
    )


def pack(tensors: LogprobTensors) -> torch.Tensor:
    """Everything in one [T, 3 + 2N] int64 tensor, for a single copy to the host; `unpack` is the inverse."""
    return torch.cat(
        [
            torch.stack([tensors.token_ids, tensors.ranks, tensors.logprobs.view(torch.int32)], dim=1),
            tensors.top_token_ids,
            tensors.top_logprobs.contiguous().view(torch.int32),
        ],
        dim=1,
    )


def unpack(packed: torch.Tensor, num_top: int) -> LogprobTensors:
    """Inverse of `pack` for N = `num_top`."""
    return LogprobTensors(
        token_ids=packed[:, 0],
        ranks=packed[:, 1],
        logprobs=packed[:, 2].to(torch.int32).view(torch.float32),
        top_token_ids=packed[:, 3 : 3 + num_top],
        top_logprobs=packed[:, 3 + num_top :].to(torch.int32).view(torch.float32),
    )


def to_token_logprobs(tensors: LogprobTensors, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """One dict for each token: itself first, then its `num_top[i]` most likely alternatives, the likeliest first.

    `tensors` must be in host memory. Tokens of equal probability have the same rank.
    """
    ids, logprobs, ranks = tensors.token_ids.tolist(), tensors.logprobs.tolist(), tensors.ranks.tolist()
    top_ids, top_logprobs = tensors.top_token_ids.tolist(), tensors.top_logprobs.tolist()
    found: list[TokenLogprobs] = []
    for index, count in enumerate(num_top):
        entry: TokenLogprobs = {ids[index]: Logprob(logprobs[index], ranks[index])}
        rank, previous = 0, None
        for place in range(min(count, len(top_ids[index]))):
            value = top_logprobs[index][place]
            if value != previous:
                rank, previous = place + 1, value
            entry.setdefault(top_ids[index][place], Logprob(value, rank))
        found.append(entry)
    return found
