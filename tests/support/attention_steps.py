"""Steps for tests of attention backends: random inputs and caches for any mix of rows, and how results are compared."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from tests.support.paged_cache import attention_metadata
from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.engine.plan import Row
from tokenmill.runtime.slot_state import SlotState
from tokenmill.runtime.step_graphs import host_rows
from tokenmill.runtime.step_sizes import StepSize

FP8 = torch.float8_e4m3fn
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative, of the whole output


@dataclass(frozen=True)
class Case:
    """One step: rows of (tokens of this step, tokens before), rows of one token first."""

    rows: Sequence[tuple[int, int]]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    tokens_per_block: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    window: int | None = None
    soft_cap: float | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0

    def __str__(self) -> str:
        default = Case(())
        names = [field.name for field in fields(self) if field.name != "rows"]
        changed = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) != getattr(default, name)]
        return ",".join([f"{len(self.rows)}rows", *changed]).replace("torch.", "")

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=1 / math.sqrt(self.head_dim),
            sliding_window=self.window,
            soft_cap=self.soft_cap,
            key_scale=self.key_scale,
            value_scale=self.value_scale,
        )


@dataclass(frozen=True)
class Step:
    """What a backend gets. Cache entries that no row owns are NaN."""

    spec: AttentionSpec
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cache: LayerCache
    metadata: AttentionMetadata

    def cloned_cache(self) -> LayerCache:
        keys, values = self.cache
        return keys.clone(), values.clone()


def to_device(metadata: AttentionMetadata, device: str) -> AttentionMetadata:
    return replace(
        metadata,
        query_start=metadata.query_start.to(device),
        kv_lens=metadata.kv_lens.to(device),
        block_tables=metadata.block_tables.to(device),
        slot_mapping=metadata.slot_mapping.to(device),
    )


def make_step(case: Case, device: str, seed: int = 0) -> Step:
    """Random inputs, q, k and v as views into one fused tensor; blocks in random order."""
    generator = torch.Generator().manual_seed(seed)
    lens = [tokens + before for tokens, before in case.rows]
    num_blocks = [-(-length // case.tokens_per_block) for length in lens]
    blocks = list(range(1, 1 + sum(num_blocks)))
    random.Random(seed).shuffle(blocks)
    tables = [[blocks.pop() for _ in range(count)] for count in num_blocks]
    metadata = attention_metadata([tokens for tokens, _ in case.rows], lens, tables, case.tokens_per_block)
    shape = (1 + sum(num_blocks), case.tokens_per_block, case.num_kv_heads, case.head_dim)
    cache_dtype = case.cache_dtype or case.dtype
    cache = (torch.full(shape, torch.nan).to(cache_dtype), torch.full(shape, torch.nan).to(cache_dtype))
    for table, (_, before) in zip(tables, case.rows, strict=True):
        for position in range(before):
            for part in cache:
                random_heads = torch.randn(shape[2:], generator=generator).to(cache_dtype)
                part[table[position // case.tokens_per_block], position % case.tokens_per_block] = random_heads
    num_tokens = sum(tokens for tokens, _ in case.rows)
    fused = torch.randn(num_tokens, case.num_heads + 2 * case.num_kv_heads, case.head_dim, generator=generator)
    if device == "cpu":  # the interpreter rounds ties its own way: leave it nothing to round
        fused = fused.to(cache_dtype).float()
    query, key, value = fused.to(device, case.dtype).split([case.num_heads, case.num_kv_heads, case.num_kv_heads], 1)
    assert num_tokens < 2 or not key.is_contiguous()
    return Step(case.spec, query, key, value, (cache[0].to(device), cache[1].to(device)), to_device(metadata, device))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Relative error of the whole and of the worst token; NaN never passes."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    difference = (actual.float() - expected.float()).flatten(1)
    assert difference.norm() <= tolerance * expected.float().norm()
    assert (difference.norm(dim=1) <= 3 * tolerance * expected.float().flatten(1).norm(dim=1)).all()


def assert_same_cache(actual: LayerCache, expected: LayerCache) -> None:
    """Bit for bit, NaN where nothing was written."""
    for part, expected_part in zip(actual, expected, strict=True):
        torch.testing.assert_close(part.float(), expected_part.float(), rtol=0.0, atol=0.0, equal_nan=True)


def device_rows(case: Case, step: Step, num_more: int) -> tuple[torch.Tensor, int, SlotState]:
    """The rows of a step as a graph gets them, with as many more that pad it, its padded tokens, and their slots."""
    device, num_rows = step.query.device, len(case.rows)
    state = SlotState(num_rows, 512, case.tokens_per_block, device)
    tables = step.metadata.block_tables
    state.block_tables[:num_rows, : tables.shape[1]] = tables
    rows = [Row(slot, before, tokens, True) for slot, (tokens, before) in enumerate(case.rows)]
    num_tokens = step.query.shape[0] + 5
    size = StepSize(num_rows + num_more, num_tokens, 512, greedy=True, num_prompts=4)
    return torch.from_numpy(host_rows(rows, size, state.scratch_slot)).to(device), num_tokens, state


MIXED = ((1, 0), (1, 15), (1, 37), (1, 16), (2, 0), (19, 0), (7, 21), (33, 5))

REAL_ROWS = ((1, 8191), (1, 0), (1, 1023), (1, 1100), (1, 63), (700, 0), (513, 3000), (2, 4000), (17, 31), (300, 1))

REAL = Case(REAL_ROWS, num_heads=32, num_kv_heads=8, head_dim=128, tokens_per_block=32, dtype=torch.bfloat16)
