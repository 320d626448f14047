from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.support.fp8_checkpoints import FORMATS
from tokenmill.errors import UnsupportedFeatureError
from tokenmill.quantization.checkpoint_format import Fp8Format, read_format


def read(config: dict[str, Any], **shapes: tuple[int, ...]) -> Fp8Format | None:
    return read_format({"quantization_config": config}, {f"layer.{name}": shape for name, shape in shapes.items()})


def test_no_quantization() -> None:
    assert read_format({}, {}) is None


@pytest.mark.spec("E5")
def test_blocks() -> None:
    found = read(FORMATS["block"])
    assert found is not None
    assert (found.weight_scales, found.scale_name, found.static_inputs) == ("block", "weight_scale_inv", False)


@pytest.mark.parametrize(
    ("kind", "weight_scales", "static_inputs", "shape", "expected"),
    [
        ("matrix", "matrix", False, (1,), (1,)),
        ("tensor", "matrix", True, (), ()),
        ("modelopt", "matrix", True, (1,), (1,)),
        ("channel", "feature", False, (64, 1), (-1, 1)),
        ("channel", "feature", False, (64,), (-1,)),
    ],
)
def test_scales(
    kind: str, weight_scales: str, static_inputs: bool, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    found = read(FORMATS[kind], weight_scale=shape)
    assert found is not None
    assert (found.weight_scales, found.static_inputs, found.scale_shape) == (weight_scales, static_inputs, expected)
    assert found.scale_name == "weight_scale"


def test_layers_that_are_not_quantized() -> None:
    ignored = ("lm_head", "model.layers.1.self_attn", "re:.*mlp\\.gate$", "*layers.2.*")
    found = Fp8Format(weight_scales="block", ignored=ignored)
    covered = {
        "lm_head": False,
        "model.layers.0.self_attn.qkv_proj": True,
        "model.layers.1.self_attn.qkv_proj": False,
        "model.layers.11.self_attn.qkv_proj": True,
        "model.layers.0.mlp.gate": False,
        "model.layers.0.mlp.gate_up_proj": True,
        "model.layers.2.mlp.down_proj": False,
    }
    assert {name: found.covers(name) for name in covered} == covered


@pytest.mark.parametrize(
    ("kind", "path", "value", "what"),
    [
        ("block", ["weight_block_size"], [64, 64], "64"),
        ("block", ["activation_scheme"], "static", "static"),
        ("block", ["activation_scheme"], "sometimes", "sometimes"),
        ("block", ["fmt"], "e5m2", "e5m2"),
        ("matrix", ["quant_method"], "awq", "awq"),
        ("modelopt", ["quant_algo"], "NVFP4", "NVFP4"),
        ("channel", ["config_groups", "group_0", "weights", "num_bits"], 4, "4 bits"),
        ("channel", ["config_groups", "group_0", "weights", "strategy"], "group", "group"),
        ("channel", ["config_groups", "group_0", "input_activations"], None, "other inputs"),
        ("tensor", ["config_groups", "group_0", "input_activations", "strategy"], "channel", "channel"),
        ("channel", ["config_groups"], {}, "0 groups"),
    ],
)
def test_other_formats_are_refused_by_name(kind: str, path: list[str], value: Any, what: str) -> None:
    config = copy.deepcopy(FORMATS[kind])
    entries = config
    for key in path[:-1]:
        entries = entries[key]
    entries[path[-1]] = value
    with pytest.raises(UnsupportedFeatureError, match=what) as error:
        read(config)
    assert error.value.field == "model"
