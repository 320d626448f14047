"""Times an attention backend against the limits of one H100: `python -m benchmarks.gpu.attention`.

Every time is that of one layer inside a CUDA graph that runs many layers, each with a cache of its own, so that no
layer finds its keys in the L2 cache. Limits: bytes over the measured read bandwidth, operations over the measured bf16
matrix rate of the H100 80GB (SXM). `--tune` tries other tiles and prints the best of them first. `--backend flashinfer`
times that library beside Triton's kernels, and what its plan of a step costs the host.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import triton
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.runtime.errors import PTXASError

from benchmarks.result_file import describe_run, write_document
from tokenmill.attention.base import AttentionBackend, AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.attention.flashinfer import FlashInferAttention
from tokenmill.attention.triton import TritonAttention
from tokenmill.attention.triton_common import Result
from tokenmill.attention.triton_decode import decode_attention
from tokenmill.attention.triton_decode_tiles import DecodeTiles
from tokenmill.attention.triton_kv_write import write_kv_triton
from tokenmill.attention.triton_prefill import PrefillTiles, prefill_attention
from tokenmill.runtime.warm_up import run_together

BYTES_PER_SECOND = 3.06e12
BFLOAT16_FLOPS = 798e12
CACHE_BYTES = 300 << 20  # of all layers together at least: several times the L2 cache
RESULTS = Path(__file__).parents[1] / "results"


@dataclass(frozen=True)
class Work:
    """Equal rows of `query_len` tokens of this step, the last of `kv_len`."""

    name: str
    num_rows: int
    query_len: int
    kv_len: int
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    tokens_per_block: int = 32
    cache_dtype: torch.dtype = torch.bfloat16
    window: int | None = None
    goal: float | None = None

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(self.num_heads, self.num_kv_heads, self.head_dim, self.head_dim**-0.5, self.window)

    @property
    def num_bytes(self) -> int:
        """Keys and values that a decode step must read."""
        visible = min(self.kv_len, self.window or self.kv_len)
        return self.num_rows * visible * self.num_kv_heads * self.head_dim * 2 * self.cache_dtype.itemsize

    @property
    def flops(self) -> int:
        """Of both products, hidden scores not counted."""
        history = self.kv_len - self.query_len
        pairs = self.num_rows * (self.query_len * history + self.query_len * (self.query_len + 1) // 2)
        return 4 * pairs * self.num_heads * self.head_dim


FP8 = torch.float8_e4m3fn
DECODE = (
    Work("decode 1 x 2048", 1, 1, 2048),
    Work("decode 1 x 2048 fp8", 1, 1, 2048, cache_dtype=FP8),
    Work("decode 1 x 256", 1, 1, 256),
    Work("decode 4 x 8192", 4, 1, 8192),
    Work("decode 16 x 2048", 16, 1, 2048),
    Work("decode 64 x 1100", 64, 1, 1100, goal=0.75),
    Work("decode 64 x 1100 fp8", 64, 1, 1100, cache_dtype=FP8, goal=0.75),
    Work("decode 512 x 192", 512, 1, 192, goal=0.75),
    Work("decode 512 x 192 fp8", 512, 1, 192, cache_dtype=FP8, goal=0.75),
    Work("decode 64 x 1100 head 64", 64, 1, 1100, head_dim=64, goal=0.75),
    Work("decode 64 x 1100 head 256", 64, 1, 1100, num_heads=16, head_dim=256, goal=0.75),
)
PREFILL = (
    Work("prefill 1 x 2048", 1, 2048, 2048, goal=300e12),
    Work("prefill 4 x 2048", 4, 2048, 2048, goal=300e12),
    Work("prefill 16 x 128", 16, 128, 128),
    Work("prefill 1 x 8192", 1, 8192, 8192),
    Work("prefill 512 after 7680", 1, 512, 8192),
    Work("prefill 1 x 2048 fp8", 1, 2048, 2048, cache_dtype=FP8),
    Work("prefill 4 x 2048 fp8", 4, 2048, 2048, cache_dtype=FP8),
    Work("prefill 512 after 7680 fp8", 1, 512, 8192, cache_dtype=FP8),
    Work("prefill 4 x 2048 head 64", 4, 2048, 2048, head_dim=64),
    Work("prefill 4 x 2048 head 256", 4, 2048, 2048, num_heads=16, num_kv_heads=8, head_dim=256),
)
WRITE = (Work("write 4 x 2048", 4, 2048, 2048), Work("write 16 x 128", 16, 128, 128))


@dataclass(frozen=True)
class Layers:
    """Inputs of one step and a cache for each of several layers."""

    work: Work
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    caches: Sequence[LayerCache]
    metadata: AttentionMetadata


def make_layers(work: Work, max_layers: int = 48) -> Layers:
    """Random inputs and caches; blocks in random order."""
    device = torch.device("cuda")
    blocks_per_row = -(-work.kv_len // work.tokens_per_block)
    num_blocks = 1 + work.num_rows * blocks_per_row
    shape = (num_blocks, work.tokens_per_block, work.num_kv_heads, work.head_dim)
    layer_bytes = num_blocks * work.tokens_per_block * work.num_kv_heads * work.head_dim * 2 * work.cache_dtype.itemsize
    caches = []
    for _ in range(min(max_layers, max(4, CACHE_BYTES // layer_bytes))):
        keys, values = (torch.randn(shape, dtype=torch.bfloat16, device=device).to(work.cache_dtype) for _ in "kv")
        caches.append((keys, values))
    tables = 1 + torch.randperm(num_blocks - 1, device=device).view(work.num_rows, blocks_per_row).int()
    positions = torch.arange(work.kv_len - work.query_len, work.kv_len, device=device)
    slots = tables.long()[:, positions // work.tokens_per_block] * work.tokens_per_block
    num_tokens = work.num_rows * work.query_len
    heads = [work.num_heads, work.num_kv_heads, work.num_kv_heads]
    fused = torch.randn(num_tokens, sum(heads), work.head_dim, dtype=torch.bfloat16, device=device)
    query, key, value = fused.split(heads, 1)
    metadata = AttentionMetadata(
        query_start=torch.arange(work.num_rows + 1, device=device, dtype=torch.int32) * work.query_len,
        kv_lens=torch.full((work.num_rows,), work.kv_len, device=device, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=(slots + positions % work.tokens_per_block).flatten(),
        num_decode_rows=work.num_rows if work.query_len == 1 else 0,
        query_lens=(work.query_len,) * work.num_rows,
        kv_lens_host=(work.kv_len,) * work.num_rows,
    )
    return Layers(work, query, key, value, caches, metadata)


def seconds_per_layer(num_layers: int, run_layer: Callable[[int], object]) -> float:
    """Median over several replays of a graph of all layers, for one layer."""
    run_layer(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(num_layers):
            run_layer(layer)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(12):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times[2:]) / num_layers


def time_backend(layers: Layers, backend: AttentionBackend) -> float:
    """Seconds of one whole `forward`, writing the cache included; what it plans for a step is there already."""
    return seconds_per_layer(len(layers.caches), partial(forward, layers, backend))


def forward(layers: Layers, backend: AttentionBackend, layer: int) -> torch.Tensor:
    """Attention of one layer, writing the cache included."""
    cache = layers.caches[layer]
    return backend.forward(layers.work.spec, layers.query, layers.key, layers.value, cache, layers.metadata)


def write(layers: Layers, layer: int) -> object:
    """Keys and values of one layer written to its cache."""
    slots = layers.metadata.slot_mapping
    return write_kv_triton(layers.work.spec, layers.key, layers.value, layers.caches[layer], slots)


def compile_kernels(with_attention: Sequence[Work], written: Sequence[Work]) -> None:
    """Of all works, beside each other; each runs once."""
    first = [partial(forward, make_layers(work, 1), TritonAttention(), 0) for work in with_attention]
    writes = [partial(write, make_layers(work, 1), 0) for work in written]
    run_together([*first, *writes], torch.device("cuda", torch.cuda.current_device()))
    torch.cuda.empty_cache()


def time_decode(layers: Layers, tiles: DecodeTiles, num_splits: int) -> float:
    """Seconds of the decode kernels with given tiles."""
    metadata, output = layers.metadata, torch.empty_like(layers.query, memory_format=torch.contiguous_format)

    def run_layer(layer: int) -> None:
        decode_attention(
            layers.work.spec, layers.query, layers.key, layers.value, layers.caches[layer], metadata,
            Result(output), num_splits=num_splits, tiles=tiles,
        )  # fmt: skip

    return seconds_per_layer(len(layers.caches), run_layer)


def time_prefill(layers: Layers, tiles: PrefillTiles) -> float:
    """Seconds of the prefill kernel alone with given tiles."""
    metadata, output = layers.metadata, torch.empty_like(layers.query, memory_format=torch.contiguous_format)
    spec = layers.work.spec
    keys, values = write_kv_triton(spec, layers.key, layers.value, layers.caches[0], metadata.slot_mapping)

    def run_layer(layer: int) -> None:
        prefill_attention(
            spec, layers.query, keys, values, layers.caches[layer], metadata, Result(output),
            rows=slice(0, None), has_history=layers.work.kv_len > layers.work.query_len,
            tiles=tiles,
        )  # fmt: skip

    return seconds_per_layer(len(layers.caches), run_layer)


def time_peer(work: Work) -> float | None:
    """Seconds of the fastest of torch's own dense attention kernels for a causal prefill without history."""
    if work.query_len != work.kv_len or work.cache_dtype == FP8:
        return None
    shape = (work.num_rows, work.query_len, work.head_dim)
    query = torch.randn(shape[0], work.num_heads, *shape[1:], dtype=torch.bfloat16, device="cuda")
    key, value = (
        torch.randn(shape[0], work.num_kv_heads, *shape[1:], dtype=torch.bfloat16, device="cuda") for _ in "kv"
    )
    times = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

        def run_layer(layer: int) -> torch.Tensor:
            return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        try:
            with sdpa_kernel(backend):
                times.append(seconds_per_layer(8, run_layer))
        except RuntimeError as error:
            print(f"{backend}: {error}", file=sys.stderr)
    return min(times, default=None)


def seconds_to_plan(layers: Layers) -> float:
    """Of the host, for the plan of a step and the launches of its first layer, with FlashInfer."""
    backend, caches = FlashInferAttention(), layers.caches
    times = []
    for _ in range(12):
        metadata = replace(layers.metadata)
        torch.cuda.synchronize()
        start = time.perf_counter()
        backend.forward(layers.work.spec, layers.query, layers.key, layers.value, caches[0], metadata)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def row(
    work: Work,
    metric: str,
    value: float,
    unit: str,
    limit: float | None,
    peer: float | None = None,
    peer_name: str = "torch scaled_dot_product_attention",
) -> dict[str, object]:
    """One line of the results file."""
    return {
        "work": work.name,
        "metric": metric,
        "value": value,
        "unit": unit,
        "goal": work.goal,
        "peer": None if peer is None else {peer_name: peer},
        "limit": limit,
    }


def measure_decode(work: Work) -> dict[str, object]:
    """Time and share of the read bandwidth of one decode step of one layer."""
    seconds = time_backend(make_layers(work), TritonAttention())
    share = work.num_bytes / BYTES_PER_SECOND / seconds
    print(f"{work.name:28} {seconds * 1e6:8.1f} us   {share * BYTES_PER_SECOND / 1e12:5.2f} TB/s {share:6.1%} of limit")
    if work.goal is None:
        return row(work, "time", seconds * 1e6, "us", work.num_bytes / BYTES_PER_SECOND * 1e6)
    return row(work, "share of read bandwidth", share, "1", 1.0)


def measure_prefill(work: Work) -> dict[str, object]:
    """Rate of one prefill step of one layer, the writes to the cache included."""
    seconds, peer = time_backend(make_layers(work), TritonAttention()), time_peer(work)
    rate, peer_rate = work.flops / seconds, None if peer is None else work.flops / peer
    beside = "" if peer_rate is None else f"   torch {peer_rate / 1e12:4.0f}"
    print(f"{work.name:28} {seconds * 1e6:8.1f} us   {rate / 1e12:5.0f} TFLOP/s {rate / BFLOAT16_FLOPS:6.1%}{beside}")
    return row(work, "rate", rate, "FLOP/s", BFLOAT16_FLOPS, peer_rate)


def measure_flashinfer(work: Work) -> list[dict[str, object]]:
    """FlashInfer's time of a step of one layer beside Triton's, and what the step costs the host."""
    layers = make_layers(work)
    ours, theirs, plan = (
        time_backend(layers, TritonAttention()) * 1e6,
        time_backend(layers, FlashInferAttention()) * 1e6,
        seconds_to_plan(layers) * 1e6,
    )
    limit = max(work.num_bytes / BYTES_PER_SECOND if work.query_len == 1 else 0.0, work.flops / BFLOAT16_FLOPS) * 1e6
    print(
        f"{work.name:28} {theirs:8.1f} us   triton {ours:8.1f} us   limit {limit:6.1f} us   plan {plan:6.0f} us of host"
    )
    return [
        row(replace(work, goal=None), "time", theirs, "us", limit, ours, "triton"),
        row(replace(work, goal=None), "host: plan of a step and launches of a layer", plan, "us", None),
    ]


DECODE_TILES = tuple(
    DecodeTiles(block_n, num_warps, num_stages, 0)
    for block_n, num_warps in ((32, 1), (32, 2), (32, 4), (64, 2), (64, 4), (128, 4))
    for num_stages in (2, 3, 4)
)
UNFIT = (triton.OutOfResources, PTXASError)  # tiles that the chip has no room for
PREFILL_TILES = (
    PrefillTiles(128, 128, 8, 2),
    PrefillTiles(128, 64, 8, 3),
    PrefillTiles(128, 64, 8, 2),
    PrefillTiles(128, 64, 8, 2, max_registers=128),
    PrefillTiles(128, 32, 8, 3),
    PrefillTiles(128, 32, 8, 3, max_registers=128),
    PrefillTiles(64, 128, 4, 2),
    PrefillTiles(64, 64, 4, 3),
    PrefillTiles(64, 64, 4, 2),
    PrefillTiles(64, 64, 4, 2, max_registers=168),
    PrefillTiles(64, 32, 4, 3),
)


def measure_write(work: Work) -> dict[str, object]:
    """Time to write one step's keys and values of one layer."""
    layers = make_layers(work)
    seconds = seconds_per_layer(len(layers.caches), partial(write, layers))
    numbers = 2 * work.num_rows * work.query_len * work.num_kv_heads * work.head_dim
    limit = numbers * (2 + work.cache_dtype.itemsize) / BYTES_PER_SECOND
    print(f"{work.name:28} {seconds * 1e6:8.1f} us   {limit / seconds:6.1%} of limit")
    return row(work, "time", seconds * 1e6, "us", limit * 1e6)


def tune_decode(work: Work) -> None:
    """Print the best tiles and numbers of splits."""
    layers, tried = make_layers(work), []
    for tiles in DECODE_TILES:
        for num_splits in (1, 2, 3, 4, 8, 16, 32, 64):
            if num_splits > 1 and (num_splits * work.num_rows > 256 or num_splits * tiles.block_n > 2 * work.kv_len):
                continue
            try:
                tried.append((time_decode(layers, tiles, num_splits), tiles, num_splits))
            except UNFIT:
                break
    for seconds, tiles, num_splits in sorted(tried)[:6]:
        print(f"  {work.name}: {seconds * 1e6:7.1f} us splits {num_splits:2} {tiles}")


def tune_prefill(work: Work) -> None:
    """Print the best tiles."""
    layers, tried = make_layers(work), []
    for tiles in PREFILL_TILES:
        try:
            tried.append((time_prefill(layers, tiles), tiles))
        except UNFIT:
            continue
    for seconds, tiles in sorted(tried, key=lambda trial: trial[0])[:4]:
        print(f"  {work.name}: {seconds * 1e6:7.1f} us {work.flops / seconds / 1e12:4.0f} TFLOP/s {tuple(tiles)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="try tiles first")
    parser.add_argument("--only", default="", help="works whose name matches this regular expression")
    parser.add_argument("--backend", choices=("triton", "flashinfer"), default="triton")
    parser.add_argument("--output", type=Path, help="results file")
    arguments = parser.parse_args()
    decode, prefill, written = (
        [work for work in works if re.search(arguments.only, work.name)] for works in (DECODE, PREFILL, WRITE)
    )
    if arguments.tune:
        for work in decode:
            tune_decode(work)
        for work in prefill:
            tune_prefill(work)
    versions = {"triton": triton.__version__, "cuda": str(torch.version.cuda)}
    if arguments.backend == "flashinfer":
        name = "gpu_attention_flashinfer.json"
        versions["flashinfer"] = version("flashinfer-python")
        rows = [line for work in (*decode, *prefill) for line in measure_flashinfer(work)]
    else:
        name = "gpu_attention.json"
        compile_kernels((*decode, *prefill), written)
        rows = [*map(measure_decode, decode), *map(measure_prefill, prefill), *map(measure_write, written)]
    document = describe_run("gpu.attention", torch.cuda.get_device_name(), **versions)
    write_document(arguments.output or RESULTS / name, {**document, "rows": rows})


if __name__ == "__main__":
    main()
