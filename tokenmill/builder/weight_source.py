"""`WeightSource`: a checkpoint's tensors by the model's names for them, in the format that a program wants.

Tensors that are stored in one of the program's own formats are taken as they are, byte for byte; others are decoded
and encoded again. Used when an engine is built and when it is given new weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tokenmill.builder.recording import META, CapturedAttention
from tokenmill.checkpoints.base import Checkpoint, LazyTensor
from tokenmill.checkpoints.loading import named_tensors
from tokenmill.checkpoints.row_formats import BLOCK_TYPES, Rows, encode_rows
from tokenmill.errors import CheckpointError
from tokenmill.layers.context import LayerContext
from tokenmill.models import load_model_class
from tokenmill.models.base import CausalLM
from tokenmill.models.config import ModelConfig
from tokenmill.program.program import Weight

_MAX_LISTED = 5


class WeightSource:
    """The tensors of `checkpoint` that a model uses.

    Args:
        checkpoint: where they come from.
        config: of the model.

    Attributes:
        tensors: by the names that the model's weights have.

    Raises:
        CheckpointError: two tensors have the same name.
    """

    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.checkpoint = checkpoint
        self.tensors: dict[str, LazyTensor] = {}
        model = _without_layers(config)
        self._ignored = model.ignored_weights
        for name, tensor in named_tensors(checkpoint, model.rename_weight, model.unstack_weight):
            if name in self.tensors:
                raise CheckpointError(f"{checkpoint.path} holds the tensor '{tensor.name}' twice.", field="model")
            self.tensors[name] = tensor

    def native_format(self, name: str) -> str | None:
        """The program's format in which the tensor is stored; None if there is none for its type."""
        tensor = self.tensors[name]
        if tensor.block_type is not None:
            return BLOCK_TYPES.get(tensor.block_type)
        return "bfloat16" if tensor.dtype == torch.bfloat16 else "float32"

    def check(self, weights: Iterable[Weight]) -> None:
        """Compare the tensors with the parts of all weights of a program.

        Raises:
            CheckpointError: tensors are missing, left over or of another shape; the message names them.
        """
        expected = {part.name: (part.num_rows, *weight.shape[1:]) for weight in weights for part in weight.parts}
        missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in self.tensors]
        unexpected = [
            f"{tensor.name} {list(tensor.shape)}"
            for name, tensor in self.tensors.items()
            if name not in expected and not any(pattern.fullmatch(name) for pattern in self._ignored)
        ]
        mismatched = [
            f"{name} is {list(self.tensors[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in self.tensors and tuple(self.tensors[name].shape) != shape
        ]
        if missing or unexpected or mismatched:
            parts = (
                _listed("missing", missing),
                _listed("unexpected", unexpected),
                _listed("of another shape", mismatched),
            )
            raise CheckpointError(
                f"{self.checkpoint.path} does not fit the model: {'; '.join(part for part in parts if part)}.",
                field="model",
                remedy="Check that the weights and the configuration belong to the same model.",
            )

    def encoded(self, weight: Weight) -> Rows:
        """The weight's rows in its format, [out_features, bytes of a row]; a vector is one row.

        Raises:
            CheckpointError: a file is damaged.
        """
        parts = [self._encoded_part(part.name, weight) for part in weight.parts]
        if len(weight.shape) == 1:
            return np.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def values(self, weight: Weight) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The weight's values, [out_features, in_features] float32."""
        parts = [self._transformed(part.name, weight).float().numpy() for part in weight.parts]
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    def _encoded_part(self, name: str, weight: Weight) -> Rows:
        tensor = self.tensors[name]
        if weight.transform == "none" and tensor.block_type and BLOCK_TYPES.get(tensor.block_type) == weight.format:
            assert tensor.load_blocks is not None
            return tensor.load_blocks()
        values = self._transformed(name, weight)
        return encode_rows(values.reshape(1, -1) if values.dim() == 1 else values, weight.format)

    def _transformed(self, name: str, weight: Weight) -> torch.Tensor:
        values = self.tensors[name].load()
        return values.float() + 1.0 if weight.transform == "add_one" else values


def _without_layers(config: ModelConfig) -> CausalLM:
    """The model with no layers and no memory: it knows which tensors it ignores and what it calls the others."""
    context = LayerContext(dtype=torch.float32, device=META, backend=CapturedAttention())
    return load_model_class(config.model_type)(replace(config, num_layers=0, layer_types=()), context)


def _listed(what: str, entries: list[str]) -> str:
    if not entries:
        return ""
    rest = f" and {len(entries) - _MAX_LISTED} more" if len(entries) > _MAX_LISTED else ""
    noun = "tensor" if len(entries) == 1 else "tensors"
    return f"{len(entries)} {noun} {what}: {', '.join(entries[:_MAX_LISTED])}{rest}"
