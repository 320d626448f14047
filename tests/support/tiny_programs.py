"""Programs written by hand from a configuration: one operation for each line of the model's definition, nothing fused.

Independent of the builder, so that executors can be tested without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenmill.layers.rope import inverse_frequencies
from tokenmill.layers.rope_config import RopeConfig
from tokenmill.models.config import ModelConfig
from tokenmill.program.engine_config import EngineConfig, LimitsRecord, ModelRecord, TargetRecord
from tokenmill.program.package import EnginePackage
from tokenmill.program.program import AttributeValue, Buffer, Operand, Operation, Program, Weight, WeightPart
from tokenmill.version import __version__


class ProgramWriter:
    """Writes the program of a decoder-only model, with a buffer for every intermediate result."""

    def __init__(self, config: ModelConfig, state: Mapping[str, torch.Tensor]) -> None:
        self.config = config
        self.weights: dict[str, torch.Tensor] = {}
        self._state = state
        self._buffers: dict[str, Buffer] = {}
        self._operations: list[Operation] = []
        self._listed: list[Weight] = []

    def write(self) -> Program:
        """The program; `weights` holds its weights afterwards."""
        config, size = self.config, self.config.hidden_size
        is_gemma = config.model_type.startswith("gemma3")
        inputs = tuple(
            Buffer(name, rows, 1, "int32")
            for name, rows in (("token_ids", "tokens"), ("positions", "tokens"), ("row_index", "rows"))
        )
        output = Buffer("logits", "rows", config.vocab_size)
        for buffer in (*inputs, output):
            self._buffers[buffer.name] = buffer
        rotations = {"full_attention": self._rotation("rotation", config.rope)}
        rotations["sliding_attention"] = self._rotation("local_rotation", config.local_rope or config.rope)
        scale = config.hidden_size**0.5 if is_gemma else 1.0
        x = self.op("embedding", "embed", {"token_ids": "token_ids"}, size, {"table": "model.embed_tokens.weight"},
                    scale=scale)  # fmt: skip
        for layer in range(config.num_layers):
            x = self._layer(f"model.layers.{layer}", layer, x, rotations[config.layer_types[layer]])
        x = self._norm("model.norm", x)
        x = self.op("select_rows", "select", {"x": x, "row_index": "row_index"}, size, rows="rows")
        head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        cap = config.final_logit_soft_cap
        x = self.op("linear", "lm_head", {"x": x}, config.vocab_size, {"weight": head}, rows="rows",
                    into="logits" if cap is None else None)  # fmt: skip
        if cap is not None:
            self.op("soft_cap", "cap", {"x": x}, config.vocab_size, rows="rows", into="logits", cap=cap)
        own = tuple(buffer for buffer in self._buffers.values() if buffer not in (*inputs, output))
        return Program(inputs, output, own, tuple(self._listed), tuple(self._operations))

    def op(
        self,
        kind: str,
        name: str,
        inputs: Mapping[str, str | Operand],
        columns: int,
        weights: Mapping[str, str] | None = None,
        *,
        rows: str = "tokens",
        into: str | None = None,
        **attributes: AttributeValue,
    ) -> str:
        """Append an operation that writes a buffer of its own; returns the buffer's name."""
        target = into or f"{name}.y"
        if into is None and columns:
            self._buffers[target] = Buffer(target, rows, columns)  # type: ignore[arg-type]
        for weight in (weights or {}).values():
            self._add_weight(weight)
        operands = {
            role: Operand(value, 0, self._buffers[value].columns) if isinstance(value, str) else value
            for role, value in inputs.items()
        }
        outputs = {"y": Operand(target, 0, columns)} if columns else {}
        self._operations.append(Operation(kind, name, operands, outputs, dict(weights or {}), attributes))
        return target

    def _add_weight(self, name: str, tensor: torch.Tensor | None = None) -> None:
        if name in self.weights:
            return
        is_constant = tensor is not None
        if tensor is None:
            tensor = self._state[name]
        add_one = self.config.model_type.startswith("gemma3") and name.endswith("norm.weight")
        self.weights[name] = tensor.float() + 1.0 if add_one else tensor.float()
        parts = () if is_constant else (WeightPart(name, tensor.shape[0]),)
        self._listed.append(Weight(name, tuple(tensor.shape), parts=parts, transform="add_one" if add_one else "none"))

    def _rotation(self, name: str, rope: RopeConfig) -> str:
        self._add_weight(f"{name}.frequencies", inverse_frequencies(rope, self.config.head_dim))
        return self.op("rotation", name, {"positions": "positions"}, self.config.head_dim,
                       {"frequencies": f"{name}.frequencies"}, factor=rope.attention_factor)  # fmt: skip

    def _norm(self, name: str, x: str, head_dim: int | None = None) -> str:
        attributes: dict[str, AttributeValue] = {"eps": self.config.rms_norm_eps}
        if head_dim is not None:
            attributes["head_dim"] = head_dim
        columns = self._buffers[x].columns
        return self.op("rms_norm", name, {"x": x}, columns, {"weight": f"{name}.weight"}, **attributes)

    def _linear(self, name: str, x: str, columns: int) -> str:
        weights = {"weight": f"{name}.weight"}
        if f"{name}.bias" in self._state:
            weights["bias"] = f"{name}.bias"
        return self.op("linear", name, {"x": x}, columns, weights)

    def _layer(self, name: str, layer: int, x: str, rotation: str) -> str:
        config, size = self.config, self.config.hidden_size
        attended = self._attention(f"{name}.self_attn", layer, self._norm(f"{name}.input_layernorm", x), rotation)
        if config.sandwich_norms:
            attended = self._norm(f"{name}.post_attention_layernorm", attended)
        x = self.op("add", f"{name}.add_attention", {"a": x, "b": attended}, size)
        before = "pre_feedforward_layernorm" if config.sandwich_norms else "post_attention_layernorm"
        y = self._norm(f"{name}.{before}", x)
        gate = self._linear(f"{name}.mlp.gate_proj", y, config.intermediate_size)
        up = self._linear(f"{name}.mlp.up_proj", y, config.intermediate_size)
        gate = self.op("activation", f"{name}.mlp.act", {"x": gate}, config.intermediate_size,
                       activation=config.hidden_act)  # fmt: skip
        y = self.op("multiply", f"{name}.mlp.multiply", {"a": gate, "b": up}, config.intermediate_size)
        y = self._linear(f"{name}.mlp.down_proj", y, size)
        if config.sandwich_norms:
            y = self._norm(f"{name}.post_feedforward_layernorm", y)
        return self.op("add", f"{name}.add_mlp", {"a": x, "b": y}, size)

    def _attention(self, name: str, layer: int, x: str, rotation: str) -> str:
        config, head_dim = self.config, self.config.head_dim
        sizes = {"q": config.num_attention_heads * head_dim, "k": config.num_key_value_heads * head_dim}
        sizes["v"] = sizes["k"]
        heads = {part: self._linear(f"{name}.{part}_proj", x, columns) for part, columns in sizes.items()}
        for part in ("q", "k"):
            if config.attention.qk_norm:
                heads[part] = self._norm(f"{name}.{part}_norm", heads[part], head_dim)
            heads[part] = self.op("rope", f"{name}.{part}_rope", {"x": heads[part], "rotation": rotation}, sizes[part],
                                  head_dim=head_dim)  # fmt: skip
        self.op("write_cache", f"{name}.write", {"key": heads["k"], "value": heads["v"]}, 0, layer=layer)
        attended = self.op(
            "attention",
            f"{name}.attention",
            {"query": heads["q"]},
            sizes["q"],
            layer=layer,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            scale=config.attention.scale,
            sliding_window=config.window_of(layer),
            soft_cap=config.attention.soft_cap,
        )
        return self._linear(f"{name}.o_proj", attended, config.hidden_size)


def tiny_program(config: ModelConfig, state: Mapping[str, torch.Tensor]) -> tuple[Program, dict[str, torch.Tensor]]:
    """(program, its weights by name) of a model with the checkpoint tensors `state`."""
    writer = ProgramWriter(config, state)
    return writer.write(), writer.weights


def tiny_package(
    hf_config: Mapping[str, Any], state: Mapping[str, torch.Tensor], *, tokenizer: Path | None = None, **limits: int
) -> EnginePackage:
    """A float32 engine of a model, made without the builder."""
    program, weights = tiny_program(ModelConfig.from_hf(hf_config), state)
    sizes = {"max_batch_size": 8, "max_num_tokens": 256, "max_input_len": 255, "max_seq_len": 256, **limits}
    files: dict[str, bytes | Path] = {}
    if tokenizer is not None:
        files = {f"tokenizer/{name}": tokenizer / name for name in ("tokenizer.json", "tokenizer_config.json")}
    config = EngineConfig(
        tokenmill_version=__version__,
        model=ModelRecord(name="tiny", hf_config=dict(hf_config), checkpoint_format="safetensors", quantization="none"),
        target=TargetRecord(device="cpu", architecture="any", instruction_set="any"),
        limits=LimitsRecord(**sizes, max_beam_width=1),
        dtype="float32",
        kv_cache_dtype="float32",
        quantization="none",
        tokenizer="tokenizer" if tokenizer is not None else None,
    )
    encoded = {name: tensor.contiguous().numpy().view(np.uint8).reshape(-1) for name, tensor in weights.items()}
    return EnginePackage(config=config, program=program, weights=encoded, files=files)
