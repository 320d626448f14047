"""What each part of a model moves and computes in a step, from its configuration alone, for any backend.

The costs are those of the same operations in a program (`program.costs`); what is here is which operations a model of
`models/` has, and that behind the last layer's attention a step computes the wanted tokens alone
(`ForwardBatch.wanted`). `bench` compares the times of kernels with them, `inspect` lists the linear layers. Imports no
torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from tokenmill.models.config import ModelConfig
from tokenmill.program.costs import Block, Cost, StepSize, operation_cost
from tokenmill.program.program import AttributeValue, Weight

OperationKind: TypeAlias = Literal[
    "embedding", "norm", "linear", "rope", "attention", "activation", "routing", "experts", "head", "sampling", "other"
]

_CostOfStep: TypeAlias = Callable[[StepSize], Cost]


@dataclass(frozen=True, slots=True)
class LinearShape:
    """Linear layers of one shape.

    Args:
        name: of the projection, such as `qkv_proj`.
        out_features, in_features: of the weight.
        count: layers that have it.
        is_quantized: whether `quantization` covers it.
    """

    name: str
    out_features: int
    in_features: int
    count: int
    is_quantized: bool = True

    @property
    def num_values(self) -> int:
        """Of all of them."""
        return self.count * self.out_features * self.in_features


@dataclass(frozen=True, slots=True)
class StepOperation:
    """All operations of one name in a step.

    Args:
        name: such as `down_proj` or `attention`.
        kind: what runs it.
        count: how many there are.
        cost: of all.
    """

    name: str
    kind: OperationKind
    count: int
    cost: Cost


def linear_shapes(config: ModelConfig) -> tuple[LinearShape, ...]:
    """The linear layers in the order of a decoder layer, the output head last; experts are none of them."""
    query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    num_moe = 0 if config.moe is None else sum(config.moe.layers)
    num_dense = config.num_layers - num_moe
    hidden, size = config.hidden_size, config.intermediate_size
    shapes = [
        LinearShape("qkv_proj", query + 2 * key_value, hidden, config.num_layers),
        LinearShape("o_proj", hidden, query, config.num_layers),
    ]
    if config.moe is not None:
        shapes.append(LinearShape("router", config.moe.num_experts, hidden, num_moe, is_quantized=False))
    if num_dense:
        shapes += [
            LinearShape("gate_up_proj", 2 * size, hidden, num_dense),
            LinearShape("down_proj", hidden, size, num_dense),
        ]
    return (*shapes, LinearShape("lm_head", config.vocab_size, hidden, 1, is_quantized=False))


def linear_order(config: ModelConfig) -> tuple[str, ...]:
    """Names of `linear_shapes` in the order in which a step computes them, a name for each layer that has it."""
    has_experts = (False,) * config.num_layers if config.moe is None else config.moe.layers
    order: list[str] = []
    for is_moe in has_experts:
        order += ["qkv_proj", "o_proj", *(["router"] if is_moe else ["gate_up_proj", "down_proj"])]
    return (*order, "lm_head")


def step_costs(config: ModelConfig, step: StepSize, *, linear_nbytes: float = 2.0) -> tuple[StepOperation, ...]:
    """What the parts of a step cost, in 16 bits.

    Args:
        config: of the model.
        step: its size; `num_rows` tokens are computed behind the last layer's attention, and `cache_nbytes` is of one
            cached number.
        linear_nbytes: bytes of a weight that `quantization` covers.
    """
    behind = _behind_attention(config)
    found = [
        _linear(shape, step, linear_nbytes if shape.is_quantized else 2.0, shape.name in behind)
        for shape in linear_shapes(config)
    ]
    found += _attention(config, step)
    tokens = Block("tokens", config.hidden_size, "bfloat16")
    norms = (4 if config.sandwich_norms else 2) * config.num_layers
    add_rms_norm = _per_step("add_rms_norm", [tokens] * 2, [tokens] * 2)
    found.append(_operation("norms", "norm", norms, step, add_rms_norm, 3 if config.sandwich_norms else 1))
    num_dense = config.num_layers - (0 if config.moe is None else sum(config.moe.layers))
    if num_dense:
        inner = Block("tokens", config.intermediate_size, "bfloat16")
        activation = _per_step("gated_activation", [inner] * 2, [inner])
        found.append(_operation("activation", "activation", num_dense, step, activation, "down_proj" in behind))
    if config.moe is not None:
        experts = _experts(config, linear_nbytes)
        found.append(_operation("experts", "experts", sum(config.moe.layers), step, experts, "router" in behind))
    table = Weight("embed_tokens", (config.vocab_size, config.hidden_size), "bfloat16")
    ids = {"token_ids": Block("tokens", 2, "float32")}
    embedding = operation_cost("embedding", ids, {"y": tokens}, {"table": table}, {}, step)
    found.append(StepOperation("embedding", "embedding", 1, embedding))
    logits = Block("rows", config.vocab_size, "bfloat16")
    found.append(_operation("sampling", "sampling", 1, step, _per_step("argmax", [logits], [])))
    return tuple(found)


def _behind_attention(config: ModelConfig) -> frozenset[str]:
    """The linear layers behind the last layer's attention, the output head left out."""
    order = linear_order(config)
    return frozenset(order[len(order) - order[::-1].index("qkv_proj") : -1])


def _operation(
    name: str, kind: OperationKind, count: int, step: StepSize, cost_of: _CostOfStep, num_behind: int = 0
) -> StepOperation:
    """`count` operations, `num_behind` of them behind the last layer's attention."""
    wanted = replace(step, num_tokens=step.num_rows)
    cost = _times(cost_of(step), count - num_behind) + _times(cost_of(wanted), num_behind)
    return StepOperation(name, kind, count, cost)


def _per_step(program_kind: str, inputs: list[Block], outputs: list[Block]) -> _CostOfStep:
    """The cost of an operation without weights worth counting."""
    by_role = {str(index): block for index, block in enumerate(inputs)}
    outputs_by_role = {"y" if index == 0 else str(index): block for index, block in enumerate(outputs)}
    return lambda step: operation_cost(program_kind, by_role, outputs_by_role, {}, {}, step)


def _times(cost: Cost, count: int) -> Cost:
    return Cost(cost.weight_bytes * count, cost.activation_bytes * count, cost.flops * count)


def _linear(shape: LinearShape, step: StepSize, nbytes: float, is_behind: bool) -> StepOperation:
    rows: Literal["rows", "tokens"] = "rows" if shape.name == "lm_head" else "tokens"
    x, y = Block(rows, shape.in_features, "bfloat16"), Block(rows, shape.out_features, "bfloat16")
    weight = Weight(shape.name, (shape.out_features, shape.in_features), "bfloat16")
    kind: OperationKind = "head" if shape.name == "lm_head" else "linear"

    def cost_of(step: StepSize) -> Cost:
        return operation_cost("linear", {"x": x}, {"y": y}, {"weight": weight}, {}, step)

    found = _operation(shape.name, kind, shape.count, step, cost_of, is_behind)
    return replace(found, cost=replace(found.cost, weight_bytes=round(shape.num_values * nbytes)))


def _attention(config: ModelConfig, step: StepSize) -> list[StepOperation]:
    """Attention of all layers, and the rotation with the write to the cache."""
    query = Block("tokens", config.num_attention_heads * config.head_dim, "bfloat16")
    key = Block("tokens", config.num_key_value_heads * config.head_dim, "bfloat16")
    total = Cost()
    for layer in range(config.num_layers):
        attributes: dict[str, AttributeValue] = {
            "num_heads": config.num_attention_heads,
            "num_kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "sliding_window": config.window_of(layer),
        }
        total += operation_cost("attention", {"query": query}, {"y": query}, {}, attributes, step)
    roles = {"query": query, "key": key, "value": key}
    rope = operation_cost("rope_write_cache", roles, {"y": query}, {}, {}, step)
    return [
        StepOperation("attention", "attention", config.num_layers, total),
        StepOperation("rope and cache write", "rope", config.num_layers, _times(rope, config.num_layers)),
    ]


def _experts(config: ModelConfig, nbytes: float) -> _CostOfStep:
    moe = config.moe
    assert moe is not None, "the model has no experts"
    tokens = Block("tokens", config.hidden_size, "bfloat16")
    shapes = {
        "gate_up": (moe.num_experts, 2 * moe.intermediate_size, config.hidden_size),
        "down": (moe.num_experts, config.hidden_size, moe.intermediate_size),
    }
    weights = {role: Weight(role, shape, "bfloat16") for role, shape in shapes.items()}
    attributes: dict[str, AttributeValue] = {"num_experts": moe.num_experts, "top_k": moe.top_k}

    def cost_of(step: StepSize) -> Cost:
        cost = operation_cost("experts", {"x": tokens}, {"y": tokens}, weights, attributes, step)
        return replace(cost, weight_bytes=round(cost.weight_bytes * nbytes / 2))

    return cost_of
