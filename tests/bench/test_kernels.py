"""Kernels find their operation, operations their bytes, and steps of one kind come together."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import tokenmill
from tokenmill.bench.kernels import DeviceLimits, Kernel, kernels_of_steps, operation_of, step_table
from tokenmill.models.config import ModelConfig
from tokenmill.program.costs import StepSize

pytestmark = pytest.mark.spec("C6")

CONFIG = ModelConfig.from_hf({
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 256,
})  # fmt: skip
STEP = StepSize(num_tokens=3, num_rows=3, num_sequences=3, context_len=100, cache_nbytes=2)
LIMITS = DeviceLimits(read_bandwidth=1e12, flops=1e14)
LAYER = (
    ("_rms_norm_kernel", 1.0),
    ("_small_batch_kernel", 4.0),  # qkv
    ("_rope_kernel", 1.0),
    ("_decode_kernel", 7.0),
    ("_combine_kernel", 2.0),
    ("nvjet_tst_64x8", 3.0),  # o
    ("_product_kernel", 5.0),  # gate and up
    ("_add_product_splits_kernel", 0.5),
    ("_gated_kernel", 1.0),
    ("_small_batch_kernel", 6.0),  # down
)
HEAD = (("_small_batch_kernel", 9.0), ("_argmax_kernel", 1.0), ("vectorized_elementwise_kernel", 0.25))


def launches(num_steps: int) -> list[Kernel]:
    """Of whole steps."""
    return [
        Kernel(name, float(start), microseconds)
        for start, (name, microseconds) in enumerate((*LAYER, *LAYER, *HEAD) * num_steps)
    ]


def own_kernels() -> list[str]:
    """Names of all kernels in the sources."""
    jit = re.compile(r"^@(?:triton|gluon)\.jit(?:\([^)]*\))?\ndef (\w+_kernel)\(", re.MULTILINE)
    root = Path(tokenmill.__file__).parent
    return sorted({name for path in root.rglob("*.py") for name in jit.findall(path.read_text(encoding="utf-8"))})


def test_all_own_kernels_belong_to_an_operation() -> None:
    kernels = own_kernels()
    assert {"_decode_heads_kernel", "_many_kernel", "_rms_norm_kernel"} <= set(kernels)
    assert [name for name in kernels if operation_of(name, has_experts=True) == "other"] == ["_copy_blocks_kernel"]


def test_linear_layers_are_told_by_their_order() -> None:
    table = step_table("Steps", launches(3)[::-1], 3, CONFIG, STEP, LIMITS)
    times = {row.operation: (row.calls, row.microseconds) for row in table.rows}
    assert times == {
        "attention": (4.0, 18.0),
        "down_proj": (2.0, 12.0),
        "gate_up_proj": (4.0, 11.0),
        "lm_head": (1.0, 9.0),
        "qkv_proj": (2.0, 8.0),
        "o_proj": (2.0, 6.0),
        "norms": (2.0, 2.0),
        "rope and cache write": (2.0, 2.0),
        "activation": (2.0, 2.0),
        "sampling": (1.0, 1.0),
        "other": (1.0, 0.25),
    }
    assert [row.microseconds for row in table.rows] == sorted((time for _, time in times.values()), reverse=True)
    assert table.microseconds == pytest.approx(71.25)


def test_bytes_and_operations_of_a_step() -> None:
    table = step_table("Steps", launches(1), 1, CONFIG, STEP, LIMITS, linear_nbytes=1.0)
    rows = {row.operation: row for row in table.rows}
    down, head, attention = rows["down_proj"].cost, rows["lm_head"].cost, rows["attention"].cost
    assert down is not None and head is not None and attention is not None
    assert down.weight_bytes == 2 * 64 * 160  # quantized: a byte each
    assert down.activation_bytes == 2 * 3 * (64 + 160) * 2
    assert down.flops == 2 * 2 * 3 * 64 * 160
    assert head.weight_bytes == 1000 * 64 * 2  # never quantized
    cached = 3 * 100 * 2 * 16 * 2 * 2  # sequences, tokens, heads, columns, keys and values, bytes
    assert attention.bytes == 2 * (cached + 2 * 3 * 64 * 2)
    assert attention.flops == 2 * 4 * 3 * 100 * 4 * 16
    assert rows["down_proj"].of_limit == pytest.approx(down.bytes / 1e12 / 12e-6)
    assert rows["other"].of_limit is None


def test_steps_that_do_not_fit_the_order_are_summed_up() -> None:
    table = step_table("Steps", launches(1)[1:], 1, CONFIG, STEP, LIMITS)
    assert "qkv_proj" in {row.operation for row in table.rows}
    table = step_table("Steps", [*launches(1), Kernel("cutlass_gemm", 999.0, 5.0)], 1, CONFIG, STEP, LIMITS)
    linear = next(row for row in table.rows if row.operation == "linear")
    assert linear.cost is not None
    weights = 2 * (128 * 64 + 64 * 64 + 320 * 64 + 64 * 160) + 1000 * 64
    assert linear.cost.weight_bytes == 2 * weights
    assert linear.microseconds == pytest.approx(51.0)


def test_a_table_is_printed() -> None:
    text = io.StringIO()
    step_table("Decode steps", launches(2), 2, CONFIG, STEP, LIMITS).print(Console(width=160, file=text))
    assert "Decode steps: 71 us in kernels, mean of 2 steps; limits here: 1.00 TB/s, 100 TFLOP/s" in text.getvalue()
    assert "gate_up_proj" in text.getvalue()


@pytest.mark.parametrize(
    ("kernel", "has_experts", "operation"),
    [
        ("_pair_gate_up_kernel", True, "experts"),
        ("_rows_kernel", False, "linear"),
        ("_combine_kernel", True, None),
        ("_router_product_kernel", True, "linear"),
        ("_choose_experts_kernel", True, "experts"),
        ("_expert_sum_rms_norm_kernel", True, "norms"),
        ("_norm_and_rope_kernel", True, "rope and cache write"),
        ("sm90_xmma_gemm_bf16bf16", False, "linear"),
        ("Memset", False, "other"),
    ],
)
def test_operation_of(kernel: str, has_experts: bool, operation: str | None) -> None:
    assert operation_of(kernel, has_experts=has_experts) == operation


def test_kernels_belong_to_the_step_that_launched_them() -> None:
    def event(category: str, start: float, correlation: int) -> dict[str, Any]:
        return {
            "cat": category,
            "name": f"k{correlation}",
            "ts": start,
            "dur": 2.0,
            "args": {"correlation": correlation},
        }

    trace = {
        "traceEvents": [
            event("kernel", 100.0, 1),
            event("kernel", 103.0, 2),
            event("kernel", 250.0, 2),  # another of the same graph, run while the next step is launched
            event("kernel", 300.0, 3),
            event("cuda_runtime", 5.0, 0),
            event("cuda_runtime", 12.0, 1),
            event("cuda_driver", 15.0, 2),
            event("cuda_runtime", 22.0, 3),
            event("kernel", 1.0, 0),
        ]
    }
    first, second = kernels_of_steps(trace, [10.0, 20.0])
    assert [kernel.name for kernel in first] == ["k1", "k2", "k2"]
    assert [kernel.name for kernel in second] == ["k3"]
