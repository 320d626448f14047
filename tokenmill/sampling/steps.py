"""The steps from raw logits to a distribution. Each is a pure function: logits [R, V] float32 in, logits out.

`sampler` composes them in this order: penalties, logit bias, bad words, bans; temperature, top-k, top-p, min-p.
What is cut is set to -inf. Logits must be finite or -inf; a step makes no NaN and no +inf of them. Parameters have one
entry a row, with the value that switches the step off where a row does not want it. Nothing here waits for the device.
"""

from __future__ import annotations

import math

import torch

from tokenmill.sampling.exact import float_from_ordered_bits, integer_weights, largest_threshold, ordered_bits

_MAX_TOP_K = 256
"""Up to this k `torch.topk` is faster than the radix selection (CPU, 49152 tokens: 2 ms against 5 ms for 16 rows)."""


def count_tokens(
    tokens: torch.Tensor,  # [R, L] int
    first: torch.Tensor | int,  # [R] int, or the same for all
    end: torch.Tensor,  # [R] int
    vocab_size: int,
) -> torch.Tensor:  # [R, V] float32
    """How often each token occurs at positions `first` to `end - 1`. Ids outside the vocabulary are not counted."""
    position = torch.arange(tokens.shape[1], device=tokens.device)
    first = first.unsqueeze(1) if isinstance(first, torch.Tensor) else first
    counted = (position >= first) & (position < end.unsqueeze(1)) & (tokens >= 0) & (tokens < vocab_size)
    ids = tokens.to(torch.int64).where(counted, 0)
    counts = torch.zeros(tokens.shape[0], vocab_size, device=tokens.device)
    return counts.scatter_add_(1, ids, counted.to(torch.float32))


def repetition_penalty(
    logits: torch.Tensor,
    counts: torch.Tensor,  # [R, V], of prompt and answer
    penalty: torch.Tensor,  # [R] float32; 1: off
) -> torch.Tensor:
    """Divide positive logits of tokens seen by the penalty, multiply negative ones by it (Keskar et al. 2019, CTRL)."""
    factor = penalty.unsqueeze(1)
    penalized = logits.clamp(min=0.0) / factor + logits.clamp(max=0.0) * factor
    limit = torch.finfo(torch.float32).max  # a penalty below 1 must not lift a huge logit to +inf
    return torch.where(counts > 0, penalized.clamp_(max=limit), logits)


def count_penalties(
    logits: torch.Tensor,
    counts: torch.Tensor,  # [R, V], of the answer alone
    presence: torch.Tensor,  # [R] float32; 0: off
    frequency: torch.Tensor,  # [R] float32; 0: off
) -> torch.Tensor:
    """Subtract `presence` for tokens in the answer, and `frequency` once for each time (OpenAI's definition)."""
    return logits - (counts > 0) * presence.unsqueeze(1) - counts * frequency.unsqueeze(1)


def add_bias(
    logits: torch.Tensor,
    ids: torch.Tensor,  # [R, E] int64
    values: torch.Tensor,  # [R, E] float32
) -> torch.Tensor:
    """Add `values` to the logits at `ids`. Unused entries are any id with value 0."""
    return logits.scatter_add(1, ids, values)


def ban(
    logits: torch.Tensor,
    ids: torch.Tensor,  # [R, E] int64
    banned: torch.Tensor,  # [R, E] bool
) -> torch.Tensor:
    """Set the logits at `ids` to -inf where `banned`. Unused entries are any id with False."""
    # Adding 0 or -inf gives the same whatever the order, even where an id occurs twice; writing would not.
    return logits.scatter_add(1, ids, torch.zeros(ids.shape, device=ids.device).masked_fill_(banned, -math.inf))


def matching_words(
    tokens: torch.Tensor,  # [S, L] int
    slots: torch.Tensor,  # [R] int64, rows of `tokens`
    positions: torch.Tensor,  # [R] int64
    word: torch.Tensor,  # [R, E] int64, 0 <= word < num_words
    distance: torch.Tensor,  # [R, E] int64, 1 or more
    expected: torch.Tensor,  # [R, E] int64
    used: torch.Tensor,  # [R, E] bool
    num_words: int,
) -> torch.Tensor:  # [R, W] bool
    """Words whose tokens but the last are what stands right before `positions`, so that the last would complete them.

    The words' beginnings come as a flat list of E tokens: token `expected` must stand `distance` before the position.
    A word that has no entry, that is one of a single token, matches always.
    """
    index = positions.unsqueeze(1) - distance
    # Unused entries may point anywhere, so the index is kept inside the buffer.
    found = tokens[slots.unsqueeze(1), index.clamp(0, tokens.shape[1] - 1)].to(torch.int64)
    differs = ((index < 0) | (found != expected)) & used
    num_differing = torch.zeros(slots.shape[0], num_words, dtype=torch.int32, device=tokens.device)
    return num_differing.scatter_add_(1, word, differs.to(torch.int32)) == 0


def temperature(
    logits: torch.Tensor,
    value: torch.Tensor,  # [R] float32, above 0
) -> torch.Tensor:
    """Divide by the temperature, after moving each row's maximum to 0 so that no temperature can overflow."""
    row_max = logits.amax(dim=-1, keepdim=True)
    row_max = row_max.masked_fill(row_max.isneginf(), 0.0)
    return (logits - row_max).div_(value.unsqueeze(1))


def top_k(
    logits: torch.Tensor,
    k: torch.Tensor,  # [R] int64; 0: off
    max_k: int,
) -> torch.Tensor:
    """Keep the tokens whose logit is at least the k-th largest of the row; tokens that tie with it all stay.

    `max_k` is the largest k of any row, known on the host; a row with a k of V or more keeps everything.
    """
    vocab_size = logits.shape[1]
    off = (k <= 0) | (k >= vocab_size)
    if max_k <= _MAX_TOP_K:
        largest = torch.topk(logits, min(max_k, vocab_size), dim=-1).values
        threshold = largest.gather(1, k.clamp(1, largest.shape[1]).unsqueeze(1) - 1)
    else:
        ones = torch.ones(1, 1, dtype=torch.int64, device=logits.device).expand_as(logits)
        keys = largest_threshold(ordered_bits(logits), ones, k.clamp(1, vocab_size))
        threshold = float_from_ordered_bits(keys).unsqueeze(1)
    threshold = threshold.masked_fill(off.unsqueeze(1), -math.inf)
    return _cut(logits, logits < threshold)


def top_p(
    logits: torch.Tensor,
    p: torch.Tensor,  # [R] float64; 1: off
) -> torch.Tensor:
    """Keep the most likely tokens down to the first that makes their probabilities sum to p (Holtzman et al. 2020).

    The tokens kept are those with a probability of at least t, for the largest t whose tokens sum to p or more; tokens
    that tie with the last one all stay.
    """
    weights, integers = integer_weights(logits)
    target = (p * integers.sum(dim=-1)).ceil_().to(torch.int64).clamp_(min=1)
    bits = largest_threshold(weights.view(torch.int32), integers, target)  # weights are not negative
    threshold = bits.view(torch.float32).masked_fill(p >= 1.0, 0.0)
    return _cut(logits, weights < threshold.unsqueeze(1))


def min_p(
    logits: torch.Tensor,
    p: torch.Tensor,  # [R] float64; 0: off
) -> torch.Tensor:
    """Keep the tokens at least `p` times as likely as the most likely one (Nguyen et al. 2024)."""
    threshold = (logits.amax(dim=-1) + p.log()).to(torch.float32)
    return _cut(logits, logits < threshold.unsqueeze(1))


def _cut(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`masked_fill(mask, -inf)`, which on a CPU takes six times as long for the branch that it mispredicts."""
    return logits - mask.to(torch.float32).mul_(3e38).mul_(10.0)  # 0, or beyond float32's range: inf
