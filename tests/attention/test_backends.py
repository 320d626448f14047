"""Every backend against attention over contiguous keys and values in float64, on the same random cache."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from tests.support.paged_cache import PagedSequences
from tokenmill.attention.base import AttentionSpec
from tokenmill.attention.cpu import QUERIES_PER_PIECE, SHORTEST_GROUP
from tokenmill.attention.select import BACKENDS, select_backend

CPU = torch.device("cpu")
HEAD_DIM = 8
# Triton's runs on a CPU in its interpreter, which is used where there is no GPU.
CPU_BACKENDS = ["cpu", "reference", *(["triton"] if not torch.cuda.is_available() else [])]


@dataclass
class History:
    """All keys and values that a sequence ever had, contiguous: [L, G, D] each."""

    keys: torch.Tensor
    values: torch.Tensor


def exact(spec: AttentionSpec, query: torch.Tensor, history: History) -> torch.Tensor:
    """One query head and position at a time, in float64: [Q, H, D]."""
    num_queries, num_keys = query.shape[0], history.keys.shape[0]
    result = torch.empty(query.shape, dtype=torch.float64)
    for index in range(num_queries):
        position = num_keys - num_queries + index
        first = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
        for head in range(spec.num_heads):
            group = head // (spec.num_heads // spec.num_kv_heads)
            keys = history.keys[first : position + 1, group].double()
            scores = (keys @ query[index, head].double()) * spec.scale
            if spec.soft_cap is not None:
                scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
            weights = torch.exp(scores - scores.max())
            result[index, head] = (weights / weights.sum()) @ history.values[first : position + 1, group].double()
    return result


class Scene:
    """Sequences whose every step is run by a backend and checked against `exact`."""

    def __init__(
        self,
        backend: str,
        spec: AttentionSpec,
        *,
        tokens_per_block: int,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        tolerance: float = 1e-5,
    ) -> None:
        self.backend = BACKENDS[backend]()
        self.spec = spec
        self.dtype = dtype
        self.tolerance = tolerance
        self.cache_dtype = cache_dtype or dtype
        self.sequences = PagedSequences(
            num_layers=1,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            tokens_per_block=tokens_per_block,
            num_blocks=4096 // tokens_per_block,
            dtype=self.cache_dtype,
        )
        self.histories: dict[str, History] = {}
        self.generator = torch.Generator().manual_seed(0)

    def step(self, rows: list[tuple[str, int]]) -> None:
        metadata = self.sequences.step(rows)
        num_tokens = sum(count for _, count in rows)
        query, key, value = self._random_qkv(num_tokens)
        actual = self.backend.forward(self.spec, query, key, value, self.sequences.caches[0], metadata)
        assert actual.dtype == self.dtype
        assert actual.shape == query.shape
        start = 0
        for name, count in rows:
            part = slice(start, start + count)
            history = self._remember(name, key[part], value[part])
            expected = exact(self.spec, query[part], history)
            torch.testing.assert_close(actual[part].double(), expected, atol=self.tolerance, rtol=self.tolerance)
            start += count

    def _random_qkv(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Slices of one merged tensor, as in the models; scores are large enough for a peaked softmax."""
        heads, kv_heads = self.spec.num_heads, self.spec.num_kv_heads
        shape = (num_tokens, heads + 2 * kv_heads, self.spec.head_dim)
        qkv = (torch.randn(shape, generator=self.generator) * 2).to(self.dtype)
        return qkv[:, :heads], qkv[:, heads : heads + kv_heads], qkv[:, heads + kv_heads :]

    def _remember(self, name: str, key: torch.Tensor, value: torch.Tensor) -> History:
        key, value = key.to(self.cache_dtype), value.to(self.cache_dtype)
        if name in self.histories:
            old = self.histories[name]
            key, value = torch.cat((old.keys, key)), torch.cat((old.values, value))
        self.histories[name] = History(key, value)
        return self.histories[name]


def make_spec(
    num_heads: int = 6, num_kv_heads: int = 2, window: int | None = None, soft_cap: float | None = None
) -> AttentionSpec:
    return AttentionSpec(num_heads, num_kv_heads, HEAD_DIM, 1.0 / math.sqrt(HEAD_DIM), window, soft_cap)


SPECS = {
    "grouped": make_spec(),
    "multi_head": make_spec(4, 4),
    "multi_query": make_spec(3, 1),
    "window": make_spec(window=5),
    "window_of_one": make_spec(window=1),
    "soft_cap": make_spec(soft_cap=1.5),
    "window_and_soft_cap": make_spec(4, 2, window=9, soft_cap=2.0),
}
STEPS: list[list[tuple[str, int]]] = [
    [("a", 11), ("b", 3)],  # two whole prefills
    [("b", 1), ("a", 7), ("c", 20)],  # decode, continued prefill, fresh prefill
    [("a", 1), ("b", 1), ("c", 1)],  # decode rows of different lengths
    [("c", 1), ("a", 1), ("d", 1)],  # a prompt of one token
    [("b", 1), ("d", 2), ("c", 5)],
    [("d", 1)],
]


@pytest.mark.parametrize("tokens_per_block", [1, 16, 32])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_mixed_steps(backend: str, spec: AttentionSpec, tokens_per_block: int) -> None:
    scene = Scene(backend, spec, tokens_per_block=tokens_per_block)
    for rows in STEPS:
        scene.step(rows)


@pytest.mark.parametrize("window", [None, 100])
def test_decode_rows_of_very_different_lengths(window: int | None) -> None:
    """Rows fall into several padded groups; each comes back in its own place."""
    scene = Scene("cpu", make_spec(2, 1, window=window), tokens_per_block=16)
    lengths = {"a": 3, "b": 2 * SHORTEST_GROUP + 40, "c": 1, "d": SHORTEST_GROUP + 7, "e": 90}
    for name, length in lengths.items():
        scene.sequences.step([(name, length)])
        keys, values = torch.randn(2, length, 1, HEAD_DIM, generator=scene.generator)
        fill(scene, name, keys, values)
    scene.step([(name, 1) for name in lengths])
    scene.step([*[(name, 1) for name in ("d", "b", "a")], ("c", 4)])


def fill(scene: Scene, name: str, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write a history straight into the cache."""
    scene.histories[name] = History(keys, values)
    metadata = scene.sequences.step([(name, 0)])
    size = scene.sequences.tokens_per_block
    key_cache, value_cache = scene.sequences.caches[0]
    for position in range(keys.shape[0]):
        block = int(metadata.block_tables[0, position // size])
        key_cache[block, position % size] = keys[position]
        value_cache[block, position % size] = values[position]


@pytest.mark.parametrize("spec", [make_spec(2, 1), make_spec(2, 1, window=70), make_spec(2, 1, soft_cap=3.0)])
def test_long_prefill_in_several_pieces(spec: AttentionSpec) -> None:
    """Longer than one masked piece, whole and after a cached beginning."""
    scene = Scene("cpu", spec, tokens_per_block=32)
    scene.step([("a", QUERIES_PER_PIECE + 30)])
    scene.step([("a", QUERIES_PER_PIECE + 2), ("b", 90)])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_bfloat16(backend: str) -> None:
    scene = Scene(backend, make_spec(), tokens_per_block=16, dtype=torch.bfloat16, tolerance=3e-2)
    for rows in STEPS:
        scene.step(rows)


@pytest.mark.parametrize("backend", ["cpu", "reference"])  # Triton's interpreter does not round to nearest
def test_cache_of_another_type(backend: str) -> None:
    """What is attended to is what the cache holds, also for tokens of the same step."""
    scene = Scene(backend, make_spec(), tokens_per_block=16, cache_dtype=torch.bfloat16)
    for rows in STEPS:
        scene.step(rows)


def test_layers_of_one_step_with_different_windows() -> None:
    """The plan of a step is kept by window: layers that alternate do not mix their masks up."""
    full, local = make_spec(), make_spec(window=4)
    backend = select_backend("cpu", CPU)
    sequences = PagedSequences(num_layers=1, num_kv_heads=2, head_dim=HEAD_DIM, tokens_per_block=4)
    for rows in ([("a", 9), ("b", 12)], [("a", 1), ("b", 1)]):
        metadata = sequences.step(rows)
        num_tokens = sum(count for _, count in rows)
        query = torch.randn(num_tokens, 6, HEAD_DIM)
        key, value = torch.randn(2, num_tokens, 2, HEAD_DIM)
        outputs = {}
        for spec in (full, local, full, local):
            output = backend.forward(spec, query, key, value, sequences.caches[0], metadata)
            previous = outputs.setdefault(spec, output)
            assert torch.equal(output, previous)
        assert not torch.allclose(outputs[full], outputs[local])


def test_two_backends_do_not_share_state() -> None:
    first, second = select_backend("auto", CPU), select_backend("auto", CPU)
    assert first is not second
