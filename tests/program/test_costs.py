"""Costs of operations, computed by hand."""

from __future__ import annotations

import pytest

from tests.support.programs import captured, compiled, tiny_model
from tokenmill.program.costs import Block, Cost, StepSize, operation_cost, operation_rows, rows_by_layer_part
from tokenmill.program.program import OPERATIONS, Weight

DECODE = StepSize(num_tokens=1, num_rows=1, context_len=100)
PREFILL = StepSize(num_tokens=40, num_rows=1, context_len=100)
BATCH = StepSize(num_tokens=8, num_rows=8, num_sequences=8, context_len=100, cache_nbytes=2)
HEADS = {"layer": 0, "num_heads": 6, "num_kv_heads": 2, "head_dim": 16, "scale": 1.0}


def tokens(columns: int, dtype: str = "float32") -> Block:
    return Block("tokens", columns, dtype)  # type: ignore[arg-type]


def test_products_read_their_weight_once() -> None:
    weight = Weight("w", (96, 64), "q4_1")
    for step, num_tokens in ((DECODE, 1), (PREFILL, 40)):
        cost = operation_cost("linear", {"x": tokens(64)}, {"y": tokens(96)}, {"weight": weight}, {}, step)
        assert cost == Cost(96 * 2 * 20, num_tokens * (64 + 96) * 4, 2 * num_tokens * 96 * 64)


def test_quantized_values_have_scales_and_sums() -> None:
    assert tokens(80, "int8_group32").nbytes(PREFILL) == 40 * (80 + 3 * 8)
    assert tokens(80, "bfloat16").nbytes(DECODE) == 160


def test_embeddings_read_one_row_for_each_token() -> None:
    table = Weight("w", (1000, 64), "q8_0")
    cost = operation_cost(
        "embedding", {"token_ids": Block("tokens", 1, "int32")}, {"y": tokens(64)}, {"table": table}, {}, PREFILL
    )
    assert cost == Cost(40 * 68, 40 * (4 + 256), 0)


@pytest.mark.parametrize(
    ("step", "window", "pairs", "cached"),
    [
        (DECODE, None, 100, 100),
        (DECODE, 30, 30, 30),
        (PREFILL, None, sum(range(61, 101)), 100),
        (PREFILL, 70, sum(min(length, 70) for length in range(61, 101)), 100),
        (PREFILL, 20, 40 * 20, 59),
        (BATCH, None, 800, 800),
    ],
)
def test_attention(step: StepSize, window: int | None, pairs: int, cached: int) -> None:
    attributes = {**HEADS, "sliding_window": window} if window else HEADS
    cost = operation_cost("attention", {"query": tokens(96)}, {"y": tokens(96)}, {}, attributes, step)
    assert cost.flops == pairs * 6 * 16 * 4
    assert cost.activation_bytes == step.num_tokens * 96 * 4 * 2 + cached * 2 * 16 * 2 * step.cache_nbytes


def test_experts_are_read_if_a_token_chose_them() -> None:
    weights = {"gate_up": Weight("g", (8 * 2 * 24, 32)), "down": Weight("d", (8 * 32, 24))}
    attributes = {"num_experts": 8, "top_k": 2, "normalize": True, "activation": "silu"}
    inputs = {"x": tokens(32), "router_logits": tokens(8)}
    nbytes = 8 * 3 * 24 * 32 * 4
    for step, share in ((DECODE, 2 / 8), (PREFILL, 1 - (6 / 8) ** 40)):
        cost = operation_cost("experts", inputs, {"y": tokens(32)}, weights, attributes, step)
        assert cost.weight_bytes == pytest.approx(share * nbytes, abs=1)
        assert cost.flops == 2 * step.num_tokens * 2 * 3 * 24 * 32


def test_writes_to_the_cache_count_what_is_written() -> None:
    cost = operation_cost("write_cache", {"key": tokens(32), "value": tokens(32)}, {}, {}, {"layer": 0}, BATCH)
    assert cost == Cost(0, 8 * 64 * 4 + 8 * 64 * 2, 0)


def test_rows_of_a_program() -> None:
    graph = captured(tiny_model("llama"))
    program = compiled(graph)
    rows = operation_rows(program, DECODE, {"lm_head": 12.5})
    assert [row.name for row in rows] == [operation.name for operation in program.operations]
    by_name = {row.name: row for row in rows}
    assert (by_name["lm_head"].microseconds, by_name["lm_head"].shape) == (12.5, "[rows, 61]")
    assert by_name["model.layers.0.mlp.gate_up_proj"].formats == "float32"
    assert (
        sum(row.cost.weight_bytes for row in rows)
        == sum(
            4 * weight.shape[0] * (weight.shape[1] if len(weight.shape) > 1 else 1)
            for weight in program.weights
            if weight.name != "model.embed_tokens.weight"
        )
        + 4 * 48
    )


def test_layers_are_added_up() -> None:
    rows = operation_rows(compiled(captured(tiny_model("llama"))), PREFILL, {"model.layers.1.mlp.down_proj": 2.0})
    total = {row.name: row for row in rows_by_layer_part(rows)}
    part = total["model.layers.*.mlp.down_proj"]
    assert (part.count, part.kind, part.shape, part.microseconds) == (3, "linear", "[tokens, 48]", 2.0)
    assert part.cost == sum((row.cost for row in rows if row.name.endswith("mlp.down_proj")), Cost())
    assert total["lm_head"].microseconds is None
    assert sum(row.count for row in total.values()) == len(rows)


def test_every_kind_has_a_cost() -> None:
    """Of operations that compute, the number of floating-point operations is not forgotten."""
    moves = {"embedding", "copy", "select_rows", "write_cache", "linear", "attention", "experts"}
    for kind in OPERATIONS.keys() - moves:
        roles = {role.removesuffix("?"): tokens(32) for role in OPERATIONS[kind].inputs}
        cost = operation_cost(kind, roles, {"y": tokens(32)}, {}, {}, DECODE)
        assert cost.flops > 0, kind
