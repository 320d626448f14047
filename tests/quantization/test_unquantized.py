from __future__ import annotations

import torch
from torch import nn

from tokenmill.ops.linear import choose
from tokenmill.quantization.unquantized import UnquantizedLinear, unquantized

CPU = torch.device("cpu")


def test_same_product_before_and_after_packing() -> None:
    layer, method = nn.Module(), unquantized("layer")
    axes = method.create_weights(layer, 6, 10, torch.float32, CPU)
    assert layer.get_parameter("weight").shape == (10, 6)
    assert axes["weight"] == (0, 1)
    layer.get_parameter("weight").data.normal_()
    x, bias = torch.randn(3, 6), torch.randn(10)
    before = method.apply(x, bias)
    torch.testing.assert_close(before, x @ layer.get_parameter("weight").T + bias)
    for _ in range(2):  # the second call changes nothing
        method.process_after_loading(layer)
        torch.testing.assert_close(method.apply(x, bias), before)


def test_packing_frees_the_plain_weight() -> None:
    layer, method = nn.Module(), UnquantizedLinear()
    method.create_weights(layer, 6, 10, torch.float32, CPU)
    layer.get_parameter("weight").data.zero_()
    method.process_after_loading(layer)
    expected = 0 if choose(CPU, torch.float32) == "onednn" else 1
    assert len(list(layer.parameters())) == expected


def test_a_shared_weight_stays_with_its_owner() -> None:
    owner, layer, method = nn.Linear(6, 10, bias=False), nn.Module(), UnquantizedLinear()
    method.share_weight(owner.weight.data)
    method.process_after_loading(layer)
    x = torch.randn(2, 6)
    torch.testing.assert_close(method.apply(x, None), x @ owner.weight.data.T)
    assert owner.weight.shape == (10, 6)
