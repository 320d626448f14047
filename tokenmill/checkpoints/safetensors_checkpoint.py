"""A directory in Hugging Face format as a `Checkpoint`: config.json and memory-mapped *.safetensors files.

Weights lie in one file, or in shards listed by `model.safetensors.index.json`. All headers are checked when the
checkpoint is opened; a tensor's bytes are touched only when it is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch

from tokenmill.checkpoints.base import LazyTensor
from tokenmill.errors import CheckpointError

_INDEX_NAME: Final = "model.safetensors.index.json"
_SINGLE_NAME: Final = "model.safetensors"
_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTIZED_DTYPES: Final = {"F8_E4M3": torch.float8_e4m3fn}
"""Of checkpoints whose configuration says how they are quantized."""
_OTHER_WEIGHTS: Final = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
_DOWNLOAD_AGAIN: Final = "The file is truncated or damaged: download it again."


class SafetensorsCheckpoint:
    """A model in Hugging Face format.

    Args:
        path: the directory.
        config_only: leave the weights files alone, which need not be there; the checkpoint then has no tensors.

    Raises:
        CheckpointError: config.json or a weights file is missing, damaged or contradicts another.
    """

    def __init__(self, path: Path, *, config_only: bool = False) -> None:
        self.path = path
        self.format: Literal["safetensors"] = "safetensors"
        self.hf_config: dict[str, Any] = _read_config(path)
        self.quantization = _quantization(self.hf_config)
        self._files: dict[str, Any] = {}
        self._file_of_tensor = {} if config_only else self._open_files()
        self.num_bytes = sum(_num_tensor_bytes(path / file_name) for file_name in self._files)

    def tensors(self) -> Iterator[LazyTensor]:
        """Every tensor, in the order of the index; types other than floating point are a `CheckpointError`."""
        dtypes = _DTYPES if self.quantization == "none" else {**_DTYPES, **_QUANTIZED_DTYPES}
        for name, file_name in self._file_of_tensor.items():
            header = self._files[file_name].get_slice(name)
            dtype_name = str(header.get_dtype())
            if dtype_name not in dtypes:
                raise CheckpointError(
                    f"{self.path / file_name}: tensor '{name}' has the unsupported type {dtype_name}.",
                    field="model",
                    remedy=f"Supported are {', '.join(dtypes)}: use a checkpoint that is not quantized.",
                )
            yield LazyTensor(name, tuple(header.get_shape()), dtypes[dtype_name], partial(self._load, name))

    def _open_files(self) -> dict[str, str]:
        """Open every weights file; gives the file of each tensor."""
        if (self.path / _INDEX_NAME).is_file():
            file_of_tensor = _read_index(self.path)
            for file_name in dict.fromkeys(file_of_tensor.values()):
                self._files[file_name] = _open_file(self.path / file_name)
            self._check_index(file_of_tensor)
            return file_of_tensor
        file_of_tensor = {}
        for file_name in _file_names_without_index(self.path):
            self._files[file_name] = _open_file(self.path / file_name)
            for name in self._files[file_name].keys():  # noqa: SIM118 - not a mapping
                if name in file_of_tensor:
                    raise CheckpointError(
                        f"{self.path}: tensor '{name}' is both in {file_of_tensor[name]} and in {file_name}.",
                        field="model",
                        remedy=f"Remove the files that do not belong to the model, or add {_INDEX_NAME}.",
                    )
                file_of_tensor[name] = file_name
        return file_of_tensor

    def _check_index(self, file_of_tensor: dict[str, str]) -> None:
        names_in_file = {file_name: set(file.keys()) for file_name, file in self._files.items()}
        for name, file_name in file_of_tensor.items():
            if name not in names_in_file[file_name]:
                raise CheckpointError(
                    f"{self.path / _INDEX_NAME} says that tensor '{name}' is in {file_name}, but it is not.",
                    field="model",
                    remedy="The files do not belong together: download the model again.",
                )

    def _load(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._files[self._file_of_tensor[name]].get_tensor(name)
        return tensor


def _num_tensor_bytes(path: Path) -> int:
    """Size of a safetensors file without its header: 8 bytes that give the length of the JSON text after them."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def _open_file(path: Path) -> Any:
    """An open safetensors file; its header is checked against the file's size."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing: {path.parent / _INDEX_NAME} names it.",
            field="model",
            remedy="The download is incomplete: fetch the missing file.",
        )
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.", field="model", remedy=_DOWNLOAD_AGAIN) from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}.", field="model", remedy="Check the file and its permissions."
        ) from error


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {path}: {error.strerror or error}.", field="model", remedy="Check the file's permissions."
        ) from error
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are both ValueErrors
        raise CheckpointError(f"{path} is not JSON: {error}.", field="model", remedy=_DOWNLOAD_AGAIN) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no JSON object.", field="model", remedy=_DOWNLOAD_AGAIN)
    return content


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"{directory} has no config.json.",
            field="model",
            remedy="Give a directory in Hugging Face format, or a .gguf file.",
        )
    config = _read_json_object(path)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or not model_type:
        raise CheckpointError(
            f"{path} does not say which model it is: 'model_type' is {model_type!r}.",
            field="model",
            remedy='Add the model\'s type, for example "model_type": "llama".',
        )
    generation_path = directory / "generation_config.json"
    if generation_path.is_file():
        ids = _token_ids(config, path) + _token_ids(_read_json_object(generation_path), generation_path)
        unique = list(dict.fromkeys(ids))
        if unique:
            config["eos_token_id"] = unique[0] if len(unique) == 1 else unique
    else:
        _token_ids(config, path)
    modelopt_path = directory / "hf_quant_config.json"
    if "quantization_config" not in config and modelopt_path.is_file():  # ModelOpt's older releases write it apart
        entries = _read_json_object(modelopt_path).get("quantization")
        config["quantization_config"] = {"quant_method": "modelopt", **(entries if isinstance(entries, dict) else {})}
    return config


def _token_ids(config: dict[str, Any], path: Path) -> list[int]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(token_id, bool) or not isinstance(token_id, int) for token_id in ids):
        raise CheckpointError(
            f"{path}: 'eos_token_id' is {value!r}.",
            field="model",
            remedy="It must be a token id or a list of token ids.",
        )
    return ids


def _quantization(config: dict[str, Any]) -> str:
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return "none"
    return str(quantization.get("quant_method") or quantization.get("quant_algo") or "unknown")


def _read_index(directory: Path) -> dict[str, str]:
    """The index's table from tensor to file, checked to stay within the directory."""
    path = directory / _INDEX_NAME
    weight_map = _read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no 'weight_map'.", field="model", remedy=_DOWNLOAD_AGAIN)
    for name, file_name in weight_map.items():
        if not isinstance(file_name, str) or Path(file_name).name != file_name:
            raise CheckpointError(
                f"{path} puts tensor '{name}' into {file_name!r}, which is no file name.",
                field="model",
                remedy=_DOWNLOAD_AGAIN,
            )
    return weight_map


def _file_names_without_index(directory: Path) -> list[str]:
    if (directory / _SINGLE_NAME).is_file():
        return [_SINGLE_NAME]
    names = sorted(path.name for path in directory.glob("*.safetensors"))
    if names:
        return names
    others = sorted(path.name for pattern in _OTHER_WEIGHTS for path in directory.glob(pattern))
    if others:
        raise CheckpointError(
            f"{directory} holds weights only as {others[0]}, a format that can run code when it is read.",
            field="model",
            remedy="Convert them to safetensors: load with transformers, then `model.save_pretrained(directory)`.",
        )
    raise CheckpointError(
        f"{directory} holds no *.safetensors files.", field="model", remedy="The download is incomplete: fetch them."
    )
