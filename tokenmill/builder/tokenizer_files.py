"""The tokenizer of a checkpoint as files of an engine, so that the engine needs the checkpoint no more."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tokenmill.checkpoints.base import Checkpoint
from tokenmill.checkpoints.gguf_checkpoint import GgufCheckpoint
from tokenmill.program.package import TOKENIZER_FOLDER, FileContent

_NAMES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""What tokenizers are loaded from; `config.json` and `generation_config.json` name end tokens."""

_VOCABULARIES: Final = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_GGUF_NAME: Final = f"{TOKENIZER_FOLDER}/tokenizer.gguf"


def tokenizer_files(checkpoint: Checkpoint) -> tuple[str | None, dict[str, FileContent]]:
    """(where the tokenizer is loaded from, its files), by paths in the engine; (None, none) if there is no tokenizer.

    Of a GGUF file the header is kept: all metadata, no tensors.
    """
    if isinstance(checkpoint, GgufCheckpoint):
        if "tokenizer.ggml.tokens" not in checkpoint.file.metadata:
            return None, {}
        return _GGUF_NAME, {_GGUF_NAME: checkpoint.file.without_tensors()}
    folder = Path(checkpoint.path)
    if not any((folder / name).is_file() for name in _VOCABULARIES):
        return None, {}
    files: dict[str, FileContent] = {
        f"{TOKENIZER_FOLDER}/{name}": folder / name for name in _NAMES if (folder / name).is_file()
    }
    templates = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    files |= {f"{TOKENIZER_FOLDER}/additional_chat_templates/{path.name}": path for path in templates}
    return TOKENIZER_FOLDER, files
