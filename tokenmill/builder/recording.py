"""Runs a model without values and writes down every call that it makes, by `torch.export` or by a dispatch mode.

Both ways give the same `Recording`, which `importer.py` turns into a graph. `torch.export` proves that nothing in the
model depends on the number of tokens or rows, and needs a second for its first use in a process; the dispatch mode
needs milliseconds and finds the two sizes by numbers that occur nowhere else. Models know of neither: they are built on
the meta device, where the ops of `tokenmill.ops` are opaque calls.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tokenmill.attention.base import AttentionMetadata, AttentionSpec, LayerCache
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.layers.context import LayerContext
from tokenmill.layers.forward_batch import ForwardBatch
from tokenmill.layers.moe import Experts
from tokenmill.models.base import CausalLM
from tokenmill.ops.moe import Routing
from tokenmill.program.program import Dim
from tokenmill.quantization.base import ExpertParameter, ExpertSizes
from tokenmill.quantization.unquantized import UnquantizedExperts

NUM_TOKENS: Final = 1_000_003
NUM_ROWS: Final = 500_009
"""Primes that are no size of a model: where the dispatch mode sees them, it sees tokens and rows."""

META: Final = torch.device("meta")


def _elementwise(a: torch.Tensor, b: torch.Tensor | float) -> torch.Tensor:
    assert not isinstance(b, torch.Tensor) or a.shape == b.shape, f"{a.shape} and {b.shape} are not of one shape"
    return a.new_empty(a.shape)


def _embedding(table: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    return table.new_empty(*token_ids.shape, table.shape[1])


_RESULTS: Final[Mapping[object, Callable[..., torch.Tensor]]] = {
    torch.ops.aten.add.Tensor: _elementwise,
    torch.ops.aten.mul.Tensor: _elementwise,
    torch.ops.aten.embedding.default: _embedding,
}
"""Operators that torch defines in Python on the meta device: calling them would load its compiler, a second of work."""


@dataclass(frozen=True, slots=True, eq=False)
class RecordedTensor:
    """A tensor of a recording; two are the same if they are the same object.

    Args:
        shape: of it; heads are a dimension of their own.
    """

    shape: tuple[Dim, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operator.

    Args:
        operator: its full name, such as `aten.add.Tensor`.
        arguments: positional ones, tensors as `RecordedTensor`.
        outputs: what it returns.
        module: full name of the module that makes the call.
    """

    operator: str
    arguments: tuple[Any, ...]
    outputs: tuple[RecordedTensor, ...]
    module: str


@dataclass(slots=True)
class Recording:
    """A step of a model.

    Args:
        inputs: `token_ids`, `positions`, `row_index`.
        parameters: full name of each parameter that is read.
        caches: (layer, 0 for keys or 1 for values) of each cache.
        calls: in order.
        output: the logits.
    """

    inputs: dict[RecordedTensor, str] = field(default_factory=dict)
    parameters: dict[RecordedTensor, str] = field(default_factory=dict)
    caches: dict[RecordedTensor, tuple[int, int]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    output: RecordedTensor | None = None


class CapturedAttention:
    """The attention backend of a model that is captured: one opaque call for the write to the cache and the reads."""

    name = "captured"

    def forward(
        self,
        spec: AttentionSpec,
        query: torch.Tensor,  # [T, H, D]
        key: torch.Tensor,  # [T, G, D]
        value: torch.Tensor,  # [T, G, D]
        cache: LayerCache,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:  # [T, H, D]
        """See `AttentionBackend.forward`."""
        output: torch.Tensor = torch.ops.tokenmill.attention(
            query, key, value, cache[0], cache[1], spec.scale, spec.sliding_window, spec.soft_cap
        )
        return output


class CapturedExperts(UnquantizedExperts):
    """The experts of a model that is captured: one opaque call with both parameters."""

    def create_weights(
        self, layer: nn.Module, sizes: ExpertSizes, dtype: torch.dtype, device: torch.device
    ) -> Mapping[str, ExpertParameter]:
        """As for experts that are computed."""
        assert isinstance(layer, Experts)
        self._layer = layer
        return super().create_weights(layer, sizes, dtype, device)

    def apply(self, x: torch.Tensor, routing: Routing) -> torch.Tensor:
        """[T, H] to [T, H]."""
        gate_up, down = (self._layer.get_parameter(name) for name in ("gate_up_proj", "down_proj"))
        output: torch.Tensor = torch.ops.tokenmill.experts(x, *routing, gate_up, down, self._layer.activation)
        return output


def capture_context(dtype: torch.dtype) -> LayerContext:
    """How a model is built for capture: without values, and with calls that can be read."""
    return LayerContext(
        dtype=dtype, device=META, backend=CapturedAttention(), experts_method=lambda name: CapturedExperts()
    )


class Step(nn.Module):
    """A whole step of a model: token ids to logits of the wanted rows."""

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        token_ids: torch.Tensor,  # [T]
        positions: torch.Tensor,  # [T]
        row_index: torch.Tensor,  # [R]
        caches: tuple[LayerCache, ...],
    ) -> torch.Tensor:  # [R, vocab_size]
        """The logits of the tokens at `row_index`."""
        metadata = AttentionMetadata(positions, positions, positions, positions, 0, (), ())  # nobody reads it
        hidden = self.model(ForwardBatch(token_ids, positions, metadata, caches))
        return self.model.compute_logits(hidden.index_select(0, row_index))


def example_inputs(
    model: CausalLM, num_tokens: int, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[LayerCache, ...]]:
    """Arguments for `Step` on the meta device."""
    token_ids, positions = (torch.empty(num_tokens, dtype=torch.int64, device=META) for _ in range(2))
    row_index = torch.empty(num_rows, dtype=torch.int64, device=META)
    shape = (1, 1, model.config.num_key_value_heads, model.config.head_dim)
    caches = tuple(
        (torch.empty(shape, device=META), torch.empty(shape, device=META)) for _ in range(model.config.num_layers)
    )
    return token_ids, positions, row_index, caches


def record(model: CausalLM) -> Recording:
    """What one step of `model` (on the meta device) calls, by a dispatch mode."""
    recorder = _Recorder()
    token_ids, positions, row_index, caches = example_inputs(model, NUM_TOKENS, NUM_ROWS)
    recording = recorder.recording
    for name, tensor in (("token_ids", token_ids), ("positions", positions), ("row_index", row_index)):
        recording.inputs[recorder.tensor(tensor)] = name
    for name, parameter in model.named_parameters():
        recording.parameters[recorder.parameter(parameter)] = name
    for layer, cache in enumerate(caches):
        for which, tensor in enumerate(cache):
            recording.caches[recorder.tensor(tensor)] = (layer, which)
    with torch.no_grad(), recorder.module_names(model), recorder:
        logits = Step(model)(token_ids, positions, row_index, caches)
    recording.output = recorder.tensor(logits)
    return recording


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down the calls below it, under the names of the modules that make them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self._tensors: dict[int, tuple[torch.Tensor, RecordedTensor]] = {}  # by id; held, so that no id is used again
        self._parameters: dict[int, RecordedTensor] = {}  # by memory: layers may hold a parameter's data
        self._modules: list[str] = [""]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing here is compiled; saying so spares the import of the compiler, which takes a second."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = _RESULTS.get(func, func)(*args, **(kwargs or {}))
        outputs = result if isinstance(result, tuple | list) else (result,)
        arguments = tuple(self.tensor(one) if isinstance(one, torch.Tensor) else one for one in args)
        tensors = tuple(self.tensor(one) for one in outputs if isinstance(one, torch.Tensor))
        self.recording.calls.append(Call(str(func), arguments, tensors, self._modules[-1]))
        return result

    def tensor(self, tensor: torch.Tensor) -> RecordedTensor:
        """The same object for the same tensor."""
        known = self._tensors.get(id(tensor))
        if known is None:
            sizes: dict[int, Dim] = {NUM_TOKENS: "tokens", NUM_ROWS: "rows"}
            shape = tuple(sizes.get(size, size) for size in tensor.shape)
            recorded = self._parameters.get(_storage(tensor))
            if recorded is None or recorded.shape != shape:
                recorded = RecordedTensor(shape)
            known = tensor, recorded
            self._tensors[id(tensor)] = known
        return known[1]

    def parameter(self, parameter: torch.Tensor) -> RecordedTensor:
        """The same for a parameter of the model, which whoever shares its memory and shape stands for, too."""
        recorded = self._parameters[_storage(parameter)] = self.tensor(parameter)
        return recorded

    @contextmanager
    def module_names(self, model: nn.Module) -> Iterator[None]:
        """Keeps track of the module whose `forward` runs."""

        def leave(*_: object) -> None:
            self._modules.pop()

        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: self._modules.append(name)))
            handles.append(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def export(model: CausalLM) -> Recording:
    """What one step of `model` (on the meta device) calls, by `torch.export` with dynamic tokens and rows.

    Raises:
        UnsupportedFeatureError: the model cannot be exported: its steps depend on the number of tokens or rows.
    """
    from torch.export import Dim as ExportDim  # loads the compiler, a second of work

    tokens, rows = ExportDim("tokens"), ExportDim("rows")
    inputs = example_inputs(model, 7, 5)
    fixed = tuple((None, None) for _ in range(model.config.num_layers))
    try:
        exported = torch.export.export(
            Step(model), inputs, dynamic_shapes=({0: tokens}, {0: tokens}, {0: rows}, fixed), strict=False
        )
    except (RuntimeError, ValueError) as error:
        raise UnsupportedFeatureError(
            f"The model cannot be captured by torch.export: {str(error).splitlines()[0]}",
            field="model",
            remedy="A model's layers may not depend on how many tokens a step has.",
        ) from error
    return _ExportReader(exported, model).recording


class _ExportReader:
    """Turns an exported program into a recording."""

    def __init__(self, exported: Any, model: CausalLM) -> None:
        self.recording = Recording()
        self._tensors: dict[Any, tuple[RecordedTensor, ...]] = {}
        self._symbols: dict[str, Dim] = {}
        placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
        for node in placeholders:
            if node.name in ("token_ids", "row_index"):
                self._symbols[str(node.meta["val"].shape[0])] = "tokens" if node.name == "token_ids" else "rows"
        names = {_storage(parameter): name for name, parameter in model.named_parameters()}
        for node in placeholders:
            self._placeholder(node, exported, names)
        for node in exported.graph.nodes:
            if node.op == "call_function":
                self._call(node)
        (output,) = next(iter(node for node in exported.graph.nodes if node.op == "output")).args[0]
        self.recording.output = self._tensors[output][0]

    def _placeholder(self, node: Any, exported: Any, names: dict[int, str]) -> None:
        tensor = RecordedTensor(self._shape(node.meta["val"]))
        self._tensors[node] = (tensor,)
        signature = exported.graph_signature
        if node.name in signature.inputs_to_parameters:
            self.recording.parameters[tensor] = signature.inputs_to_parameters[node.name].removeprefix("model.")
        elif node.name in signature.inputs_to_lifted_tensor_constants:  # a parameter that a method holds
            constant = exported.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
            self.recording.parameters[tensor] = names[_storage(constant)]
        elif node.name.startswith("caches_"):
            _, layer, which = node.name.split("_")
            self.recording.caches[tensor] = (int(layer), int(which))
        else:
            self.recording.inputs[tensor] = node.name

    def _call(self, node: Any) -> None:
        if node.target is operator.getitem:
            self._tensors[node] = (self._tensors[node.args[0]][node.args[1]],)
            return
        value = node.meta.get("val")
        values: Sequence[Any] = value if isinstance(value, tuple | list) else (value,)
        outputs = tuple(RecordedTensor(self._shape(one)) for one in values if isinstance(one, torch.Tensor))
        self._tensors[node] = outputs
        if not outputs:  # a size or an assertion
            return
        arguments = tuple(self._tensors[one][0] if self._tensors.get(one) else one for one in map(_hashable, node.args))
        stack = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
        module = stack[-1].removeprefix("model").removeprefix(".") if stack else ""
        self.recording.calls.append(Call(str(node.target), arguments, outputs, module))

    def _shape(self, tensor: torch.Tensor) -> tuple[Dim, ...]:
        return tuple(size if isinstance(size, int) else self._symbols[str(size)] for size in tensor.shape)


def _hashable(argument: Any) -> Any:
    return tuple(argument) if isinstance(argument, list) else argument


def _storage(tensor: torch.Tensor) -> int:
    """Equal for tensors that share their memory, which has no address on the meta device."""
    return int(tensor.untyped_storage()._cdata)
