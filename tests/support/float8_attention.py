"""Attention of prompts with queries, keys, values and probabilities in float8, in torch: what GPU kernels round, alone.

Everything else is float32. Probabilities are rounded where they are 2**8 at most, relative to the largest score of
the tiles of keys so far, so the result depends on the tiles and their order.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from tests.support.attention_steps import FP8, Step
from tokenmill.attention.base import LayerCache
from tokenmill.attention.triton import first_row_without_history, multiplies_float8
from tokenmill.attention.triton_common import Result
from tokenmill.attention.triton_prefill_float8 import ALIGNMENT, BLOCK_M, BLOCK_N, LIFT


def rounded_queries(query: torch.Tensor) -> torch.Tensor:
    """[T, H, D] as they are multiplied: the largest number of each head becomes 448. float32."""
    scales = query.float().abs().amax(-1, keepdim=True) / 448
    scales = torch.where(scales > 0, scales, 1.0)
    return (query.float() / scales).to(FP8).float() * scales


def attend_in_float8(step: Step, query: torch.Tensor) -> torch.Tensor:
    """[P, H, D] float32, of the prompts' tokens of a step whose keys and values are in its cache already.

    Args:
        step: what else a backend gets; no window, no soft cap.
        query: [T, H, D], turned.
    """
    outputs, first = [], step.metadata.num_decode_rows
    for row in range(first, len(step.metadata.query_lens)):
        query_len = step.metadata.query_lens[row]
        outputs.append(_attend_row(step, row, rounded_queries(query[first : first + query_len]), first))
        first += query_len
    return torch.cat(outputs)


def _attend_row(step: Step, row: int, query: torch.Tensor, first_token: int) -> torch.Tensor:
    """[Q, H, D] of one row. Without history by the online softmax, with probabilities rounded as a GPU does it."""
    spec, query_len, kv_len = step.spec, step.metadata.query_lens[row], step.metadata.kv_lens_host[row]
    blocks, group = step.metadata.block_tables[row].long(), spec.num_heads // spec.num_kv_heads
    key, value = (part[blocks].flatten(0, 1)[:kv_len].float().repeat_interleave(group, 1) for part in step.cache)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (spec.scale * spec.key_scale * math.log2(math.e))
    keys, queries = torch.arange(kv_len, device=key.device), torch.arange(kv_len - query_len, kv_len, device=key.device)
    scores = scores.masked_fill(keys > queries[:, None], -torch.inf)
    if row < first_row_without_history(step.metadata) or not key.is_cuda:
        return torch.einsum("hqk,khd->qhd", scores.mul(math.log(2)).softmax(-1), value) * spec.value_scale
    alignment = max(ALIGNMENT, BLOCK_M // group)
    tile_of_key = (first_token % alignment + keys) // BLOCK_N
    maximum = torch.full_like(scores[..., 0], -torch.inf)
    total, values = torch.zeros_like(maximum), torch.zeros_like(query.transpose(0, 1))
    for number in range(int(tile_of_key.max()) + 1):  # each query begins with its own tile and ends with the first
        tile = scores.masked_fill(tile_of_key != (tile_of_key - number)[:, None], -torch.inf)
        new_maximum = torch.maximum(maximum, tile.amax(-1))
        weights, decay = torch.exp2(tile - new_maximum[..., None]) * 2**LIFT, torch.exp2(maximum - new_maximum)
        total = total * decay + weights.sum(-1)
        values = values * decay[..., None] + torch.einsum("hqk,khd->hqd", weights.to(FP8).float(), value)
        maximum = new_maximum
    return (values / total[..., None] * spec.value_scale).transpose(0, 1)


def in_float8(step: Step, query: torch.Tensor, cache: LayerCache, expected: torch.Tensor) -> torch.Tensor:
    """What a Triton backend is expected to give: `expected`, but for prompts that it attends to in float8.

    Args:
        step: of the backend.
        query: [T, H, D], turned.
        cache: as the step leaves it.
        expected: [T, H, D] of exact products.
    """
    num_decode_rows = step.metadata.num_decode_rows
    has_prompts = len(step.metadata.query_lens) > num_decode_rows
    if not has_prompts or not multiplies_float8(step.spec, query, cache, Result(expected)):
        return expected
    prompts = attend_in_float8(replace(step, cache=cache), query)
    return torch.cat([expected[:num_decode_rows], prompts.to(expected.dtype)])
