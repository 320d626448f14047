"""A GGUF file as a `Checkpoint`: tensors under Hugging Face names, with the converter's changes undone.

Two things differ from the original weights beside the block types. Files of the llama architecture hold the rows of
query and key projections reordered, because llama.cpp rotates neighbouring pairs of values (2i, 2i+1) where Hugging
Face rotates halves (i, i + head_dim/2). Gemma's norm weights have 1 added. Both are undone when a tensor is loaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch

from tokenmill.checkpoints.base import LazyTensor
from tokenmill.checkpoints.gguf_config import hf_config_from_gguf
from tokenmill.checkpoints.gguf_dequantize import can_dequantize
from tokenmill.checkpoints.gguf_reader import GgufFile
from tokenmill.errors import CheckpointError

_GLOBAL_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",  # a stack of all experts, as are the next two
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
# Gemma has a norm on both sides of each half of a layer, so `ffn_norm` means another one than elsewhere.
_GEMMA_LAYER_NAMES: Final = {
    **_LAYER_NAMES,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Read as configuration (rope_freqs), or recomputed by every reader.
_NOT_WEIGHTS: Final = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd")
_LAYER: Final = re.compile(r"blk\.(\d+)\.(.+)")
_UNQUANTIZED: Final = ("F32", "F16", "BF16", "F64")


class GgufCheckpoint:
    """A model in one GGUF file.

    Raises:
        CheckpointError: the file is damaged, of an unknown architecture, split into parts, or uses a block type that
            cannot be dequantized.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.format: Literal["gguf"] = "gguf"
        self.file = GgufFile(path)
        _refuse_split(self.file)
        self.hf_config: dict[str, Any] = hf_config_from_gguf(self.file)
        types = Counter[str]()
        for info in self.file.tensors.values():
            types[info.ggml_type] += info.nbytes
        _refuse_unreadable(path, types)
        self.num_bytes = sum(types.values())
        self.quantization = _quantization(self.file, types)

    def tensors(self) -> Iterator[LazyTensor]:
        """Every weight, as float32, under its Hugging Face name, in file order."""
        for name, info in self.file.tensors.items():
            if _NOT_WEIGHTS.fullmatch(name):
                continue
            hf_name, load = self._hf_name(name), partial(self._load, name)
            if info.ggml_type in _UNQUANTIZED:
                yield LazyTensor(hf_name, info.shape, torch.float32, load)
            else:
                blocks = partial(self._load_blocks, name)
                yield LazyTensor(hf_name, info.shape, torch.float32, load, info.ggml_type, blocks)

    def _hf_name(self, name: str) -> str:
        """The Hugging Face name; an unknown name stays as it is, and the loader reports it as unexpected."""
        stem, _, kind = name.rpartition(".")
        if stem in _GLOBAL_NAMES:
            return f"{_GLOBAL_NAMES[stem]}.{kind}"
        layer_names = _GEMMA_LAYER_NAMES if self.hf_config["model_type"] == "gemma3_text" else _LAYER_NAMES
        layer = _LAYER.fullmatch(stem)
        if layer and layer[2] in layer_names:
            return f"model.layers.{layer[1]}.{layer_names[layer[2]]}.{kind}"
        return name

    def _load(self, name: str) -> torch.Tensor:
        tensor = self.file.read(name)
        row_order = self._row_order(name)
        if row_order is not None:
            return tensor[torch.from_numpy(row_order)]
        if self.hf_config["model_type"] == "gemma3_text" and name.endswith("norm.weight"):
            return tensor.sub_(1.0)
        return tensor

    def _load_blocks(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Encoded rows; blocks lie along rows, so that rows can change places as they are."""
        rows = self.file.raw(name).reshape(self.file.tensors[name].shape[0], -1)
        row_order = self._row_order(name)
        return rows if row_order is None else rows[row_order]

    def _row_order(self, name: str) -> np.ndarray[Any, np.dtype[np.int64]] | None:
        """For each row of the Hugging Face tensor, where it is in the file: from the order of rotated pairs to that of
        rotated halves. None: they are in order."""
        if self.hf_config["model_type"] not in ("llama", "mixtral") or not re.search(
            r"\.attn_[qk]\.(weight|bias)$", name
        ):
            return None
        num_rows = self.file.tensors[name].shape[0]
        num_heads = self.hf_config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
        if num_rows % (2 * num_heads):
            raise CheckpointError(
                f"{self.path}: tensor '{name}' has {num_rows} rows, which {num_heads} heads cannot share.",
                field="model",
                remedy="The file contradicts itself: download it again or convert the model again.",
            )
        pairs = np.arange(num_rows).reshape(num_heads, num_rows // num_heads // 2, 2)
        return pairs.transpose(0, 2, 1).reshape(num_rows)


def _quantization(file: GgufFile, types: Counter[str]) -> str:
    """The mixture's name (`Q4_K_M`) if the file says one, else the block types, the largest share first."""
    from gguf.constants import LlamaFileType

    block_types = [kind for kind, _ in types.most_common() if kind not in _UNQUANTIZED]
    if not block_types:
        return "none"
    named: dict[int, str] = {
        int(kind): kind.name.removeprefix("MOSTLY_") for kind in LlamaFileType if kind.name.startswith("MOSTLY_")
    }
    file_type = file.metadata.get("general.file_type")
    name = named.get(file_type) if isinstance(file_type, int) else None
    if name is not None and name.startswith(tuple(block_types)):  # else the name is not that of the weights
        return name
    return "+".join(block_types)


def _refuse_split(file: GgufFile) -> None:
    num_parts = file.metadata.get("split.count", 1)
    if isinstance(num_parts, int) and num_parts > 1:
        raise CheckpointError(
            f"{file.path} is one of {num_parts} parts of a split GGUF file, which is not supported.",
            field="model",
            remedy="Merge the parts with `llama-gguf-split --merge`.",
        )


def _refuse_unreadable(path: Path, types: Counter[str]) -> None:
    unreadable = sorted(kind for kind in types if not can_dequantize(kind))
    if unreadable:
        raise CheckpointError(
            f"{path} holds tensors of the type {', '.join(unreadable)}, which cannot be dequantized.",
            field="model",
            remedy="Use a file of another quantization, such as Q4_K_M or Q8_0.",
        )
