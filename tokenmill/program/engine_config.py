"""`EngineConfig`: what `config.json` of an engine says, and its JSON text.

It holds everything besides program and weights that running needs: the model's configuration, the limits that the
engine was built for, the machine that it is for, and a checksum of every other file. The text has a checksum of its
own. Called by `package.py`; described in `docs/engine-format.md`.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final

import msgspec

from tokenmill.errors import EngineFileError

FORMAT_NAME: Final = "tokenmill-engine"
FORMAT_VERSION: Final = 2
"""Goes up whenever an older reader would misread a newer engine."""

MIN_LOGIT_ROWS: Final = 16
"""Rows of logits that a step has room for, at the least: log-probabilities of prompts ask for many at a time."""

CONFIG_NAME: Final = "config.json"
_REBUILD: Final = "Build the engine again with `tokenmill build`."
_DAMAGED: Final = "The file is truncated or damaged: copy the engine again, or build it again with `tokenmill build`."


class ModelRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which model it is."""

    name: str
    """What the builder was given."""
    hf_config: dict[str, Any]
    """The model's configuration in the style of Hugging Face."""
    checkpoint_format: str
    """`safetensors` or `gguf`."""
    quantization: str
    """Of the checkpoint's weights, for people."""


class TargetRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The machine that the engine is for."""

    device: str
    """`cpu` or `cuda`."""
    architecture: str
    """Of the processor, such as `x86_64`; `any` if nothing in the engine depends on it."""
    instruction_set: str
    """What the packed weights are made for, such as `avx512_vnni`; `any` for the layout `rows`."""


class LimitsRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The largest sizes that the engine was built for."""

    max_batch_size: int
    max_num_tokens: int
    max_input_len: int
    max_seq_len: int
    max_beam_width: int

    @property
    def max_num_rows(self) -> int:
        """Rows of logits that memory is planned for."""
        return max(self.max_batch_size, MIN_LOGIT_ROWS)


class FileRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What another file of the engine must be."""

    num_bytes: int
    checksum: str
    """See `checksums.py`."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about an engine besides its program and weights."""

    format: str = FORMAT_NAME
    format_version: int = FORMAT_VERSION
    tokenmill_version: str
    """That built it."""
    model: ModelRecord
    target: TargetRecord
    limits: LimitsRecord
    dtype: str
    """Type of weights that are not quantized: `float32` or `bfloat16`."""
    kv_cache_dtype: str
    """Type of cached keys and values."""
    quantization: str
    """How the linear weights are stored, as the builder resolved it."""
    tokenizer: str | None = None
    """Where the tokenizer's files are, from the engine's directory; None: the model has none."""
    stripped: bool = False
    """Whether the weights that come from a checkpoint were left out."""
    debug_outputs: dict[str, str] = {}
    """Buffers whose values are kept after a step, by the name of the operation that writes them."""
    build_config: dict[str, Any] = {}
    """The arguments of the build."""
    report: dict[str, Any] = {}
    """What the build did, for people: operations before and after the passes, times, notices."""
    files: dict[str, FileRecord] = {}
    """Every other file, by its path in the engine."""


def encode_config(config: EngineConfig) -> bytes:
    """JSON text with a checksum of its own."""
    plain = msgspec.to_builtins(config)
    plain["checksum"] = _own_checksum(plain)
    return (json.dumps(plain, indent=2, allow_nan=False) + "\n").encode()


def decode_config(text: bytes, source: str) -> EngineConfig:
    """The configuration that `encode_config` wrote.

    Args:
        text: the JSON text.
        source: name of the file, for errors.

    Raises:
        EngineFileError: it is no engine's, of another version of the format, or damaged.
    """
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are both ValueErrors
        raise EngineFileError(f"{source} is not JSON: {error}.", field="engine", remedy=_DAMAGED) from None
    if not isinstance(plain, dict) or plain.get("format") != FORMAT_NAME:
        raise EngineFileError(
            f"{source} is not the configuration of an engine.",
            field="engine",
            remedy="Give a directory that `tokenmill build` wrote.",
        )
    _check_version(plain, source)
    checksum = plain.pop("checksum", None)
    if checksum != _own_checksum(plain):
        raise EngineFileError(f"{source} was changed: its checksum differs.", field="engine", remedy=_DAMAGED)
    try:
        return msgspec.convert(plain, EngineConfig)
    except msgspec.ValidationError as error:
        raise EngineFileError(f"{source} cannot be read: {error}.", field="engine", remedy=_REBUILD) from None


def read_config(path: Path) -> EngineConfig:
    """The configuration of the engine in the directory `path`.

    Raises:
        EngineFileError: as `decode_config`, or it cannot be read.
    """
    file = path / CONFIG_NAME
    try:
        text = file.read_bytes()
    except OSError as error:
        raise EngineFileError(
            f"{file} cannot be read: {error.strerror or error}.", field="engine", remedy=_REBUILD
        ) from error
    return decode_config(text, str(file))


def is_engine(path: Path) -> bool:
    """Whether `path` is a directory that holds an engine, whole or not, of this or another version."""
    file = path / CONFIG_NAME
    if (path / "rank0").is_dir():
        return True
    try:
        return file.is_file() and f'"{FORMAT_NAME}"'.encode() in file.read_bytes()[:4096]
    except OSError:
        return False


def _check_version(plain: dict[str, Any], source: str) -> None:
    version, model = plain.get("format_version"), plain.get("model")
    if version != FORMAT_VERSION:
        name = model.get("name") if isinstance(model, dict) else None
        raise EngineFileError(
            f"{source} is of version {version} of the engine format (made by tokenmill "
            f"{plain.get('tokenmill_version')}); this tokenmill reads version {FORMAT_VERSION}.",
            field="engine",
            remedy=f"Build it again: tokenmill build {name} -o DIRECTORY." if isinstance(name, str) else _REBUILD,
        )


def _own_checksum(plain: dict[str, Any]) -> str:
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()
