"""Which format every weight of an engine is stored in.

`auto` keeps what the checkpoint has: ggml's block types that programs know run as they are, bfloat16 and float32 stay.
What a program does not know is converted, and said. Called by `build.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from tokenmill.builder.graph import Graph
from tokenmill.builder.weight_source import WeightSource
from tokenmill.program.formats import WEIGHT_FORMATS

FALLBACK = "int8_group32"
"""What quantized tensors of an unknown block type become, and rows that other formats cannot divide into blocks."""


@dataclass(frozen=True, slots=True)
class FormatChoice:
    """Formats of checkpoint tensors.

    Args:
        formats: by the tensors' names; vectors are not named, they stay float32.
        notices: what was converted against the caller's wish or knowledge, for people.
        quantization: the choice in a word: `none`, a format, or several joined by `+`, the most frequent first.
    """

    formats: dict[str, str]
    notices: tuple[str, ...] = ()
    quantization: str = "none"


@dataclass(slots=True)
class _Notices:
    """Counts the tensors of each notice."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, text: str) -> None:
        self.counts[text] = self.counts.get(text, 0) + 1

    def lines(self) -> tuple[str, ...]:
        return tuple(f"{count} tensor{'s' if count > 1 else ''} {text}" for text, count in self.counts.items())


def choose_formats(
    graph: Graph, source: WeightSource, quantization: str, dtype: Literal["float32", "bfloat16"]
) -> FormatChoice:
    """The format of every matrix of `graph`.

    Args:
        graph: just captured: one linear for each checkpoint tensor.
        source: the checkpoint.
        quantization: as `BuildConfig.quantization`.
        dtype: of weights that are not quantized.
    """
    wanted = "int8_group32" if quantization == "int8" else quantization
    linear = _tensors_of(graph, (("linear", "weight"), ("experts", "gate_up"), ("experts", "down")))
    for name in _routers(graph):  # a router's few rows decide which experts answer: they stay as they are
        del linear[name]
    tables = _tensors_of(graph, (("embedding", "table"),))
    notices = _Notices()
    formats: dict[str, str] = {}
    for name, num_columns in (linear | tables).items():
        if wanted == "none" or (wanted != "auto" and name not in linear):
            formats[name] = dtype
        elif wanted == "auto":
            formats[name] = _own_format(source, name, num_columns, dtype, notices)
        elif WEIGHT_FORMATS[wanted].fits(num_columns):
            formats[name] = wanted
        else:
            formats[name] = FALLBACK
            notices.add(f"of {num_columns} columns cannot be {wanted}: stored as {FALLBACK}")
    _unify_stacks(graph, formats, notices)
    return FormatChoice(formats, notices.lines(), _summary(formats[name] for name in linear))


def _unify_stacks(graph: Graph, formats: dict[str, str], notices: _Notices) -> None:
    """The matrices of a layer's experts lie in one weight, which has one format."""
    for weight in graph.weights.values():
        found = sorted({formats[part.name] for part in weight.parts if part.name in formats})
        if len(found) > 1:
            for part in weight.parts:
                formats[part.name] = FALLBACK
                notices.add(f"of experts that are partly {' and partly '.join(found)}: stored as {FALLBACK}")


def _routers(graph: Graph) -> list[str]:
    """Names of the tensors that choose experts."""
    producers = graph.producers()
    nodes = [producers[node.inputs["router_logits"]] for node in graph.nodes_of_kind("experts")]
    weights = [graph.weights[node.weights["weight"]] for node in nodes if node.kind == "linear"]
    return [part.name for weight in weights for part in weight.parts]


def _own_format(source: WeightSource, name: str, num_columns: int, dtype: str, notices: _Notices) -> str:
    tensor = source.tensors.get(name)
    if tensor is None or tensor.block_type is None:
        return dtype  # a missing tensor is reported with all others, later
    native = source.native_format(name)
    if native is not None and WEIGHT_FORMATS[native].fits(num_columns):
        return native
    notices.add(f"of the type {tensor.block_type}, which engines do not run: converted to {FALLBACK}")
    return FALLBACK


def _tensors_of(graph: Graph, roles: Iterable[tuple[str, str]]) -> dict[str, int]:
    """Number of columns of the checkpoint tensors that nodes read in these roles, by name."""
    found: dict[str, int] = {}
    wanted = set(roles)
    for node in graph.nodes:
        for role, name in node.weights.items():
            weight = graph.weights.get(name)
            if (node.kind, role) in wanted and weight is not None:
                found.update((part.name, weight.shape[-1]) for part in weight.parts)
    return found


def _summary(formats: Iterable[str]) -> str:
    counts: dict[str, int] = {}
    for one in formats:
        counts[one] = counts.get(one, 0) + 1
    quantized = [name for name in sorted(counts, key=lambda name: -counts[name]) if WEIGHT_FORMATS[name].is_quantized]
    return "+".join(quantized) or "none"
