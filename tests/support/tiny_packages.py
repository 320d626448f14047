"""A small engine made by hand: the program of a random llama, its weights as float32 rows, a tokenizer, a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tests.support.tiny_programs import tiny_program
from tokenmill.checkpoints.safetensors_checkpoint import SafetensorsCheckpoint
from tokenmill.models.config import ModelConfig
from tokenmill.program.engine_config import EngineConfig, LimitsRecord, ModelRecord, TargetRecord
from tokenmill.program.package import EnginePackage
from tokenmill.program.weight_file import Bytes


def tiny_package(model: Path) -> EnginePackage:
    """The engine of the tiny model in the directory `model`."""
    checkpoint = SafetensorsCheckpoint(model)
    state = {tensor.name: tensor.load() for tensor in checkpoint.tensors()}
    program, weights = tiny_program(ModelConfig.from_hf(checkpoint.hf_config), state)
    buffers = tuple(replace(buffer, offset=64 * index) for index, buffer in enumerate(program.buffers))
    config = EngineConfig(
        tokenmill_version="0.0",
        model=ModelRecord(
            name="tiny", hf_config=checkpoint.hf_config, checkpoint_format="safetensors", quantization="none"
        ),
        target=TargetRecord(device="cpu", architecture="any", instruction_set="any"),
        limits=LimitsRecord(max_batch_size=4, max_num_tokens=64, max_input_len=63, max_seq_len=64, max_beam_width=1),
        dtype="float32",
        kv_cache_dtype="float32",
        quantization="none",
        tokenizer="tokenizer",
    )
    names = ("tokenizer.json", "tokenizer_config.json")
    return EnginePackage(
        config=config,
        program=replace(program, buffers=buffers, arena_bytes=1 << 20),
        weights={name: as_bytes(tensor) for name, tensor in weights.items()},
        files={f"tokenizer/{name}": model / name for name in names} | {"graph.html": b"<html></html>"},
        tokenizer_path=model,
    )


def as_bytes(tensor: torch.Tensor) -> Bytes:
    """The bytes of float32 rows."""
    return np.frombuffer(tensor.float().contiguous().numpy().tobytes(), np.uint8)
