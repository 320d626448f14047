"""Linear kernels of float32 and bfloat16 weights against float64 products."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch.nn import functional

from tests.support.int8_groups import dequantized
from tests.support.native_ops import matrix, nans, run_equally, run_ops
from tokenmill.errors import InvalidParameterError, UnsupportedFeatureError
from tokenmill.ops.cpu.layout import int8_group32_bytes
from tokenmill.ops.cpu.linear_float import SCRATCH_BYTES, LinearFloatOp, linear_float, pack_float_weight


def bits(weight: torch.Tensor) -> npt.NDArray[Any]:
    """What is packed."""
    return weight.numpy() if weight.dtype == torch.float32 else weight.view(torch.uint16).numpy()


def run(weight: torch.Tensor, x: torch.Tensor, output: torch.Tensor, num_threads: int = 1, **options: Any) -> None:
    """y = x weight^T and so on, to `output`."""
    gated = options.get("activation") is not None
    packed = pack_float_weight([bits(part) for part in (weight.chunk(2) if gated else [weight])], gated=gated)
    scratch = torch.empty(num_threads * SCRATCH_BYTES, dtype=torch.uint8)
    op = LinearFloatOp(
        x=matrix(x),
        weight=packed.ctypes.data,
        is_bfloat16=weight.dtype == torch.bfloat16,
        num_rows=weight.shape[0],
        num_columns=weight.shape[1],
        output=(output.data_ptr(), 0) if options.get("quantized") else matrix(output),
        scratch=scratch.data_ptr(),
        **options,
    )
    run_ops([(linear_float, op.arguments())], x.shape[0], num_threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "rows", "columns"), [(1, 100, 64), (5, 31, 30), (16, 32, 8), (300, 70, 34)])
def test_products(dtype: torch.dtype, tokens: int, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(rows, columns).to(dtype), torch.randn(tokens, columns)

    def compute(num_threads: int) -> torch.Tensor:
        y = nans(tokens, rows)
        run(weight, x, y, num_threads)
        return y

    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(run_equally(compute), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_does_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(64, 96).to(dtype), torch.randn(15, 96)
    together, alone = nans(15, 64), nans(15, 64)
    run(weight, x, together)
    for token in range(15):
        run(weight, x[token : token + 1], alone[token : token + 1])
    assert torch.equal(together, alone)


def test_bias_and_residual_in_place() -> None:
    torch.manual_seed(0)
    weight, x, bias, residual = torch.randn(40, 24), torch.randn(9, 24), torch.randn(40), torch.randn(9, 50)
    expected = residual.clone()
    expected[:, :40] += functional.linear(x, weight, bias)
    run(weight, x, residual[:, :40], bias=bias.data_ptr(), residual=matrix(residual))
    torch.testing.assert_close(residual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "columns"), [("silu", 64), ("gelu_pytorch_tanh", 45)])
@pytest.mark.parametrize("quantized", [False, True])
def test_gated_weights(dtype: torch.dtype, activation: str, columns: int, quantized: bool) -> None:
    torch.manual_seed(0)
    weight, x, bias = torch.randn(2 * columns, 32).to(dtype), torch.randn(6, 32), torch.randn(2 * columns)
    size = int8_group32_bytes(6, columns)

    def compute(num_threads: int) -> torch.Tensor:
        y = torch.zeros(size, dtype=torch.uint8) if quantized else nans(6, columns)
        run(weight, x, y, num_threads, bias=bias.data_ptr(), activation=activation, quantized=quantized)
        return y

    gate, up = functional.linear(x, weight.float(), bias).chunk(2, dim=-1)
    expected = up * (functional.silu(gate) if activation == "silu" else functional.gelu(gate, approximate="tanh"))
    output = run_equally(compute)
    if not quantized:
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
        return
    values, _ = dequantized(output, 6, columns)
    groups = functional.pad(expected, (0, -columns % 32)).view(6, -1, 32)
    assert torch.all((values - groups).abs() <= groups.abs().amax(-1, keepdim=True) / 127 * 0.51)


def test_weights_of_several_tensors_are_one_weight() -> None:
    query, key = np.float32(np.random.default_rng(0).random((20, 8))), np.float32(np.zeros((7, 8)))
    assert np.array_equal(pack_float_weight([query, key]), pack_float_weight([np.concatenate([query, key])]))


def test_bad_parts_are_refused() -> None:
    a, b = np.zeros((4, 8), np.float32), np.zeros((4, 6), np.float32)
    with pytest.raises(InvalidParameterError, match=r"\[6, 8\] columns"):
        pack_float_weight([a, b])
    with pytest.raises(InvalidParameterError, match="float64"):
        pack_float_weight([a.astype(np.float64)])
    with pytest.raises(InvalidParameterError, match="gate and up"):
        pack_float_weight([a], gated=True)
    with pytest.raises(UnsupportedFeatureError, match="even"):
        pack_float_weight([np.zeros((4, 7), np.uint16)])
    with pytest.raises(InvalidParameterError, match="residual"):
        run(torch.zeros(4, 8), torch.zeros(1, 8), torch.zeros(1, 2), activation="silu", residual=(0, 0))
