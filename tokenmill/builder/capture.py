"""`capture`: the graph of a model, from its configuration alone. Called by the builder; needs no weights.

The model is built on the meta device, one of its steps is recorded (`recording.py`), the calls become nodes
(`importer.py`), and torch.export confirms them. Weights carry the names of the checkpoint tensors that fill them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import torch

from tokenmill.builder.capture_proofs import CaptureProofs
from tokenmill.builder.graph import Graph, diff
from tokenmill.builder.importer import Parameter, import_recording
from tokenmill.builder.recording import capture_context, export, record
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.layers.weights import weight_targets
from tokenmill.models import load_model_class
from tokenmill.models.base import CausalLM
from tokenmill.models.config import ModelConfig
from tokenmill.program.program import WeightPart


def capture(
    config: ModelConfig,
    *,
    dtype: torch.dtype = torch.float32,
    method: Literal["export", "dispatch"] = "export",
    proofs: Path | None = None,
) -> Graph:
    """The graph of a step of the model that `config` describes.

    Args:
        config: the architecture.
        dtype: the type that the model computes in; some models round constants to it.
        method: `dispatch` records one step, within milliseconds; `export` does so, too, and then has torch.export prove
            that the graph serves every number of tokens and rows.
        proofs: folder where it is noted what was proved, so that it is proved once; None: it is proved each time.

    Raises:
        UnsupportedFeatureError: the model does something that programs cannot do.
    """
    model = load_model_class(config.model_type)(config, capture_context(dtype)).eval()
    parameters = parameters_of(model)
    graph = import_recording(record(model), parameters)
    graph.check()
    known = CaptureProofs(proofs)
    if method == "export" and not known.has(graph):
        _compare(graph, import_recording(export(model), parameters))
        known.add(graph)
    return graph


def _compare(recorded: Graph, exported: Graph) -> None:
    """Refuse a graph that is not the one that torch.export gives."""
    if recorded == exported:
        return
    lines = [line for line in diff(exported, recorded, context=0).splitlines()[3:] if line]
    raise UnsupportedFeatureError(
        f"The model computes something else for other numbers of tokens; the first difference is: {lines[0][:200]}",
        field="model",
        remedy="A model's layers may not depend on how many tokens a step has.",
    )


def parameters_of(model: CausalLM) -> dict[str, Parameter]:
    """Shape and checkpoint tensors of every parameter, by its full name."""
    parts: dict[int, list[tuple[int, WeightPart]]] = {}  # by memory: (first row, part)
    for name, target in weight_targets(model).items():
        destination = target.destination
        row = destination.storage_offset() // (destination.stride(0) or 1)
        part = WeightPart(name, destination.shape[0])
        parts.setdefault(destination.untyped_storage()._cdata, []).append((row, part))
    found = {}
    for name, parameter in model.named_parameters():
        placed = sorted(parts[parameter.untyped_storage()._cdata], key=lambda one: one[0])
        num_rows = parameter.shape[0] if parameter.dim() == 1 else math.prod(parameter.shape[:-1])
        assert sum(part.num_rows for _, part in placed) == num_rows, f"{name} is not filled"
        found[name] = Parameter(tuple(parameter.shape), tuple(part for _, part in placed))
    return found
