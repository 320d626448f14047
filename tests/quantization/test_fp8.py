from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.triton_kernels import relative_error
from tokenmill.attention.reference import ReferenceAttention
from tokenmill.checkpoints.loading import fill_dummy
from tokenmill.errors import CheckpointError
from tokenmill.layers.context import LayerContext
from tokenmill.layers.embedding import LMHead
from tokenmill.layers.linear import MergedColumnLinear, RowParallelLinear
from tokenmill.layers.weights import finalize_weights, weight_targets
from tokenmill.ops.fp8 import per_token_quantize_fp8
from tokenmill.parallel.group import ParallelGroup
from tokenmill.quantization import fp8 as module
from tokenmill.quantization.base import RowForm
from tokenmill.quantization.fp8 import Fp8Linear
from tokenmill.quantization.select import linear_method_for

CPU = torch.device("cpu")
HALF_STEP = 2**-4  # relative: e4m3 has three bits of mantissa


def context(dtype: torch.dtype = torch.float32, rank: int = 0, size: int = 1) -> LayerContext:
    return LayerContext(
        dtype=dtype,
        device=CPU,
        backend=ReferenceAttention(),
        linear_method=linear_method_for("fp8", quantize_lm_head=True),
        group=ParallelGroup(rank=rank, size=size),
        prefix="block.gate_up_proj",
    )


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loaded_merged_layer() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A merged layer of 5 + 7 features, filled in an order that is not its own."""
    layer = nn.Module()
    layer.gate_up_proj = MergedColumnLinear(6, {"gate_proj": 5, "up_proj": 7}, bias=True, context=context())
    tensors = {
        "up_proj.weight": normal(7, 6, seed=1),
        "gate_proj.bias": normal(5, seed=2),
        "gate_proj.weight": normal(5, 6, seed=3) * 100,
        "up_proj.bias": normal(7, seed=4),
    }
    targets = weight_targets(layer)
    assert set(targets) == set(tensors)
    for name, tensor in tensors.items():
        targets[name].load(tensor)
    finalize_weights(layer)
    return layer, tensors


@pytest.mark.parametrize("num_rows", [0, 1, 2, 17])
def test_a_merged_layer_loaded_in_any_order(num_rows: int) -> None:
    layer, tensors = loaded_merged_layer()
    x = normal(num_rows, 6, seed=9)
    weight = torch.cat((tensors["gate_proj.weight"], tensors["up_proj.weight"]))
    bias = torch.cat((tensors["gate_proj.bias"], tensors["up_proj.bias"]))
    actual = layer.gate_up_proj(x)
    # Exact against the quantized factors; and the quantized factors are near the given ones.
    quantized = per_token_quantize_fp8(weight)
    exact_weight = quantized.values.double() * quantized.scales.double()[:, None]
    rows = x.double()
    if num_rows != 1:
        values, scales = per_token_quantize_fp8(x)
        rows = values.double() * scales.double()[:, None]
    assert relative_error(actual, rows @ exact_weight.T + bias.double()) < 1e-6
    assert relative_error(actual, x @ weight.T + bias) < 2 * HALF_STEP


def test_scales_belong_to_output_features() -> None:
    """A projection of large weights beside one of small ones costs the small ones nothing."""
    layer, tensors = loaded_merged_layer()
    method = layer.gate_up_proj.method
    assert isinstance(method, Fp8Linear)
    stored = method._filled.dequantized(torch.float32)
    up = tensors["up_proj.weight"]
    assert float(((stored[5:] - up).abs() / up.abs().amax(dim=1, keepdim=True)).max()) <= HALF_STEP


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = loaded_merged_layer()
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 13)  # two rows of six
    in_blocks, _ = loaded_merged_layer()
    x = normal(3, 6)
    assert torch.equal(in_blocks.gate_up_proj(x), layer.gate_up_proj(x))


def test_memory_holds_one_block_beside_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing as large as the layer is ever converted at once."""
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 64)
    seen = []

    def quantize(x: torch.Tensor) -> object:
        seen.append(x.numel())
        return per_token_quantize_fp8(x)

    monkeypatch.setattr(module, "per_token_quantize_fp8", quantize)
    layer, method = nn.Module(), Fp8Linear()
    axes = method.create_weights(layer, 16, 32, torch.bfloat16, CPU)
    assert axes["weight"] == (0, 1)
    method.store(layer, "weight", 0, normal(32, 16).bfloat16())
    assert seen == [64] * 8
    method.process_after_loading(layer)
    assert sum(tensor.nbytes for tensor in (*layer.parameters(), *layer.buffers())) == 32 * 16 + 32 * 4


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_quantizes_its_shard(rank: int) -> None:
    layer = RowParallelLinear(8, 3, bias=False, context=context(rank=rank, size=2))
    weight = normal(3, 8)
    (target,) = weight_targets(layer).values()
    assert target.shape == (3, 8)
    target.load(weight)
    layer.finalize_weights()
    mine = weight[:, rank * 4 : rank * 4 + 4]
    expected = per_token_quantize_fp8(mine)
    assert isinstance(layer.method, Fp8Linear)
    assert torch.equal(layer.method._filled.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(layer.method._filled.scales, expected.scales)


def test_a_tensor_of_another_shape_is_refused() -> None:
    layer = RowParallelLinear(8, 3, bias=False, context=context())
    (target,) = weight_targets(layer).values()
    with pytest.raises(CheckpointError, match="expected"):
        target.load(normal(8, 3))


def test_dummy_weights_are_of_a_trained_models_scale() -> None:
    layer = RowParallelLinear(64, 48, bias=False, context=context(torch.bfloat16))
    fill_dummy(weight_targets(layer), seed=0)
    layer.finalize_weights()
    assert isinstance(layer.method, Fp8Linear)
    weight = layer.method._filled.dequantized(torch.float32)
    assert float(weight.std()) == pytest.approx(0.02, rel=0.1)
    assert float(layer.method._filled.values.float().abs().max()) == 448.0


def test_a_quantized_head_with_padding() -> None:
    """Five tokens over two ranks: the second has two of them and a row of padding."""
    head = LMHead(5, 8, tied_to=None, context=context(rank=1, size=2))
    weight = normal(5, 8)
    (target,) = weight_targets(head).values()
    target.load(weight)
    head.finalize_weights()
    stored = head.method._filled.dequantized(torch.float32)  # type: ignore[attr-defined]
    assert relative_error(stored[:2], weight[3:]) < HALF_STEP
    assert not stored[2].any()


def test_rows_that_come_quantized() -> None:
    layer, _ = loaded_merged_layer()
    method = layer.gate_up_proj.method
    x = normal(4, 6)
    assert method.row_form(x[:1]) is RowForm.PLAIN
    assert method.row_form(x[:2]) is method.row_form(x[:0]) is RowForm.QUANTIZED
    expected = method.apply(x, layer.gate_up_proj.bias)
    assert torch.equal(method.apply_quantized(per_token_quantize_fp8(x), layer.gate_up_proj.bias, x.dtype), expected)


def test_a_product_that_is_added_to_a_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """By two operations here; plain rows and quantized ones."""
    monkeypatch.setattr("tokenmill.ops.fp8.add_scaled_product", lambda *_: False)
    layer, _ = loaded_merged_layer()
    method = layer.gate_up_proj.method
    assert not method.adds(300, torch.float32)  # on a CPU
    x = normal(4, 6)
    stream = normal(4, layer.gate_up_proj.out_features, seed=1)
    for rows in (x, per_token_quantize_fp8(x)):
        total = stream.clone()
        method.add_product(total, rows)
        assert torch.equal(total, stream + method.apply(x, None))


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [0, 1, 2, 17, 64, 200])
def test_on_a_gpu(num_rows: int) -> None:
    layer, method = nn.Module(), Fp8Linear()
    method.create_weights(layer, 4096, 6144, torch.bfloat16, torch.device("cuda"))
    weight = normal(6144, 4096).bfloat16()
    method.store(layer, "weight", 0, weight[:4096])
    method.store(layer, "weight", 4096, weight[4096:])
    method.process_after_loading(layer)
    x = normal(num_rows, 4096, seed=1).bfloat16()
    exact = x.double() @ weight.double().T
    assert relative_error(method.apply(x.cuda(), None).cpu(), exact) < HALF_STEP
