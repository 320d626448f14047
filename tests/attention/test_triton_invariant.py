"""Attention that gives a token the same bits in any company, in the interpreter and on a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from tests.support.paged_cache import PagedSequences
from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.attention.reference import ReferenceAttention

pytest.importorskip("triton")
from tokenmill.attention.triton_common import Result
from tokenmill.attention.triton_invariant import InvariantTiles, invariant_attention

pytestmark = pytest.mark.spec("H3")

SMALL = InvariantTiles(16, 16, 32, 4, 2)
"""Several tiles and splits in short contexts, for the interpreter."""
NAMES = ("one", "two", "three")

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window, soft cap, scales": {"sliding_window": 21, "soft_cap": 5.0, "key_scale": 0.5, "value_scale": 2.0},
}
"""The window begins within a split, and moves on to the next one."""


@pytest.fixture(autouse=True)
def _products_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's products are a library's, which sums rows at the edge of its tiles in another order."""

    def matmul(a: npt.NDArray[Any], b: npt.NDArray[Any], dtype: Any = None) -> npt.NDArray[Any]:
        return np.add.reduce(a[:, :, None] * b[None, :, :], axis=1, dtype=dtype)

    monkeypatch.setattr(np, "matmul", matmul)


class Run:
    """Sequences of random queries, keys and values, attended to in steps of any shape."""

    def __init__(self, device: str, dtype: torch.dtype, lens: Sequence[int], **spec: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        size = self.size = 128 if device == "cuda" else 16
        self.spec = AttentionSpec(4, 2, size, 1 / math.sqrt(size), **spec)
        self.lens = dict(zip(NAMES, lens, strict=True))
        # Few bits: the interpreter rounds ties its own way, and the cache shall have nothing to round.
        self.heads = {
            name: torch.randint(-16, 17, (length, 8, size), generator=generator).div(8).to(device, dtype)
            for name, length in self.lens.items()
        }
        self.device, self.dtype = device, dtype

    def outputs(
        self,
        steps: Sequence[Sequence[tuple[str, int]]],
        *,
        splits_programs: bool | None = None,
        reference: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Each sequence's outputs [length, H, D], its tokens computed in the steps given."""
        paged = PagedSequences(num_layers=1, num_kv_heads=2, head_dim=self.size, dtype=self.dtype, num_blocks=1024)
        cache: LayerCache = tuple(part.to(self.device) for part in paged.caches[0])  # type: ignore[assignment]
        done = dict.fromkeys(self.lens, 0)
        found: dict[str, list[torch.Tensor]] = {name: [] for name in self.lens}
        for rows in steps:
            metadata = paged.step(rows)
            fused = torch.cat([self.heads[name][done[name] : done[name] + count] for name, count in rows])
            output = self._attend(fused, cache, _on(metadata, self.device), splits_programs, reference)
            for (name, count), part in zip(rows, output.split([count for _, count in rows]), strict=True):
                found[name].append(part)
                done[name] += count
        return {name: torch.cat(parts) for name, parts in found.items() if parts}

    def _attend(
        self,
        fused: torch.Tensor,
        cache: LayerCache,
        metadata: AttentionMetadata,
        splits_programs: bool | None,
        reference: bool,
    ) -> torch.Tensor:
        query, key, value = fused.split([4, 2, 2], dim=1)
        if reference:
            return ReferenceAttention().forward(self.spec, query, key, value, cache, metadata)
        output = torch.full_like(query, torch.nan).contiguous()
        tiles = SMALL if self.device == "cpu" else None
        invariant_attention(
            self.spec, query, key, value, cache, metadata, Result(output), tiles=tiles, splits_programs=splits_programs
        )
        return output


def _on(metadata: AttentionMetadata, device: str) -> AttentionMetadata:
    tensors = ("query_start", "kv_lens", "block_tables", "slot_mapping")
    return replace(metadata, **{name: getattr(metadata, name).to(device) for name in tensors})


def _sizes(device: str) -> tuple[tuple[int, int, int], int]:
    """Lengths of the sequences, and tokens of a chunk that ends nowhere special."""
    return ((1300, 700, 33), 171) if device == "cuda" else ((41, 35, 3), 17)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_has_the_same_bits_however_it_is_computed(device: str, variant: str) -> None:
    lens, chunk = _sizes(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    run = Run(device, dtype, lens, **VARIANTS[variant])
    together = [[(name, length) for name, length in run.lens.items()]]
    expected = run.outputs(together)
    ways: dict[str, list[list[tuple[str, int]]]] = {
        "alone": [[(name, length)] for name, length in run.lens.items()],
        "chunked": [[(name, min(chunk, lens[0] - start))] for name in NAMES[:1] for start in range(0, lens[0], chunk)],
        "decoded": [[("two", lens[1] - 4)], *([("two", 1)] for _ in range(4))],
        "decoded in company": [
            [("one", lens[0] - 5), ("two", lens[1] - 3)],
            [("one", 1), ("two", 1), ("three", 1)],
            [("one", 1), ("two", 1), ("three", 2)],
            [("two", 1), ("one", 3)],
        ],
    }
    for way in ways if device == "cuda" else ("chunked", "decoded in company"):
        for splits_programs in (False, True) if device == "cuda" or way == "chunked" else (True,):
            for name, output in run.outputs(ways[way], splits_programs=splits_programs).items():
                assert torch.equal(output, expected[name][: len(output)]), (way, splits_programs, name)
    for name, output in run.outputs(together, reference=True).items():
        error = (expected[name].float() - output.float()).norm() / output.float().norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 2e-6)


def test_rows_that_pad_a_batch_are_harmless(device: str) -> None:
    run = Run(device, torch.float32, (20, 5, 3))
    paged = PagedSequences(num_layers=1, num_kv_heads=2, head_dim=run.size)
    cache: LayerCache = tuple(part.to(device) for part in paged.caches[0])  # type: ignore[assignment]
    metadata = _on(paged.step([("three", 3)]), device)
    fused = torch.cat([run.heads["three"], run.heads["three"][:2]])
    query, key, value = fused.split([4, 2, 2], dim=1)
    padded = replace(
        metadata,
        query_start=torch.tensor([0, 3, 4, 5], dtype=torch.int32, device=device),
        kv_lens=torch.tensor([3, 0, 0], dtype=torch.int32, device=device),
        block_tables=torch.nn.functional.pad(metadata.block_tables, (0, 0, 0, 2)),
        slot_mapping=torch.cat([metadata.slot_mapping, metadata.slot_mapping.new_zeros(2)]),
        query_lens=(3, 1, 1),
        kv_lens_host=(),
        max_kv_len=64,
    )
    expected = run.outputs([[("three", 3)]])["three"]
    for splits_programs in (False, True):
        output = torch.full_like(query, torch.nan).contiguous()
        invariant_attention(
            run.spec, query, key, value, cache, padded, Result(output), tiles=SMALL, splits_programs=splits_programs
        )
        assert output.isfinite().all()
        torch.testing.assert_close(output[:3], expected, rtol=1e-5, atol=1e-6)
