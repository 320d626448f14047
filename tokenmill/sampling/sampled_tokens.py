"""What the sampler gives: `SampledTokens` on the device, and `TokenReadback`, which brings them to the host.

A step's tokens stay on the device for the next step; the runner starts a `TokenReadback` when it launches the step and
waits for it when the step is collected. Everything travels in one copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from tokenmill.outputs import TokenLogprobs
from tokenmill.sampling.logprobs import LogprobTensors, pack, to_token_logprobs, unpack


@dataclass(frozen=True, slots=True)
class SampledTokens:
    """One step's tokens, on the device.

    Args:
        token_ids: [R] int64; 0 where `invalid`.
        invalid: [R] bool, rows without an answer: logits with NaN or +inf, or nothing but -inf, or `banned`.
        banned: [R] bool, rows of sound logits whose bans leave no token; None if no row has any.
        logprobs: of the rows in `logprob_rows`; None if no row wants any.
        logprob_rows: rows that want log-probabilities, on the host.
        num_logprobs: how many most likely tokens each of them wants, on the host.
    """

    token_ids: torch.Tensor
    invalid: torch.Tensor
    banned: torch.Tensor | None = None
    logprobs: LogprobTensors | None = None
    logprob_rows: tuple[int, ...] = ()
    num_logprobs: tuple[int, ...] = ()

    def first(self, count: int) -> SampledTokens:
        """The first rows alone: a padded batch without its padding. Not for rows with log-probabilities."""
        assert self.logprobs is None, "rows with log-probabilities are not padded"
        return SampledTokens(self.token_ids[:count], self.invalid[:count])


class SampledRow(NamedTuple):
    """One row's answer on the host: the token (None if the row was invalid), its log-probabilities if wanted, and
    whether there is no token because all are banned."""

    token_id: int | None
    logprobs: TokenLogprobs | None
    is_banned: bool = False


class TokenReadback:
    """The copy of one step's tokens to the host, started when this is made."""

    def __init__(self, sampled: SampledTokens) -> None:
        self._sampled = sampled
        self._ready: torch.cuda.Event | None = None
        self._host = packed = _pack(sampled)
        if packed.is_cuda:
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._ready = torch.cuda.current_stream(packed.device).record_event()

    def wait(self) -> list[SampledRow]:
        """Wait for the copy; the rows in the order of the batch."""
        if self._ready is not None:
            self._ready.synchronize()
        sampled, num_rows = self._sampled, self._sampled.token_ids.shape[0]
        token_ids, invalid = self._host[: 2 * num_rows].view(2, num_rows).tolist()
        logprobs: dict[int, TokenLogprobs] = {}
        if sampled.logprobs is not None:
            num_top = sampled.logprobs.top_token_ids.shape[1]
            tensors = unpack(self._host[2 * num_rows :].view(len(sampled.logprob_rows), 3 + 2 * num_top), num_top)
            entries = to_token_logprobs(tensors, sampled.num_logprobs)
            logprobs = dict(zip(sampled.logprob_rows, entries, strict=True))
        return [
            SampledRow(None, None, bad > 1) if bad else SampledRow(token_id, logprobs.get(row))
            for row, (token_id, bad) in enumerate(zip(token_ids, invalid, strict=True))
        ]


def collect(sampled: SampledTokens) -> list[SampledRow]:
    """Bring the tokens to the host now, waiting for the device."""
    return TokenReadback(sampled).wait()


def _pack(sampled: SampledTokens) -> torch.Tensor:
    """[2R + T(3 + 2N)] int64: tokens, 1 for invalid rows and 2 for banned ones, packed log-probabilities."""
    invalid = sampled.invalid.to(torch.int64)
    parts = [sampled.token_ids, invalid if sampled.banned is None else invalid + sampled.banned]
    if sampled.logprobs is not None:
        parts.append(pack(sampled.logprobs).flatten())
    return torch.cat(parts)
