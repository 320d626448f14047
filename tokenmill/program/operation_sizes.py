"""Which sizes of an operation's operands, weights and attributes belong together. Used by `checks.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from tokenmill.program.program import AttributeValue


@dataclass(frozen=True, slots=True)
class SizesOfOperation:
    """What the rules look at.

    Args:
        columns: number of columns of each input and output, by role.
        shapes: of the weights, by role.
        attributes: of the operation.
    """

    columns: Mapping[str, int]
    shapes: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, AttributeValue]

    def integer(self, name: str) -> int:
        """An attribute that was checked to be an integer."""
        value = self.attributes[name]
        assert isinstance(value, int)
        return value


Rule = Callable[[SizesOfOperation], Iterator[str]]
"""Gives what is wrong, in words; nothing if all is well."""


def _equal(sizes: SizesOfOperation, *roles: str) -> Iterator[str]:
    """All of these roles that are there have the same number of columns."""
    found = {role: sizes.columns[role] for role in roles if role in sizes.columns}
    if len(set(found.values())) > 1:
        yield f"its operands have different numbers of columns: {found}"


def _same_columns(*roles: str) -> Rule:
    def rule(sizes: SizesOfOperation) -> Iterator[str]:
        yield from _equal(sizes, *roles)

    return rule


def _shape(sizes: SizesOfOperation, role: str, expected: tuple[int, ...]) -> Iterator[str]:
    if role in sizes.shapes and tuple(sizes.shapes[role]) != expected:
        yield f"its {role} has the shape {list(sizes.shapes[role])} instead of {list(expected)}"


def _columns(sizes: SizesOfOperation, role: str, expected: int) -> Iterator[str]:
    if role in sizes.columns and sizes.columns[role] != expected:
        yield f"its {role} has {sizes.columns[role]} columns instead of {expected}"


def _whole_heads(sizes: SizesOfOperation, *roles: str) -> Iterator[str]:
    head_dim = sizes.integer("head_dim")
    if head_dim % 2:
        yield f"its heads have the odd size {head_dim}"
    for role in roles:
        if sizes.columns[role] % head_dim:
            yield f"its {role} has {sizes.columns[role]} columns, which are no heads of {head_dim}"


def _embedding(sizes: SizesOfOperation) -> Iterator[str]:
    yield from _matrix(sizes, "table")
    yield from _columns(sizes, "y", sizes.shapes["table"][1])


def _matrix(sizes: SizesOfOperation, role: str) -> Iterator[str]:
    if len(sizes.shapes[role]) != 2:
        yield f"its {role} has the shape {list(sizes.shapes[role])} instead of two dimensions"


def _rotation(sizes: SizesOfOperation) -> Iterator[str]:
    yield from _columns(sizes, "positions", 1)
    yield from _shape(sizes, "frequencies", (sizes.columns["y"] // 2,))
    yield from _columns(sizes, "y", 2 * sizes.shapes["frequencies"][0])


def _rms_norm(sizes: SizesOfOperation) -> Iterator[str]:
    yield from _equal(sizes, "x", "y")
    if "head_dim" in sizes.attributes:
        yield from _whole_heads(sizes, "x")
        yield from _shape(sizes, "weight", (sizes.integer("head_dim"),))
    else:
        yield from _shape(sizes, "weight", (sizes.columns["x"],))


def _add_rms_norm(sizes: SizesOfOperation) -> Iterator[str]:
    yield from _equal(sizes, "x", "residual", "y", "sum")
    yield from _shape(sizes, "weight", (sizes.columns["x"],))


def _linear(sizes: SizesOfOperation) -> Iterator[str]:
    yield from _matrix(sizes, "weight")
    out_features, in_features = sizes.shapes["weight"]
    yield from _columns(sizes, "x", in_features)
    yield from _shape(sizes, "bias", (out_features,))
    if "activation" in sizes.attributes:
        if out_features % 2:
            yield f"its weight has {out_features} rows, which cannot be halved into gate and up"
        yield from _columns(sizes, "y", out_features // 2)
    else:
        yield from _columns(sizes, "y", out_features)
    yield from _equal(sizes, "y", "residual")


def _add_bias(sizes: SizesOfOperation) -> Iterator[str]:
    yield from _equal(sizes, "x", "y")
    yield from _shape(sizes, "bias", (sizes.columns["x"],))


def _rope(sizes: SizesOfOperation) -> Iterator[str]:
    yield from _equal(sizes, "x", "y")
    yield from _whole_heads(sizes, "x")
    yield from _columns(sizes, "rotation", sizes.integer("head_dim"))


def _rope_write_cache(sizes: SizesOfOperation) -> Iterator[str]:
    yield from _equal(sizes, "query", "y")
    yield from _equal(sizes, "key", "value")
    yield from _whole_heads(sizes, "query", "key")
    head_dim = sizes.integer("head_dim")
    yield from _columns(sizes, "rotation", head_dim)
    yield from _shape(sizes, "query_norm", (head_dim,))
    yield from _shape(sizes, "key_norm", (head_dim,))
    if sizes.shapes and "eps" not in sizes.attributes:
        yield "it normalizes heads and has no attribute 'eps'"


def _attention(sizes: SizesOfOperation) -> Iterator[str]:
    num_heads, num_kv_heads = sizes.integer("num_heads"), sizes.integer("num_kv_heads")
    if num_heads % num_kv_heads:
        yield f"{num_heads} query heads cannot share {num_kv_heads} key and value heads"
    yield from _columns(sizes, "query", num_heads * sizes.integer("head_dim"))
    yield from _equal(sizes, "query", "y")


def _experts(sizes: SizesOfOperation) -> Iterator[str]:
    yield from _equal(sizes, "x", "y")
    num_experts, top_k = sizes.integer("num_experts"), sizes.integer("top_k")
    yield from _columns(sizes, "router_logits", num_experts)
    if top_k > num_experts:
        yield f"it chooses {top_k} of {num_experts} experts"
    yield from _matrix(sizes, "gate_up")
    yield from _matrix(sizes, "down")
    hidden, features = sizes.columns["x"], sizes.shapes["down"][1]
    yield from _shape(sizes, "gate_up", (num_experts * 2 * features, hidden))
    yield from _shape(sizes, "down", (num_experts * hidden, features))


def _select_rows(sizes: SizesOfOperation) -> Iterator[str]:
    yield from _equal(sizes, "x", "y")
    yield from _columns(sizes, "row_index", 1)


COLUMN_RULES: Final[Mapping[str, Rule]] = MappingProxyType(
    {
        "embedding": _embedding,
        "rotation": _rotation,
        "rms_norm": _rms_norm,
        "add_rms_norm": _add_rms_norm,
        "quantize": _same_columns("x", "y"),
        "linear": _linear,
        "add_bias": _add_bias,
        "rope": _rope,
        "write_cache": _same_columns("key", "value"),
        "rope_write_cache": _rope_write_cache,
        "attention": _attention,
        "experts": _experts,
        "activation": _same_columns("x", "y"),
        "gated_activation": _same_columns("gate", "up", "y"),
        "add": _same_columns("a", "b", "y"),
        "multiply": _same_columns("a", "b", "y"),
        "scale": _same_columns("x", "y"),
        "copy": _same_columns("x", "y"),
        "select_rows": _select_rows,
        "soft_cap": _same_columns("x", "y"),
    }
)
"""The rule of every kind of operation; a test compares the keys with `OPERATIONS`."""
