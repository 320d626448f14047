"""`Fp8Format`: how the float8 weights of a checkpoint are scaled, read from its configuration. Imports no torch.

Three families are understood: `quant_method: fp8` (DeepSeek, Qwen 3: blocks of 128 x 128, or one scale for a matrix),
compressed-tensors (one scale for a matrix or an output feature), and ModelOpt (one scale for a matrix and its input).
Called by the model loader.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final, Literal, NoReturn, TypeAlias

from tokenmill.errors import UnsupportedFeatureError

WeightScales: TypeAlias = Literal["matrix", "feature", "block"]
BLOCK_SHAPE: Final = (128, 128)

_MERGED: Final = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Our merged layers, by the projections that checkpoints know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Format:
    """How float8 weights are stored.

    Args:
        weight_scales: what has a scale of its own: a whole matrix, an output feature, or a block of 128 x 128.
        static_inputs: whether each matrix comes with a scale of its input; else inputs are scaled token by token.
        scale_name: of the weights' scales: `weight_scale`, or `weight_scale_inv` (a factor, for all its name).
        scale_shape: of the scale of a matrix, () or (1,); of those of features, (-1,) or (-1, 1).
        ignored: layers that are not quantized: names, ends of names, `re:` expressions or patterns with `*`.
    """

    weight_scales: WeightScales
    static_inputs: bool = False
    scale_name: str = "weight_scale"
    scale_shape: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()

    def covers(self, layer: str) -> bool:
        """Whether the layer, merged or not, is quantized."""
        parent, _, name = layer.rpartition(".")
        return not any(self._ignores(f"{parent}.{part}".lstrip(".")) for part in _MERGED.get(name, (name,)))

    def _ignores(self, layer: str) -> bool:
        return any(_matches(entry, layer) for entry in self.ignored)


def _matches(entry: str, layer: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], layer) is not None
    if "*" in entry:
        return fnmatchcase(layer, entry)
    return layer == entry or layer.startswith(f"{entry}.") or layer.endswith(f".{entry}")


def read_format(hf_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Fp8Format | None:
    """The format that `quantization_config` describes; None if the weights are not quantized.

    Args:
        hf_config: the checkpoint's configuration.
        shapes: of its tensors, by name; empty if they are not at hand.

    Raises:
        UnsupportedFeatureError: weights are quantized in another way; the text says how.
    """
    config = hf_config.get("quantization_config")
    if not isinstance(config, Mapping):
        return None
    method = config.get("quant_method") or ("modelopt" if config.get("quant_algo") else None)
    if method == "fp8":
        found = _read_fp8(config)
    elif method == "compressed-tensors":
        found = _read_compressed_tensors(config)
    elif method == "modelopt":
        found = _read_modelopt(config)
    else:
        _refuse(f"'{method}'")
    return _with_shape(found, shapes)


def _read_fp8(config: Mapping[str, Any]) -> Fp8Format:
    """DeepSeek's and Qwen's format, and its older form without blocks."""
    block = config.get("weight_block_size")
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        _refuse(f"float8 of the kind {config['fmt']!r}")
    if block is not None and tuple(block) != BLOCK_SHAPE:
        _refuse(f"float8 in blocks of {block}")
    is_static = _is_static(config.get("activation_scheme", "dynamic"))
    if block is not None and is_static:
        _refuse("float8 in blocks with static scales of the inputs")
    return Fp8Format(
        weight_scales="matrix" if block is None else "block",
        static_inputs=is_static,
        scale_name="weight_scale" if block is None else "weight_scale_inv",
        ignored=("lm_head", *_names(config.get("modules_to_not_convert") or config.get("ignored_layers"))),
    )


def _read_compressed_tensors(config: Mapping[str, Any]) -> Fp8Format:
    groups = list((config.get("config_groups") or {}).values())
    if len(groups) != 1:
        _refuse(f"compressed-tensors with {len(groups)} groups of layers")
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations")
    if weights.get("type") != "float" or weights.get("num_bits") != 8:
        _refuse(f"compressed-tensors with weights of {weights.get('num_bits')} bits, type {weights.get('type')!r}")
    if not inputs or inputs.get("type") != "float" or inputs.get("num_bits") != 8:
        _refuse("compressed-tensors with float8 weights and other inputs")
    kinds: Mapping[Any, WeightScales] = {"tensor": "matrix", "channel": "feature", "block": "block"}
    kind = kinds.get(weights.get("strategy"))
    if kind is None or (kind == "block" and tuple(weights.get("block_structure") or ()) != BLOCK_SHAPE):
        _refuse(f"compressed-tensors with scales by {weights.get('strategy')!r}")
    is_static = not inputs.get("dynamic")
    if is_static and (inputs.get("strategy") != "tensor" or kind == "block"):
        _refuse(f"compressed-tensors with static scales of inputs by {inputs.get('strategy')!r}")
    return Fp8Format(weight_scales=kind, static_inputs=is_static, ignored=_names(config.get("ignore")))


def _read_modelopt(config: Mapping[str, Any]) -> Fp8Format:
    if config.get("quant_algo") != "FP8":
        _refuse(f"ModelOpt's {config.get('quant_algo')}")
    excluded = config.get("exclude_modules") or config.get("ignore")
    return Fp8Format(weight_scales="matrix", static_inputs=True, ignored=("lm_head", *_names(excluded)))


def _is_static(scheme: object) -> bool:
    if scheme not in ("static", "dynamic"):
        _refuse(f"float8 with the activation scheme {scheme!r}")
    return scheme == "static"


def _names(entries: object) -> tuple[str, ...]:
    return tuple(str(entry) for entry in entries) if isinstance(entries, Sequence) else ()


def _with_shape(found: Fp8Format, shapes: Mapping[str, tuple[int, ...]]) -> Fp8Format:
    """With the shape of scales as the first of them has it: writers differ."""
    if found.weight_scales == "block":
        return found
    shape = next((shape for name, shape in shapes.items() if name.endswith(f".{found.scale_name}")), None)
    is_flat = shape is None or len(shape) < (1 if found.weight_scales == "matrix" else 2)
    scale_shape = (() if is_flat else (1,)) if found.weight_scales == "matrix" else ((-1,) if is_flat else (-1, 1))
    return Fp8Format(
        weight_scales=found.weight_scales,
        static_inputs=found.static_inputs,
        scale_name=found.scale_name,
        scale_shape=scale_shape,
        ignored=found.ignored,
    )


def _refuse(what: str) -> NoReturn:
    raise UnsupportedFeatureError(
        f"Checkpoints quantized as {what} are not supported.",
        field="model",
        remedy="Supported: float8 (e4m3) with a scale for each matrix, output feature or block of 128 x 128.",
    )
