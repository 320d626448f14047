"""`Engine`: a built engine with what the builder can do to it. Part of the public API."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec

from tokenmill.builder.packing import pack_weight
from tokenmill.builder.weight_source import WeightSource
from tokenmill.checkpoints.base import open_checkpoint
from tokenmill.checkpoints.resolve import resolve_model
from tokenmill.models.config import ModelConfig
from tokenmill.ops.cpu.cpu_features import best_dot_product
from tokenmill.program.package import EnginePackage
from tokenmill.program.weight_file import Bytes


class Engine(EnginePackage):
    """A model, compiled: `build` makes it, `save` and `load` keep it, `Session` and `LLM` run it."""

    @property
    def kernels(self) -> str:
        """What computes on this machine: the processor's best instructions for integer products that the kernels know,
        such as `avx512_vnni`, `avx2` or `portable`; `triton` for an engine for GPUs."""
        if self.config.target.device != "cpu":
            return "triton"
        return best_dot_product().name.lower()

    def refit(
        self,
        checkpoint: str | Path,
        *,
        revision: str | None = None,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> Self:
        """The same engine with the weights of another checkpoint of the same model. Nothing is captured or planned
        again: weights are encoded in the engine's formats and packed.

        Args:
            checkpoint: as `model` of `LLM`: names and shapes of its tensors must be those of the engine's model.
            revision: branch, tag or commit of a hub model.
            on_progress: told the name of each weight, weights done, all weights.

        Raises:
            CheckpointError: tensors are missing, left over or of another shape; the message names them.
        """
        opened = open_checkpoint(resolve_model(checkpoint, revision=revision))
        source = WeightSource(opened, ModelConfig.from_hf(self.config.model.hf_config))
        source.check(self.program.weights)
        weights: dict[str, Bytes] = {}
        for done, weight in enumerate(self.program.weights, start=1):
            weights[weight.name] = pack_weight(weight, source) if weight.parts else self.weights[weight.name]
            if on_progress is not None:
                on_progress(weight.name, done, len(self.program.weights))
        config = msgspec.structs.replace(self.config, stripped=False)
        return dataclasses.replace(self, config=config, weights=weights)

    def strip(self) -> Self:
        """The same engine without the weights that a checkpoint holds; `refit` puts them in again."""
        constants = {weight.name for weight in self.program.weights if not weight.parts}
        kept = {name: content for name, content in self.weights.items() if name in constants}
        return dataclasses.replace(self, config=msgspec.structs.replace(self.config, stripped=True), weights=kept)
