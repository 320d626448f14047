"""What a checkpoint is to the rest of tokenmill: a configuration and a stream of named tensors.

`open_checkpoint` picks the reader by what lies at the path. The model registry reads `hf_config`, the loader in
`loading.py` reads `tensors()`. A further format is one more class with these members.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from tokenmill.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor of a checkpoint, not yet read.

    Args:
        name: its Hugging Face name, such as `model.layers.0.self_attn.q_proj.weight`.
        shape: its shape.
        dtype: the type that `load` gives.
        load: reads it, as a CPU tensor of `shape` and `dtype`. It may be a view of the file: do not write.
        block_type: name of the ggml block type that it is stored in, such as `Q4_1`; None: as plain numbers of `dtype`.
        load_blocks: with a block type, reads its rows as they are encoded [rows, bytes of a row], not to be written.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], torch.Tensor]
    block_type: str | None = None
    load_blocks: Callable[[], np.ndarray[Any, np.dtype[np.uint8]]] | None = None


class Checkpoint(Protocol):
    """A model on disk."""

    @property
    def path(self) -> Path:
        """The directory or file that was opened."""
        ...

    @property
    def format(self) -> Literal["safetensors", "gguf"]:
        """Kind of the files."""
        ...

    @property
    def hf_config(self) -> dict[str, Any]:
        """Configuration in the style of Hugging Face's `config.json`; always has `model_type`.

        `eos_token_id` (an int or a list) holds the ids of `generation_config.json` too.
        """
        ...

    @property
    def quantization(self) -> str:
        """How the weights are quantized, for people: `none`, `Q4_1`, `awq`."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors as they lie on disk."""
        ...

    def tensors(self) -> Iterator[LazyTensor]:
        """Every tensor once, under its Hugging Face name.

        Raises:
            CheckpointError: here or in `LazyTensor.load`, where a file turns out to be damaged or of unknown content.
        """
        ...


def open_checkpoint(path: str | Path, *, config_only: bool = False) -> Checkpoint:
    """Open the model at `path`: a directory in Hugging Face format, or a GGUF file.

    Only headers and configuration are read. With `config_only` a directory needs no weights; its checkpoint has none.

    Raises:
        CheckpointError: nothing there can be read as a model; the text says what is wrong and what to do.
    """
    path = Path(path)
    if path.is_dir():
        from tokenmill.checkpoints.safetensors_checkpoint import SafetensorsCheckpoint

        return SafetensorsCheckpoint(path, config_only=config_only)
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise CheckpointError(
            f"{path} is a weights file without its configuration.",
            field="model",
            remedy="Give the directory that holds config.json and the *.safetensors files.",
        )
    from tokenmill.checkpoints.gguf_checkpoint import GgufCheckpoint

    return GgufCheckpoint(path)
