from __future__ import annotations

import pytest
import torch

from tokenmill.ops.kv_cache import IMPLEMENTATIONS, copy_blocks, write_kv, write_kv_reference


def empty_caches(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values: 6 blocks of 4 tokens, 2 heads of 3."""
    return torch.zeros(6, 4, 2, 3, dtype=dtype), torch.zeros(6, 4, 2, 3, dtype=dtype)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_every_token_lands_in_its_slot(name: str, cache_dtype: torch.dtype) -> None:
    key_cache, value_cache = empty_caches(cache_dtype)
    merged = torch.randn(3, 5, 3)  # keys and values are slices of a wider tensor
    key, value = merged[:, 1:3], merged[:, 3:]
    slots = [5, 0, 23]
    IMPLEMENTATIONS[name](key, value, key_cache, value_cache, torch.tensor(slots))
    expected_keys, expected_values = empty_caches(cache_dtype)
    for token, slot in enumerate(slots):
        expected_keys[slot // 4, slot % 4] = key[token]
        expected_values[slot // 4, slot % 4] = value[token]
    assert torch.equal(key_cache, expected_keys)
    assert torch.equal(value_cache, expected_values)


def test_float8_caches_hold_their_largest_value_for_what_is_larger() -> None:
    """Whatever torch's own conversion does: in 2.11 it gives NaN."""
    key_cache, value_cache = empty_caches(torch.float8_e4m3fn)
    key = torch.tensor([[[1000.0, -465.0, 448.0], [-1e9, 0.0, -448.0]]])
    write_kv_reference(key, -key, key_cache, value_cache, torch.tensor([2]))
    expected = torch.tensor([[448.0, -448.0, 448.0], [-448.0, 0.0, -448.0]])
    assert torch.equal(key_cache[0, 2].float(), expected)
    assert torch.equal(value_cache[0, 2].float(), -expected)


def test_write_kv_overwrites() -> None:
    key_cache, value_cache = empty_caches()
    for factor in (1.0, 2.0):
        key = torch.full((1, 2, 3), factor)
        write_kv(key, -key, key_cache, value_cache, torch.tensor([7]))
    assert torch.equal(key_cache[1, 3], torch.full((2, 3), 2.0))
    assert torch.equal(value_cache[1, 3], torch.full((2, 3), -2.0))
    assert key_cache.count_nonzero() == 6


def test_copy_blocks_in_every_layer() -> None:
    caches = [(torch.randn(6, 4, 2, 3), torch.randn(6, 4, 2, 3)) for _ in range(2)]
    before = [(keys.clone(), values.clone()) for keys, values in caches]
    copy_blocks(caches, torch.tensor([5, 1]), torch.tensor([2, 3]))
    for (keys, values), (old_keys, old_values) in zip(caches, before, strict=True):
        for new, old in ((keys, old_keys), (values, old_values)):
            assert torch.equal(new, old[[0, 1, 5, 1, 4, 5]])


def test_copy_no_blocks() -> None:
    caches = [(torch.randn(2, 4, 2, 3), torch.randn(2, 4, 2, 3))]
    before = caches[0][0].clone()
    nothing = torch.empty(0, dtype=torch.int64)
    copy_blocks(caches, nothing, nothing)
    assert torch.equal(caches[0][0], before)
