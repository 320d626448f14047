"""Rotary embedding, head norms and cache writes against the reference ops."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tests.support.native_cache import NativeCache
from tests.support.native_ops import matrix, nans, run_equally, run_ops
from tests.support.paged_cache import PagedSequences
from tokenmill.attention.base import AttentionMetadata, LayerCache
from tokenmill.ops.cpu.rope import RopeOp, rope_write_cache, rotation, rotation_arguments
from tokenmill.ops.rms_norm import rms_norm_reference


def angles(positions: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[T, D]: cosines, then sines."""
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    turned = positions[:, None].double() * frequencies.double()
    return torch.cat([turned.cos(), turned.sin()], dim=1).float()


def turn(x: torch.Tensor, rotated: torch.Tensor) -> torch.Tensor:
    """x [T, heads, D]."""
    half = x.shape[-1] // 2
    low, high, cos, sin = x[..., :half], x[..., half:], rotated[:, None, :half], rotated[:, None, half:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_rotation(head_dim: int) -> None:
    positions = torch.tensor([0, 1, 7, 1000, 8191, 131071], dtype=torch.int32)
    frequencies = 500000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    exact = (positions[:, None].float() * frequencies).double()  # angles are float32, as the layers compute them

    def compute(num_threads: int) -> torch.Tensor:
        y = nans(len(positions), head_dim)
        arguments = rotation_arguments(
            positions=positions.data_ptr(),
            frequencies=frequencies.data_ptr(),
            output=matrix(y),
            head_dim=head_dim,
            factor=1.5,
        )
        run_ops([(rotation, arguments)], len(positions), num_threads)
        return y

    expected = 1.5 * torch.cat([exact.cos(), exact.sin()], dim=1)
    torch.testing.assert_close(run_equally(compute).double(), expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize(("heads", "head_dim"), [(9, 64), (2, 24), (3, 8)])
def test_rope_in_place(heads: int, head_dim: int) -> None:
    torch.manual_seed(0)
    x, rotated = torch.randn(5, heads * head_dim), angles(torch.tensor([3, 9, 0, 511, 2]), head_dim)
    expected = turn(x.view(5, heads, head_dim), rotated).flatten(1)

    def compute(num_threads: int) -> torch.Tensor:
        y = x.clone()
        op = RopeOp(head_dim=head_dim, num_heads=heads, query=matrix(y), output=matrix(y), rotation=matrix(rotated))
        run_ops([(rope_write_cache, op.arguments())], 5, num_threads)
        return y

    torch.testing.assert_close(run_equally(compute), expected, rtol=1e-6, atol=1e-6)


@dataclass(frozen=True)
class Step:
    """A step's query, key and value as columns of one buffer, and what must become of them."""

    metadata: AttentionMetadata
    old: LayerCache
    qkv: torch.Tensor
    rotated: torch.Tensor
    weights: torch.Tensor | None
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor

    def run(self, num_threads: int) -> torch.Tensor:
        """The turned query; checks the cache."""
        tokens, heads, head_dim = self.query.shape
        kv_heads = self.keys.shape[2]
        y = nans(tokens, heads * head_dim)
        cache = NativeCache(self.old, self.metadata)
        op = RopeOp(
            head_dim=head_dim,
            num_heads=heads,
            num_kv_heads=kv_heads,
            query=matrix(self.qkv),
            output=matrix(y),
            key=matrix(self.qkv, heads * head_dim),
            value=matrix(self.qkv, (heads + kv_heads) * head_dim),
            rotation=matrix(self.rotated),
            query_norm=0 if self.weights is None else self.weights[0].data_ptr(),
            key_norm=0 if self.weights is None else self.weights[1].data_ptr(),
            eps=1e-6,
            cache=cache.location,
        )
        run_ops([(rope_write_cache, op.arguments())], tokens, num_threads)
        keys, values = cache.unpacked()
        is_bfloat16 = keys.dtype == torch.bfloat16
        tolerance = 1e-2 if is_bfloat16 else 1e-6
        torch.testing.assert_close(keys, self.keys, rtol=tolerance, atol=tolerance, equal_nan=True)
        check_values(values, self.values, clears=is_bfloat16)
        return y


def make_step(sequences: PagedSequences, rows: list[tuple[str, int]], heads: int, weights: torch.Tensor | None) -> Step:
    """Grow the sequences with random queries, keys and values."""
    old = sequences.caches[0]
    kv_heads, head_dim = old[0].shape[2:]
    metadata = sequences.step(rows)
    tokens = sum(metadata.query_lens)
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim)
    lengths = zip(metadata.query_lens, metadata.kv_lens_host, strict=True)
    rotated = angles(torch.cat([torch.arange(kv - q, kv) for q, kv in lengths]), head_dim)
    parts = qkv.view(tokens, -1, head_dim)
    query, key, value = parts[:, :heads], parts[:, heads:-kv_heads], parts[:, -kv_heads:]
    if weights is not None:
        query = rms_norm_reference(query, weights[0], 1e-6)
        key = rms_norm_reference(key, weights[1], 1e-6)
    keys, values = (part.clone() for part in old)
    for part, new in ((keys, turn(key, rotated)), (values, value)):
        part.view(-1, kv_heads, head_dim)[metadata.slot_mapping] = new.to(part.dtype)
    return Step(metadata, old, qkv, rotated, weights, turn(query, rotated), keys, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "tokens_per_block", "norms"), [(64, 32, False), (24, 5, True), (16, 1, True)])
def test_rope_and_cache(dtype: torch.dtype, head_dim: int, tokens_per_block: int, norms: bool) -> None:
    """Over several steps, nothing but the step's own cells changes."""
    torch.manual_seed(0)
    sequences = PagedSequences(
        num_layers=1,
        num_kv_heads=2,
        head_dim=head_dim,
        tokens_per_block=tokens_per_block,
        num_blocks=80,
        dtype=dtype,
    )
    weights = torch.rand(2, head_dim) + 0.5 if norms else None
    for rows in ([("a", 7), ("b", 2)], [("a", 1), ("b", 1), ("c", 33)], [("c", 1), ("b", 4)]):
        step = make_step(sequences, rows, 4, weights)
        torch.testing.assert_close(run_equally(step.run), step.query.flatten(1), rtol=1e-6, atol=1e-6)
        for part, new in zip(sequences.caches[0], (step.keys, step.values), strict=True):
            part.copy_(new)


def check_values(values: torch.Tensor, expected: torch.Tensor, *, clears: bool) -> None:
    """Equal, but that unwritten partners of last tokens may be zero."""
    cleared = (values == 0) & expected.isnan()
    assert clears or not cleared.any()
    assert torch.equal(values.nan_to_num(7.0)[~cleared], expected.nan_to_num(7.0)[~cleared])


def test_write_cache_alone_and_padding_rows() -> None:
    """No query, no rotation; a row of no cached tokens writes nothing."""
    torch.manual_seed(0)
    sequences = PagedSequences(num_layers=1, num_kv_heads=3, head_dim=32, tokens_per_block=16, num_blocks=8)
    metadata = sequences.step([("a", 1), ("b", 1), ("c", 4)])
    metadata.kv_lens[1] = 0
    key, value = torch.randn(6, 96), torch.randn(6, 96)
    cache = NativeCache(sequences.caches[0], metadata)
    op = RopeOp(head_dim=32, num_kv_heads=3, key=matrix(key), value=matrix(value), cache=cache.location)
    run_ops([(rope_write_cache, op.arguments())], 6, 2)
    for part, new in zip(cache.unpacked(), (key, value), strict=True):
        written = part.view(-1, 96)[metadata.slot_mapping]
        assert torch.equal(written[[0, 2, 3, 4, 5]], new[[0, 2, 3, 4, 5]])
        assert part.isnan().sum() == part.numel() - 5 * 96
