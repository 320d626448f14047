"""From the recording of a model to a `Graph`: one node for each call that computes, none for views of heads.

Linear layers come out as the checkpoint holds them, one for each of its tensors, with biases added by nodes of their
own: merging and fusing is for passes. What is not known is refused with the name of the call and the module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenmill.builder.graph import Graph, Node, Value, free_name
from tokenmill.builder.recording import Call, RecordedTensor, Recording
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.program.program import AttributeValue, Dim, Weight, WeightPart


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model.

    Args:
        shape: of it.
        parts: the checkpoint tensors that fill it, in order of its rows.
    """

    shape: tuple[int, ...]
    parts: tuple[WeightPart, ...]


def import_recording(recording: Recording, parameters: Mapping[str, Parameter]) -> Graph:
    """The graph of a recorded step.

    Raises:
        UnsupportedFeatureError: the model calls something that programs cannot do.
    """
    importer = _Importer(recording, parameters)
    for call in recording.calls:
        importer.add_call(call)
    return importer.graph(recording)


@dataclass(frozen=True, slots=True)
class _Routing:
    """How the experts of each token are chosen."""

    logits: Value
    top_k: int
    normalize: bool


@dataclass(slots=True)
class _Importer:
    recording: Recording
    parameters: Mapping[str, Parameter]
    nodes: list[Node] = field(default_factory=list)
    weights: dict[str, Weight] = field(default_factory=dict)
    constants: dict[str, tuple[float, ...]] = field(default_factory=dict)
    values: dict[RecordedTensor, Value] = field(default_factory=dict)
    weight_names: dict[RecordedTensor, str] = field(default_factory=dict)
    routings: dict[RecordedTensor, _Routing] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for tensor, name in self.recording.inputs.items():
            self.values[tensor] = Value(name, tensor.shape[0], 1, "int32")
        self.weight_names.update(self.recording.parameters)

    def graph(self, recording: Recording) -> Graph:
        assert recording.output is not None
        inputs = tuple(self.values[tensor] for tensor in recording.inputs)
        # Arithmetic on weights needs nothing but them: it comes first, so that whoever reads it may move up.
        nodes = sorted(self.nodes, key=lambda node: node.kind != "offset_weight")
        return Graph(inputs, self.values[recording.output].name, tuple(nodes), self.weights, self.constants)

    def add_call(self, call: Call) -> None:
        handler = _HANDLERS.get(call.operator)
        if handler is None:
            raise UnsupportedFeatureError(
                f"The module {call.module} calls {call.operator}, which a program cannot do.",
                field="model",
                remedy="Use the torch backend, or write the module with the ops of tokenmill.ops.",
            )
        handler(self, call)

    # what handlers are made of

    def add_node(
        self,
        kind: str,
        name: str,
        inputs: Mapping[str, Value],
        columns: int,
        *,
        rows: Dim | None = None,
        weights: Mapping[str, str] | None = None,
        **attributes: AttributeValue,
    ) -> Value:
        """A node with the output `y` (of as many rows as its first input); attributes that are None are left out."""
        name = self.new_name(name)
        if rows is None:
            rows = next(iter(inputs.values())).rows
        value = Value(name, rows, columns)
        names = {role: one.name for role, one in inputs.items()}
        given = {key: attribute for key, attribute in attributes.items() if attribute is not None}
        self.nodes.append(Node(kind, name, names, {"y": value}, weights or {}, given))
        return value

    def new_name(self, wanted: str) -> str:
        """`wanted`, or with a number if it is taken."""
        name = free_name(wanted, self.names)
        self.names.add(name)
        return name

    def value(self, tensor: Any, call: Call) -> Value:
        """The value that a tensor of the call is."""
        if tensor not in self.values:
            raise _unsupported(call, "of a tensor that is no activation")
        return self.values[tensor]

    def whole_weight(self, tensor: RecordedTensor) -> str:
        """The name of the weight that is a whole parameter, or arithmetic on one."""
        name = self.weight_names[tensor]
        if name not in self.parameters:  # of `offset_weight`
            return name
        (part,) = self.parameters[name].parts
        return self.add_weight(part, self.parameters[name].shape)

    def stacked_weight(self, tensor: RecordedTensor) -> str:
        """The weight that is a parameter of several matrices, all their rows below each other."""
        name = self.weight_names[tensor]
        parameter = self.parameters[name]
        num_rows = sum(part.num_rows for part in parameter.parts)
        self.weights[name] = Weight(name, (num_rows, parameter.shape[-1]), parts=parameter.parts)
        return name

    def add_weight(self, part: WeightPart, shape: Sequence[int]) -> str:
        """The weight that is one checkpoint tensor."""
        self.weights[part.name] = Weight(part.name, (part.num_rows, *shape[1:]), parts=(part,))
        return part.name


def _unsupported(call: Call, what: str) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"The module {call.module} calls {call.operator} {what}, which a program cannot do.", field="model"
    )


def _alias(importer: _Importer, call: Call) -> None:
    """Another shape or type of the same numbers."""
    source, target = call.arguments[0], call.outputs[0]
    if source in importer.weight_names:
        importer.weight_names[target] = importer.weight_names[source]
        return
    value = importer.value(source, call)
    if not target.shape or target.shape[0] != value.rows or _num_columns(target) != value.columns:
        raise _unsupported(call, f"from {source.shape} to {target.shape}")
    importer.values[target] = value


def _slice(importer: _Importer, call: Call) -> None:
    source, target = call.arguments[0], call.outputs[0]
    dim, start = (*call.arguments[1:], 0, 0)[:2] if len(call.arguments) < 3 else call.arguments[1:3]
    if source.shape == target.shape:
        _alias(importer, call)
        return
    value = importer.value(source, call)
    step = call.arguments[4] if len(call.arguments) > 4 else 1
    if dim != 1 or step != 1 or start < 0:
        raise _unsupported(call, f"along dimension {dim} from {start}")
    width = math.prod(int(size) for size in source.shape[2:])
    importer.values[target] = _add_slice(importer, value, start * width, _num_columns(target))


def _add_slice(importer: _Importer, value: Value, first_column: int, num_columns: int) -> Value:
    if num_columns == value.columns:
        return value
    name = f"{value.name}[{first_column}:{first_column + num_columns}]"
    return importer.add_node(
        "slice", name, {"x": value}, num_columns, first_column=first_column, num_columns=num_columns
    )


def _add(importer: _Importer, call: Call) -> None:
    first, second = call.arguments[:2]
    if first in importer.weight_names and isinstance(second, int | float):
        weight = importer.whole_weight(first)
        (columns,) = importer.parameters[importer.weight_names[first]].shape
        value = importer.add_node(
            "offset_weight", f"{weight}_plus", {}, columns, rows=1, weights={"weight": weight}, offset=float(second)
        )
        importer.weight_names[call.outputs[0]] = value.name
        return
    a, b = importer.value(first, call), importer.value(second, call)
    if (a.rows, a.columns) != (b.rows, b.columns):
        raise _unsupported(call, f"of {a} and {b}")
    importer.values[call.outputs[0]] = importer.add_node("add", _name(call, "add"), {"a": a, "b": b}, a.columns)


def _multiply(importer: _Importer, call: Call) -> None:
    first, second = call.arguments[:2]
    a = importer.value(first, call)
    if isinstance(second, int | float):
        result = importer.add_node("scale", _name(call, "scale"), {"x": a}, a.columns, factor=float(second))
    else:
        b = importer.value(second, call)
        if (a.rows, a.columns) != (b.rows, b.columns):
            raise _unsupported(call, f"of {a} and {b}")
        result = importer.add_node("multiply", _name(call, "multiply"), {"a": a, "b": b}, a.columns)
    importer.values[call.outputs[0]] = result


def _embedding(importer: _Importer, call: Call) -> None:
    table, token_ids = call.arguments[:2]
    weights = {"table": importer.whole_weight(table)}
    value = importer.value(token_ids, call)
    columns = _num_columns(call.outputs[0])
    importer.values[call.outputs[0]] = importer.add_node(
        "embedding", call.module, {"token_ids": value}, columns, weights=weights, scale=1.0
    )


def _linear(importer: _Importer, call: Call) -> None:
    """One node for each checkpoint tensor in the weight, and one for its bias."""
    x, weight, bias = call.arguments
    parameter = importer.parameters[importer.weight_names[weight]]
    biases = importer.parameters[importer.weight_names[bias]].parts if bias is not None else ()
    value = importer.value(x, call)
    results = []
    for index, part in enumerate(parameter.parts):
        name = part.name.removesuffix(".weight") if len(parameter.parts) > 1 else call.module
        weights = {"weight": importer.add_weight(part, parameter.shape)}
        result = importer.add_node("linear", name, {"x": value}, part.num_rows, weights=weights)
        if biases:
            weights = {"bias": importer.add_weight(biases[index], (biases[index].num_rows,))}
            result = importer.add_node("add_bias", f"{name}.add_bias", {"x": result}, part.num_rows, weights=weights)
        results.append(result)
    if len(results) > 1:
        inputs = {f"x{index}": result for index, result in enumerate(results)}
        results = [importer.add_node("concat", call.module, inputs, sum(one.columns for one in results))]
    importer.values[call.outputs[0]] = results[0]


def _rms_norm(importer: _Importer, call: Call) -> None:
    x, weight, eps = call.arguments
    value = importer.value(x, call)
    name = importer.weight_names[weight].removesuffix("_plus").removesuffix(".weight")
    importer.values[call.outputs[0]] = importer.add_node(
        "rms_norm",
        name,
        {"x": value},
        value.columns,
        weights={"weight": importer.whole_weight(weight)},
        eps=eps,
        head_dim=int(x.shape[2]) if len(x.shape) == 3 else None,
    )


def _rotation(importer: _Importer, call: Call) -> None:
    positions, frequencies, factor = call.arguments
    name = importer.new_name(f"{call.module}.rotation")
    importer.names.remove(name)
    weight = f"{name}.frequencies"
    importer.weights[weight] = Weight(weight, (len(frequencies),))
    importer.constants[weight] = tuple(frequencies)
    value = importer.add_node(
        "rotation",
        name,
        {"positions": importer.value(positions, call)},
        2 * len(frequencies),
        weights={"frequencies": weight},
        factor=factor,
    )
    for output in call.outputs:  # cosines and sines: one value holds both
        importer.values[output] = value


def _rope(importer: _Importer, call: Call) -> None:
    x, cos, _ = call.arguments
    value = importer.value(x, call)
    inputs = {"x": value, "rotation": importer.value(cos, call)}
    importer.values[call.outputs[0]] = importer.add_node(
        "rope", _name(call, "rope"), inputs, value.columns, head_dim=int(x.shape[2])
    )


def _attention(importer: _Importer, call: Call) -> None:
    """The write to the cache, then the attention."""
    query, key, value, key_cache, _, scale, sliding_window, soft_cap = call.arguments
    layer, _ = importer.recording.caches[key_cache]
    inputs = {"key": importer.value(key, call), "value": importer.value(value, call)}
    parent = call.module.rpartition(".")[0]
    names = {role: one.name for role, one in inputs.items()}
    name = importer.new_name(f"{parent}.write_cache")
    importer.nodes.append(Node("write_cache", name, names, attributes={"layer": layer}))
    heads = importer.value(query, call)
    importer.values[call.outputs[0]] = importer.add_node(
        "attention",
        call.module,
        {"query": heads},
        heads.columns,
        layer=layer,
        num_heads=int(query.shape[1]),
        num_kv_heads=int(key.shape[1]),
        head_dim=int(query.shape[2]),
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )


def _gated_activation(importer: _Importer, call: Call) -> None:
    gate_up, activation = call.arguments
    value = importer.value(gate_up, call)
    half = value.columns // 2
    inputs = {"gate": _add_slice(importer, value, 0, half), "up": _add_slice(importer, value, half, half)}
    importer.values[call.outputs[0]] = importer.add_node(
        "gated_activation", _name(call, "gated_activation"), inputs, half, activation=activation
    )


def _route(importer: _Importer, call: Call) -> None:
    """Nothing by itself: `experts` chooses them."""
    logits, top_k, normalize = call.arguments
    routing = _Routing(importer.value(logits, call), top_k, normalize)
    importer.routings.update((output, routing) for output in call.outputs)


def _experts(importer: _Importer, call: Call) -> None:
    x, experts, _, gate_up, down, activation = call.arguments
    routing = importer.routings[experts]
    value = importer.value(x, call)
    importer.values[call.outputs[0]] = importer.add_node(
        "experts",
        call.module,
        {"x": value, "router_logits": routing.logits},
        value.columns,
        weights={"gate_up": importer.stacked_weight(gate_up), "down": importer.stacked_weight(down)},
        num_experts=routing.logits.columns,
        top_k=routing.top_k,
        normalize=routing.normalize,
        activation=activation,
    )


def _select_rows(importer: _Importer, call: Call) -> None:
    x, dim, row_index = call.arguments
    if dim != 0:
        raise _unsupported(call, f"along dimension {dim}")
    inputs = {"x": importer.value(x, call), "row_index": importer.value(row_index, call)}
    importer.values[call.outputs[0]] = importer.add_node(
        "select_rows", _name(call, "select_rows"), inputs, inputs["x"].columns, rows=inputs["row_index"].rows
    )


def _soft_cap(importer: _Importer, call: Call) -> None:
    x, cap = call.arguments
    value = importer.value(x, call)
    importer.values[call.outputs[0]] = importer.add_node(
        "soft_cap", _name(call, "soft_cap"), {"x": value}, value.columns, cap=cap
    )


def _name(call: Call, name: str) -> str:
    return f"{call.module}.{name}" if call.module else name


def _num_columns(tensor: RecordedTensor) -> int:
    return math.prod(int(size) for size in tensor.shape[1:])


_HANDLERS: Mapping[str, Callable[[_Importer, Call], None]] = {
    **dict.fromkeys(
        (
            "aten._to_copy.default",
            "aten._unsafe_view.default",
            "aten.alias.default",
            "aten.clone.default",
            "aten.contiguous.default",
            "aten.detach.default",
            "aten.flatten.using_ints",
            "aten.reshape.default",
            "aten.to.dtype",
            "aten.view.default",
        ),
        _alias,
    ),
    "aten.add.Tensor": _add,
    "aten.embedding.default": _embedding,
    "aten.index_select.default": _select_rows,
    "aten.mul.Tensor": _multiply,
    "aten.slice.Tensor": _slice,
    "tokenmill.apply_rope.default": _rope,
    "tokenmill.attention.default": _attention,
    "tokenmill.experts.default": _experts,
    "tokenmill.gated_activation.default": _gated_activation,
    "tokenmill.linear.default": _linear,
    "tokenmill.rms_norm.default": _rms_norm,
    "tokenmill.rotation.default": _rotation,
    "tokenmill.route.default": _route,
    "tokenmill.soft_cap.default": _soft_cap,
}
"""What each call becomes, by the operator's name."""
